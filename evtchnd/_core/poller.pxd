cimport cython
from evtchnd._core.channel cimport Channel
from evtchnd._core.words cimport Mem, get32


cdef extern from "wake.h" nogil:
    int kicked_of "ev_kicked" (int epoll, char *fds, int most)


@cython.final
cdef class Poller:
    cdef readonly object loop
    cdef public long long window_ns
    cdef readonly long long slices
    cdef readonly long long hits
    cdef readonly long long misses
    cdef readonly long long sleeps
    cdef readonly dict live
    cdef public object defect

    cdef object __weakref__
    cdef long long _max
    cdef object _clock
    cdef tuple _sources
    cdef list _users
    cdef object _next
    cdef bint _busy
    cdef long long _deadline
    cdef long long _slept_at
    cdef long long _left_at
    cdef int _in_vain
    cdef int _skip
    cdef int _skipped
    cdef bint _closed
    cdef object _kicks
    cdef int _epoll
    cdef list _by_fd
    cdef Mem _fds
    cdef dict _late
    cdef object _lines

    @cython.locals(slept_at=cython.longlong)
    cpdef object woken(self)
    cpdef object pumped(self, bint found)
    @cython.locals(channel=Channel, hit=bint, now=cython.longlong, end=cython.longlong, slice=cython.longlong)
    cpdef object _look(self)
    @cython.locals(channel=Channel)
    cdef object _settle(self, long long now)
    cdef bint _arm(self, Channel channel) except -1
    cdef object _missed(self)
    @cython.locals(channel=Channel, more=bint)
    cdef object _sleep(self)
    cpdef bint looks_at(self, Channel channel) except -1
    cpdef object mute(self, Channel channel)
    @cython.locals(channel=Channel, found=bint, n=int, i=int)
    cpdef object _on_kicks(self)
