"""One queue of a guest's block frontend: a ring, an event channel, requests at any depth.

Each of `depth` slots owns `segments` neighbouring pages, granted once for the queue's life, so that a request costs
one entry in the ring. With `regrant` every request has grants of its own, read-only for a write, taken back when it is
answered (what Linux does, and dear in Python).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from evtchnd.abi import PAGE_SIZE
from evtchnd.blkif import (
    MAX_SEGMENTS,
    SECTOR_SIZE,
    SECTORS_PER_PAGE,
    SEGMENT,
    SEGMENTS_PER_INDIRECT_PAGE,
    Layout,
    Op,
    Status,
)
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.ring import FrontRing, RingLayout

_TABLE_PAGE = SEGMENTS_PER_INDIRECT_PAGE * SEGMENT.size
# A sleep on the event channel, after which the ring is looked at whether anything came or not.
_NAP = 1.0


@dataclass(frozen=True)
class Manner:
    """How a frontend works; see Blkfront."""

    layout: Layout
    spin_us: int
    regrant: bool
    copy: bool
    timeout: float


@dataclass(slots=True)
class Completion:
    """One answered request. `data` is what a READ brought (bytes), else b""."""

    ident: int
    op: int
    sector: int
    count: int
    status: int
    data: bytes
    nanoseconds: int


class Slot:
    """Pages, grants and the segment table of one request."""

    def __init__(self, domain: Domain, segments: int) -> None:
        self.gfn = domain.alloc(segments)
        self.views = [domain.vm.ram.view(self.gfn + index) for index in range(segments)]
        self.grefs = [domain.grant(self.gfn + index) for index in range(segments)]
        tables = -(-segments // SEGMENTS_PER_INDIRECT_PAGE) if segments > MAX_SEGMENTS else 0
        self.table_gfn = domain.alloc(tables) if tables else 0
        self.tables = [domain.vm.ram.view(self.table_gfn + index) for index in range(tables)]
        self.table_grefs = [domain.grant(self.table_gfn + index) for index in range(tables)]
        self.table = bytearray()
        self.ident = -1
        self.op = 0
        self.sector = 0
        self.count = 0
        self.first = 0
        self.pages = 0
        self.ragged = False
        self.begun = 0
        self.fill()

    def fill(self) -> None:
        """The table of whole pages, in the indirect pages too."""
        self.table[:] = b"".join(SEGMENT.pack(gref, 0, SECTORS_PER_PAGE - 1) for gref in self.grefs)
        for index, view in enumerate(self.tables):
            part = self.table[index * _TABLE_PAGE : (index + 1) * _TABLE_PAGE]
            view[: len(part)] = part

    def patch(self, index: int, first: int, last: int) -> None:
        """Segment `index` is sectors `first` to `last` of its page."""
        entry = SEGMENT.pack(self.grefs[index], first, last)
        at = index * SEGMENT.size
        self.table[at : at + SEGMENT.size] = entry
        if self.tables:
            at %= _TABLE_PAGE
            self.tables[index // SEGMENTS_PER_INDIRECT_PAGE][at : at + SEGMENT.size] = entry

    def put(self, data: bytes | memoryview, first: int) -> None:
        """Copies a write's data into the pages."""
        at = first * SECTOR_SIZE
        view = self.views[0]
        head = min(PAGE_SIZE - at, len(data))
        view[at : at + head] = data[:head]
        for index in range(1, self.pages):
            part = data[head : head + PAGE_SIZE]
            self.views[index][: len(part)] = part
            head += PAGE_SIZE

    def get(self) -> bytes:
        """A read's data."""
        at, size = self.first * SECTOR_SIZE, self.count * SECTOR_SIZE
        if self.pages == 1:
            return bytes(self.views[0][at : at + size])
        return b"".join(self.views[: self.pages])[at : at + size]

    def forget(self) -> None:
        for view in (*self.views, *self.tables):
            view.release()

    def release(self, domain: Domain) -> None:
        self.forget()
        for gref in (*self.grefs, *self.table_grefs):
            domain.end_grant(gref)
        domain.free(self.gfn, len(self.views))
        if self.tables:
            domain.free(self.table_gfn, len(self.tables))


class Queue:
    """One ring. Not for several threads at once; several queues may have a thread each, as a guest's vCPUs do.

    `name` begins every error. `make_slots` before the first request.
    """

    def __init__(self, domain: Domain, name: str, backend_domid: int, pages: int, manner: Manner) -> None:
        self.domain = domain
        self.name = name
        self.layout = layout = manner.layout
        self.requests = self.responses = self.kicks = self.sleeps = 0
        self.segments = self.depth = 0
        self._backend_domid = backend_domid
        self._ring_pages = pages
        self._spin_ns = manner.spin_us * 1000
        self._regrant = manner.regrant
        self._copy = manner.copy
        self._timeout = manner.timeout
        self._slots: list[Slot] = []
        self._idle: list[Slot] = []
        self._open: dict[int, Slot] = {}
        self._serial = 0
        self.ring_gfn = domain.alloc(pages)
        self._ring_views = [domain.vm.ram.view(self.ring_gfn + index) for index in range(pages)]
        for view in self._ring_views:
            view[:] = bytes(PAGE_SIZE)
        ring_layout = RingLayout(layout.request_size, layout.response_size, pages)
        self.ring = FrontRing(self._ring_views, ring_layout)
        self.ring_size = ring_layout.entries
        self.ring_grefs = [domain.grant(self.ring_gfn + index, domid=backend_domid) for index in range(pages)]
        self.port = domain.vm.alloc_unbound(backend_domid)

    def nodes(self) -> dict[str, str]:
        """What the backend has to know of it."""
        if self._ring_pages == 1:
            refs = {"ring-ref": str(self.ring_grefs[0])}
        else:
            refs = {f"ring-ref{index}": str(gref) for index, gref in enumerate(self.ring_grefs)}
        return {**refs, "event-channel": str(self.port)}

    def make_slots(self, segments: int, depth: int | None) -> None:
        """Pages for `depth` requests (None: as many as the ring holds) of `segments` pages each."""
        self.segments = segments
        self.depth = min(depth or self.ring_size, self.ring_size)
        self._slots = [Slot(self.domain, self.segments) for _ in range(self.depth)]
        self._idle = self._slots[::-1]

    def release(self) -> None:
        """Takes everything back. GuestFault if the backend still uses a page."""
        for slot in self._slots:
            slot.release(self.domain)
        self._slots = []
        self.forget()
        for gref in self.ring_grefs:
            self.domain.end_grant(gref)
        self.domain.free(self.ring_gfn, self._ring_pages)
        self.domain.vm.close_port(self.port)

    def forget(self) -> None:
        """Lets go of the pages, and of nothing else."""
        for slot in self._slots:
            slot.forget()
        self._slots = []
        self._idle = []
        self._open = {}
        self.ring.close()
        for view in self._ring_views:
            view.release()

    # ---- requests at depth

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._open)

    @property
    def room(self) -> int:
        """Requests that can be submitted now."""
        return len(self._idle)

    @property
    def most_sectors(self) -> int:
        """Sectors that fit one request."""
        return self.segments * SECTORS_PER_PAGE

    def submit_read(self, sector: int, count: int, *, first: int = 0) -> int:
        """Puts a READ of `count` sectors into the ring; `push` publishes it. `first`: sector of its first page."""
        return self._submit(Op.READ, sector, count, first)

    def submit_write(self, sector: int, data: bytes | memoryview, *, first: int = 0) -> int:
        """Puts a WRITE of `data` (whole sectors) into the ring."""
        count, odd = divmod(len(data), SECTOR_SIZE)
        if odd:
            raise ValueError(f"{len(data)} bytes are no whole sectors")
        return self._submit(Op.WRITE, sector, count, first, data)

    def submit_flush(self) -> int:
        """Puts a FLUSH_DISKCACHE into the ring."""
        slot = self._take(Op.FLUSH_DISKCACHE, 0, 0)
        self.ring.request(self.layout.request(Op.FLUSH_DISKCACHE, slot.ident, 0, ()))
        return slot.ident

    def submit_discard(self, sector: int, count: int) -> int:
        """Puts a DISCARD into the ring."""
        slot = self._take(Op.DISCARD, sector, 0)
        self.ring.request(self.layout.discard_request(slot.ident, sector, count))
        return slot.ident

    def submit_raw(self, build: Callable[[int, list[int]], bytes], *, op: int) -> int:
        """Puts what `build(ident, grefs of the slot's pages)` makes into the ring: any request, however wrong.

        `op` is what the response must carry.
        """
        slot = self._take(op, 0, 0)
        self.ring.request(build(slot.ident, slot.grefs))
        return slot.ident

    def _take(self, op: int, sector: int, count: int) -> Slot:
        if not self._idle:
            raise GuestFault(f"{self.name}: {self.depth} requests are in flight already")
        slot = self._idle.pop()
        self._serial += 1
        slot.ident = self._serial
        slot.op = op
        slot.sector = sector
        slot.count = count
        slot.pages = 0
        slot.begun = time.perf_counter_ns()
        self._open[slot.ident] = slot
        self.requests += 1
        return slot

    def _submit(self, op: int, sector: int, count: int, first: int, data: bytes | memoryview = b"") -> int:
        pages = (first + count + SECTORS_PER_PAGE - 1) // SECTORS_PER_PAGE
        if not 0 < pages <= self.segments:
            raise ValueError(f"{count} sectors do not fit {self.segments} segments")
        slot = self._take(op, sector, count)
        slot.first = first
        slot.pages = pages
        if self._regrant:
            self._grant_again(slot, readonly=op == Op.WRITE)
        if data:
            slot.put(data, first)
        slot.ragged = bool(first or (first + count) % SECTORS_PER_PAGE)
        if slot.ragged:
            last = (first + count - 1) % SECTORS_PER_PAGE
            slot.patch(pages - 1, 0, last)
            slot.patch(0, first, last if pages == 1 else SECTORS_PER_PAGE - 1)
        if pages <= MAX_SEGMENTS:
            entry = self.layout.request_head.pack(op, pages, 0, slot.ident, sector)
            self.ring.request(entry + slot.table[: pages * SEGMENT.size])
        else:
            used = -(-pages // SEGMENTS_PER_INDIRECT_PAGE)
            self.ring.request(self.layout.indirect_request(op, slot.ident, sector, pages, slot.table_grefs[:used]))
        return slot.ident

    def _grant_again(self, slot: Slot, *, readonly: bool) -> None:
        for index in range(slot.pages):
            self.domain.end_grant(slot.grefs[index])
            slot.grefs[index] = self.domain.grant(slot.gfn + index, domid=self._backend_domid, readonly=readonly)
        slot.fill()

    def push(self) -> None:
        """Publishes what was submitted; kicks if the backend asked to be."""
        if self.ring.push():
            self.kicks += 1
            self.domain.vm.send(self.port)

    def complete(self, timeout: float | None = None) -> list[Completion]:
        """Pushes, then waits for at least one response. GuestFault after `timeout` seconds, or for a wrong response."""
        self.push()
        ring = self.ring
        if not ring.pending():
            self._wait(self._timeout if timeout is None else timeout)
        now = time.perf_counter_ns()
        return [self._finish(entry, now) for entry in ring.responses(self.ring_size)]

    def _wait(self, timeout: float) -> None:
        ring = self.ring
        until = time.perf_counter_ns() + self._spin_ns
        while time.perf_counter_ns() < until:
            if ring.pending():
                return
        deadline = time.monotonic() + timeout
        while not ring.arm():
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestFault(f"{self.name}: {len(self._open)} requests have no response after {timeout} s")
            self.sleeps += 1
            self.domain.vm.wait(self.port, min(left, _NAP))

    def _finish(self, entry: bytes, now: int) -> Completion:
        ident, op, status = self.layout.response.unpack_from(entry)
        slot = self._open.pop(ident, None)
        if slot is None:
            raise GuestFault(f"{self.name}: a response to request {ident}, which is not in flight")
        if op != slot.op:  # of an indirect request: the inner operation, which Linux' blkfront looks at too
            raise GuestFault(f"{self.name}: request {ident} was operation {slot.op}, the response says {op}")
        for gref in slot.grefs[: slot.pages]:
            # "g.e. still in use!": a response may only be seen when its pages are the guest's again
            if self.domain.in_use(gref):
                raise GuestFault(f"{self.name}: request {ident} is answered, its grant {gref} still in use")
        self.responses += 1
        good = slot.op == Op.READ and status == Status.OKAY and self._copy
        data = slot.get() if good and slot.pages else b""
        if slot.ragged:
            slot.fill()
            slot.ragged = False
        self._idle.append(slot)
        return Completion(ident, slot.op, slot.sector, slot.count, status, data, now - slot.begun)

    # ---- one after the other

    def _one(self, ident: int, what: str) -> Completion:
        (done,) = self._until({ident})
        if done.status != Status.OKAY:
            raise OSError(5, f"{self.name}: {what}: status {done.status}")
        return done

    def _until(self, idents: set[int]) -> list[Completion]:
        found = []
        while idents:
            for done in self.complete():
                idents.remove(done.ident)
                found.append(done)
        return found

    def read(self, sector: int, count: int) -> bytes:
        """`count` sectors from `sector`, any number; in as many requests as that takes. OSError for an error status."""
        return b"".join(
            self._one(self.submit_read(at, min(self.most_sectors, sector + count - at)), f"read at sector {at}").data
            for at in range(sector, sector + count, self.most_sectors)
        )

    def write(self, sector: int, data: bytes | memoryview) -> None:
        """Writes whole sectors at `sector`. OSError for an error status."""
        step = self.most_sectors * SECTOR_SIZE
        for at in range(0, len(data), step):
            where = sector + at // SECTOR_SIZE
            self._one(self.submit_write(where, data[at : at + step]), f"write at sector {where}")

    def flush(self) -> None:
        """Waits until everything that was written is on the disk. OSError for an error status."""
        self._one(self.submit_flush(), "flush")
