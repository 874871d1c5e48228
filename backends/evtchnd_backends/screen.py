"""What outlives a console's ring: who reads it and types at it, its last output, its log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping

from evtchnd.errors import HostError
from evtchnd.worker.device import ConsoleDevice

from .consolelog import ConsoleLog
from .terminal import Terminal

log = logging.getLogger(__name__)

# Typed bytes that wait for the guest, besides the 1024 of its ring: a line of Linux' line discipline (N_TTY_BUF_SIZE).
MOST_TYPED = 4096


class Screen:
    """One console's. `wake`, set by who serves the ring, is called when something was typed.

    typed   bytes for the guest, at most MOST_TYPED: while it is full nobody's typing is read
    """

    def __init__(self, device: ConsoleDevice) -> None:
        self.typed = bytearray()
        self.wake: Callable[[], None] = nothing
        self._device = device
        self._recent = bytearray()
        self._clients: dict[Terminal, None] = {}
        self._pty = self._terminal(device.pty, self._hung_up) if device.pty >= 0 else None
        self._log: ConsoleLog | None = None
        self._dropped = 0
        self._out = self._in = 0
        if device.log >= 0:
            options = device.options
            self._log = ConsoleLog(
                device.log, device.old_log, size=options.log_bytes, rate=options.log_rate_bytes, name=device.name
            )
        self._listen()

    def show(self, data: bytes) -> None:
        """The guest's output, to everybody."""
        self._out += len(data)
        self._recent += data
        del self._recent[: max(0, len(self._recent) - self._device.options.scrollback_bytes)]
        for terminal in (*([self._pty] if self._pty else []), *self._clients):
            terminal.put(data)
        if self._log is not None:
            self._log.put(data)

    def taken(self, count: int) -> None:
        """The guest has got that many of the typed bytes."""
        self._in += count
        del self.typed[:count]
        self._listen()

    def accept(self, fd: int, greeting: bytes) -> None:
        """A client's stream socket, taken: `greeting`, the last output, and what comes. HostError: there are too
        many."""
        for client in list(self._clients):
            client.look()
        most = self._device.options.clients
        if len(self._clients) >= most:
            os.close(fd)
            raise HostError(f"{self._device.name}: {most} look at it already (console.clients)")
        client = self._terminal(fd, self._left)
        self._clients[client] = None
        client.put(greeting + self._recent)
        self._listen()

    def stats(self) -> Mapping[str, int]:
        """Plain integers by name."""
        terminals = [*([self._pty] if self._pty else []), *self._clients]
        counted = {
            "out_bytes": self._out,
            "in_bytes": self._in,
            "dropped_bytes": self._dropped + sum(terminal.dropped for terminal in terminals),
            "clients": len(self._clients),
        }
        if self._log is not None:
            counted |= {"log_suppressed_bytes": self._log.suppressed, "log_lost_bytes": self._log.lost}
        return counted

    async def close(self) -> None:
        """Lets everybody go; the log's last words are written."""
        self._device.accept = self._device.refuse
        if self._pty is not None:
            self._pty.close()
        for client in list(self._clients):
            client.close()
            os.close(client.fd)
        self._clients.clear()
        console_log, self._log = self._log, None
        if console_log is not None and not await asyncio.to_thread(console_log.close):
            log.error("%s: log: its storage does not answer", self._device.name)

    def _terminal(self, fd: int, gone: Callable[[Terminal], None]) -> Terminal:
        device = self._device
        return Terminal(fd, device.loop, typed=self._type, gone=gone, most=device.options.buffer_bytes)

    def _type(self, data: bytes) -> None:
        self.typed += data
        self._listen()
        self.wake()

    def _listen(self) -> None:
        room = MOST_TYPED - len(self.typed)
        for terminal in (*([self._pty] if self._pty else []), *self._clients):
            terminal.listen(room)

    def _left(self, client: Terminal) -> None:
        self._dropped += client.dropped
        del self._clients[client]
        os.close(client.fd)

    def _hung_up(self, pty: Terminal) -> None:
        self._dropped += pty.dropped
        self._pty = None
        log.warning("%s: its pty was hung up: it goes on without", self._device.name)


def nothing() -> None:
    """Nobody is to be woken."""
