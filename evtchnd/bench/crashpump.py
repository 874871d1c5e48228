"""The backend's own pump as a worker that dies: Vbd, RawDisk, io_uring, poller and channel over a guest's ring.

What is not there is the handshake (XenStore) and the control plane; the caller keeps the io_uring's descriptor as the
control plane does, and waits until it has run dry before the next worker begins.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from evtchnd._core.blk import passed
from evtchnd._core.points import AT_COMPLETE, AT_NOTIFY, AT_OVER, AT_SUBMIT
from evtchnd._core.req import Req
from evtchnd._core.uring import Uring, descriptor_of, inflight_of
from evtchnd.bench.crashguest import Guest
from evtchnd.bench.crashring import Mapped
from evtchnd.channel import Channel, Poller
from evtchnd.control.config import Vbd as Options
from evtchnd.worker.device import Device
from evtchnd_backends.blkif import Queue, Rings
from evtchnd_backends.disk import RawDisk
from evtchnd_backends.vbd import Vbd

_DRAIN_S = 30.0
_OVER_S = 30.0


class Pump:
    """One life: `serve()` in the fork, `parent(pid)` beside it.

    direct: reads and writes go through the io_uring, too, as those of an image opened with O_DIRECT. again: the ring
    lives already.
    """

    def __init__(self, guest: Guest, order: Sequence[int], *, push_each: bool, direct: bool, again: bool) -> None:
        self._guest = guest
        self._order = order
        self._push_each = push_each
        self._direct = direct
        self._again = again
        self._tell = os.pipe()
        self._go = os.pipe()

    def parent(self, pid: int) -> None:
        """Keeps the io_uring, and returns when the worker is dead and its I/O has ended."""
        pidfd = os.pidfd_open(pid)
        os.close(self._tell[1])
        os.close(self._go[0])
        number = os.read(self._tell[0], 4)
        uring = -1
        if number:
            uring = descriptor_of(pidfd, int.from_bytes(number, "little"))
        os.close(self._go[1])
        os.read(self._tell[0], 1)  # its end of file: the process has gone
        os.close(self._tell[0])
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        os.close(pidfd)
        if uring >= 0:
            deadline = time.monotonic() + _DRAIN_S
            while inflight_of(uring):
                if time.monotonic() > deadline:
                    raise TimeoutError("a dead worker's requests do not end")
                time.sleep(0.0002)
            os.close(uring)

    def serve(self) -> None:
        """The worker. Returns when all is answered."""
        logging.disable()  # a line for each refusal of each case
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        guest, loop = self._guest, asyncio.get_running_loop()
        mapped = Mapped(guest)
        poller = Poller(loop, max_us=50)
        completions = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        uring = Uring(64, eventfd=completions)
        os.write(self._tell[1], uring.fd.to_bytes(4, "little"))
        os.close(self._go[1])
        os.read(self._go[0], 1)  # until the parent has its copy
        disk = Disk(
            guest.image,
            self._order,
            push_each=self._push_each,
            direct=self._direct,
            uring=uring,
            eventfd=completions,
            poller=poller,
        )
        device = Watched(
            domid=guest.domid,
            devid=51712,
            kind="vbd",
            store=None,  # of the handshake only
            memory=mapped.memory,
            grants=mapped.grants,
            poller=poller,
            loop=loop,
            connected=None,
            bind=self._bind,
            unbind=lambda ports: None,
            report=_reported,
            uring=uring,
            completions=completions,
            disk_fd=guest.image,
            readonly=False,
            cdrom=False,
            direct=False,
            journal_fd=guest.journal_fd,
            options=Options(max_queues=1),
        )
        failed: list[Exception] = []
        rings = Rings(guest.layout, (Queue(tuple(guest.queue.ring_grefs), guest.queue.port),))
        vbd = Vbd(device, disk, rings)
        await vbd.open(failed.append, again=self._again)
        due = (guest.queue.ring.req_prod) & 0xFFFFFFFF
        deadline = loop.time() + _OVER_S
        while guest.rsp_prod != due or disk.inflight:
            if failed:
                raise failed[0]
            if loop.time() > deadline:
                raise TimeoutError(f"{disk.inflight} at the disk, answered up to {guest.rsp_prod} of {due}")
            await asyncio.sleep(0.0002)
        await vbd.close(final=True)
        passed(AT_OVER)

    async def _bind(self, ports: Sequence[int]) -> list[tuple[int, int]]:
        guest = self._guest
        return [(os.dup(guest.kick_fd), os.dup(guest.notify_fd)) for _ in ports]


class Watched(Device):
    """A device whose notifications are points."""

    async def bind(self, ports: Sequence[int]) -> list[Channel]:
        """As a Device's."""
        return [Notifying(kick, notify, name=self.name, poller=self.poller) for kick, notify in await self._bind(ports)]


async def _reported(_params: object) -> None: ...


class Notifying(Channel):
    """A channel that passes a point before it notifies."""

    __slots__ = ()

    def notify(self) -> None:
        """As a Channel's."""
        passed(AT_NOTIFY)
        super().notify()


class Disk(RawDisk):
    """Requests are numbered as they start, and finish in the order that was asked: those behind wait here.

    push_each: one at a time, so that the pump publishes it before the next.
    """

    def __init__(self, fd: int, order: Sequence[int], *, push_each: bool, **options: Any) -> None:
        super().__init__(fd, readonly=False, **options)
        self._order = list(order)
        self._most = 1 if push_each else len(order)
        self._started = 0
        self._numbers: dict[int, int] = {}
        self._waiting: dict[int, tuple[Req, int]] = {}

    def start(self, req: Req) -> None:
        """As a RawDisk's."""
        passed(AT_SUBMIT)
        self._numbers[req.id] = self._started
        if self._started >= len(self._order):
            self._order.append(self._started)
        self._started += 1
        super().start(req)

    def finished(self) -> list[tuple[Req, int]]:
        """As a RawDisk's, in order. What the ring answered by itself (reads that were cached, refusals) is skipped."""
        found = super().finished()
        self.inflight += len(found)
        for req, status in found:
            self._waiting[self._numbers.pop(req.id)] = (req, status)
        out: list[tuple[Req, int]] = []
        # an order longer than what was started: the numbers that never come are passed over
        while len(out) < self._most and self._waiting and len(self._waiting) == self.inflight:
            number = next(n for n in self._order if n in self._waiting)
            out.append(self._waiting.pop(number))
            self.inflight -= 1
            passed(AT_COMPLETE)
        if self._waiting and self.wake is not None and len(self._waiting) == self.inflight:
            asyncio.get_running_loop().call_soon(self.wake)
        return out
