"""One connection of a vbd: its queues, each a ring with a journal, an event channel and a pump; one disk for all.

Requests go from a guest's ring to the disk and back without a wait in between: `Queue._serve` is stepped straight from
a kick, a poll that hit, or a completion; it takes what is there, starts it, answers what is finished, publishes once,
notifies once. What the disk has finished may be any queue's: whoever collects answers it in its own ring, and steps
that queue, which publishes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from evtchnd._core import BlkRing, Req
from evtchnd.blkif import Layout
from evtchnd.channel import Channel, on_failure
from evtchnd.grants import Page
from evtchnd.journal import Journal
from evtchnd.worker.device import Device

from . import blkif
from .disk import RawDisk

log = logging.getLogger(__name__)

# What is at the disk when a ring is let go: as long as Linux' netback waits for its own, and libxl for a device.
DRAIN_SECONDS = 10.0
# Answers are published when they are so many bytes: the guest takes them while the rest of a deep ring is served. Less
# wakes a sleeping guest too often (256 KiB: sequential reads of 128 KiB lost a tenth).
PUSH_BYTES = 1 << 20


class Vbd:
    """The rings that a frontend has published, served from `open()` to `close()`."""

    def __init__(self, device: Device, disk: RawDisk, rings: blkif.Rings) -> None:
        self._device = device
        self._disk = disk
        self._rings = rings
        self._queues: list[Queue] = []

    async def open(self, failed: Callable[[Exception], None], *, again: bool) -> None:
        """Maps the rings, binds their ports, serves. `again`: the rings live, an earlier worker served them.

        GuestError (a gref, a port), HostError (a journal): whatever was taken is given back. An error later on goes to
        `failed`, once for each queue that it stops.
        """
        device, rings = self._device, self._rings
        steps: dict[object, Callable[[], None]] = {}
        try:
            for number, where in enumerate(rings.queues):
                queue = Queue(device, self._disk, number, steps)
                self._queues.append(queue)
                queue.map(where, rings.layout, again=again)
            channels = await device.bind([where.port for where in rings.queues])
            for queue, channel in zip(self._queues, channels, strict=True):
                queue.channel = channel
            # before the first request is taken: from here on these rings survive the worker
            device.connected_as(rings.params())
            # Whichever queue is stepped, it collects what the disk has done for all.
            self._disk.wake = channels[0].step
            for queue in self._queues:
                queue.start(failed, again=again)
        except BaseException:
            await self.close()
            raise

    def resize(self, sectors: int) -> None:
        """The disk has `sectors` of 512 bytes from now on."""
        for queue in self._queues:
            queue.ring.sectors = sectors

    def counters(self) -> Mapping[str, int]:
        """What only grows, plain integers by name: of all queues, then `queue-N/` of each where there are several."""
        each = [queue.counters() for queue in self._queues]
        total: Counter[str] = Counter()
        for counted in each:
            total.update(counted)
        if len(each) > 1:
            for number, counted in enumerate(each):
                total.update({f"queue-{number}/{name}": value for name, value in counted.items()})
        return total

    def gauges(self) -> Mapping[str, int]:
        """What holds now: the number of queues, and of requests that are not answered."""
        inflight = [queue.ring.inflight for queue in self._queues]
        found = {"queues": len(inflight), "in_flight": sum(inflight)}
        if len(inflight) > 1:
            found |= {f"queue-{number}/in_flight": value for number, value in enumerate(inflight)}
        return found

    async def close(self, *, final: bool = False) -> None:
        """Takes nothing more, waits for what is at the disk, answers it, gives ports and pages back.

        `final`: waits DRAIN_SECONDS at most, the device ends. Else as long as it takes: a storage that hangs holds up
        its own disk, but neither does the guest get pages back that are still written to, nor the next connection
        answers that are not its own.
        """
        for queue in self._queues:
            queue.stop()
        await self._drain(final=final)
        for queue in self._queues:
            queue.publish()
        await self._device.unbind([queue.channel for queue in self._queues if queue.channel is not None])
        if not self._disk.inflight:  # else the kernel may still write into these pages: they stay pinned
            self.give_back()

    def give_back(self) -> None:
        """The pages, unpinned; nothing is at the disk any more. Idempotent."""
        for queue in self._queues:
            queue.give_back()

    async def _drain(self, *, final: bool) -> None:
        """Waits for what is at the disk and answers it."""
        disk, due = self._disk, asyncio.Event()
        disk.wake = due.set

        async def quiet() -> None:
            while True:
                due.clear()
                for req, status in disk.finished():
                    req.owner.done(req, status)
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


class Queue:
    """One ring. `map()`, then `channel`, then `start()`; `stop()`, `publish()`, `give_back()`.

    steps: of every queue of this vbd, how it is woken, by its ring.
    """

    ring: BlkRing

    def __init__(self, device: Device, disk: RawDisk, number: int, steps: dict[object, Callable[[], None]]) -> None:
        self.channel: Channel | None = None
        self._device = device
        self._disk = disk
        self._number = number
        self._steps = steps
        self._pages: list[Page] = []
        self._journal: Journal | None = None
        self._mapped = False
        self._replay: list[Req] = []
        self._pump: asyncio.Future[None] | None = None
        self._broken = False
        self._refused = 0

    def map(self, where: blkif.Queue, layout: Layout, *, again: bool) -> None:
        """The pages and the journal. GuestError, HostError."""
        device = self._device
        for gref in where.grefs:
            self._pages.append(device.grants.map(gref, write=True))
        self._journal = Journal(device.journal_fd, self._number)
        if not again:
            self._journal.reset()
        self.ring = BlkRing(
            device.grants,
            self._pages,
            abi=layout.abi,
            journal=self._journal,
            sectors=self._disk.sectors,
            sector_size=self._disk.sector_size,
            readonly=device.readonly,
            max_indirect=device.options.max_indirect_segments,
        )
        self._mapped = True
        if again:
            self._replay = self.ring.attach()

    def start(self, failed: Callable[[Exception], None], *, again: bool) -> None:
        """Serves; what a dead worker had not answered comes first."""
        channel = self.channel
        if channel is None:
            raise RuntimeError("a queue is started with its channel")
        self._steps[self.ring] = channel.step
        channel.watch(self.ring.pending, self.ring.arm)
        self._pump = channel.drive(self._serve(channel, again=again))

        def broken(error: Exception) -> None:
            self._broken = True
            failed(error)

        on_failure(self._pump, broken)

    async def _serve(self, channel: Channel, *, again: bool) -> None:
        """The pump: no wait but the one for work."""
        disk, ring = self._disk, self.ring
        replay, self._replay = self._replay, []
        for req in replay:
            self._begin(ring, req)
        while True:
            last = ring.requests + ring.size  # a guest that fills the ring as fast as it is emptied waits its turn
            while True:
                if disk.inflight:
                    self._collect(ring)
                most = last - ring.requests
                for req in ring.run(disk.fd, most, PUSH_BYTES) if disk.nowait else ring.take(most):
                    self._begin(ring, req)
                if disk.inflight:  # those that were done at once
                    self._collect(ring)
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

    def _collect(self, mine: BlkRing) -> None:
        """Answers what the disk has done, for whatever queue; the others are stepped, and publish theirs."""
        others: set[BlkRing] = set()
        for req, status in self._disk.finished():
            ring = req.owner
            ring.done(req, status)
            if ring is not mine:
                others.add(ring)
        for ring in others:
            self._steps[ring]()

    def counters(self) -> dict[str, int]:
        """What only grows, plain integers by name."""
        ring, channel = self.ring, self.channel
        counted = {
            "requests": ring.requests,
            "responses": ring.responses,
            "bytes": ring.bytes,
            "sectors_read": ring.sectors_read,
            "sectors_written": ring.sectors_written,
            "sectors_discarded": ring.sectors_discarded,
            "flushes": ring.flushes,
            "errors": ring.errors,
            "refused": self._refused,
        }
        if channel is not None:
            counted |= {
                "kicks": channel.kicks,
                "wakeups": channel.wakeups,
                "spurious_kicks": channel.spurious,
                "notifications": channel.notifications,
            }
        return counted

    def stop(self) -> None:
        """Takes nothing more."""
        if self._pump is not None:
            self._pump.cancel()

    def publish(self) -> None:
        """The last answers."""
        if self._mapped and not self._broken and self.ring.push() and self.channel is not None:
            self.channel.notify()

    def give_back(self) -> None:
        """Unmaps. Idempotent."""
        if self._mapped:
            self.ring.close()
        if self._journal is not None:
            self._journal.close()
        for page in self._pages:
            page.close()
