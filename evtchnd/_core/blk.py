# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""A blkif ring's back end: batches of requests, grants, answers and the in-flight journal (io/blkif.h, io/ring.h).

    request           x86_64            x86_32            response
    u8  operation     0                 0                 u64 id         0
    u8  nr_segments   1   inner op      1                 u8  operation  8
    u16 handle        2   nr_segments   2                 s16 status     10
    u64 id            8                 4
    u64 sector        16                12
    segment[11]       24  grefs[8] 28   20  grefs[8] 24   {u32 gref, u8 first_sect, u8 last_sect, u16 pad}
    an entry          112 bytes         108               DISCARD: flag 1, nr_sectors 24 / 20

A request is copied once, into its journal entry, and only that copy is read. What the words are for in which order,
and what each possible death of the worker leaves behind, is told in evtchnd/journal.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd.errors import GuestError, HostError

if not cython.compiled:
    from evtchnd._core.points import (
        AT_ANSWERED,
        AT_ARM,
        AT_CONSUMED,
        AT_COPY,
        AT_COUNTER,
        AT_DONE,
        AT_FREE,
        AT_INDEX,
        AT_INFLIGHT,
        AT_PIN,
        AT_PUBLISHED,
        AT_RESPONSE,
        AT_RSP_PROD,
        AT_SETTLE,
        AT_START,
        AT_TAKEN,
        AT_TARGET,
        AT_UNPIN,
        point,
        set_watch,
    )
    from evtchnd._core.req import Req
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
        st64,
        sys_preadv,
        u32,
    )

if TYPE_CHECKING:
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST pages of 512 segments each. One call takes IOV_MAX (1024) vectors at most:
# whoever carries a request out gives that many of them at a time (`Req.advance`).
MOST_INDIRECT = 8 * 512


def watch(mem: Mem | None) -> None:
    """For tests of a worker's death: notes each step that this process passes, and ends it at one (see points.py).

    mem: the watch's words, alive until another call; None: nobody watches, as it is in production.
    """
    if cython.compiled:
        address = 0 if mem is None else mem.address
        ev_watch(address)  # type: ignore[name-defined]  # noqa: F821
    else:
        set_watch(mem)


def passed(label: int) -> None:
    """A point of points.py, for callers in Python."""
    point(label)


class BlkRing:
    """One vbd's ring, from the back. Not for several threads; no await between `take` and the index it stores.

    A new ring begins where the shared rsp_prod is (`take` starts it, and resets the journal); after a worker's death
    call `attach()` first. Order of a pump: take or run, done..., push (True: notify), arm before sleep.

    size: entries | sectors: capacity in 512-byte units, settable while it runs | inflight: taken and not done
    sector_size: of the disk, in bytes; where a request begins and how long it is must be multiples of it
    requests, responses: counters since the ring was made; bytes: moved by READ and WRITE
    sectors_read, sectors_written, sectors_discarded: of 512 bytes, flushes: all of them answered OKAY; errors: answers
    that were not
    """

    if TYPE_CHECKING:
        size: int
        sectors: int
        requests: int
        responses: int
        bytes: int
        sectors_read: int
        sectors_written: int
        sectors_discarded: int
        flushes: int
        errors: int
        inflight: int
        req_cons: int
        rsp_prod: int
        memory: Any

    def __init__(
        self,
        grants: Pins,
        pages: Sequence[Any],
        *,
        abi: int,
        journal: Any = None,
        sectors: int,
        sector_size: int = 512,
        readonly: bool = False,
        max_indirect: int = 0,
        most_segments: int = 11,
    ) -> None:
        if abi not in (32, 64) or not 1 <= most_segments <= 11 or not 0 <= max_indirect <= MOST_INDIRECT:
            raise ValueError(f"abi {abi}, {most_segments} segments, {max_indirect} indirect")
        if sector_size not in (512, 1024, 2048, 4096):
            raise ValueError(f"sectors of {sector_size} bytes")
        self.abi = abi
        self.entry_size = 112 if abi == 64 else 108
        self.o_id = 8 if abi == 64 else 4
        self.o_sector = 16 if abi == 64 else 12
        self.o_segments = 24 if abi == 64 else 20
        self.o_indirect = 28 if abi == 64 else 24
        self.grants = grants
        self.memory = grants.memory
        self.sectors = sectors
        self.sector_mask = (sector_size >> 9) - 1
        self.readonly = readonly
        self.most_segments = most_segments
        self.max_indirect = max_indirect
        self.closed = False
        self.started = False
        self.nowait = True
        self.requests = self.responses = self.bytes = 0
        self.sectors_read = self.sectors_written = self.sectors_discarded = self.flushes = self.errors = 0
        size = (len(pages) * 4096 - 64) // self.entry_size
        self.size = 1 << (size.bit_length() - 1)
        self.mask = self.size - 1
        self.journal = journal
        if journal is None:
            self.jmem = Mem(bytearray(128 + 128 * self.size))
        elif journal.entries < self.size:
            raise HostError(f"journal: {journal.entries} entries for a ring of {self.size}")
        else:
            self.jmem = journal.mem
        self.area = Area([page.view for page in pages])
        self.jp = self.jmem.p
        self.free = Mem(bytearray(8 * self.size))
        self.batch = Mem(bytearray(8 * self.size))
        self.scratch: list[Any] = [None] * self.size
        self.held: list[Any] = [None] * self.size
        self.private = Mem(bytearray(4096))
        self.response = Mem(bytearray(112))
        self.reset_at(self.area.load(8))

    def reset_at(self, index: int) -> None:
        """Nothing in flight, the next request and the next response both at `index`."""
        self.req_cons = self.rsp_prod = self.published = index
        self.consumed = index
        self.inflight = 0
        self.batch_count = 0
        self.free_count = self.size
        for i in range(self.size):
            put32(self.free.p, 4 * i, self.size - 1 - i)

    def start(self) -> None:
        """Begin a new ring: forget what the journal says. `take` does it when nobody did."""
        if self.started:
            raise ValueError("the ring is started")
        for entry in range(self.size):
            point(AT_START)
            st32(self.jp, 128 + 128 * entry, 0)
        point(AT_START)
        st64(self.jp, 16, self.consumed)
        point(AT_START)
        st32(self.jp, 24, self.published)
        point(AT_START)
        st32(self.jp, 28, self.published)
        point(AT_START)
        put32(self.jp, 36, self.abi | self.size << 16)
        point(AT_START)
        st32(self.jp, 32, 1)
        self.started = True

    def attach(self) -> list[Req]:
        """After a worker's death: restore the indices, settle the batch that was being published, pin again.

        -> the requests that were in flight, in the order in which they were taken, to be done once more. Answers that
        were ready are published by the next push. The caller notifies and kicks once, whatever push says.
        GuestError: the shared rsp_prod is not where the journal left it. HostError: the journal is of another ring.
        """
        if self.started:
            raise ValueError("the ring is started")
        if self.journal is None or not self.journal.started:
            self.start()
            return []
        if get32(self.jp, 36) != self.abi | self.size << 16:
            raise HostError("journal: it was kept for a ring of another size or ABI")
        left = self.journal.restore(self.area.load(8), self.size)
        self.consumed = left.consumed
        # A worker that died between INFLIGHT and this store: once the request is answered, nothing else would tell.
        point(AT_SETTLE)
        st64(self.jp, 16, self.consumed)
        self.req_cons = left.consumed & 0xFFFFFFFF
        self.published = left.published
        self.rsp_prod = (left.published + len(left.done)) & 0xFFFFFFFF
        self.started = True
        self.free_count = 0
        busy = {*left.inflight, *left.done}
        for entry in range(self.size):
            if entry not in busy:
                put32(self.free.p, 4 * self.free_count, entry)
                self.free_count += 1
        for entry in left.done:
            self.answer_again(entry)
        return [self.take_again(entry) for entry in left.inflight]

    def answer_again(self, entry: int) -> None:
        """Write the response of a DONE entry into the ring once more: the worker may have died before it did."""
        base = 128 + 128 * entry
        status = get16(self.jp, base + 2)
        op = get8(self.jp, base + 16)
        if op == 6 and self.max_indirect:
            op = get8(self.jp, base + 17)
        self.respond(get32(self.jp, base + 4), get64(self.jp, base + 16 + self.o_id), op, status)
        put32(self.batch.p, 4 * self.batch_count, entry)
        self.batch_count += 1

    def take_again(self, entry: int) -> Req:
        """Parse and pin an INFLIGHT entry from its private copy."""
        req = Req.__new__(Req)
        self.parse(req, entry)
        self.inflight += 1
        self.requests += 1
        return req

    def ready(self) -> int:
        if not self.started:
            if self.closed:
                raise ValueError("the ring is closed")
            self.start()
        return 0

    def available(self) -> int:
        """Requests not taken yet. The guest may say anything: behind req_cons, or more than the ring holds."""
        prod = ld32(self.area.p, 0)
        waiting = u32(prod - self.req_cons)
        if waiting > self.size or u32(prod - self.published) > self.size:
            raise GuestError(
                f"ring: request index jumped: req_prod {prod:#x}, taken up to {self.req_cons:#x}, "
                f"answered up to {self.published:#x}, {self.size} entries"
            )
        return waiting

    def take(self, most: int) -> list[Req]:
        """At most `most` requests. GuestError: the index jumped, stop the device. See Req for what is in one.

        A request that is wrong but can be answered has `status` and `reason`; the caller gives that status to `done`.
        """
        self.ready()
        n = self.available()
        if n > most:
            n = most
        out: list[Req] = []
        while n > 0:
            req = Req.__new__(Req)
            self.next_into(req)
            out.append(req)
            n -= 1
        return out

    def run(self, fd: int, most: int, most_bytes: int = 1 << 30) -> list[Req]:
        """`take`, and answer each READ whose data is in the page cache of `fd`; -> every other request.

        Stops behind the request that makes the answers `most_bytes` long: the guest gets them while the rest is read.
        Uses RWF_NOWAIT; a file system that has none (tmpfs) is noticed once and not asked again.
        """
        self.ready()
        n = self.available()
        if n > most:
            n = most
        out: list[Req] = []
        req = Req.__new__(Req)
        end = self.bytes + most_bytes
        while n > 0 and self.bytes < end:
            n -= 1
            self.next_into(req)
            if req.op == 0 and req.status == 0 and self.nowait:
                if cython.compiled:
                    got = sys_preadv(fd, req.iov_addr, req.iov_count, req.sector << 9, 8)  # type: ignore[arg-type]
                else:
                    got = sys_preadv(fd, req.iov(), req.iov_count, req.sector << 9, 8)
                if got == req.want:
                    self.finish(req, 0)
                    continue
                if got == -95:  # EOPNOTSUPP
                    self.nowait = False
            out.append(req)
            req = Req.__new__(Req)
        return out

    def next_into(self, req: Req) -> int:
        # available() bounds what is in flight or unpublished by the ring's size, so that an entry is free
        self.free_count -= 1
        entry = get32(self.free.p, 4 * self.free_count)
        base = 128 + 128 * entry
        point(AT_COPY)
        self.area.take(64 + (self.req_cons & self.mask) * self.entry_size, self.jp, base + 16, self.entry_size)
        point(AT_COUNTER)
        st64(self.jp, base + 8, self.consumed)
        self.parse(req, entry)
        point(AT_INFLIGHT)
        st32(self.jp, base, 1)  # INFLIGHT
        self.consumed += 1
        self.req_cons = u32(self.consumed)
        point(AT_CONSUMED)
        st64(self.jp, 16, self.consumed)
        point(AT_TAKEN)
        self.inflight += 1
        self.requests += 1
        return 0

    def parse(self, req: Req, entry: int) -> int:
        raw = 128 + 128 * entry + 16
        op = get8(self.jp, raw)
        req.op = op
        req.id = get64(self.jp, raw + self.o_id)
        req.sector = 0
        req.want = 0
        req.segments = 0
        req.status = 0
        req.reason = ""
        req.nr_sectors = 0
        req.flag = 0
        req.iov_count = 0
        req.held = 0
        req.end = 0
        req.row = 0
        req.owner = self
        req.memory = self.memory
        req.entry = entry
        self.held[entry] = req
        self.room(req, 11)
        try:
            if op <= 1:
                self.direct(req, raw)
            elif op == 6 and self.max_indirect:
                self.indirect(req, raw)
            elif op == 3:
                if get8(self.jp, raw + 1):
                    raise GuestError("a flush has no segments")
            elif op == 5:
                req.sector = get64(self.jp, raw + self.o_sector)
                req.nr_sectors = get64(self.jp, raw + self.o_segments)
                req.flag = get8(self.jp, raw + 1)
                if self.readonly:
                    raise GuestError("the disk is read-only")
                self.in_range(req, req.nr_sectors)
            else:
                req.status = -2
                req.reason = f"operation {op} is not supported"
        except GuestError as error:
            self.unpin(req)
            req.iov_count = 0
            req.status = -1
            req.reason = str(error)
        return 0

    def direct(self, req: Req, raw: int) -> int:
        n = get8(self.jp, raw + 1)
        if n == 0 or n > self.most_segments:
            raise GuestError(f"{n} segments, 1 to {self.most_segments} are possible")
        req.sector = get64(self.jp, raw + self.o_sector)
        if req.op == 1 and self.readonly:
            raise GuestError("the disk is read-only")
        for i in range(n):
            at = raw + self.o_segments + 8 * i
            self.segment(req, get32(self.jp, at), get8(self.jp, at + 4), get8(self.jp, at + 5))
        return self.in_range(req, req.want >> 9)

    def indirect(self, req: Req, raw: int) -> int:
        req.op = get8(self.jp, raw + 1)
        n = get16(self.jp, raw + 2)
        if req.op > 1:
            raise GuestError(f"operation {req.op} inside an indirect request, only 0 and 1 are possible")
        if n == 0 or n > self.max_indirect:
            raise GuestError(f"{n} indirect segments, 1 to {self.max_indirect} are possible")
        req.sector = get64(self.jp, raw + self.o_sector)
        if req.op == 1 and self.readonly:
            raise GuestError("the disk is read-only")
        self.room(req, n)
        for page in range((n + 511) >> 9):
            part = n - 512 * page
            if part > 512:
                part = 512
            gref = get32(self.jp, raw + self.o_indirect + 4 * page)
            point(AT_PIN)
            address = self.grants.pin_page(gref, False)
            length = 8 * part
            if cython.compiled:
                copy(self.private.p, 0, cython.cast("const char *", address), 0, length)
            else:
                with self.memory.view_at(address, length) as view:
                    self.private.view[:length] = view
            point(AT_UNPIN)
            self.grants.unpin_page(gref, False)
            for i in range(part):
                self.segment(
                    req,
                    get32(self.private.p, 8 * i),
                    get8(self.private.p, 8 * i + 4),
                    get8(self.private.p, 8 * i + 5),
                )
        return self.in_range(req, req.want >> 9)

    def room(self, req: Req, segments: int) -> int:
        """Scratch memory for the request's vectors and grefs: kept per entry, so bounded by the ring."""
        mem = self.scratch[req.entry]
        if mem is None or mem.size < 20 * segments:
            mem = Mem(bytearray(40 * ((segments + 1) >> 1)))
            self.scratch[req.entry] = mem
        req.scratch = mem
        req.grefs = mem.size // 20 * 16
        req.iov_addr = mem.address
        return 0

    def segment(self, req: Req, gref: int, first: int, last: int) -> int:
        if first > last or last > 7:
            raise GuestError(f"segment {req.segments}: sectors {first} to {last} are not inside a page")
        point(AT_PIN)
        address = self.grants.pin_page(gref, req.op == 0)  # a read from the disk writes to the page
        row = self.grants.row
        put32(req.scratch.p, req.grefs + 4 * req.held, gref)
        req.held += 1
        address += first << 9
        length = (last - first + 1) << 9
        if req.iov_count and address == req.end and row == req.row:
            at = 16 * (req.iov_count - 1) + 8
            put64(req.scratch.p, at, get64(req.scratch.p, at) + length)
        else:
            at = 16 * req.iov_count
            put64(req.scratch.p, at, address)
            put64(req.scratch.p, at + 8, length)
            req.iov_count += 1
        req.end = address + length
        req.row = row
        req.want += length
        req.segments += 1
        return 0

    def in_range(self, req: Req, count: int) -> int:
        if count > self.sectors or req.sector > self.sectors - count:
            raise GuestError(f"sectors {req.sector} to {req.sector} + {count} are past the end ({self.sectors})")
        if (req.sector | count) & self.sector_mask:
            # The unit on the wire is 512 bytes, whatever the disk's sectors are.
            own = 512 * (self.sector_mask + 1)
            raise GuestError(f"{count} sectors of 512 bytes at {req.sector} are no whole sectors of {own} bytes")
        return 0

    def unpin(self, req: Req) -> int:
        write = req.op == 0
        for i in range(req.held):
            point(AT_UNPIN)
            self.grants.unpin_page(get32(req.scratch.p, req.grefs + 4 * i), write)
        req.held = 0
        return 0

    def done(self, req: Req, status: int) -> None:
        """Answer a request with a blkif status, once: unpins, then writes the response, which `push` publishes."""
        if req.owner is not self or self.closed:
            raise ValueError("this request is done, or of another ring")
        self.finish(req, status)

    def finish(self, req: Req, status: int) -> int:
        self.unpin(req)
        base = 128 + 128 * req.entry
        point(AT_INDEX)
        put32(self.jp, base + 4, self.rsp_prod)
        point(AT_DONE)
        st32(self.jp, base, 2 | (status & 0xFFFF) << 16)  # DONE
        self.respond(self.rsp_prod, req.id, req.op, status)
        point(AT_ANSWERED)
        self.rsp_prod = u32(self.rsp_prod + 1)
        put32(self.batch.p, 4 * self.batch_count, req.entry)
        self.batch_count += 1
        self.held[req.entry] = None
        req.owner = None
        self.inflight -= 1
        self.responses += 1
        if status:
            self.errors += 1
        elif req.op == 0:
            self.bytes += req.want
            self.sectors_read += req.want >> 9
        elif req.op == 1:
            self.bytes += req.want
            self.sectors_written += req.want >> 9
        elif req.op == 5:
            self.sectors_discarded += req.nr_sectors
        else:
            self.flushes += 1
        return 0

    def respond(self, index: int, id: int, op: int, status: int) -> int:
        # the rest of the entry stays zero: no byte of ours may leak in it (XSA-216), nor the request's
        put64(self.response.p, 0, id)
        put8(self.response.p, 8, op)
        put16(self.response.p, 10, status)
        point(AT_RESPONSE)
        self.area.give(64 + (index & self.mask) * self.entry_size, self.response.p, 0, self.entry_size)
        return 0

    def push(self) -> bool:
        """Publish the answers; True: the guest wants to be notified."""
        if self.closed:
            raise ValueError("the ring is closed")
        new = self.rsp_prod
        old = self.published
        if new == old:
            return False
        point(AT_TARGET)
        st32(self.jp, 28, new)
        point(AT_RSP_PROD)
        st32(self.area.p, 8, new)
        fence()
        event = ld32(self.area.p, 12)
        for i in range(self.batch_count):
            entry = get32(self.batch.p, 4 * i)
            point(AT_FREE)
            st32(self.jp, 128 + 128 * entry, 0)  # FREE
            put32(self.free.p, 4 * self.free_count, entry)
            self.free_count += 1
        self.batch_count = 0
        point(AT_PUBLISHED)
        st32(self.jp, 24, new)
        self.published = new
        return u32(new - event) < u32(new - old)

    def arm(self) -> bool:
        """Ask for a kick at the next request; True: there is one already, do not sleep."""
        if self.closed:
            raise ValueError("the ring is closed")
        point(AT_ARM)
        return self.area.arm(0, self.req_cons)

    def pending(self) -> bool:
        """A cheap look: requests wait (or the index jumped, which `take` tells)."""
        return not self.closed and self.area.pending(0, self.req_cons)

    def close(self) -> None:
        """Unpin all that is held, without answers, and let go of the pages; idempotent. The disk must be quiet."""
        if self.closed:
            return
        self.closed = True
        self.started = False
        for req in self.held:
            if req is not None:
                self.drop(req)
        self.inflight = 0
        self.area.close()

    def drop(self, req: Req) -> int:
        self.unpin(req)
        req.owner = None
        return 0
