"""One queue of a guest's network frontend: a transmit ring, a receive ring, one or two event channels.

Every page is granted once for the queue's life: slot i of the receive ring always has page i, a transmit request any
page that is free. Whatever is answered is checked: an answered page must not be in use any more.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from evtchnd.abi import PAGE_SIZE
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.netif import (
    EXTRA,
    EXTRA_GSO,
    EXTRA_MORE,
    RX_REQUEST,
    RX_RESPONSE,
    TX_REQUEST,
    TX_RESPONSE,
    Extra,
    RxFlag,
    Status,
    TxFlag,
)
from evtchnd.ring import FrontRing, RingLayout

# A sleep on the event channel, after which the ring is looked at whether anything came or not.
_NAP = 1.0
_TX = RingLayout(TX_REQUEST.size, TX_RESPONSE.size, 1)
_RX = RingLayout(RX_REQUEST.size, RX_RESPONSE.size, 1)
ENTRIES = 256


@dataclass
class Frame:
    """A frame with what netif says of it.

    csum_blank: its TCP or UDP checksum is the pseudo-header's only; validated: it is known to be right
    gso_size, gso_type: bytes of payload a segment, netif's type; 0: it is one packet
    extras: of other types, (type, 6 bytes)
    """

    data: bytes
    csum_blank: bool = False
    validated: bool = False
    gso_size: int = 0
    gso_type: int = 0
    extras: list[tuple[int, bytes]] = field(default_factory=list)
    slots: int = 0


def gso_extra(size: int, kind: int, *, more: bool = False) -> bytes:
    """An extra of type GSO."""
    return EXTRA_GSO.pack(Extra.GSO, EXTRA_MORE if more else 0, size, kind, 0, 0)


class Queue:
    """One pair of rings. Not for several threads at once. `name` begins every error."""

    def __init__(self, domain: Domain, name: str, backend_domid: int, *, split: bool, timeout: float) -> None:
        self.domain = domain
        self.name = name
        self.answers: list[tuple[int, int]] = []  # (slots of the packet, status), when `keep`
        self.keep = False
        self.sent = self.tx_errors = self.received = self.kicks = 0
        self._timeout = timeout
        self.ring_gfns = [domain.alloc(1), domain.alloc(1)]
        self._views = [domain.vm.ram.view(gfn) for gfn in self.ring_gfns]
        for view in self._views:
            view[:] = bytes(PAGE_SIZE)
        self.tx = FrontRing(self._views[:1], _TX)
        self.rx = FrontRing(self._views[1:], _RX)
        self.grefs = [domain.grant(gfn, domid=backend_domid) for gfn in self.ring_gfns]
        self.ports = [domain.vm.alloc_unbound(backend_domid) for _ in range(2 if split else 1)]
        self.tx_gfn = domain.alloc(ENTRIES)
        self.rx_gfn = domain.alloc(ENTRIES)
        self.tx_views = [domain.vm.ram.view(self.tx_gfn + index) for index in range(ENTRIES)]
        self.rx_views = [domain.vm.ram.view(self.rx_gfn + index) for index in range(ENTRIES)]
        self.tx_grefs = [
            domain.grant(self.tx_gfn + index, domid=backend_domid, readonly=True) for index in range(ENTRIES)
        ]
        self.rx_grefs = [domain.grant(self.rx_gfn + index, domid=backend_domid) for index in range(ENTRIES)]
        self.free = list(range(ENTRIES))[::-1]
        self._expected: list[int] = []  # the page of each request in the ring, -1: an extra
        self._first: int | None = None

    def nodes(self) -> dict[str, str]:
        """What the backend has to know of it."""
        names = ["event-channel"] if len(self.ports) == 1 else ["event-channel-tx", "event-channel-rx"]
        ports = {name: str(port) for name, port in zip(names, self.ports, strict=True)}
        return {"tx-ring-ref": str(self.grefs[0]), "rx-ring-ref": str(self.grefs[1]), **ports}

    def release(self) -> None:
        """Takes everything back. GuestFault if the backend still uses a page."""
        for view in (*self.tx_views, *self.rx_views):
            view.release()
        self.tx.close()
        self.rx.close()
        for view in self._views:
            view.release()
        for gref in (*self.grefs, *self.tx_grefs, *self.rx_grefs):
            self.domain.end_grant(gref)
        for gfn, pages in ((self.tx_gfn, ENTRIES), (self.rx_gfn, ENTRIES), *((gfn, 1) for gfn in self.ring_gfns)):
            self.domain.free(gfn, pages)
        for port in self.ports:
            self.domain.vm.close_port(port)

    # ---- transmit

    def room(self) -> int:
        """Slots that a packet may have now."""
        return min(self.tx.free, len(self.free))

    def send(self, frame: Frame, sizes: Iterable[int] | None = None, *, offset: int = 0) -> None:
        """Puts a frame into the ring, in parts of `sizes` bytes (None: whole pages) at `offset` of their pages.

        It waits for room. `push` publishes it.
        """
        data = frame.data
        if sizes is None:
            step = PAGE_SIZE - offset
            parts = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
        else:
            parts, at = [], 0
            for size in sizes:
                parts.append(data[at : at + size])
                at += size
        extras = [EXTRA.pack(kind, 0, body) for kind, body in frame.extras]
        if frame.gso_size:
            extras.append(gso_extra(frame.gso_size, frame.gso_type))
        for index in range(len(extras) - 1):
            extras[index] = extras[index][:1] + bytes([EXTRA_MORE]) + extras[index][2:]
        flags = TxFlag.CSUM_BLANK | TxFlag.DATA_VALIDATED if frame.csum_blank else TxFlag(0)
        flags |= TxFlag.DATA_VALIDATED if frame.validated else 0
        self.wait_room(len(parts) + len(extras))
        slots: list[tuple[int, int, int, int]] = []
        for part in parts:
            page = self.free.pop()
            self.tx_views[page][offset : offset + len(part)] = part
            slots.append((page, offset, 0, len(part)))
        self.put(slots, len(data), flags, extras)

    def put(
        self,
        slots: Sequence[tuple[int, int, int, int]],
        total: int,
        flags: int = 0,
        extras: Sequence[bytes] = (),
        grefs: Sequence[int] | None = None,
    ) -> None:
        """The requests of one packet: (page, offset, flags, size) each; the first gets `total`, `flags`, `extras`."""
        for number, (page, offset, own, size) in enumerate(slots):
            mark = own | (TxFlag.MORE_DATA if number + 1 < len(slots) else 0)
            if number == 0:
                mark |= flags | (TxFlag.EXTRA_INFO if extras else 0)
                size = total
            gref = grefs[number] if grefs is not None else self.tx_grefs[page]
            self.tx.request(TX_REQUEST.pack(gref, offset, mark, page, size & 0xFFFF))
            self._expected.append(page)
            if number == 0:
                for extra in extras:
                    self.tx.request(extra.ljust(TX_REQUEST.size, b"\0"))
                    self._expected.append(-1)
        self.sent += 1

    def push(self) -> None:
        """Publishes what was put; kicks if the backend asked to be."""
        if self.tx.push():
            self.kicks += 1
            self.domain.vm.send(self.ports[0])

    def wait_room(self, slots: int) -> None:
        """Until a packet of so many slots fits."""
        if self.room() < slots:
            self.reap()
        deadline = time.monotonic() + self._timeout
        while self.room() < slots:
            self.push()
            if not self.tx.arm():
                if time.monotonic() > deadline:
                    raise GuestFault(f"{self.name}: no transmit slot is answered after {self._timeout} s")
                self.domain.vm.wait(self.ports[0], _NAP)
            self.reap()

    def reap(self) -> None:
        """Takes the answers. GuestFault: one that is not due, or a page in use."""
        for entry in self.tx.responses(ENTRIES):
            ident, status = TX_RESPONSE.unpack_from(entry)
            page = self._expected.pop(0)
            if page < 0:
                if status != Status.NULL:
                    raise GuestFault(f"{self.name}: the answer to an extra is {status}")
                continue
            if ident != page:
                raise GuestFault(f"{self.name}: request {page} is due, the answer is to {ident}")
            if self.domain.in_use(self.tx_grefs[page]):
                raise GuestFault(f"{self.name}: request {page} is answered, its grant is in use")
            if status != Status.OKAY:
                self.tx_errors += 1
            if self.keep:
                self.answers.append((page, status))
            self.free.append(page)

    def flush(self) -> None:
        """Until every request is answered."""
        self.push()
        deadline = time.monotonic() + self._timeout
        self.reap()
        while self._expected:
            if not self.tx.arm():
                if time.monotonic() > deadline:
                    raise GuestFault(f"{self.name}: {len(self._expected)} slots have no answer")
                self.domain.vm.wait(self.ports[0], _NAP)
            self.reap()

    # ---- receive

    def post(self, most: int = ENTRIES) -> None:
        """Posts pages, so that `most` are there."""
        while self.rx.entries - self.rx.free < most:
            slot = self.rx.req_prod & (ENTRIES - 1)
            self.rx.request(RX_REQUEST.pack(slot, 0, self.rx_grefs[slot]))
        if self.rx.push():
            self.kicks += 1
            self.domain.vm.send(self.ports[-1])

    def receive(self, *, post: int = ENTRIES) -> list[Frame]:
        """The frames that are there, copied; posts their pages again. GuestFault for what no backend may do."""
        found = []
        cons = self.rx.rsp_cons
        entries = self.rx.responses(ENTRIES)
        at = 0
        while at < len(entries):
            frame, used = self._frame(entries, at, cons)
            at += used
            self.received += 1
            if frame is not None:
                found.append(frame)
        if post:
            self.post(post)
        return found

    def _frame(self, entries: list[bytes], at: int, cons: int) -> tuple[Frame | None, int]:
        """The frame whose first response is number `at`; None: the backend answered with an error."""
        ident, offset, flags, status = RX_RESPONSE.unpack_from(entries[at])
        frame = Frame(
            b"", csum_blank=bool(flags & RxFlag.CSUM_BLANK), validated=bool(flags & RxFlag.DATA_VALIDATED), slots=1
        )
        used = 1
        more = bool(flags & RxFlag.EXTRA_INFO)
        while more:
            kind, extra_flags, body = EXTRA.unpack_from(entries[at + used])
            self._given_back(cons + at + used)
            if kind == Extra.GSO:
                frame.gso_size, frame.gso_type = struct.unpack_from("<HB", body)
            elif Extra.GSO < kind <= Extra.XDP:
                frame.extras.append((kind, body))
            else:
                raise GuestFault(f"{self.name}: an extra of type {kind}")
            more = bool(extra_flags & EXTRA_MORE)
            used += 1
        parts = [self._part(cons + at, ident, offset, status)]
        while flags & RxFlag.MORE_DATA:
            ident, offset, flags, status = RX_RESPONSE.unpack_from(entries[at + used])
            parts.append(self._part(cons + at + used, ident, offset, status))
            used += 1
            frame.slots += 1
        if any(part is None for part in parts):
            return None, used
        frame.data = b"".join(part for part in parts if part is not None)
        return frame, used

    def _given_back(self, index: int) -> int:
        slot = index & (ENTRIES - 1)
        if self.domain.in_use(self.rx_grefs[slot]):
            raise GuestFault(f"{self.name}: receive slot {slot} is answered, its grant is in use")
        return slot

    def _part(self, index: int, ident: int, offset: int, status: int) -> bytes | None:
        slot = self._given_back(index)
        if ident != slot:
            raise GuestFault(f"{self.name}: receive slot {slot} has the answer to {ident}")
        if status < 0:
            return None
        if offset + status > PAGE_SIZE:
            raise GuestFault(f"{self.name}: receive slot {slot}: {offset} + {status} crosses its page")
        return bytes(self.rx_views[slot][offset : offset + status])

    def wait(self, timeout: float = _NAP) -> None:
        """Until there is a response to receive, or `timeout`."""
        if not self.rx.arm():
            self.domain.vm.wait(self.ports[-1], timeout)

    def expect(self, count: int, *, mac: bytes = b"", post: int = ENTRIES) -> list[Frame]:
        """`count` frames, of those to `mac` (others, as a host's neighbour discovery, are left out). GuestFault when
        they do not come."""
        found: list[Frame] = []
        deadline = time.monotonic() + self._timeout
        while len(found) < count:
            found += [frame for frame in self.receive(post=post) if frame.data.startswith(mac)]
            if len(found) < count:
                if time.monotonic() > deadline:
                    raise GuestFault(f"{self.name}: {len(found)} of {count} frames came in {self._timeout} s")
                self.wait(0.2)
        return found
