from libc.stdint cimport uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.frames cimport Frames
from evtchnd._core.words cimport Mem, and16, cas32, get32, get64, ld32, put32, put64


cdef class Pins:
    cdef readonly Frames memory
    cdef readonly int domid
    cdef readonly int backend_domid
    cdef readonly Py_ssize_t max_frames
    cdef readonly uint64_t pinned
    cdef list frames
    cdef Mem act
    cdef Py_ssize_t row

    @cython.locals(frame=Mem, at=Py_ssize_t, readers=uint32_t, writers=uint32_t, gfn=uint32_t, row=Py_ssize_t, address=uint64_t, memory=Frames, first=uint64_t)
    cdef uint64_t pin_page(self, uint32_t gref, bint write) except 0
    @cython.locals(frame=Mem, at=Py_ssize_t, readers=uint32_t, writers=uint32_t, clear=uint16_t)
    cdef int unpin_page(self, uint32_t gref, bint write) except -1
    @cython.final
    @cython.locals(tries=int, word=uint32_t, new=uint32_t, was=uint32_t)
    cdef int mark(self, Mem frame, uint32_t gref, bint write, bint checked) except -1
    @cython.final
    @cython.locals(base=Py_ssize_t, rows=Mem)
    cdef int hold(self, Py_ssize_t row) except -1
    @cython.final
    @cython.locals(base=Py_ssize_t, rows=Mem, left=uint64_t)
    cdef int unhold(self, Py_ssize_t row) except -1
