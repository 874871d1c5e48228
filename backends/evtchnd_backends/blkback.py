"""blkback: one vbd from its first node in XenStore to its end, over a raw file or block device.

`run` is the life of a device; a `Vbd` is one connection of it. Requests go from the guest's ring to the disk and back
without a wait in between: `Vbd.serve` is stepped straight from a kick, a poll that hit, or a completion; it takes what
is there, starts it, answers what is finished, publishes once, notifies once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from evtchnd import xenbus
from evtchnd._core import BlkRing, Req
from evtchnd.abi import XenbusState
from evtchnd.channel import Channel
from evtchnd.errors import GuestError
from evtchnd.grants import Page
from evtchnd.journal import Journal
from evtchnd.seldom import Seldom
from evtchnd.worker.device import Device
from evtchnd.xenbus import Step

from . import blkif
from .disk import RawDisk

log = logging.getLogger(__name__)

# What is at the disk when a ring is let go: as long as Linux' netback waits for its own, and libxl for a device.
DRAIN_SECONDS = 10.0
# Answers are published when they are so many bytes: the guest takes them while the rest of a deep ring is served. Less
# wakes a sleeping guest too often (256 KiB: sequential reads of 128 KiB lost a tenth).
PUSH_BYTES = 1 << 20


async def run(device: Device) -> None:
    """Serves `device` until it is detached (returns) or cancelled.

    A guest that breaks the rules loses its connection: one log line, state Closing; it may begin again. HostError,
    ConnectionError: this host cannot serve it.
    """
    vbd: Vbd | None = None
    totals: Counter[str] = Counter()

    def stats() -> Mapping[str, int]:
        now = Counter(totals)
        if vbd is not None:
            now.update(vbd.counters())
        return now

    async def connect(ring: blkif.Ring, *, again: bool) -> None:
        nonlocal vbd
        new = Vbd(device, disk, ring)
        await new.open(bus.fail, again=again)
        vbd = new
        say(log.info, "attached again" if again else "connected", ring)

    async def let_go() -> None:
        nonlocal vbd
        if vbd is not None:
            await vbd.close()
            totals.update(vbd.counters())
            vbd = None
        if device.connected is not None:  # also after an attempt to attach again that failed
            device.connected_as(None)

    def say(how: Callable[..., None], what: str, detail: object) -> None:
        more = lines.due(what)
        if more is not None:
            how("%s: %s: %s%s", device.name, what, detail, more)

    lines = Seldom()

    disk = RawDisk(
        device.disk_fd,
        readonly=device.readonly,
        uring=device.uring,
        eventfd=device.completions,
        direct=device.direct,
        poller=device.poller,
        name=device.name,
    )
    device.stats = stats
    bus = xenbus.Backend(device.store, device.name, device.backend_path, device.frontend_path)
    async with bus:
        try:
            if device.connected is not None:
                await bus.resume()
                try:
                    await connect(blkif.Ring.from_params(device.connected), again=True)
                except GuestError as error:
                    bus.fail(error)
            async for step in bus:
                match step:
                    case Step.ANNOUNCE:
                        await let_go()
                        await bus.announce(features(device, disk))
                    case Step.CONNECT:
                        try:
                            nodes = await bus.frontend_nodes(blkif.FRONTEND_NODES)
                            ring = blkif.frontend_ring(nodes, max_order=device.options.max_ring_page_order)
                            await connect(ring, again=False)
                            await bus.switch(XenbusState.CONNECTED)
                        except GuestError as error:
                            bus.fail(error)
                    case Step.CLOSE:
                        await bus.switch(XenbusState.CLOSING)
                    case Step.FAIL:
                        say(log.error, "stopped", bus.failure)
                        await let_go()
                        await bus.switch(XenbusState.CLOSING)
                    case Step.SHUT:
                        await let_go()
                        await bus.switch(XenbusState.CLOSED)
        finally:
            if vbd is not None:
                await vbd.close(final=True)
            await disk.close()
            if vbd is not None and not disk.inflight:
                vbd.give_back()


def features(device: Device, disk: RawDisk) -> dict[str, str]:
    """The backend's nodes for this disk."""
    return blkif.features(
        sectors=disk.sectors,
        sector_size=disk.sector_size,
        physical_sector_size=disk.physical_sector_size,
        readonly=device.readonly,
        cdrom=device.cdrom,
        max_ring_page_order=device.options.max_ring_page_order,
        max_indirect_segments=device.options.max_indirect_segments,
        discard=disk.discard,
    )


class Vbd:
    """One connection: the ring's pages, its journal, the guest's port, and the pump."""

    def __init__(self, device: Device, disk: RawDisk, where: blkif.Ring) -> None:
        self._device = device
        self._disk = disk
        self._where = where
        self._pages: list[Page] = []
        self._journal: Journal | None = None
        self._ring: BlkRing | None = None
        self._channel: Channel | None = None
        self._pump: asyncio.Future[None] | None = None
        self._broken = False
        self._refused = 0

    async def open(self, failed: Callable[[Exception], None], *, again: bool) -> None:
        """Maps the ring, binds the port, serves. `again`: the ring lives, an earlier worker served it.

        GuestError (a gref, a port), HostError (the journal): whatever was taken is given back. An error later on
        goes to `failed`.
        """
        device, where = self._device, self._where
        try:
            for gref in where.grefs:
                self._pages.append(device.grants.map(gref, write=True))
            self._journal = Journal(device.journal_fd)
            if not again:
                self._journal.reset()
            self._ring = ring = BlkRing(
                device.grants,
                self._pages,
                abi=where.layout.abi,
                journal=self._journal,
                sectors=self._disk.sectors,
                readonly=device.readonly,
                max_indirect=device.options.max_indirect_segments,
            )
            (self._channel,) = (channel,) = await device.bind([where.port])
            # before the first request is taken: from here on this ring survives the worker
            device.connected_as(where.params())
            replay = ring.attach() if again else []
            channel.watch(ring.pending, ring.arm)
            self._pump = channel.drive(self._serve(ring, channel, replay, again=again))
            self._disk.wake = channel.step
        except BaseException:
            await self.close()
            raise
        self._pump.add_done_callback(lambda pump: self._ended(pump, failed))

    def _ended(self, pump: asyncio.Future[None], failed: Callable[[Exception], None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if isinstance(error, Exception):
            self._broken = True
            failed(error)

    async def _serve(self, ring: BlkRing, channel: Channel, replay: list[Req], *, again: bool) -> None:
        """The pump: no wait but the one for work."""
        disk = self._disk
        for req in replay:
            self._begin(ring, req)
        while True:
            last = ring.requests + ring.size  # a guest that fills the ring as fast as it is emptied waits its turn
            while True:
                if disk.inflight:
                    for req, status in disk.finished():
                        ring.done(req, status)
                most = last - ring.requests
                for req in ring.run(disk.fd, most, PUSH_BYTES) if disk.nowait else ring.take(most):
                    self._begin(ring, req)
                if disk.inflight:  # those that were done at once
                    for req, status in disk.finished():
                        ring.done(req, status)
                # an earlier worker may have died between its push and its notification
                if ring.push() or again:
                    channel.notify()
                    again = False
                if ring.requests >= last or not ring.pending():
                    break
            await channel.kicked()

    def _begin(self, ring: BlkRing, req: Req) -> None:
        if req.status == blkif.Status.OKAY:
            self._disk.start(req)
            return
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # a guest that sends nothing else must not fill the log
            log.warning("%s: request %d refused: %s (%d so far)", self._device.name, req.id, req.reason, self._refused)
        ring.done(req, req.status)

    def counters(self) -> dict[str, int]:
        """Plain integers by name."""
        ring, channel = self._ring, self._channel
        counted = {"refused": self._refused}
        if ring is not None:
            counted |= {"requests": ring.requests, "responses": ring.responses, "bytes": ring.bytes}
        if channel is not None:
            counted |= {
                "kicks": channel.kicks,
                "wakeups": channel.wakeups,
                "notifications": channel.notifications,
            }
        return counted

    async def close(self, *, final: bool = False) -> None:
        """Takes nothing more, waits for what is at the disk, answers it, gives port and pages back.

        `final`: waits DRAIN_SECONDS at most, the device ends. Else as long as it takes: a storage that hangs holds up
        its own disk, but neither does the guest get pages back that are still written to, nor the next connection
        answers that are not its own.
        """
        if self._pump is not None:
            self._pump.cancel()
        ring, channel = self._ring, self._channel
        if ring is not None:
            await self._drain(ring, final=final)
            if not self._broken and ring.push() and channel is not None:
                channel.notify()
        if channel is not None:
            await self._device.unbind([channel])
        if not self._disk.inflight:  # else the kernel may still write into these pages: they stay pinned
            self.give_back()

    def give_back(self) -> None:
        """The pages, unpinned; nothing is at the disk any more. Idempotent."""
        if self._ring is not None:
            self._ring.close()
        if self._journal is not None:
            self._journal.close()
        for page in self._pages:
            page.close()

    async def _drain(self, ring: BlkRing, *, final: bool) -> None:
        """Waits for what is at the disk and answers it."""
        disk, due = self._disk, asyncio.Event()
        disk.wake = due.set

        async def quiet() -> None:
            while True:
                due.clear()
                for req, status in disk.finished():
                    ring.done(req, status)
                if not disk.inflight:
                    return
                await due.wait()

        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await quiet()
        except TimeoutError:
            what = "left to the kernel" if final else "waiting"
            log.error(
                "%s: %d requests are still at the disk after %g s: %s",
                *(self._device.name, disk.inflight, DRAIN_SECONDS, what),
            )
            if not final:
                await quiet()
        finally:
            disk.wake = None
