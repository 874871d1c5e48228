"""A console's log file: limited in size and in rate, written beside the loop.

A thread of its own, since a write may take as long as its storage hangs, and the guest's console and disks must not
notice. What the storage does not take is dropped and counted; so is what a guest writes faster than the log's rate.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from time import monotonic

log = logging.getLogger(__name__)

# Seconds' worth of output that may come at once: a boot's.
_BURST_S = 4
# Output that waits for the storage, in bytes: ten seconds at the highest sensible rate.
_MOST_WAITING = 1 << 20
# The thread's last words when the console ends; a storage that hangs longer keeps what it has.
_END_S = 1.0


class Allowance:
    """A bucket of bytes that fills at `rate` a second up to `burst`; full at first. `clock` in seconds."""

    def __init__(self, rate: int, burst: int, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._left = float(burst)
        self._at = clock()

    def take(self, wanted: int) -> int:
        """How many of `wanted` bytes may go."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._rate, self._burst)
        self._at = now
        count = min(wanted, int(self._left))
        self._left -= count
        return count


class ConsoleLog:
    """Writes to the file `fd`; when that is full, its content becomes `old`'s and it begins again.

    fd, old      descriptors for reading and writing, `fd` with O_APPEND; copies are kept, since the thread may outlive
                 its console
    size, rate   bytes of a file, bytes a second
    suppressed   bytes above the rate, so far; lost: bytes that the storage did not take
    """

    def __init__(
        self, fd: int, old: int, *, size: int, rate: int, name: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self.suppressed = 0
        self.lost = 0
        self._name = name
        self._size = size
        self._allowance = Allowance(rate, _BURST_S * rate, clock)
        self._left_out = 0  # suppressed, and not yet said in the log
        self._waiting = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._complained = False
        self._fd = os.dup(fd)
        try:
            self._old = os.dup(old)
        except BaseException:
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._run, name="console log", daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Appends what the rate allows. Does not wait."""
        count = self._allowance.take(len(data))
        if count and self._left_out:
            self._queue(b"\n[evtchnd: %d bytes suppressed: above console.log_rate_bytes]\n" % self._left_out)
            self._left_out = 0
        self._queue(data[:count])
        self.suppressed += len(data) - count
        self._left_out += len(data) - count

    def close(self) -> bool:
        """Writes the rest; False: the storage still hangs, the thread ends when it lets go. Blocks for a second."""
        if self._left_out:
            self._queue(b"\n[evtchnd: %d bytes suppressed: above console.log_rate_bytes]\n" % self._left_out)
            self._left_out = 0
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(_END_S)
        return not self._thread.is_alive()

    def _queue(self, data: bytes) -> None:
        if not data:
            return
        with self._changed:
            room = max(0, _MOST_WAITING - len(self._waiting))
            self.lost += max(0, len(data) - room)
            self._waiting += data[:room]
            self._changed.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._ended:
                        self._changed.wait()
                    data, self._waiting = bytes(self._waiting), bytearray()
                    if not data:
                        return
                self._append(data)
        finally:
            os.close(self._fd)
            os.close(self._old)

    def _append(self, data: bytes) -> None:
        """The storage may refuse (it is full): that much is lost, and one line says so."""
        while data:
            try:
                room = self._size - os.fstat(self._fd).st_size
                if room <= 0:
                    self._rotate()
                    room = self._size
                data = data[os.write(self._fd, data[:room]) :]
            except OSError as exc:
                self.lost += len(data)
                if not self._complained:
                    log.error("%s: log: %s", self._name, exc.strerror)
                self._complained = True
                return
        self._complained = False

    def _rotate(self) -> None:
        """A copy, not a new name: who holds nothing but descriptors cannot rename."""
        os.ftruncate(self._old, 0)
        os.lseek(self._old, 0, os.SEEK_SET)
        at, size = 0, os.fstat(self._fd).st_size
        while at < size:
            count = os.sendfile(self._old, self._fd, at, size - at)
            if count == 0:
                break
            at += count
        os.ftruncate(self._fd, 0)
