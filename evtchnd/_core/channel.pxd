cimport cython
from evtchnd._core.poller cimport Poller


cdef extern from "wake.h" nogil:
    int signal "ev_signal" (int eventfd)


cdef class _Kick:
    cdef tuple _once


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
