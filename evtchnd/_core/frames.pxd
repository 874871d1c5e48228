from libc.stdint cimport uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, get64, put64


cdef class Frames:
    cdef Mem rows
    cdef list order
    cdef list free
    # what was found last, in the open: pins look here before they call
    cdef Py_ssize_t last
    cdef uint64_t last_first, last_pages, last_address
    cdef readonly Py_ssize_t max_slots
    cdef readonly uint64_t held

    @cython.locals(low=Py_ssize_t, high=Py_ssize_t, middle=Py_ssize_t, row=Py_ssize_t, base=Py_ssize_t, first=uint64_t)
    cdef Py_ssize_t find(self, uint64_t gfn) except -2
    cdef int unheld(self, Py_ssize_t row) except -1
    cdef object forget(self)
