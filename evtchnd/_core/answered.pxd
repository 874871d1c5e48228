from libc.stdint cimport uint32_t
cimport cython
from evtchnd._core.pins cimport Pins
from evtchnd._core.words cimport Area, Mem, copy, fence, get32, ld32, st32, u32


@cython.final
cdef class Answered:
    cdef Area area
    cdef Mem answers, entry
    cdef readonly uint32_t published, seen
    cdef object name
    cdef Py_ssize_t size

    @cython.locals(target=uint32_t, waiting=uint32_t, i=uint32_t)
    cdef void take_over(self, Pins grants, Py_ssize_t gref_at, bint write) except *
    @cython.locals(start=Py_ssize_t, n=Py_ssize_t, part=Py_ssize_t)
    cdef int put(self, uint32_t old, uint32_t new) except -1
    @cython.locals(prod=uint32_t)
    cdef uint32_t posted(self, uint32_t taken, uint32_t answered) except? 0xFFFFFFFF
    @cython.locals(old=uint32_t, event=uint32_t)
    cdef bint publish(self, uint32_t new) except -1
