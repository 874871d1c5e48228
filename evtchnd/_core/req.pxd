from libc.stdint cimport uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, get64, put64, sys_preadv, sys_pwritev


@cython.final
@cython.freelist(64)
cdef class Req:
    cdef readonly int op
    cdef readonly uint64_t id
    cdef readonly uint64_t sector
    cdef readonly uint64_t want
    cdef readonly int segments
    cdef readonly int status
    cdef readonly object reason
    cdef readonly uint64_t nr_sectors
    cdef readonly int flag
    cdef readonly uint64_t iov_addr
    cdef readonly int iov_count
    cdef readonly object owner
    cdef object memory
    cdef Mem scratch
    cdef Py_ssize_t entry
    cdef Py_ssize_t grefs
    cdef uint64_t end
    cdef Py_ssize_t row
    cdef int held

    @cython.locals(n=Py_ssize_t)
    cpdef Py_ssize_t preadv(self, int fd, long long offset, int flags=*) except? -4095
    @cython.locals(n=Py_ssize_t)
    cpdef Py_ssize_t pwritev(self, int fd, long long offset, int flags=*) except? -4095
    @cython.locals(at=Py_ssize_t, length=uint64_t)
    cpdef object advance(self, uint64_t n)
    @cython.locals(at=Py_ssize_t, i=int, p=cython.p_char)
    cpdef list iov(self)
    cdef int alive(self) except -1
