# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""A netif transmit ring's back end: packets out of guest pages into a TAP, one writev each (io/netif.h).

    request, 12 bytes   u32 gref | u16 offset | u16 flags | u16 id | u16 size       response   u16 id | s16 status
    extra, in a slot    u8 type | u8 flags | GSO: u16 size, u8 type, u8 pad, u16 features; MCAST: u8 addr[6]

A packet is a request, its extras (flag 8, then flag 1 of each extra), further requests (flag 4 of the one before). The
first request's size is the whole packet's: its own part is what the others leave. Each slot is copied once, and so
are the first 256 bytes of the packet: what is parsed is what is sent (XSA-155), and a header may be split over slots
anywhere. The rest goes from the guest's pages to the TAP as it is.

A write to a TAP is done when it returns, so that nothing is in flight: every slot is answered before the next packet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.answered import Answered
from evtchnd.errors import GuestError

if not cython.compiled:
    from evtchnd._core.words import (
        Mem,
        copy,
        get8,
        get16,
        get32,
        get64,
        put8,
        put16,
        put32,
        put64,
        sys_pwritev,
        u32,
    )

if TYPE_CHECKING:
    from evtchnd._core.framelog import FrameLog
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants: 256 entries of 12 bytes in the ring's page. Slots after the head: 18 are taken
# (XEN_NETIF_NR_SLOTS_MIN), with 19 and 20 the packet is dropped, the 21st ends the vif (Linux' fatal_skb_slots).
# `head` is the vnet header (12) and 256 bytes of the packet: Ethernet 14 + two VLAN tags 8 + IPv6 40 + extension
# headers + TCP 60 leave 134 for the extensions; Linux' netback looks at no more than 256 either (MAX_IPV6_HDR_LEN).

# What `stopped` says: why `run` ended before the ring was empty.
NO_CREDIT = 1
TAP_FULL = 2

OKAY, ERROR, DROPPED = 0, -1, -2


class TxRing:
    """One transmit ring, from the back. Not for several threads. Order of a pump: run, push (True: notify), arm.

    credit: bytes that may be sent now; -1: no limit | stopped: 0, NO_CREDIT or TAP_FULL, of the last `run`
    tap_error: errno of the last write that the TAP refused since it was set to 0 (EIO: down, EBADFD: deleted)
    multicast(add, address) -> bool: what an extra of that type asks for; False: refused
    logs: FrameLogs that get a copy of each frame that was sent, as frames of `queue`; None: nobody looks
    Counters: packets, bytes (frames sent), slots; and packets that were dropped by reason: bad (sizes, slots),
    no_grant, no_header (a checksum or a segmentation was asked for a packet that has none), no_tap, refused (by the
    kernel)
    """

    if TYPE_CHECKING:
        memory: Any
        credit: int
        stopped: int
        tap_error: int
        packets: int
        bytes: int
        slots: int
        bad: int
        no_grant: int
        no_header: int
        no_tap: int
        refused: int
        reason: str
        req_cons: int
        rsp_prod: int
        multicast: Callable[[bool, Any], bool] | None
        logs: tuple[FrameLog, ...] | None
        queue: int
        head: Mem

    def __init__(self, grants: Pins, page: Any, answers: Mem, *, again: bool) -> None:
        self.grants = grants
        self.memory = grants.memory
        self.multicast = None
        self.logs = None
        self.queue = 0
        self.closed = False
        self.credit = -1
        self.stopped = self.tap_error = 0
        self.packets = self.bytes = self.slots = 0
        self.bad = self.no_grant = self.no_header = self.no_tap = self.refused = 0
        self.reason = ""
        # gref, offset, flags, id, size: as in the ring, the head first
        self.taken = Mem(bytearray(12 * 32))
        self.extra = Mem(bytearray(16))
        self.head = Mem(bytearray(272))
        self.iov = Mem(bytearray(16 * 24))
        self.ring = Answered("tx", 12, page, answers, grants, gref_at=0, write=False, again=again)
        self.area, self.answers = self.ring.area, self.ring.answers
        # what a dead worker had taken and not answered is taken again, and may be sent twice
        self.req_cons = self.rsp_prod = self.ring.published

    def run(self, fd: int, most: int) -> int:
        """Send packets to the TAP `fd` (-1: there is none, all are dropped), until `most` slots; how many packets.

        GuestError: what no driver does; stop the vif.
        """
        if self.closed:
            raise ValueError("the ring is closed")
        self.stopped = 0
        waiting = u32(self.ring.posted(self.req_cons, self.rsp_prod) - self.req_cons)
        done = 0
        while waiting > 0 and most > 0:
            got = self.packet(fd, waiting)
            if got == 0:
                break
            waiting -= got
            most -= got
            done += 1
        return done

    def packet(self, fd: int, waiting: int) -> int:
        """Take one packet, of at most `waiting` slots; -> slots, 0: not now (see `stopped`)."""
        start = self.req_cons
        self.slot(0, start)
        total = get16(self.taken.p, 10)
        if self.credit >= 0 and total > self.credit:
            self.stopped = 1
            return 0
        used = 1
        extras = 0
        gso_type = 0
        gso_size = 0
        member = 0
        more = get16(self.taken.p, 6) & 8
        while more:
            if used >= waiting:
                raise GuestError("tx: an extra is missing")
            copy(self.extra.p, 0, self.area.p, 64 + (u32(start + used) & 255) * 12, 8)
            used += 1
            extras += 1
            kind = get8(self.extra.p, 0)
            if kind == 0 or kind > 5:
                raise GuestError(f"tx: extra of type {kind}")
            more = get8(self.extra.p, 1) & 1
            if kind == 1:
                gso_size = get16(self.extra.p, 2)
                gso_type = get8(self.extra.p, 4)
                if gso_size == 0:
                    raise GuestError("tx: segments of 0 bytes")
                if gso_type == 0 or gso_type > 2:
                    raise GuestError(f"tx: segmentation of type {gso_type}")
            elif kind == 2 or kind == 3:
                member = kind
                put64(self.extra.p, 8, get64(self.extra.p, 0))
        if member:
            # a request that only carries this, whatever else it says (Linux' netback takes it the same way)
            return self.member(member, extras)
        drop = 0
        parts = 1
        rest = total
        more = get16(self.taken.p, 6) & 4
        while more:
            if used >= waiting:
                raise GuestError(f"tx: slot {parts + 1} of a packet is missing")
            if parts > 20:
                raise GuestError("tx: more than 20 slots after the first one")
            if parts > 18:
                drop = 1
            self.slot(parts, u32(start + used))
            at = 12 * parts
            size = get16(self.taken.p, at + 10)
            if size + get16(self.taken.p, at + 4) > 4096:
                raise GuestError(f"tx: slot {parts}: {get16(self.taken.p, at + 4)} + {size} crosses its page")
            if size > rest:
                drop = 1
            else:
                rest -= size
            more = get16(self.taken.p, at + 6) & 4
            used += 1
            parts += 1
        if total < 14:
            drop = 1
        if drop:
            self.bad += 1
            self.reason = f"{total} bytes in {parts} slots"
            return self.answer(parts, extras, -1)
        if rest + get16(self.taken.p, 4) > 4096:
            raise GuestError(f"tx: slot 0: {get16(self.taken.p, 4)} + {rest} crosses its page")
        put16(self.taken.p, 10, rest)
        return self.send(fd, parts, extras, total, gso_type, gso_size)

    def slot(self, number: int, index: int) -> int:
        copy(self.taken.p, 12 * number, self.area.p, 64 + (index & 255) * 12, 12)
        return 0

    def send(self, fd: int, parts: int, extras: int, total: int, gso_type: int, gso_size: int) -> int:
        """Pin, copy the header, write, unpin, answer."""
        head = self.head
        iov = self.iov
        filled = 0
        vectors = 1
        end = 0
        held = 0
        status = 0
        try:
            while held < parts:
                at = 12 * held
                size = get16(self.taken.p, at + 10)
                if size:
                    address = self.grants.pin_page(get32(self.taken.p, at), False) + get16(self.taken.p, at + 4)
                    part = 256 - filled
                    if part > size:
                        part = size
                    if part > 0:
                        if cython.compiled:
                            copy(head.p, 12 + filled, cython.cast("const char *", address), 0, part)
                        else:
                            with self.memory.view_at(address, part) as view:
                                head.view[12 + filled : 12 + filled + part] = view
                        filled += part
                    if size > part:
                        if cython.compiled and vectors > 1 and address + part == end:
                            # neighbours are one vector: the kernel then copies to whole pages, which is twice as fast
                            put64(iov.p, 16 * vectors - 8, get64(iov.p, 16 * vectors - 8) + size - part)
                        else:
                            put64(iov.p, 16 * vectors, address + part)
                            put64(iov.p, 16 * vectors + 8, size - part)
                            vectors += 1
                        end = address + size
                held += 1
        except GuestError as error:
            self.no_grant += 1
            self.reason = str(error)
            status = -1
        if status == 0:
            put64(head.p, 0, 0)
            put32(head.p, 8, 0)
            if (gso_type or get16(self.taken.p, 6) & 1) and not self.offload(filled, total, gso_type, gso_size):
                self.no_header += 1
                status = -1
        if status == 0:
            put64(iov.p, 0, head.address)
            put64(iov.p, 8, 12 + filled)
            got = self.write(fd, vectors)
            if got < 0:
                status = self.failed(got)
            elif self.logs is not None:
                self.log(12 + filled, vectors, total)
        for i in range(held):
            if get16(self.taken.p, 12 * i + 10):
                self.grants.unpin_page(get32(self.taken.p, 12 * i), False)
        if status == 1:
            return 0
        if status == 0:
            self.packets += 1
            self.bytes += total
        if self.credit >= 0:
            self.credit -= total
        return self.answer(parts, extras, status)

    def write(self, fd: int, vectors: int) -> int:
        if fd < 0:
            return -77
        if cython.compiled:
            return sys_pwritev(fd, self.iov.address, vectors, -1, 0)  # type: ignore[arg-type]
        p = self.iov.p
        views = [self.head.view[: get64(p, 8)]]
        views += [self.memory.view_at(get64(p, 16 * i), get64(p, 16 * i + 8)) for i in range(1, vectors)]
        return sys_pwritev(fd, views, vectors, -1, 0)

    def log(self, filled: int, vectors: int, total: int) -> int:
        """What was sent, to those who look. The guest may have changed it since, past its header."""
        p = self.head.p
        mark = 1
        if get8(p, 0) & 1:
            mark |= 0x200
        if get8(p, 1):
            mark |= 0x800
        for log in self.logs or ():
            if log.begin(mark, self.queue, total):
                log.private(p, 12, filled - 12)
                for i in range(1, vectors):
                    log.guest(get64(self.iov.p, 16 * i), get64(self.iov.p, 16 * i + 8))
                log.end()
        return 0

    def failed(self, got: int) -> int:
        """The kernel did not take a packet; -> the status for the guest, 1: try again later."""
        if got == -11:
            self.stopped = 2
            return 1
        if got == -22:
            self.refused += 1
            self.reason = "the kernel refuses its header"
            return -1
        self.no_tap += 1
        self.tap_error = -got
        return -2

    def offload(self, filled: int, total: int, gso_type: int, gso_size: int) -> int:
        """Fill in the vnet header from the packet's own: where its checksum belongs. 0: it has no such header.

        struct virtio_net_hdr_v1: u8 flags, u8 gso_type, u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers
        """
        p = self.head.p
        at = 12 + 12
        end = 12 + filled
        proto = get8(p, at) << 8 | get8(p, at + 1)
        at += 2
        while (proto == 0x8100 or proto == 0x88A8) and at + 4 <= end and at < 38:
            proto = get8(p, at + 2) << 8 | get8(p, at + 3)
            at += 4
        version = 0
        address = 0
        if proto == 0x0800 and at + 20 <= end:
            version = 4
            length = (get8(p, at) & 15) << 2
            fragment = get8(p, at + 6) << 8 | get8(p, at + 7)
            proto = get8(p, at + 9)
            address = at + 12
            if get8(p, at) >> 4 != 4 or length < 20 or fragment & 0x3FFF:
                return self.headless("a fragment, or no IPv4 header")
            at += length
        elif proto == 0x86DD and at + 40 <= end:
            version = 6
            proto = get8(p, at + 6)
            address = at + 8
            if get8(p, at) >> 4 != 6:
                return self.headless("no IPv6 header")
            at += 40
            # hop-by-hop, routing, destination options: u8 next, u8 length in units of 8 after the first
            while (proto == 0 or proto == 43 or proto == 60) and at + 2 <= end:
                proto = get8(p, at)
                at += (get8(p, at + 1) + 1) << 3
        else:
            return self.headless("neither IPv4 nor IPv6")
        need = 20 if proto == 6 else 8
        if (proto != 6 and proto != 17) or at + need > end:
            return self.headless("neither TCP nor UDP")
        offset = 16 if proto == 6 else 6
        put8(p, 0, 1)  # VIRTIO_NET_HDR_F_NEEDS_CSUM
        put16(p, 6, at - 12)
        put16(p, 8, offset)
        if gso_type == 0:
            return 1
        length = (get8(p, at + 12) >> 4) << 2
        if proto != 6 or length < 20 or at + length > 12 + total or (version == 4) != (gso_type == 1):
            return self.headless("segmentation of what is no such TCP packet")
        # VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6, with _ECN where CWR is set: only the first segment may have it
        kind = 1 if gso_type == 1 else 4
        if get8(p, at + 13) & 0x80:
            kind |= 0x80
        put8(p, 1, kind)
        put16(p, 2, at - 12 + length)
        put16(p, 4, gso_size)
        if not get16(self.taken.p, 6) & 1:
            self.pseudo(address, version, at, total - (at - 12), proto, offset)
        return 1

    def headless(self, reason: str) -> int:
        self.reason = reason
        return 0

    def pseudo(self, address: int, version: int, at: int, length: int, proto: int, offset: int) -> int:
        """The checksum of the pseudo-header into its place: a segmentation came without csum_blank."""
        p = self.head.p
        n = 8 if version == 4 else 32
        total = length + proto
        i = 0
        while i < n:
            total += get8(p, address + i) << 8 | get8(p, address + i + 1)
            i += 2
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        put8(p, at + offset, total >> 8)
        put8(p, at + offset + 1, total & 0xFF)
        return 0

    def member(self, kind: int, extras: int) -> int:
        """A group joined or left."""
        good = self.multicast is not None and self.multicast(kind == 2, bytes(self.extra.view[10:16]))
        return self.answer(1, extras, 0 if good else -1)

    def answer(self, parts: int, extras: int, status: int) -> int:
        """One response a slot, in the slots' order: the head, NETIF_RSP_NULL for each extra, the other parts."""
        self.respond(get16(self.taken.p, 8), status)
        for _ in range(extras):
            self.respond(0, 1)
        for i in range(1, parts):
            self.respond(get16(self.taken.p, 12 * i + 8), status)
        self.req_cons = u32(self.req_cons + parts + extras)
        self.slots += parts + extras
        return parts + extras

    def respond(self, id: int, status: int) -> int:
        # the rest of the slot is zero (XSA-216)
        at = (self.rsp_prod & 255) * 12 + 64
        put16(self.answers.p, at, id)
        put16(self.answers.p, at + 2, status)
        self.rsp_prod = u32(self.rsp_prod + 1)
        return 0

    def push(self) -> bool:
        """Publish the answers; True: the guest wants to be notified."""
        if self.closed:
            raise ValueError("the ring is closed")
        return self.ring.publish(self.rsp_prod)

    def arm(self) -> bool:
        """Ask for a kick at the next request; True: there is one already, do not sleep."""
        if self.closed:
            raise ValueError("the ring is closed")
        return self.area.arm(0, self.req_cons)

    def pending(self) -> bool:
        """A cheap look: requests wait (or the index jumped, which `run` tells)."""
        return not self.closed and self.area.pending(0, self.req_cons)

    def close(self) -> None:
        """Let go of the page; idempotent. Nothing is pinned between two packets."""
        if self.closed:
            return
        self.closed = True
        self.area.close()
