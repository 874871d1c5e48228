from libc.stdint cimport uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, copy, get8, put8, u32


@cython.final
cdef class Toeplitz:
    cdef public int kinds
    cdef readonly uint32_t value
    cdef Mem key, tuple

    @cython.locals(i=int)
    cpdef void set_key(self, key) except *
    @cython.locals(kinds=int, ethertype=int, tcp=bint, n=int, ports=Py_ssize_t, kind=int)
    cdef int hash(self, char *p, Py_ssize_t frame, int length) except -2
    @cython.locals(value=uint32_t, window=uint64_t, low=uint64_t, i=int, byte=uint32_t, bit=int)
    cdef int slide(self, int n) except -1
