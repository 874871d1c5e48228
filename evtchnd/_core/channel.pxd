cimport cython
from evtchnd._core.words cimport Mem, get32


cdef extern from "wake.h" nogil:
    int kicked_of "ev_kicked" (int epoll, char *fds, int most)
    int signal "ev_signal" (int eventfd)


cdef class _Kick:
    cdef tuple _once


@cython.final
cdef class Channel:
    cdef readonly int kick_fd
    cdef readonly int notify_fd
    cdef readonly object name
    cdef public long long wakeups
    cdef public long long spurious
    cdef public long long notifications
    cdef readonly bint closed
    cdef public object pending
    cdef public object arm
    cdef public bint more
    cdef public bint muted
    cdef public long long until
    cdef public long long idle

    cdef object __weakref__
    cdef object _kicks  # a guest may make it any sum of 64-bit numbers
    cdef Poller _poller
    cdef bint _own
    cdef object _coro
    cdef object _done
    cdef bint _running
    cdef bint _again

    cpdef object count(self)
    cpdef object step(self)
    cpdef object notify(self)
    cpdef object advance(self)
    @cython.locals(found=bint, looked_at=bint, poller=Poller)
    cpdef bint heard(self) except -1
    cpdef object fail(self, object error)
    @cython.locals(idle=cython.longlong)
    cdef object _heard_in_vain(self)
    cdef object _cancel(self)
    cdef object _leave(self)


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
