from libc.stdint cimport uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, get64, put64


cdef class Frames:
    cdef Mem rows
    cdef list order
    cdef list free
    cdef Py_ssize_t last
    cdef readonly Py_ssize_t max_slots
    cdef readonly uint64_t held

    @cython.locals(low=Py_ssize_t, high=Py_ssize_t, middle=Py_ssize_t, row=Py_ssize_t, base=Py_ssize_t, first=uint64_t)
    cdef Py_ssize_t find(self, uint64_t gfn) except -2
    cdef uint64_t address_in(self, Py_ssize_t row, uint64_t gfn) noexcept
    @cython.locals(base=Py_ssize_t)
    cdef int hold(self, Py_ssize_t row) except -1
    @cython.locals(base=Py_ssize_t, left=uint64_t)
    cdef int unhold(self, Py_ssize_t row) except -1
