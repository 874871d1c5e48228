# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""A netif receive ring's back end: packets out of a TAP into the guest's pages, one readv each (io/netif.h).

    request, 8 bytes    u16 id | u16 pad | u32 gref
    response, 8 bytes   u16 id | u16 offset | u16 flags | s16 status: bytes in this slot's page, or an error
    extra, in a slot    u8 type | u8 flags | GSO: u16 size, u8 type, u8 pad, u16 features; HASH: type, algorithm, value

The guest posts empty pages. At most WINDOW of them are taken ahead, copied and pinned, so that a packet costs one pin
for each page it fills, however many a packet of 64 KiB would need. A response stays in the slot of its request, and an
extra (a GSO packet's size of segments) has the slot behind the first one; how long a packet is, and whether it is one
of those, is only known when it has been read. So the vectors leave the slots of possible extras out, and a large packet
without them is moved up (a jumbo frame's few pages; a GSO packet is never moved).

A packet that is longer than what was offered to it ends in a buffer here, one a ring, and is copied; if there are too
few pages for it, it waits there until there are enough. So nothing is lost, and nothing piles up: what else comes waits
in the TAP's own queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.rxslots import RxSlots
from evtchnd._core.toeplitz import Toeplitz
from evtchnd._core.words import Mem

if not cython.compiled:
    from evtchnd._core.words import copy, get8, get16, get64, put8, put64, sys_preadv, sys_readable, u32

if TYPE_CHECKING:
    from evtchnd._core.framelog import FrameLog
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants. WINDOW (rxslots.py: `fill`) is 64: three packets of 64 KiB.
# A packet has at most 65535 bytes of IP behind its Ethernet header and two VLAN tags: 17 pages, 18 with an XDP headroom
# of 256 in each; Linux' netfront takes XEN_NETIF_NR_SLOTS_MIN (18) slots of data at most.
# The buffer is a vnet header (12), and the largest packet.
BUFFER = 12 + 4 + (18 << 12)

# What `stopped` says: why `run` ended.
EMPTY = 1  # the TAP has no packet
NO_SLOTS = 2  # the guest has to post pages
TAP_ERROR = 3  # tap_error tells
STEER = 4  # with `hasher`: one packet was read, `hash_value` says where it belongs: `run` again, or another's `adopt`


class RxRing:
    """One receive ring, from the back. Not for several threads. Order of a pump: run, push (True: notify).

    most_bytes: the longest frame expected, settable; longer ones are copied
    gso: the guest takes GSO packets, so that the slot behind the first one is kept for the extra
    headroom: bytes left free at the start of each page (XDP)
    sg: False: the guest takes no packet of several slots
    posted: the slots, and counters of them
    Counters: packets, bytes (frames); dropped: too_long (or of a kind that was not asked for), unwanted (`groups`);
    moved (jumbo frames, see above), waited (packets that had to wait for slots), expired (by `drop_held`), completed
    (checksums that had to be computed here)
    groups: None, or a set of the multicast addresses (bytes) that the guest wants
    held: bytes of the packet that waits, 0: none
    logs: FrameLogs that get a copy of each frame that is delivered, as frames of `queue`; None: nobody looks
    hasher: while it has `kinds`, each packet is read aside and hashed
    hash_value, hash_type: of the packet that waits; type 0 to 3 (_XEN_NETIF_CTRL_HASH_TYPE_*), -1: it has none
    """

    if TYPE_CHECKING:
        memory: Any
        most_bytes: int
        gso: bool
        sg: bool
        headroom: int
        stopped: int
        tap_error: int
        held: int
        packets: int
        bytes: int
        too_long: int
        unwanted: int
        moved: int
        waited: int
        expired: int
        completed: int
        groups: Any
        hasher: Toeplitz
        posted: RxSlots
        hash_value: int
        hash_type: int
        logs: tuple[FrameLog, ...] | None
        queue: int

    def __init__(
        self, grants: Pins, page: Any, answers: Mem, *, again: bool, most_bytes: int, gso: bool, sg: bool = True
    ) -> None:
        self.memory = grants.memory
        self.most_bytes = most_bytes
        self.gso = gso
        self.sg = sg
        self.headroom = 0
        self.groups = None
        self.logs = None
        self.queue = 0
        self.hasher = Toeplitz()
        self.hash_value = 0
        self.hash_type = -1
        self.small = 0
        self.stopped = self.tap_error = self.held = 0
        self.packets = self.bytes = 0
        self.too_long = self.unwanted = self.moved = self.waited = self.expired = self.completed = 0
        # the vnet header ends where the frame begins at a multiple of 16
        self.buffer = Mem(bytearray(12 + 4 + (18 << 12)))
        self.iov = Mem(bytearray(16 * 24))
        self.posted = RxSlots(grants, page, answers, again=again)

    def run(self, fd: int, most: int) -> int:
        """Receive packets from the TAP `fd`, `most` at most, until so many slots; how many it gave. GuestError."""
        if self.posted.closed:
            raise ValueError("the ring is closed")
        self.stopped = 0
        done = 0
        limit = self.posted.used + most
        while done < most and self.posted.used < limit:
            if self.held and not self.settle():
                break
            usable = self.posted.fill()
            if usable == 0:
                self.stopped = 2
                break
            if self.hasher.kinds:
                got = self.read_aside(fd)
                if got >= 0:
                    self.hash_type = self.hasher.hash(self.buffer.p, 16, self.held)
                    self.hash_value = self.hasher.value
                    self.stopped = 4
                    done += 1
                    break
                self.stopped = 1 if got == -11 else 3
                if got != -11:
                    self.tap_error = -got
                break
            self.hash_type = -1
            got = self.read(fd, usable)
            if got < 0:
                self.stopped = 1 if got == -11 else 3
                if got != -11:
                    self.tap_error = -got
                break
            done += 1
        return done

    def settle(self) -> bool:
        """Deliver the packet that waits, if one does. False: the guest has to post pages."""
        while self.held:
            usable = self.posted.fill()
            if not self.deliver(usable):
                if u32(self.posted.rsp_prod + usable) == self.posted.req_cons:
                    self.stopped = 2
                    return False
                # a page that cannot be had lies in between: those before it are too few for ever
                for _ in range(usable):
                    self.posted.answer(0, 0, -1)
        return True

    def adopt(self, other: RxRing) -> bool:
        """Take the packet that waits at `other`, by taking its buffer. False: one waits here already."""
        if self.held:
            return False
        self.buffer, other.buffer = other.buffer, self.buffer
        self.held, self.hash_value, self.hash_type = other.held, other.hash_value, other.hash_type
        other.held = 0
        return True

    def read_aside(self, fd: int) -> int:
        """Read a packet into the buffer, to be delivered by the next turn."""
        put64(self.iov.p, 0, self.buffer.address + 4)
        put64(self.iov.p, 8, 12 + (18 << 12))
        if cython.compiled:
            got = sys_preadv(fd, self.iov.address, 1, -1, 0)  # type: ignore[arg-type]
        else:
            got = sys_preadv(fd, [self.buffer.view[4:]], 1, -1, 0)
        if got < 0:
            return got
        self.held = got - 12 if got > 12 else 0
        self.waited += 1
        return 0

    def deliver(self, usable: int) -> int:
        """Copy the packet that waits into the guest's pages. 0: there are not enough of them."""
        length = self.held
        extras = self.extras_of()
        each = 4096 - self.headroom
        parts = (length + each - 1) // each
        if parts > 18 or (parts > 1 and not self.sg) or not self.usual():
            self.too_long += 1
            self.held = 0
            return 1
        if parts + extras > usable:
            return 0
        if not self.wanted(get64(self.buffer.p, 16)):
            self.held = 0
            return 1
        done = 0
        for i in range(parts):
            part = length - done
            if part > each:
                part = each
            index = self.posted.rsp_prod if i == 0 else u32(self.posted.rsp_prod + extras + i)
            self.copy_out(16 + done, index, part)
            done += part
        self.held = 0
        self.finish(length, parts, extras)
        return 1

    def copy_in(self, at: int, index: int, start: int, n: int) -> int:
        """`n` bytes at `start` of a slot's page into the buffer."""
        address = self.posted.address(index) + self.headroom + start
        if cython.compiled:
            copy(self.buffer.p, at, cython.cast("const char *", address), 0, n)
        else:
            with self.memory.view_at(address, n) as view:
                self.buffer.view[at : at + n] = view
        return 0

    def copy_out(self, at: int, index: int, n: int) -> int:
        address = self.posted.address(index) + self.headroom
        if cython.compiled:
            copy(cython.cast("char *", address), 0, self.buffer.p, at, n)
        else:
            with self.memory.view_at(address, n) as view:
                view[:] = self.buffer.view[at : at + n]
        return 0

    def read(self, fd: int, usable: int) -> int:
        """Read a packet into the guest's pages, `usable` of which follow one another.

        After some small packets one page is offered, else as many as the largest one takes: an offer has its price.
        What is longer than the offer ends in the buffer, in its place behind what did not, and is copied.
        """
        each = 4096 - self.headroom
        spare = 1 if self.gso else 0
        if self.headroom:
            spare += 1
        parts = 1
        if self.small < 8:
            parts = (self.most_bytes + each - 1) // each
            if parts > 18:
                parts = 18
            if parts + spare > usable:
                parts = usable - spare
            if parts < 1:
                parts = 1
        iov = self.iov.p
        put64(iov, 0, self.buffer.address + 4)
        put64(iov, 8, 12)
        n = 1
        end = 0
        for i in range(parts):
            index = self.posted.rsp_prod if i == 0 else u32(self.posted.rsp_prod + spare + i)
            address = self.posted.address(index) + self.headroom
            if cython.compiled and address == end:
                put64(iov, 16 * n - 8, get64(iov, 16 * n - 8) + each)
            else:
                put64(iov, 16 * n, address)
                put64(iov, 16 * n + 8, each)
                n += 1
            end = address + each
        put64(iov, 16 * n, self.buffer.address + 16 + parts * each)
        put64(iov, 16 * n + 8, (18 << 12) - parts * each)
        if cython.compiled:
            got = sys_preadv(fd, self.iov.address, n + 1, -1, 0)  # type: ignore[arg-type]
        else:
            views = [self.buffer.view[4:16]]
            views += [self.memory.view_at(get64(iov, 16 * i), get64(iov, 16 * i + 8)) for i in range(1, n)]
            got = sys_preadv(fd, [*views, self.buffer.view[16 + parts * each :]], n + 1, -1, 0)
        if got < 0:
            return got
        if got <= 12:
            return 0
        length = got - 12
        self.small = self.small + 1 if length <= each else 0
        there = (length + each - 1) // each
        if there > 18 or (there > 1 and not self.sg) or not self.usual():
            self.too_long += 1
            return 0
        address = self.posted.address(self.posted.rsp_prod) + self.headroom
        if self.groups is not None:
            self.peek(0, 8)
            if not self.wanted(get64(self.buffer.p, 16)):
                return 0
        extras = self.extras_of()
        if parts > there:
            parts = there
        if there + extras > usable:
            self.take_back(length, parts, spare, each)
            return 0
        if parts > 1 and extras < spare:
            self.move_up(length, parts, spare, extras, each)
        for i in range(parts, there):
            part = length - i * each
            self.copy_out(16 + i * each, u32(self.posted.rsp_prod + extras + i), part if part < each else each)
        self.finish(length, there, extras)
        return 0

    def take_back(self, length: int, parts: int, spare: int, each: int) -> int:
        """There are too few pages for this packet: it waits in the buffer, where its end is already."""
        self.waited += 1
        for i in range(parts):
            part = length - i * each
            if part > each:
                part = each
            index = self.posted.rsp_prod if i == 0 else u32(self.posted.rsp_prod + spare + i)
            self.copy_in(16 + i * each, index, 0, part)
        self.held = length
        return 0

    def move_up(self, length: int, parts: int, spare: int, extras: int, each: int) -> int:
        """There is no extra where one might have been: every further page's data goes that many slots ahead.

        By way of the buffer's start: its end may be the packet's.
        """
        self.moved += 1
        for i in range(1, parts):
            part = length - i * each
            if part > each:
                part = each
            self.copy_in(16, u32(self.posted.rsp_prod + spare + i), 0, part)
            self.copy_out(16, u32(self.posted.rsp_prod + extras + i), part)
        return 0

    def extras_of(self) -> int:
        """How many extras the packet has whose vnet header is in the buffer."""
        n = 1 if self.gso_of() else 0
        if self.headroom:
            n += 1
        if self.hash_type >= 0:
            n += 1
        return n

    def usual(self) -> bool:
        """Not of a kind that was not asked for: such may lie in the TAP's queue from before its offloads were set."""
        return get8(self.buffer.p, 5) == 0 or (self.gso and self.gso_of() != 0)

    def gso_of(self) -> int:
        """XEN_NETIF_GSO_TYPE_* of VIRTIO_NET_HDR_GSO_*: TCPV4 1 -> 1, TCPV6 4 -> 2; the ECN bit (0x80) has no place."""
        kind = get8(self.buffer.p, 5) & 0x7F
        if kind == 1:
            return 1
        if kind == 4:
            return 2
        return 0

    def wanted(self, start: int) -> int:
        """Whether the guest takes a frame that begins with these 8 bytes: multicast but broadcast is filtered."""
        groups = self.groups
        if groups is None or not start & 1:
            return 1
        address = (start & 0xFFFFFFFFFFFF).to_bytes(6, "little")
        if address == b"\xff\xff\xff\xff\xff\xff" or address in groups:
            return 1
        self.unwanted += 1
        return 0

    def finish(self, length: int, parts: int, extras: int) -> int:
        """Unpin the packet's pages and write its responses, extras behind the first."""
        # virtio-net flags: NEEDS_CSUM 1, DATA_VALID 2; netif: data_validated 1, csum_blank 2, more_data 4, extra_info 8
        flags = get8(self.buffer.p, 4)
        if flags & 1 and not self.plain() and not self.gso_of():
            self.complete(length, extras)
            flags = 0
        if flags & 1:
            flags = 3
        elif flags & 2:
            flags = 1
        else:
            flags = 0
        if self.logs is not None:
            self.log(flags, length, extras)
        if extras:
            flags |= 8
        each = 4096 - self.headroom
        left = length
        for i in range(parts):
            part = left if left < each else each
            left -= part
            if left:
                flags |= 4
            self.posted.answer(flags, self.headroom, part)
            flags = 0
            if i == 0 and extras:
                kind = self.gso_of()
                if kind:
                    self.posted.extra(1, 1 if extras > 1 else 0, get16(self.buffer.p, 8), kind)
                if self.hash_type >= 0:
                    # XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ is 1
                    self.posted.extra(4, 1 if self.headroom else 0, self.hash_type | 1 << 8, self.hash_value)
                if self.headroom:
                    self.posted.extra(5, 0, self.headroom, 0)
        self.packets += 1
        self.bytes += length
        return 0

    def log(self, flags: int, length: int, extras: int) -> int:
        """A frame in the guest's pages, to those who look."""
        mark = 2
        if flags & 2:
            mark |= 0x200
        elif flags & 1:
            mark |= 0x400
        if self.gso_of():
            mark |= 0x800
        each = 4096 - self.headroom
        for log in self.logs or ():
            if log.begin(mark, self.queue, length):
                left = length
                i = 0
                while left > 0:
                    part = left if left < each else each
                    index = self.posted.rsp_prod if i == 0 else u32(self.posted.rsp_prod + extras + i)
                    log.guest(self.posted.address(index) + self.headroom, part)
                    left -= part
                    i += 1
                log.end()
        return 0

    def plain(self) -> int:
        """Whether the guest finds by itself where the checksum belongs: TCP or UDP right behind an IP header."""
        self.peek(0, 48)
        p = self.buffer.p
        start = get16(p, 10)
        kind = get8(p, 28) << 8 | get8(p, 29)
        proto = 0
        at = 0
        if kind == 0x0800:
            at = 14 + ((get8(p, 30) & 15) << 2)
            proto = get8(p, 39)
        elif kind == 0x86DD:
            at = 54
            proto = get8(p, 36)
        return 1 if at == start and (proto == 6 or proto == 17) else 0

    def peek(self, at: int, n: int) -> int:
        """`n` bytes at `at` of the first page, into the buffer behind the vnet header."""
        return self.copy_in(16, self.posted.rsp_prod, at, n)

    def complete(self, length: int, extras: int) -> int:
        """Compute the checksum that the packet lacks, where its vnet header says (in a tunnel, behind a VLAN tag).

        The frame is in the guest's pages. RFC 1071's sum does not mind in which order its words come.
        """
        start = get16(self.buffer.p, 10)
        field = start + get16(self.buffer.p, 12)
        each = 4096 - self.headroom
        if field + 2 > length or field + 2 > each:
            return 0
        self.completed += 1
        total = 0
        done = 0
        i = 0
        while done < length:
            part = length - done
            if part > each:
                part = each
            index = self.posted.rsp_prod if i == 0 else u32(self.posted.rsp_prod + extras + i)
            self.copy_in(16, index, 0, part)
            k = start - done if start > done else 0
            while k < part:
                total += get8(self.buffer.p, 16 + k) << (0 if (done + k - start) & 1 else 8)
                k += 1
            done += part
            i += 1
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        total = 0xFFFF ^ total
        if total == 0:
            total = 0xFFFF  # UDP's 0 is "none"; both stand for the same
        put8(self.buffer.p, 16, total >> 8)
        put8(self.buffer.p, 17, total & 0xFF)
        address = self.posted.address(self.posted.rsp_prod) + self.headroom + field
        if cython.compiled:
            copy(cython.cast("char *", address), 0, self.buffer.p, 16, 2)
        else:
            with self.memory.view_at(address, 2) as view:
                view[:] = self.buffer.view[16:18]
        return 0

    def drop_held(self) -> None:
        """The packet that waits has waited too long."""
        if self.held:
            self.held = 0
            self.expired += 1

    def waits(self, fd: int) -> bool:
        """A cheap look: the TAP has a packet, or an error to tell."""
        return sys_readable(fd)

    def push(self) -> bool:
        """Publish the answers; True: the guest wants to be notified."""
        return self.posted.push()

    def arm(self) -> bool:
        """Ask for a kick at the next page; True: there is one that was not seen."""
        return self.posted.arm()

    def pending(self) -> bool:
        """A cheap look: pages were posted since the last `run` (or the index jumped, which `run` tells)."""
        return self.posted.pending()

    def close(self) -> None:
        """Unpin the pages that were taken ahead, without answers, and let go of the ring; idempotent."""
        self.posted.close()
