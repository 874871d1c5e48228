"""What a guest says by console_io, a kernel's early messages, on its way to a descriptor (stderr).

A guest can say as much as it likes, and who reads the descriptor may have stopped: a thread of its own writes, what
comes too fast or finds no room is dropped, and how much that was is said where it is missing.
"""

from __future__ import annotations

import os
import select
import threading
import time

# A kernel's early messages up to its console are 60 KB; a serial line of 115,200 baud has 11 KB a second.
RATE, BURST = 64 << 10, 256 << 10
_MOST_WAITING = BURST
# A pipe takes so much as a whole; one write that blocks holds no more of what waits.
_PIECE = 4096


class GuestWords:
    """Any thread may `write`, which never waits. A context manager that ends with what is left written, or given up."""

    def __init__(self, fd: int, *, rate: int = RATE, burst: int = BURST) -> None:
        self._fd, self._rate, self._burst = fd, rate, burst
        self._terminal = os.isatty(fd)  # perhaps raw: it is the guest's console
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._writing = False
        self._dropped = 0  # after what waits
        self._allowed, self._at = float(burst), time.monotonic()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="guest's words", daemon=True)
        self._thread.start()

    def write(self, text: bytes) -> None:
        with self._changed:
            taken = text[: self._room(len(text))]
            if taken and self._dropped:
                self._waiting += b"\n[%d bytes of the guest's are left out]\n" % self._dropped
                self._dropped = 0
            self._waiting += taken
            self._dropped += len(text) - len(taken)
            self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Waits until all of it is written, `timeout` s at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def close(self, timeout: float = 1.0) -> None:
        """Can be called twice."""
        with self._changed:
            if self._dropped:
                self._waiting += b"\n[%d bytes of the guest's are left out]\n" % self._dropped
                self._dropped = 0
        self.drain(timeout)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __enter__(self) -> GuestWords:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _room(self, wanted: int) -> int:
        now = time.monotonic()
        self._allowed = min(self._allowed + (now - self._at) * self._rate, self._burst)
        self._at = now
        count = min(wanted, int(self._allowed), max(0, _MOST_WAITING - len(self._waiting)))
        self._allowed -= count
        return count

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                # up to a line's end, so that other lines of the process come between lines
                count = self._waiting.rfind(b"\n", 0, _PIECE) + 1 or _PIECE
                piece = bytes(self._waiting[:count])
                del self._waiting[:count]
                self._writing = True
            try:
                self._put(piece.replace(b"\n", b"\r\n") if self._terminal else piece)
            except OSError:
                return  # nobody reads it; what comes finds no room

    def _put(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # stderr may be somebody's who wants it so
                select.select([], [self._fd], [])
