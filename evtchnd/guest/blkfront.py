"""A guest's block frontend: handshake, one or several queues, requests at any depth; every response is checked once."""

from __future__ import annotations

from collections.abc import Callable

from evtchnd.abi import XenbusState
from evtchnd.blkif import (
    MAX_INDIRECT_PAGES,
    MAX_SEGMENTS,
    SEGMENTS_PER_INDIRECT_PAGE,
    VDISK_READONLY,
    X86_64,
    Layout,
)
from evtchnd.guest.blkqueue import Completion, Manner, Queue
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.guest.xenbus import Frontend
from evtchnd.guest.xenstore import XenStore
from evtchnd.ring import FrontRing

__all__ = ["Blkfront", "Completion", "Queue"]

DEFAULT_TIMEOUT = 30.0


class Blkfront:
    """One disk. Not for several threads at once; each of its `queues` may have a thread of its own.

    depth      requests in flight a queue (at most what the ring holds; None: the ring's size)
    segments   pages a request (4 KiB each); above 11 they are indirect, as far as the backend offers that
    queues     rings with an event channel each; what is asked of the Blkfront itself goes through the first
    spin_us    how long `complete` looks at the ring before it sleeps on the event channel
    regrant    each request has grants of its own (see blkqueue.py)
    copy       False: READs bring no data (a load that only counts)

    sectors: in units of 512 bytes, whatever sector_size (bytes) is
    """

    sectors: int
    sector_size: int
    physical_sector_size: int
    info: int
    readonly: bool
    can_flush: bool
    can_discard: bool
    max_indirect: int

    def __init__(
        self,
        domain: Domain,
        store: XenStore,
        devid: int,
        *,
        depth: int | None = None,
        segments: int = MAX_SEGMENTS,
        ring_pages: int = 1,
        queues: int = 1,
        layout: Layout = X86_64,
        spin_us: int = 50,
        regrant: bool = False,
        copy: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self.domain = domain
        self.devid = devid
        self.layout = layout
        self.connected = False
        self.queues: list[Queue] = []
        self._count = queues
        self._store = store
        self._depth = depth
        self._segments = segments
        self._ring_pages = ring_pages
        self._manner = Manner(layout, spin_us, regrant, copy, timeout)

    # ---- life

    def connect(self) -> None:
        """The handshake, up to Connected on both ends."""
        self.bus = bus = Frontend(self._store, "vbd", self.devid, timeout=self._manner.timeout)
        if bus.state() != XenbusState.INITIALISING:
            bus.switch(XenbusState.INITIALISING)
        bus.wait_backend(XenbusState.INIT_WAIT)
        most = 1 << bus.backend("max-ring-page-order", 0)
        if self._ring_pages > most:
            raise GuestFault(f"vbd {self.devid}: the backend takes rings of {most} pages")
        most = bus.backend("multi-queue-max-queues", 1)
        if self._count > most:
            raise GuestFault(f"vbd {self.devid}: the backend takes {most} queues")
        self.queues = []
        for index in range(self._count):
            name = f"vbd {self.devid}" + (f": queue {index}" if self._count > 1 else "")
            self.queues.append(Queue(self.domain, name, bus.backend_domid, self._ring_pages, self._manner))
        bus.switch(XenbusState.INITIALISED, self.nodes())
        if bus.wait_backend(XenbusState.CONNECTED, XenbusState.CLOSING, XenbusState.CLOSED) != XenbusState.CONNECTED:
            raise GuestFault(f"vbd {self.devid}: the backend closed instead of connecting")
        self.read_features()
        limit = max(MAX_SEGMENTS, min(self.max_indirect, MAX_INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE))
        for queue in self.queues:
            queue.make_slots(min(self._segments, limit), self._depth)
        bus.switch(XenbusState.CONNECTED)
        self.connected = True

    def nodes(self) -> dict[str, str]:
        """What it publishes, as Linux does: with one queue all of it side by side, with more a folder for each."""
        nodes = {"protocol": self.layout.name}
        if self._ring_pages > 1:
            nodes["ring-page-order"] = str(self._ring_pages.bit_length() - 1)
        if self._count == 1:
            return {**nodes, **self.queues[0].nodes()}
        nodes["multi-queue-num-queues"] = str(self._count)
        for index, queue in enumerate(self.queues):
            nodes |= {f"queue-{index}/{name}": value for name, value in queue.nodes().items()}
        return nodes

    def read_features(self) -> None:
        """What the backend says of the disk, now: after a change of size its state is written anew."""
        backend = self.bus.backend
        self.sectors = backend("sectors")
        self.sector_size = backend("sector-size")
        self.physical_sector_size = backend("physical-sector-size", self.sector_size)
        self.info = backend("info", 0)
        self.readonly = bool(self.info & VDISK_READONLY)
        self.can_flush = bool(backend("feature-flush-cache", 0))
        self.can_discard = bool(backend("feature-discard", 0))
        self.max_indirect = backend("feature-max-indirect-segments", 0)

    def disconnect(self) -> None:
        """Waits for what is in flight, then closes: 5, 6 on both ends; pages, grants and port are free again."""
        for queue in self.queues:
            while queue.in_flight and self.connected:
                queue.complete()
        self.connected = False
        self.bus.switch(XenbusState.CLOSING)
        self.bus.wait_backend(XenbusState.CLOSING, XenbusState.CLOSED)
        self.bus.switch(XenbusState.CLOSED)
        self.bus.wait_backend(XenbusState.CLOSED)
        self.release()

    def release(self) -> None:
        """Takes everything back. GuestFault if the backend still uses a page."""
        self.connected = False
        for queue in self.queues:
            queue.release()

    def forget(self) -> None:
        """Lets go of the pages only, as a machine that stops: grants and ports stay as they are."""
        self.connected = False
        for queue in self.queues:
            queue.forget()

    # ---- the first queue

    @property
    def ring(self) -> FrontRing:
        return self.queues[0].ring

    @property
    def ring_size(self) -> int:
        return self.queues[0].ring_size

    @property
    def ring_gfn(self) -> int:
        return self.queues[0].ring_gfn

    @property
    def ring_grefs(self) -> list[int]:
        return self.queues[0].ring_grefs

    @property
    def port(self) -> int:
        return self.queues[0].port

    @property
    def segments(self) -> int:
        return self.queues[0].segments

    @property
    def depth(self) -> int:
        return self.queues[0].depth

    @property
    def requests(self) -> int:
        return self.queues[0].requests

    @property
    def responses(self) -> int:
        return self.queues[0].responses

    @property
    def kicks(self) -> int:
        return self.queues[0].kicks

    @property
    def sleeps(self) -> int:
        return self.queues[0].sleeps

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return self.queues[0].in_flight

    @property
    def room(self) -> int:
        """Requests that can be submitted now."""
        return self.queues[0].room

    @property
    def most_sectors(self) -> int:
        """Sectors of 512 bytes that fit one request."""
        return self.queues[0].most_sectors

    def submit_read(self, sector: int, count: int, *, first: int = 0) -> int:
        """As Queue.submit_read."""
        return self.queues[0].submit_read(sector, count, first=first)

    def submit_write(self, sector: int, data: bytes | memoryview, *, first: int = 0) -> int:
        """As Queue.submit_write."""
        return self.queues[0].submit_write(sector, data, first=first)

    def submit_flush(self) -> int:
        """As Queue.submit_flush."""
        return self.queues[0].submit_flush()

    def submit_discard(self, sector: int, count: int) -> int:
        """As Queue.submit_discard."""
        return self.queues[0].submit_discard(sector, count)

    def submit_raw(self, build: Callable[[int, list[int]], bytes], *, op: int) -> int:
        """As Queue.submit_raw."""
        return self.queues[0].submit_raw(build, op=op)

    def push(self) -> None:
        """As Queue.push."""
        self.queues[0].push()

    def complete(self, timeout: float | None = None) -> list[Completion]:
        """As Queue.complete."""
        return self.queues[0].complete(timeout)

    def read(self, sector: int, count: int) -> bytes:
        """As Queue.read."""
        return self.queues[0].read(sector, count)

    def write(self, sector: int, data: bytes | memoryview) -> None:
        """As Queue.write."""
        self.queues[0].write(sector, data)

    def flush(self) -> None:
        """As Queue.flush."""
        self.queues[0].flush()
