"""One who reads a console and types at it: the pty's master, or the stream socket of an `evtchnctl console`.

Never waits: output that its reader does not take is kept up to a limit, then the oldest is dropped and counted.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

# One read of what was typed: more than a person's line and a paste's piece.
_MOST_TYPED = 4096
# One write of what has waited; a pty takes up to 4 KiB at a time, a socket more.
_MOST_WRITTEN = 65536
# A descriptor that says it takes output, and takes none: asked again after this, not at once.
_PAUSE_S = 0.05


class Terminal:
    """`fd` stays its owner's; both ends of it may be anybody's, so that every error but EAGAIN is its end.

    typed(data)   what came; called while `listen` says how much is wanted
    gone(self)    once, when the other end has
    most          bytes that wait for a reader
    dropped       bytes that did not
    """

    def __init__(
        self,
        fd: int,
        loop: asyncio.AbstractEventLoop,
        *,
        typed: Callable[[bytes], None],
        gone: Callable[[Terminal], None],
        most: int,
    ) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.dropped = 0
        self._loop = loop
        self._typed = typed
        self._gone = gone
        self._most = most
        self._waiting = bytearray()
        self._wanted = 0
        self._pause: asyncio.TimerHandle | None = None
        self._open = True

    def put(self, data: bytes) -> None:
        """Shows `data`."""
        if not self._open:
            return
        if not self._waiting:
            sent = self._write(data)
            if sent == len(data) or not self._open:
                return
            data = data[sent:]
            self._loop.add_writer(self.fd, self._writable)
        self._waiting += data
        over = len(self._waiting) - self._most
        if over > 0:
            del self._waiting[:over]
            self.dropped += over

    def listen(self, wanted: int) -> None:
        """How many typed bytes there is room for; with 0 the other end has to wait."""
        if not self._open:
            return
        if wanted and not self._wanted:
            self._loop.add_reader(self.fd, self._readable)
        elif self._wanted and not wanted:
            self._loop.remove_reader(self.fd)
        self._wanted = wanted

    def look(self) -> None:
        """Sees an end that went away while nothing was read from it."""
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        if self._open and poll.poll(0):
            self._end()

    def close(self) -> None:
        """Leaves the loop without a word. Idempotent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self.fd)
            self._loop.remove_writer(self.fd)
            if self._pause is not None:
                self._pause.cancel()

    def _end(self) -> None:
        self.close()
        self._gone(self)

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._end()
            return 0

    def _writable(self) -> None:
        sent = self._write(self._waiting[:_MOST_WRITTEN])
        if not self._open:
            return
        del self._waiting[:sent]
        if not self._waiting or not sent:
            self._loop.remove_writer(self.fd)
        if not sent:
            self._pause = self._loop.call_later(_PAUSE_S, lambda: self._loop.add_writer(self.fd, self._writable))

    def _readable(self) -> None:
        try:
            data = os.read(self.fd, min(self._wanted, _MOST_TYPED))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._typed(data)
        else:
            self._end()
