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

If there are fewer pages than the largest packet needs, it is read into a buffer here, one a ring, and waits there until
there are enough. So nothing is lost, and nothing piles up: what else comes waits in the TAP's own queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd.errors import GuestError

if not cython.compiled:
    from evtchnd._core.words import (
        Area,
        Mem,
        copy,
        fence,
        get8,
        get16,
        get32,
        get64,
        ld32,
        put8,
        put16,
        put32,
        put64,
        st32,
        sys_preadv,
        u32,
    )

if TYPE_CHECKING:
    from evtchnd._core.framelog import FrameLog
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants. 256 entries of 8 bytes in the ring's page. WINDOW is 64: three packets of 64 KiB.
# A packet has at most 65535 bytes of IP behind its Ethernet header and two VLAN tags: 17 pages, 18 with an XDP headroom
# of 256 in each; Linux' netfront takes XEN_NETIF_NR_SLOTS_MIN (18) slots of data at most.
# The buffer is a vnet header (12), and the largest packet.
BUFFER = 12 + 4 + (18 << 12)

# What `stopped` says: why `run` ended.
EMPTY = 1  # the TAP has no packet
NO_SLOTS = 2  # the guest has to post pages
TAP_ERROR = 3  # tap_error tells
STEER = 4  # with `hashing`: one packet was read, `hash_value` says where it belongs: `run` again, or another's `adopt`

# A page that was taken: u64 address | u32 gref | u16 id | u16 bad (its grant was refused)
PAGE = 16


class RxRing:
    """One receive ring, from the back. Not for several threads. Order of a pump: run, push (True: notify).

    most_bytes: the longest frame expected, settable; longer ones are dropped, and the next such one fits
    gso: the guest takes GSO packets, so that the slot behind the first one is kept for the extra
    headroom: bytes left free at the start of each page (XDP)
    sg: False: the guest takes no packet of several slots
    Counters: packets, bytes (frames), slots; dropped: too_long (or of a kind that was not
    asked for), unwanted (`groups`), moved (jumbo frames, see above),
    bad_grants (slots answered with an error), waited (packets that had to wait for slots), expired (by `drop_held`),
    completed (checksums that had to be computed here)
    groups: None, or a set of the multicast addresses (bytes) that the guest wants
    held: bytes of the packet that waits, 0: none
    hashing: XEN_NETIF_CTRL_HASH_TYPE_* bits: each packet is read aside, and hashed with the key of `set_key`
    logs: FrameLogs that get a copy of each frame that is delivered, as frames of `queue`; None: nobody looks
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
        slots: int
        too_long: int
        unwanted: int
        moved: int
        bad_grants: int
        waited: int
        expired: int
        completed: int
        reason: str
        req_cons: int
        rsp_prod: int
        groups: Any
        hashing: int
        hash_value: int
        hash_type: int
        logs: tuple[FrameLog, ...] | None
        queue: int

    def __init__(
        self, grants: Pins, page: Any, answers: Mem, *, again: bool, most_bytes: int, gso: bool, sg: bool = True
    ) -> None:
        self.grants = grants
        self.memory = grants.memory
        self.most_bytes = most_bytes
        self.gso = gso
        self.sg = sg
        self.headroom = 0
        self.groups = None
        self.logs = None
        self.queue = 0
        self.hashing = self.hash_value = 0
        self.hash_type = -1
        self.key = Mem(bytearray(48))
        self.tuple = Mem(bytearray(40))
        self.closed = False
        self.stopped = self.tap_error = self.held = 0
        self.packets = self.bytes = self.slots = 0
        self.too_long = self.unwanted = self.moved = self.bad_grants = self.waited = self.expired = self.completed = 0
        self.reason = ""
        self.area = Area([page.view])
        self.answers = answers
        self.pages = Mem(bytearray(16 * 256))
        self.entry = Mem(bytearray(8))
        # the vnet header ends where the frame begins at a multiple of 16
        self.buffer = Mem(bytearray(12 + 4 + (18 << 12)))
        self.iov = Mem(bytearray(16 * 24))
        self.req_cons = self.rsp_prod = self.published = self.seen = self.area.load(8)
        if again:
            self.inherit()
        else:
            st32(self.answers.p, 0, self.published)

    def inherit(self) -> None:
        """Take the ring over from a worker that may have died at it.

        What it had answered is published. The pages that it had pinned ahead are the guest's own again: its marks in
        their entries nobody else can clear. GuestError as `free`, or the guest wrote to rsp_prod.
        """
        target = ld32(self.answers.p, 0)
        if u32(target - self.published) > 256:
            raise GuestError(f"rx ring: rsp_prod is {self.published:#x}, this end left it at {target:#x}")
        self.put(self.published, target)
        st32(self.area.p, 8, target)
        self.req_cons = self.rsp_prod = self.published = self.seen = target
        waiting = self.free()
        for i in range(waiting):
            self.area.take(64 + (u32(self.rsp_prod + i) & 255) * 8, self.entry.p, 0, 8)
            try:
                self.grants.pin_page(get32(self.entry.p, 4), True)
            except GuestError:
                continue
            self.grants.unpin_page(get32(self.entry.p, 4), True)

    def put(self, old: int, new: int) -> int:
        """The answers to slots `old` up to `new` into the ring."""
        start = (old & 255) * 8 + 64
        n = u32(new - old) * 8
        part = 64 + 8 * 256 - start
        if part > n:
            part = n
        self.area.give(start, self.answers.p, start, part)
        self.area.give(64, self.answers.p, 64, n - part)
        return 0

    def free(self) -> int:
        """Slots that the guest has posted and that are not used. GuestError: the index jumped."""
        prod = ld32(self.area.p, 0)
        waiting = u32(prod - self.rsp_prod)
        if u32(prod - self.req_cons) > 256 or waiting > 256 or u32(prod - self.published) > 256:
            raise GuestError(
                f"rx ring: request index jumped: req_prod {prod:#x}, taken up to {self.req_cons:#x}, "
                f"answered up to {self.published:#x}, 256 entries"
            )
        self.seen = prod
        return waiting

    def fill(self) -> int:
        """Take pages ahead, 64 at most; -> how many usable ones follow one another from the first."""
        waiting = self.free()
        if waiting > 64:
            waiting = 64
        while u32(self.req_cons - self.rsp_prod) < waiting:
            at = (self.req_cons & 255) * 16
            self.area.take(64 + (self.req_cons & 255) * 8, self.entry.p, 0, 8)
            put32(self.pages.p, at + 8, get32(self.entry.p, 4))
            put16(self.pages.p, at + 12, get16(self.entry.p, 0))
            put16(self.pages.p, at + 14, 0)
            try:
                put64(self.pages.p, at, self.grants.pin_page(get32(self.entry.p, 4), True))
            except GuestError as error:
                put16(self.pages.p, at + 14, 1)
                self.reason = str(error)
            self.req_cons = u32(self.req_cons + 1)
        usable = 0
        while u32(self.rsp_prod + usable) != self.req_cons:
            at = (u32(self.rsp_prod + usable) & 255) * 16
            if get16(self.pages.p, at + 14):
                if usable:
                    break
                self.bad_grants += 1
                self.answer(0, 0, -1)
            else:
                usable += 1
        return usable

    def needed(self, length: int, extras: int) -> int:
        """Slots for a frame of `length` bytes."""
        each = 4096 - self.headroom
        return (length + each - 1) // each + extras

    def run(self, fd: int, most: int) -> int:
        """Receive at most `most` packets from the TAP `fd`; how many were taken from it. GuestError as `fill`."""
        if self.closed:
            raise ValueError("the ring is closed")
        self.stopped = 0
        done = 0
        while done < most:
            if self.held and not self.settle():
                break
            usable = self.fill()
            if usable == 0:
                self.stopped = 2
                break
            if self.hashing:
                got = self.read_aside(fd)
                if got >= 0:
                    self.hash()
                    self.stopped = 4
                    done += 1
                    break
                self.stopped = 1 if got == -11 else 3
                if got != -11:
                    self.tap_error = -got
                break
            self.hash_type = -1
            spare = 1 if self.gso else 0
            if self.headroom:
                spare += 1
            if usable < self.needed(self.most_bytes, spare):
                got = self.read_aside(fd)
            else:
                got = self.read(fd, spare)
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
            usable = self.fill()
            if not self.deliver(usable):
                if u32(self.rsp_prod + usable) == self.req_cons:
                    self.stopped = 2
                    return False
                # a page that cannot be had lies in between: those before it are too few for ever
                for _ in range(usable):
                    self.answer(0, 0, -1)
        return True

    def set_key(self, key: Any) -> None:
        """40 bytes of a Toeplitz key."""
        for i in range(48):
            put8(self.key.p, i, key[i] if i < len(key) else 0)

    def adopt(self, other: RxRing) -> bool:
        """Take the packet that waits at `other`, by taking its buffer. False: one waits here already."""
        if self.held:
            return False
        self.buffer, other.buffer = other.buffer, self.buffer
        self.held, self.hash_value, self.hash_type = other.held, other.hash_value, other.hash_type
        other.held = 0
        return True

    def hash(self) -> int:
        """The hash of the packet that waits, over addresses, and ports where it is TCP and no fragment."""
        p = self.buffer.p
        self.hash_type = -1
        self.hash_value = 0
        kind = get8(p, 28) << 8 | get8(p, 29)
        at = 0
        n = 0
        tcp = 0
        if kind == 0x0800 and self.held >= 34 and self.hashing & 3:
            at = 30 + ((get8(p, 30) & 15) << 2)
            n = 8
            if get8(p, 39) == 6 and not (get8(p, 36) & 0x3F or get8(p, 37)):
                tcp = self.hashing & 2
            elif not self.hashing & 1:
                return 0
            copy(self.tuple.p, 0, p, 42, 8)
            self.hash_type = 1 if tcp else 0
        elif kind == 0x86DD and self.held >= 54 and self.hashing & 12:
            at = 70
            n = 32
            if get8(p, 36) == 6:
                tcp = self.hashing & 8
            elif not self.hashing & 4:
                return 0
            copy(self.tuple.p, 0, p, 38, 32)
            self.hash_type = 3 if tcp else 2
        else:
            return 0
        if tcp:
            copy(self.tuple.p, n, p, at, 4)
            n += 4
        elif not self.hashing & (1 if kind == 0x0800 else 4):
            self.hash_type = -1
            return 0
        self.toeplitz(n)
        return 0

    def toeplitz(self, n: int) -> int:
        """Toeplitz' hash of the first `n` bytes of `tuple`: a window of 32 bits slides over the key, a bit a bit."""
        value = 0
        window = 0
        for i in range(5):
            window = window << 8 | get8(self.key.p, i)
        for i in range(n):
            byte = get8(self.tuple.p, i)
            for bit in range(8):
                if byte >> (7 - bit) & 1:
                    value ^= u32(window >> (8 - bit))
            low = u32(window)
            window = low << 8 | get8(self.key.p, 5 + i)
        self.hash_value = value
        return 0

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
            index = self.rsp_prod if i == 0 else u32(self.rsp_prod + extras + i)
            self.copy_out(16 + done, index, part)
            done += part
        self.held = 0
        self.finish(length, parts, extras)
        return 1

    def copy_out(self, at: int, index: int, n: int) -> int:
        address = get64(self.pages.p, (index & 255) * 16) + self.headroom
        if cython.compiled:
            copy(cython.cast("char *", address), 0, self.buffer.p, at, n)
        else:
            with self.memory.view_at(address, n) as view:
                view[:] = self.buffer.view[at : at + n]
        return 0

    def read(self, fd: int, spare: int) -> int:
        """Read a packet into the guest's pages. What is longer than they are ends in the buffer, and is dropped."""
        each = 4096 - self.headroom
        parts = (self.most_bytes + each - 1) // each
        iov = self.iov.p
        put64(iov, 0, self.buffer.address + 4)
        put64(iov, 8, 12)
        for i in range(parts):
            index = self.rsp_prod if i == 0 else u32(self.rsp_prod + spare + i)
            put64(iov, 16 * i + 16, get64(self.pages.p, (index & 255) * 16) + self.headroom)
            put64(iov, 16 * i + 24, each)
        put64(iov, 16 * parts + 16, self.buffer.address + 16)
        put64(iov, 16 * parts + 24, 18 << 12)
        if cython.compiled:
            got = sys_preadv(fd, self.iov.address, parts + 2, -1, 0)  # type: ignore[arg-type]
        else:
            views = [self.buffer.view[4:16]]
            views += [self.memory.view_at(get64(iov, 16 * i), get64(iov, 16 * i + 8)) for i in range(1, parts + 1)]
            got = sys_preadv(fd, [*views, self.buffer.view[16:]], parts + 2, -1, 0)
        if got < 0:
            return got
        if got <= 12:
            return 0
        length = got - 12
        if length > parts * each or not self.usual():
            self.too_long += 1
            if self.sg and self.most_bytes < length <= 65557:
                self.most_bytes = length
            return 0
        address = get64(self.pages.p, (self.rsp_prod & 255) * 16) + self.headroom
        if self.groups is not None:
            if cython.compiled:
                copy(self.buffer.p, 16, cython.cast("const char *", address), 0, 8)
            else:
                with self.memory.view_at(address, 8) as view:
                    self.buffer.view[16:24] = view
            if not self.wanted(get64(self.buffer.p, 16)):
                return 0
        parts = (length + each - 1) // each
        extras = self.extras_of()
        if parts > 1 and extras < spare:
            self.move_up(length, parts, spare, extras, each)
        self.finish(length, parts, extras)
        return 0

    def move_up(self, length: int, parts: int, spare: int, extras: int, each: int) -> int:
        """There is no extra where one might have been: every further page's data goes that many slots ahead."""
        self.moved += 1
        done = each
        for i in range(1, parts):
            part = length - done
            if part > each:
                part = each
            source = get64(self.pages.p, (u32(self.rsp_prod + spare + i) & 255) * 16) + self.headroom
            if cython.compiled:
                copy(self.buffer.p, 16, cython.cast("const char *", source), 0, part)
            else:
                with self.memory.view_at(source, part) as view:
                    self.buffer.view[16 : 16 + part] = view
            self.copy_out(16, u32(self.rsp_prod + extras + i), part)
            done += part
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
            self.answer(flags, self.headroom + part, 0)
            flags = 0
            if i == 0 and extras:
                kind = self.gso_of()
                if kind:
                    self.extra(1, 1 if extras > 1 else 0, get16(self.buffer.p, 8), kind)
                if self.hash_type >= 0:
                    # XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ is 1
                    self.extra(4, 1 if self.headroom else 0, self.hash_type | 1 << 8, self.hash_value)
                if self.headroom:
                    self.extra(5, 0, self.headroom, 0)
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
                    index = self.rsp_prod if i == 0 else u32(self.rsp_prod + extras + i)
                    log.guest(get64(self.pages.p, (index & 255) * 16) + self.headroom, part)
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
        address = get64(self.pages.p, (self.rsp_prod & 255) * 16) + self.headroom + at
        if cython.compiled:
            copy(self.buffer.p, 16, cython.cast("const char *", address), 0, n)
        else:
            with self.memory.view_at(address, n) as view:
                self.buffer.view[16 : 16 + n] = view
        return 0

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
            index = self.rsp_prod if i == 0 else u32(self.rsp_prod + extras + i)
            address = get64(self.pages.p, (index & 255) * 16) + self.headroom
            if cython.compiled:
                copy(self.buffer.p, 16, cython.cast("const char *", address), 0, part)
            else:
                with self.memory.view_at(address, part) as view:
                    self.buffer.view[16 : 16 + part] = view
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
        address = get64(self.pages.p, (self.rsp_prod & 255) * 16) + self.headroom + field
        if cython.compiled:
            copy(cython.cast("char *", address), 0, self.buffer.p, 16, 2)
        else:
            with self.memory.view_at(address, 2) as view:
                view[:] = self.buffer.view[16:18]
        return 0

    def extra(self, kind: int, flags: int, value: int, type: int) -> int:
        """An extra over the response of the next slot."""
        p = self.answers.p
        at = (self.rsp_prod & 255) * 8 + 64
        put8(p, at, kind)
        put8(p, at + 1, flags)
        put16(p, at + 2, value)
        put32(p, at + 4, type)
        return self.give()

    def answer(self, flags: int, size: int, status: int) -> int:
        p = self.answers.p
        at = (self.rsp_prod & 255) * 8 + 64
        put16(p, at, get16(self.pages.p, (self.rsp_prod & 255) * 16 + 12))
        put16(p, at + 2, 0)
        put16(p, at + 4, flags)
        put16(p, at + 6, size if status == 0 else status)
        return self.give()

    def give(self) -> int:
        """The next slot has its answer, and its page is the guest's again."""
        at = (self.rsp_prod & 255) * 16
        if not get16(self.pages.p, at + 14):
            self.grants.unpin_page(get32(self.pages.p, at + 8), True)
        self.rsp_prod = u32(self.rsp_prod + 1)
        self.slots += 1
        return 0

    def drop_held(self) -> None:
        """The packet that waits has waited too long."""
        if self.held:
            self.held = 0
            self.expired += 1

    def push(self) -> bool:
        """Put the answers into the ring and publish them (the order is answers.py's); True: the guest wants to be notified."""
        if self.closed:
            raise ValueError("the ring is closed")
        new = self.rsp_prod
        old = self.published
        if new == old:
            return False
        st32(self.answers.p, 0, new)
        self.put(old, new)
        st32(self.area.p, 8, new)
        fence()
        event = ld32(self.area.p, 12)
        self.published = new
        return u32(new - event) < u32(new - old)

    def arm(self) -> bool:
        """Ask for a kick at the next page; True: there is one that was not seen."""
        if self.closed:
            raise ValueError("the ring is closed")
        if ld32(self.area.p, 0) != self.seen:
            return True
        st32(self.area.p, 4, u32(self.seen + 1))
        fence()
        return ld32(self.area.p, 0) != self.seen

    def pending(self) -> bool:
        """A cheap look: pages were posted since the last `run` (or the index jumped, which `run` tells)."""
        if self.closed:
            return False
        return ld32(self.area.p, 0) != self.seen

    def close(self) -> None:
        """Unpin the pages that were taken ahead, without answers, and let go of the ring; idempotent."""
        if self.closed:
            return
        self.closed = True
        while self.rsp_prod != self.req_cons:
            at = (self.rsp_prod & 255) * 16
            if not get16(self.pages.p, at + 14):
                self.grants.unpin_page(get32(self.pages.p, at + 8), True)
            self.rsp_prod = u32(self.rsp_prod + 1)
        self.area.close()
