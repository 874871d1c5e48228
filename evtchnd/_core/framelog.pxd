from libc.stdint cimport uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, copy, put16, put32, put64, u32


@cython.final
cdef class FrameLog:
    cdef readonly Py_ssize_t snap
    cdef readonly long long most, frames, dropped
    cdef readonly bint full
    cdef readonly Py_ssize_t waiting

    cdef object memory
    cdef Py_ssize_t at, size, length, rest
    cdef long long gap
    cdef uint32_t mark, queue
    cdef Mem buffer, small

    @cython.locals(captured=Py_ssize_t, now=uint64_t)
    cdef int begin(self, uint32_t mark, uint32_t queue, Py_ssize_t length) except -1
    cdef int word(self, uint32_t value) except -1
    @cython.locals(part=Py_ssize_t)
    cdef int private(self, const char *p, Py_ssize_t at, Py_ssize_t n) except -1
    cdef int guest(self, uint64_t address, Py_ssize_t n) except -1
    @cython.locals(fill=Py_ssize_t)
    cdef int end(self) except -1
    @cython.locals(copied=Mem)
    cpdef void put(self, bytes block) except *
    cpdef list views(self)
    cpdef void taken(self, Py_ssize_t n) except *
