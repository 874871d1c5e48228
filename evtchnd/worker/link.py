"""One end of a SEQPACKET socket on the event loop: whole messages with descriptors, a bounded queue out.

Used between control plane and worker, and by the control plane towards VMMs. uvloop's transports do neither
SEQPACKET nor descriptors, so this is a raw socket with add_reader.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from evtchnd import transport
from evtchnd.errors import EvtchndError

# Messages handled in one callback, so that one loud peer does not keep the loop from the others.
_MOST_AT_ONCE = 16


class Link:
    """`sock` belongs to the link from here on.

    received(data, fds)   one message; the descriptors belong to the callee. EvtchndError ends the link
    closed(reason)        called once, however the link ends but by close(): "" for an orderly end of file
    most                  messages that may wait for a peer that does not read; one more ends the link
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[bytes, list[int]], None],
        closed: Callable[[str], None],
        *,
        most: int,
    ) -> None:
        sock.setblocking(False)
        self._sock: socket.socket | None = sock
        self._loop = asyncio.get_running_loop()
        self._received = received
        self._closed = closed
        self._most = most
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        """False once the peer has gone or close() was called."""
        return self._sock is not None

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends at once or queues. The caller keeps its descriptors. Nothing happens on a link that has ended."""
        sock = self._sock
        if sock is None:
            return
        if not self._queue:
            try:
                transport.send(sock, data, fds)
                return
            except BlockingIOError:
                self._loop.add_writer(sock.fileno(), self._writable)
            except OSError as exc:
                # The reader may still have messages to take; it then sees the end of file and says so.
                if not isinstance(exc, BrokenPipeError | ConnectionResetError):
                    self._end(f"cannot send: {exc.strerror}")
                return
        if len(self._queue) >= self._most:
            self._end(f"the peer does not read: {self._most} messages wait")
            return
        self._queue.append((data, [os.dup(fd) for fd in fds]))

    def close(self) -> None:
        """Ends the link without a word. Idempotent."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._loop.remove_reader(sock.fileno())
        self._loop.remove_writer(sock.fileno())
        sock.close()
        while self._queue:
            transport.close_all(self._queue.popleft()[1])

    def _end(self, reason: str) -> None:
        if self._sock is not None:
            self.close()
            self._closed(reason)

    def _readable(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            sock = self._sock
            if sock is None:
                return
            try:
                message = transport.recv(sock)
                if message is None:
                    self._end("")
                    return
                self._received(*message)
            except BlockingIOError:
                return
            except ConnectionResetError:
                self._end("")
                return
            except OSError as exc:
                self._end(f"cannot receive: {exc.strerror}")
                return
            except EvtchndError as exc:
                self._end(str(exc))
                return

    def _writable(self) -> None:
        sock = self._sock
        while sock is not None and self._queue:
            data, fds = self._queue[0]
            try:
                transport.send(sock, data, fds)
            except BlockingIOError:
                return
            except OSError as exc:
                self._end(f"cannot send: {exc.strerror}")
                return
            self._queue.popleft()
            transport.close_all(fds)
        if sock is not None and self._sock is sock:
            self._loop.remove_writer(sock.fileno())
