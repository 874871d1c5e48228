from libc.stdint cimport uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.framelog cimport FrameLog
from evtchnd._core.pins cimport Pins
from evtchnd._core.words cimport (
    Area, Mem, copy, fence, get8, get16, get32, get64, ld32, put8, put16, put32, put64, st32, sys_preadv, u32,
)


@cython.final
cdef class RxRing:
    cdef public int most_bytes
    cdef public bint gso, sg
    cdef public int headroom
    cdef public object groups
    cdef public object logs
    cdef public int queue
    cdef public int hashing
    cdef readonly uint32_t hash_value
    cdef readonly int hash_type
    cdef readonly int stopped
    cdef public int tap_error
    cdef readonly int held
    cdef readonly long long packets, bytes, slots
    cdef readonly long long too_long, unwanted, moved, bad_grants, waited, expired, completed
    cdef readonly object reason
    cdef readonly uint32_t req_cons, rsp_prod

    cdef Pins grants
    cdef object memory
    cdef bint closed
    cdef Area area
    cdef Mem answers, pages, entry, buffer, iov, key, tuple
    cdef uint32_t published, seen

    @cython.locals(target=uint32_t, waiting=uint32_t, i=uint32_t)
    cdef void inherit(self) except *
    @cython.locals(start=Py_ssize_t, n=Py_ssize_t, part=Py_ssize_t)
    cdef int put(self, uint32_t old, uint32_t new) except -1
    @cython.locals(prod=uint32_t, waiting=uint32_t)
    cdef uint32_t free(self) except? 0xFFFFFFFF
    @cython.locals(waiting=uint32_t, at=Py_ssize_t, usable=int)
    cdef int fill(self) except -1
    @cython.locals(each=int)
    cdef int needed(self, int length, int extras) except -1
    @cython.locals(done=Py_ssize_t, usable=int, spare=int, got=Py_ssize_t)
    cpdef Py_ssize_t run(self, int fd, Py_ssize_t most) except -1
    @cython.locals(usable=int)
    cpdef bint settle(self) except -1
    cpdef bint adopt(self, RxRing other) except -1
    @cython.locals(p=cython.p_char, kind=int, at=Py_ssize_t, n=int, tcp=int)
    cdef int hash(self) except -1
    @cython.locals(value=uint32_t, window=uint64_t, low=uint64_t, i=int, byte=uint32_t, bit=int)
    cdef int toeplitz(self, int n) except -1
    @cython.locals(got=Py_ssize_t)
    cdef Py_ssize_t read_aside(self, int fd) except? -4095
    @cython.locals(length=int, extras=int, each=int, parts=int, done=int, part=int, i=int, index=uint32_t)
    cdef int deliver(self, int usable) except -1
    @cython.locals(address=uint64_t)
    cdef int copy_out(self, Py_ssize_t at, uint32_t index, int n) except -1
    @cython.locals(each=int, parts=int, iov=cython.p_char, i=int, index=uint32_t, got=Py_ssize_t, length=int, address=uint64_t, extras=int)
    cdef Py_ssize_t read(self, int fd, int spare) except? -4095
    @cython.locals(done=int, part=int, i=int, source=uint64_t)
    cdef int move_up(self, int length, int parts, int spare, int extras, int each) except -1
    @cython.locals(n=int)
    cdef int extras_of(self) except -1
    cdef bint usual(self) except -1
    @cython.locals(kind=int)
    cdef int gso_of(self) except -1
    cdef int wanted(self, uint64_t start) except -1
    @cython.locals(flags=int, each=int, left=int, part=int, i=int, kind=int)
    cdef int finish(self, int length, int parts, int extras) except -1
    @cython.locals(mark=int, each=int, left=int, part=int, i=int, index=uint32_t, log=FrameLog)
    cdef int log(self, int flags, int length, int extras) except -1
    @cython.locals(p=cython.p_char, start=int, kind=int, proto=int, at=int)
    cdef int plain(self) except -1
    @cython.locals(address=uint64_t)
    cdef int peek(self, int at, int n) except -1
    @cython.locals(start=int, field=int, each=int, total=uint64_t, done=int, i=int, part=int, index=uint32_t, address=uint64_t, k=int)
    cdef int complete(self, int length, int extras) except -1
    @cython.locals(p=cython.p_char, at=Py_ssize_t)
    cdef int extra(self, int kind, int flags, int value, uint32_t type) except -1
    @cython.locals(p=cython.p_char, at=Py_ssize_t)
    cdef int answer(self, int flags, int size, int status) except -1
    @cython.locals(at=Py_ssize_t)
    cdef int give(self) except -1
    @cython.locals(new=uint32_t, old=uint32_t, event=uint32_t)
    cpdef bint push(self) except -1
    cpdef bint arm(self) except -1
    cpdef bint pending(self) except -1
