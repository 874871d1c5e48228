"""Captures of a vif: copies of the frames that cross it, as pcapng, to whoever has asked the operator's socket for one.

A capture has a buffer, which its rings write to (evtchnd/_core/framelog.py), and a stream socket, which takes what it
takes. Neither is waited for: a reader that stalls fills the buffer, and what finds no room then is counted, also in the
file. Without a capture the rings have nothing to write to.

A capture ends when its reader has shut down its side of the socket, when it has its frames, or with the vif; a last
block says what was dropped, and a reader that does not take even that is let go after a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from time import time_ns

from evtchnd._core import FrameLog
from evtchnd.errors import HostError
from evtchnd.netif import MOST_SNAP
from evtchnd.worker.device import VifDevice

from . import pcapng

log = logging.getLogger(__name__)

# A batch of a ring is 64 packets, of 64 KiB each at most: two of them; and 80,000 small frames. tcpdump takes 2 MiB.
BUFFER_BYTES = 8 << 20
# Of one vif: each costs its buffer, and a copy of every frame.
MOST = 4
# What a reader has at the end, or at the vif's, to take what waits.
_LAST_S, _CLOSE_S = 10.0, 0.5
# Of what waits in one turn of the loop: a socket's buffer a few times over.
_MOST_SENT = 1 << 20


class Captures:
    """All of one vif.

    logs      what its rings write to; None: nobody captures
    changed   called when it is another one, or none
    """

    def __init__(self, device: VifDevice) -> None:
        self.logs: tuple[FrameLog, ...] | None = None
        self.changed: Callable[[], None] = _nothing
        self._device = device
        self._all: list[_Capture] = []
        self._dropped = 0

    def accept(self, fd: int, greeting: bytes, snap: int, most: int) -> None:
        """A reader's stream socket, taken: `greeting`, then frames of `snap` bytes at most, `most` of them (0: any).

        HostError: there are too many already.
        """
        if len(self._all) >= MOST:
            os.close(fd)
            raise HostError(f"{self._device.name}: {MOST} captures of it run already")
        self._all.append(_Capture(self._device, fd, greeting, snap, most, self._moved))
        self._moved()

    def flush(self) -> None:
        """Hands over what the rings have written."""
        for capture in self._all[:]:
            capture.flush()

    def forget(self) -> None:
        """There are no rings to be told of changes."""
        self.changed = _nothing

    def stats(self) -> dict[str, int]:
        """Plain integers by name."""
        dropped = self._dropped + sum(capture.log.dropped for capture in self._all)
        return {"captures": len(self._all), "capture_dropped": dropped}

    async def close(self) -> None:
        """The vif ends, and they end; a reader has a moment to take the rest."""
        self._device.capture = self._device.refuse
        for capture in self._all[:]:
            capture.finish()
        if self._all:
            await asyncio.wait([capture.over for capture in self._all], timeout=_CLOSE_S)
        for capture in self._all[:]:
            capture.close()

    def _moved(self) -> None:
        """One has begun, has its frames, or is over."""
        self._dropped += sum(capture.log.dropped for capture in self._all if capture.over.done())
        self._all = [capture for capture in self._all if not capture.over.done()]
        self.logs = tuple(capture.log for capture in self._all if not capture.ending) or None
        self.changed()


class _Capture:
    """One. Owns its socket. `moved` is called when it takes no more frames, and when it is over."""

    def __init__(
        self, device: VifDevice, fd: int, greeting: bytes, snap: int, most: int, moved: Callable[[], None]
    ) -> None:
        self.log = FrameLog(device.memory, BUFFER_BYTES, min(snap or MOST_SNAP, MOST_SNAP), most)
        self.ending = False
        self.over: asyncio.Future[None] = device.loop.create_future()
        self._device = device
        self._loop = device.loop
        self._moved = moved
        self._writing = False
        self._last: asyncio.TimerHandle | None = None
        self._began = time_ns()
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        name = device.vif.name or f"vif{device.domid}.{device.devid}"
        about = f"{device.name}, {device.vif.mac}"
        self._greeting = greeting
        self.log.put(pcapng.section("evtchnd") + pcapng.interface(name, about, self.log.snap))
        self._loop.add_reader(fd, self._readable)
        log.info("%s: capture begins", device.name)
        self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Sends what the socket takes."""
        if self.log.full and not self.ending:
            self.finish()
        if not self._writing and not self.over.done():
            self._send()

    def finish(self) -> None:
        """Takes no more frames. It is over when its reader has the rest."""
        if self.ending or self.over.done():
            return
        self.ending = True
        self.log.put(pcapng.statistics(self._began, time_ns(), frames=self.log.frames, dropped=self.log.dropped))
        self._last = self._loop.call_later(_LAST_S, self.close)
        self._moved()
        if not self._writing:
            self._send()

    def close(self) -> None:
        """Lets the reader go. Idempotent."""
        if self.over.done():
            return
        self.over.set_result(None)
        self.ending = True
        if self._last is not None:
            self._last.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        frames, dropped = self.log.frames, self.log.dropped
        log.info("%s: capture ended: %d frames, %d dropped", self._device.name, frames, dropped)
        self._moved()

    def _send(self) -> None:
        budget = _MOST_SENT
        while (self.log.waiting or self._greeting) and budget > 0:
            try:
                sent = self._sock.sendmsg([self._greeting, *self.log.views()], [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:  # nobody is there any more
                self.close()
                return
            budget -= sent
            greeted = min(sent, len(self._greeting))
            self._greeting = self._greeting[greeted:]
            self.log.taken(sent - greeted)
        if self.log.waiting or self._greeting:
            self._listen(True)
            return
        self._listen(False)
        if self.ending:
            self.close()

    def _listen(self, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._sock.fileno(), self._send)
            else:
                self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        """The reader has nothing to say but that it has had enough."""
        try:
            if self._sock.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._loop.remove_reader(self._sock.fileno())
        self.finish()


def _nothing() -> None:
    """No ring is to be told."""
