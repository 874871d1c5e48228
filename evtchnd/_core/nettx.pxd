from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
cimport cython
from evtchnd._core.answered cimport Answered
from evtchnd._core.framelog cimport FrameLog
from evtchnd._core.pins cimport Pins
from evtchnd._core.words cimport (
    Area, Mem, copy, get8, get16, get32, get64, put8, put16, put32, put64, sys_pwritev, u32,
)


@cython.final
cdef class TxRing:
    cdef public long long credit
    cdef readonly int stopped
    cdef public int tap_error
    cdef readonly long long packets, bytes, slots
    cdef readonly long long bad, no_grant, no_header, no_tap, refused
    cdef readonly object reason
    cdef readonly uint32_t req_cons, rsp_prod
    cdef public object multicast
    cdef public object logs
    cdef public int queue
    cdef readonly Mem head

    cdef Pins grants
    cdef Answered ring
    cdef object memory
    cdef bint closed
    cdef Area area
    cdef Mem answers, taken, extra, iov

    @cython.locals(waiting=Py_ssize_t, done=Py_ssize_t, got=Py_ssize_t)
    cpdef Py_ssize_t run(self, int fd, Py_ssize_t most) except -1
    @cython.locals(start=uint32_t, total=int, used=int, extras=int, gso_type=int, gso_size=int, member=int, more=int, kind=int, drop=int, parts=int, rest=int, at=Py_ssize_t, size=int)
    cdef Py_ssize_t packet(self, int fd, Py_ssize_t waiting) except -1
    cdef int slot(self, int number, uint32_t index) except -1
    @cython.locals(head=Mem, iov=Mem, filled=int, vectors=int, held=int, status=int, at=Py_ssize_t, size=int, part=int, address=uint64_t, end=uint64_t, got=Py_ssize_t, i=int)
    cdef Py_ssize_t send(self, int fd, int parts, int extras, int total, int gso_type, int gso_size) except -1
    @cython.locals(i=int)
    cdef Py_ssize_t write(self, int fd, int vectors) except? -4095
    @cython.locals(p=cython.p_char, mark=int, i=int, log=FrameLog)
    cdef int log(self, int filled, int vectors, int total) except -1
    cdef int failed(self, Py_ssize_t got) except? -4
    @cython.locals(p=cython.p_char, at=Py_ssize_t, end=Py_ssize_t, proto=int, version=int, address=Py_ssize_t, length=int, fragment=int, need=int, offset=int, kind=int)
    cdef int offload(self, int filled, int total, int gso_type, int gso_size) except -1
    cdef int headless(self, str reason) except -1
    @cython.locals(p=cython.p_char, n=int, total=uint32_t, i=int)
    cdef int pseudo(self, Py_ssize_t address, int version, Py_ssize_t at, int length, int proto, int offset) except -1
    cdef Py_ssize_t member(self, int kind, int extras) except -1
    @cython.locals(i=int)
    cdef Py_ssize_t answer(self, int parts, int extras, int status) except -1
    @cython.locals(at=Py_ssize_t)
    cdef int respond(self, int id, int status) except -1
    cpdef bint push(self) except -1
    cpdef bint arm(self) except -1
    cpdef bint pending(self) except -1
