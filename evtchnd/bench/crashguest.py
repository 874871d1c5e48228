"""A guest whose backend dies: memory, grants and one vbd's ring in memfds, and a model of what its disk may hold.

The guest's end is `evtchnd.guest.blkqueue.Queue`, which refuses a second response to a request, one of another
operation, and one whose pages are pinned still. Every block (4 KiB) is full of one number, so that what it holds says
which write it was.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from evtchnd import journal
from evtchnd._core.points import FIRST, ROOM
from evtchnd._core.words import Mem
from evtchnd.abi import GRANT_ENTRY_SIZE, GTF_READING, GTF_WRITING, PAGE_SIZE
from evtchnd.blkif import SECTORS_PER_PAGE, Layout, Op, Status
from evtchnd.guest.blkqueue import Completion, Manner, Queue
from evtchnd.guest.domain import FIRST_FREE_GFN, Domain
from evtchnd.memory import GuestMemory
from evtchnd.ring import RSP_PROD

DOMID = 7
BLOCKS = 512
_FRAMES = 2
_PORT = 5
_LEFT_PAGES = 512
_LABELS = 8192
_FILLED = 64


@dataclass
class Write:
    """One content of a block; `asked`, `answered`: when, in the model's own count."""

    number: int
    asked: int
    answered: int | None = None


class Model:
    """What each block may hold: a write that was answered before another one was asked for is gone once that one is.

    Those that were in flight together may come in any order, and be done twice, but not after their answer.
    """

    def __init__(self) -> None:
        self._now = 0
        self._writes: dict[int, list[Write]] = {}

    def now(self) -> int:
        """The next moment."""
        self._now += 1
        return self._now

    def write(self, block: int, number: int) -> Write:
        """Asked for now."""
        entry = Write(number, self.now())
        self._writes.setdefault(block, [Write(0, 0, 0)]).append(entry)
        return entry

    def may_hold(self, block: int, since: int, until: int) -> set[int]:
        """What a read may find that was asked for at `since` and answered at `until`."""
        writes = self._writes.get(block, [Write(0, 0, 0)])
        return {
            each.number
            for each in writes
            if each.asked <= until
            and not any(
                each.answered is not None
                and each.answered < later.asked
                and later.answered is not None
                and later.answered <= since
                for later in writes
            )
        }

    def settle(self, block: int, number: int) -> None:
        """Nothing is in flight, and this is what it holds."""
        self._writes[block] = [Write(number, 0, 0)]

    @property
    def blocks(self) -> Sequence[int]:
        """Those that were ever written to."""
        return list(self._writes)


@dataclass
class Asked:
    """A request of the guest's that is not answered."""

    op: int
    blocks: Sequence[int]
    since: int
    writes: list[Write] = field(default_factory=list)
    status: int = Status.OKAY


class Guest:
    """The machine that `Queue` asks for, the journal, the image, and what was asked of them.

    image: a descriptor of at least BLOCKS blocks, the caller's; its first ones are written to. start: where the ring's
    indices begin.
    """

    def __init__(self, layout: Layout, image: int, *, segments: int = 1, start: int = 0) -> None:
        self.domid = DOMID
        self.layout = layout
        self.image = image
        self.ram_pages = FIRST_FREE_GFN + _LEFT_PAGES
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.ram_fd, self.grant_fd = os.memfd_create("ram", flags), os.memfd_create("grants", flags)
        os.ftruncate(self.ram_fd, self.ram_pages * PAGE_SIZE)
        os.ftruncate(self.grant_fd, _FRAMES * PAGE_SIZE)
        for fd in (self.ram_fd, self.grant_fd):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.ram = GuestMemory()
        self.ram.add(0, 0, self.ram_pages, self.ram_fd, 0)
        self._table = mmap.mmap(self.grant_fd, _FRAMES * PAGE_SIZE)
        self.grants = memoryview(self._table)
        self.store_gfn = self.store_port = 0
        self.kick_fd, self.notify_fd = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self.domain = Domain(self)
        self.queue = Queue(self.domain, "vbd", 0, 1, Manner(layout, 0, False, True, 5.0))
        self.queue.ring.preset(start)
        self.queue.make_slots(segments, None)
        self.journal_fd = journal.create(32, name="crash")
        self.model = Model()
        self.open: dict[int, Asked] = {}
        self.answers: list[Asked] = []
        self._number = 0
        # The watch's words (evtchnd/_core/points.py), in memory that a fork shares.
        self._words = mmap.mmap(-1, 4 * _LABELS)
        self.watch = Mem(self._words)
        self.watch.store(ROOM, _LABELS - FIRST // 4)
        for block in range(_FILLED):
            number = self.number()
            os.pwrite(image, content(number), block * PAGE_SIZE)
            self.model.settle(block, number)

    # ---- what Queue asks of its machine

    def alloc_unbound(self, _: int) -> int:
        return _PORT

    def send(self, _: int) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def wait(self, _: int, timeout: float) -> bool:
        return bool(select.select([self.notify_fd], [], [], timeout)[0])

    def close_port(self, _: int) -> None: ...

    # ---- requests

    def ask(self, op: Op, blocks: Sequence[int]) -> None:
        """One request for neighbouring blocks; INDIRECT stands for one that is refused (it is past the end)."""
        queue, model = self.queue, self.model
        sector = blocks[0] * SECTORS_PER_PAGE
        asked = Asked(op, blocks, model.now())
        if op == Op.READ:
            ident = queue.submit_read(sector, len(blocks) * SECTORS_PER_PAGE)
        elif op == Op.WRITE:
            numbers = [self.number() for _ in blocks]
            ident = queue.submit_write(sector, b"".join(content(number) for number in numbers))
            asked.writes = [model.write(block, number) for block, number in zip(blocks, numbers, strict=True)]
        elif op == Op.DISCARD:
            ident = queue.submit_discard(sector, len(blocks) * SECTORS_PER_PAGE)
            asked.writes = [model.write(block, 0) for block in blocks]
        elif op == Op.FLUSH_DISKCACHE:
            ident = queue.submit_flush()
        else:
            asked.status = Status.ERROR
            ident = queue.submit_read(1 << 40, SECTORS_PER_PAGE)
        self.open[ident] = asked

    def number(self) -> int:
        """A content that no block ever had."""
        self._number += 1
        return self._number

    def publish(self) -> None:
        """Pushes, and asks to be told of the first answer."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.notify_fd)
        self.queue.push()
        self.queue.ring.arm()

    def collect(self) -> str:
        """Takes the answers that are there; -> what is wrong with one, or ""."""
        queue = self.queue
        while queue.ring.pending():
            for done in queue.complete(0.0):
                if wrong := self._answered(done):
                    return wrong
        return ""

    def _answered(self, done: Completion) -> str:
        asked = self.open.pop(done.ident)
        until = self.model.now()
        for write in asked.writes:
            write.answered = until
        self.answers.append(asked)
        if done.status != asked.status:
            return f"request {done.ident} ({asked.op}) has status {done.status}, not {asked.status}"
        if asked.op == Op.READ:
            for index, block in enumerate(asked.blocks):
                found = number_in(done.data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
                if found not in self.model.may_hold(block, asked.since, until):
                    return f"request {done.ident} read {found} from block {block}"
        return ""

    def overwrite(self) -> None:
        """Newer data where writes were answered, as if by another queue: whoever does those again destroys it."""
        for asked in self.answers:
            for block in asked.blocks if asked.writes else ():
                write = self.model.write(block, self.number())
                os.pwrite(self.image, content(write.number), block * PAGE_SIZE)
                write.answered = self.model.now()
        self.answers = []

    def verdict(self) -> str:
        """When nobody serves and all should be answered: what is wrong, or ""."""
        if wrong := self.collect():
            return wrong
        if self.open:
            return f"no answer to {sorted(self.open)}"
        if not self.wait(_PORT, 0.0):
            return "the guest was not notified"
        now = self.model.now()
        for block in self.model.blocks:
            found = number_in(os.pread(self.image, PAGE_SIZE, block * PAGE_SIZE))
            if found not in (allowed := self.model.may_hold(block, now, now)):
                return f"block {block} holds {found}, not one of {sorted(allowed)}"
            self.model.settle(block, found)
        flags = bytes(self.grants)[::GRANT_ENTRY_SIZE]
        if used := [gref for gref, byte in enumerate(flags) if byte & (GTF_READING | GTF_WRITING)]:
            return f"grants {used} are in use still"
        self.answers = []
        return self._journal_verdict()

    def _journal_verdict(self) -> str:
        left = journal.Journal(self.journal_fd)
        try:
            mem, prod = left.mem, self.queue.ring.rsp_cons
            words = {name: mem.load(at) for name, at in (("consumed", 16), ("published", 24), ("target", 28))}
            for name, value in words.items():
                if value != prod:
                    return f"journal: {name} is {value}, the ring is at {prod}"
            taken = [n for n in range(left.entries) if mem.load(journal.HEADER + n * journal.STRIDE) != journal.FREE]
            return f"journal: entries {taken} are not free" if taken else ""
        finally:
            left.close()

    @property
    def rsp_prod(self) -> int:
        """What the guest sees."""
        with self.ram.view(self.queue.ring_gfn) as page:
            return int.from_bytes(page[RSP_PROD : RSP_PROD + 4], "little")

    def forget(self) -> None:
        """A new handshake with what another ring left in the journal: requests in flight that nobody asks for now."""
        left = journal.Journal(self.journal_fd)
        left.reset()
        for entry in range(left.entries):
            left.mem.store(journal.HEADER + entry * journal.STRIDE, journal.INFLIGHT)
        for at in (16, 24, 28):
            left.mem.store(at, 99)
        left.close()

    def close(self) -> None:
        """Of what no worker uses."""
        self.queue.release()
        self.domain.close()
        self.watch.close()
        self._words.close()
        self.grants.release()
        self._table.close()
        self.ram.close()
        for fd in (self.ram_fd, self.grant_fd, self.kick_fd, self.notify_fd, self.journal_fd):
            os.close(fd)


def content(number: int) -> bytes:
    """A block full of it."""
    return number.to_bytes(8, "little") * (PAGE_SIZE // 8)


def number_in(block: bytes) -> int:
    """The number that a block is full of; -1: it is torn."""
    return int.from_bytes(block[:8], "little") if block == block[:8] * (PAGE_SIZE // 8) else -1
