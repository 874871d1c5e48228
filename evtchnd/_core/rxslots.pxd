from libc.stdint cimport uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.answered cimport Answered
from evtchnd._core.pins cimport Pins
from evtchnd._core.words cimport (
    Area, Mem, copy, get16, get32, get64, put8, put16, put32, put64, u32,
)


@cython.final
cdef class RxSlots:
    cdef readonly bint closed
    cdef readonly uint32_t req_cons, rsp_prod
    cdef readonly long long used, bad_grants
    cdef readonly object reason

    cdef Pins grants
    cdef Answered ring
    cdef Area area
    cdef Mem answers, pages, entry
    cdef int bad_ahead

    cdef uint64_t address(self, uint32_t index) noexcept
    @cython.locals(waiting=uint32_t, at=Py_ssize_t, usable=int)
    cdef int fill(self) except -1
    @cython.locals(p=cython.p_char, at=Py_ssize_t)
    cdef int extra(self, int kind, int flags, int value, uint32_t type) except -1
    @cython.locals(p=cython.p_char, at=Py_ssize_t)
    cdef int answer(self, int flags, int offset, int status) except -1
    @cython.locals(at=Py_ssize_t)
    cdef int give(self) except -1
    cpdef bint push(self) except -1
    cpdef bint arm(self) except -1
    cpdef bint pending(self) except -1
