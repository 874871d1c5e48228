from libc.stdint cimport int32_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.words cimport Mem, get32, get64, ld32, put32, put64, st32, sys_preadv, sys_pwritev


cdef extern from "uring.h" nogil:
    long long enter "ev_enter" (int fd, unsigned submit)


@cython.final
cdef class Uring:
    cdef readonly int fd, eventfd
    cdef readonly uint32_t entries, inflight
    cdef readonly uint32_t queued
    cdef public bint aside
    cdef uint32_t tail, head, sq_mask, cq_mask
    cdef Py_ssize_t sq_tail_at, cq_head_at, cq_tail_at, cqes_at
    cdef Mem rings, sqes
    cdef list maps
    @cython.locals(at=Py_ssize_t)
    cdef bint push(self, int op, int fd, uint64_t off, uint64_t addr, uint32_t length, uint32_t flags, uint64_t tag) except -1
    cpdef bint readv(self, int fd, uint64_t iov_addr, uint32_t iov_count, uint64_t offset, uint64_t tag) except -1
    cpdef bint writev(self, int fd, uint64_t iov_addr, uint32_t iov_count, uint64_t offset, uint64_t tag) except -1
    @cython.locals(taken="long long", total=long)
    cpdef long submit(self) except -1
    cpdef bint pending(self) except -1
    @cython.locals(head=uint32_t, tail=uint32_t, at=Py_ssize_t)
    cpdef list reap(self)


@cython.locals(done="long long")
cpdef long long transfer(int fd, bint write, uint64_t iov_addr, int iov_count, long long offset, int flags=*) except? -1
