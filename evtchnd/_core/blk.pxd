from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.pins cimport Pins
from evtchnd._core.req cimport Req
from evtchnd._core.words cimport (
    Area, Mem, copy, fence, get8, get16, get32, get64, ld32, put8, put16, put32, put64, st32, st64, sys_preadv, u32,
)

cdef extern from "points.h" nogil:
    enum:
        AT_START, AT_COPY, AT_COUNTER, AT_PIN, AT_INFLIGHT, AT_CONSUMED, AT_TAKEN, AT_UNPIN, AT_INDEX, AT_DONE
        AT_RESPONSE, AT_ANSWERED, AT_TARGET, AT_RSP_PROD, AT_FREE, AT_PUBLISHED, AT_ARM, AT_SETTLE
    void point "ev_point" (int label)
    void ev_watch (uint64_t address)


@cython.locals(address=uint64_t)
cpdef object watch(object mem)


@cython.final
cdef class BlkRing:
    cdef readonly int size
    cdef public uint64_t sectors
    cdef readonly long long requests
    cdef readonly long long responses
    cdef readonly long long bytes
    cdef readonly long long sectors_read
    cdef readonly long long sectors_written
    cdef readonly long long sectors_discarded
    cdef readonly long long flushes
    cdef readonly long long errors
    cdef readonly int inflight
    cdef readonly uint32_t req_cons
    cdef readonly uint32_t rsp_prod

    cdef Pins grants
    cdef object memory
    cdef Area area
    cdef object journal
    cdef Mem jmem
    cdef char *jp
    cdef int abi
    cdef Py_ssize_t entry_size
    cdef Py_ssize_t o_id, o_sector, o_segments, o_indirect
    cdef uint32_t mask
    cdef uint32_t published
    cdef uint64_t consumed
    cdef uint64_t sector_mask
    cdef bint readonly
    cdef bint nowait
    cdef bint started
    cdef bint closed
    cdef int most_segments
    cdef int max_indirect
    cdef Mem free
    cdef int free_count
    cdef Mem batch
    cdef int batch_count
    cdef list scratch
    cdef list held
    cdef Mem private
    cdef Mem response

    cdef int ready(self) except -1
    @cython.locals(prod=uint32_t, waiting=uint32_t)
    cdef Py_ssize_t available(self) except -1
    @cython.locals(entry=Py_ssize_t, base=Py_ssize_t)
    cdef int next_into(self, Req req) except -1
    @cython.locals(raw=Py_ssize_t, op=int)
    cdef int parse(self, Req req, Py_ssize_t entry) except -1
    @cython.locals(n=int, i=int, at=Py_ssize_t)
    cdef int direct(self, Req req, Py_ssize_t raw) except -1
    @cython.locals(n=int, i=int, page=int, part=int, gref=uint32_t, address=uint64_t, length=Py_ssize_t)
    cdef int indirect(self, Req req, Py_ssize_t raw) except -1
    @cython.locals(mem=Mem)
    cdef int room(self, Req req, int segments) except -1
    @cython.locals(address=uint64_t, length=uint64_t, row=Py_ssize_t, at=Py_ssize_t)
    cdef int segment(self, Req req, uint32_t gref, int first, int last) except -1
    cdef int in_range(self, Req req, uint64_t count) except -1
    @cython.locals(i=int, write=bint)
    cdef int unpin(self, Req req) except -1
    @cython.locals(base=Py_ssize_t)
    cdef int finish(self, Req req, int status) except -1
    cdef int drop(self, Req req) except -1
    cdef int respond(self, uint32_t index, uint64_t id, int op, int status) except -1

    @cython.locals(n=Py_ssize_t, req=Req, out=list)
    cpdef list take(self, Py_ssize_t most)
    @cython.locals(n=Py_ssize_t, req=Req, out=list, got=cython.longlong, end=cython.longlong)
    cpdef list run(self, int fd, Py_ssize_t most, long long most_bytes=*)
    cpdef object done(self, Req req, int status)
    @cython.locals(new=uint32_t, old=uint32_t, event=uint32_t, i=int, entry=Py_ssize_t)
    cpdef bint push(self) except -1
    cpdef bint arm(self) except -1
    cpdef bint pending(self) except -1
