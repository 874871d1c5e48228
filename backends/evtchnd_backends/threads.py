"""A disk's threads, where io_uring is refused: the same interface, a third of the speed.

Own threads and one eventfd; an executor's futures would cost five times as much.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from evtchnd._core.uring import transfer

THREADS = 4
"""Above four, two cores gave no more: 19-24k reads/s at depth 8 and 32."""


class Engine(Protocol):
    """What carries requests out: `Uring`, or `Threads` where that is refused. Tags and results are plain integers."""

    @property
    def inflight(self) -> int: ...
    def readv(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool: ...
    def writev(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool: ...
    def fsync(self, fd: int, tag: int) -> bool: ...
    def fallocate(self, fd: int, mode: int, offset: int, length: int, tag: int) -> bool: ...
    def submit(self) -> int: ...
    def pending(self) -> bool: ...
    def reap(self) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...


class Threads:
    """A few threads of one disk, started by its first request (a worker must not have any when it forks)."""

    def __init__(self, eventfd: int, *, threads: int = THREADS) -> None:
        self.inflight = 0
        self.holds: list[object] = []  # memory that a thread which hangs may still write to
        self._eventfd = eventfd
        self._count = threads
        self._todo: SimpleQueue[tuple[Callable[..., int], tuple[Any, ...], int] | None] = SimpleQueue()
        self._done: deque[tuple[int, int]] = deque()
        self._threads: list[threading.Thread] = []

    def readv(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool:
        return self._push(transfer, (fd, False, iov_addr, iov_count, offset), tag)

    def writev(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool:
        return self._push(transfer, (fd, True, iov_addr, iov_count, offset), tag)

    def fsync(self, fd: int, tag: int) -> bool:
        return self._push(fdatasync, (fd,), tag)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, tag: int) -> bool:
        return self._push(fallocate, (fd, mode, offset, length), tag)

    def submit(self) -> int:
        return 0

    def pending(self) -> bool:
        return bool(self._done)

    def reap(self) -> list[tuple[int, int]]:
        found = []
        while self._done:
            found.append(self._done.popleft())
        self.inflight -= len(found)
        return found

    def close(self) -> None:
        """Ends the threads as they come back; one that hangs in the kernel is left behind (they are daemons).

        What none of them has begun is dropped: it must not run when the disk is somebody else's.
        """
        with suppress(Empty):
            while True:
                self._todo.get_nowait()
        for _ in self._threads:
            self._todo.put(None)
        if not self.inflight:
            for thread in self._threads:
                thread.join()
        self._threads.clear()

    def _push(self, call: Callable[..., int], args: tuple[Any, ...], tag: int) -> bool:
        if not self._threads:
            for number in range(self._count):
                thread = threading.Thread(target=self._run, name=f"disk-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self.inflight += 1
        self._todo.put((call, args, tag))
        return True

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            call, args, tag = item
            self._done.append((tag, call(*args)))
            with suppress(OSError):  # EAGAIN: full, so it is readable; EBADF: the disk is gone
                os.eventfd_write(self._eventfd, 1)


def fdatasync(fd: int) -> int:
    try:
        os.fdatasync(fd)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return 0


_libc_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_libc_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    return -ctypes.get_errno() if _libc_fallocate(fd, mode, offset, length) < 0 else 0
