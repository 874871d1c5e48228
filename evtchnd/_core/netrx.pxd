from libc.stdint cimport uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.framelog cimport FrameLog
from evtchnd._core.rxslots cimport RxSlots
from evtchnd._core.toeplitz cimport Toeplitz
from evtchnd._core.words cimport (
    Mem, copy, get8, get16, get64, put8, put64, sys_preadv, sys_readable, u32,
)


@cython.final
cdef class RxRing:
    cdef public int most_bytes
    cdef public bint gso, sg
    cdef public int headroom
    cdef public object groups
    cdef public object logs
    cdef public int queue
    cdef readonly Toeplitz hasher
    cdef readonly uint32_t hash_value
    cdef readonly int hash_type
    cdef readonly int stopped
    cdef public int tap_error
    cdef readonly int held
    cdef readonly long long packets, bytes
    cdef readonly long long too_long, unwanted, moved, waited, expired, completed
    cdef readonly RxSlots posted
    cdef object memory
    cdef int small
    cdef Mem buffer, iov

    @cython.locals(done=Py_ssize_t, limit='long long', usable=int, got=Py_ssize_t)
    cpdef Py_ssize_t run(self, int fd, Py_ssize_t most) except -1
    @cython.locals(usable=int)
    cpdef bint settle(self) except -1
    cpdef bint adopt(self, RxRing other) except -1
    @cython.locals(got=Py_ssize_t)
    cdef Py_ssize_t read_aside(self, int fd) except? -4095
    @cython.locals(length=int, extras=int, each=int, parts=int, done=int, part=int, i=int, index=uint32_t)
    cdef int deliver(self, int usable) except -1
    @cython.locals(address=uint64_t)
    cdef int copy_in(self, Py_ssize_t at, uint32_t index, int start, int n) except -1
    @cython.locals(address=uint64_t)
    cdef int copy_out(self, Py_ssize_t at, uint32_t index, int n) except -1
    @cython.locals(each=int, spare=int, parts=int, iov=cython.p_char, n=int, end=uint64_t, i=int, index=uint32_t, address=uint64_t, got=Py_ssize_t, length=int, there=int, extras=int, part=int)
    cdef Py_ssize_t read(self, int fd, int usable) except? -4095
    @cython.locals(i=int, part=int, index=uint32_t)
    cdef int take_back(self, int length, int parts, int spare, int each) except -1
    @cython.locals(part=int, i=int)
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
    cdef int peek(self, int at, int n) except -1
    @cython.locals(start=int, field=int, each=int, total=uint64_t, done=int, i=int, part=int, index=uint32_t, k=int)
    cdef int complete(self, int length, int extras) except -1
    cpdef bint waits(self, int fd) except -1
    cpdef bint push(self) except -1
    cpdef bint arm(self) except -1
    cpdef bint pending(self) except -1
