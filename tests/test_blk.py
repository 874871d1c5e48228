"""blkif batches: both ABIs, real files, every bad request, and a guest that rewrites what was already read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bareguest import Blkfront, Ram
from evtchnd._core import BlkRing, Req
from evtchnd.errors import GuestError
from scale import scaled

READ, WRITE, FLUSH, DISCARD = 0, 1, 3, 5


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "image").write_bytes(b"".join(n.to_bytes(4, "little") * 128 for n in range(4096)))
    fd = os.open(tmp_path / "image", os.O_RDWR)
    yield fd
    os.close(fd)


def one(front: Blkfront) -> Req:
    front.publish()
    (req,) = front.ring.take(1)
    return req


@pytest.mark.parametrize("abi", [64, 32])
@pytest.mark.parametrize("pages", [1, 2, 16])
@pytest.mark.parametrize("start", [0, 2**32 - 20])
def test_reads_and_writes_of_a_file(ram: Ram, image: int, abi: int, pages: int, start: int) -> None:
    front = Blkfront(ram, abi=abi, pages=pages, start=start)
    assert front.ring.size == front.entries
    for id in range(3 * front.entries):  # past the end of the ring, entries that straddle its pages
        number = id % 10
        page = ram.page(100 + number)
        if id % 2:
            ram.ram[page : page + 4096] = bytes([id & 0xFF]) * 4096
        front.request(id % 2, 1 << 63 | id, 8 * number, front.data(number))
        req = one(front)
        assert (req.op, req.id, req.sector, req.want, req.segments) == (id % 2, 1 << 63 | id, 8 * number, 4096, 1)
        assert (req.pwritev if id % 2 else req.preadv)(image, req.sector * 512) == 4096
        assert ram.ram[page : page + 4096] == os.pread(image, 4096, 4096 * number)
        front.ring.done(req, 0)
        front.ring.push()
        assert front.responses() == [(1 << 63 | id, id % 2, 0)]
    assert (front.ring.requests, front.ring.responses) == (3 * front.entries, 3 * front.entries)
    assert front.ring.bytes == 3 * front.entries * 4096
    front.close()
    assert ram.grants.pinned == 0


def test_parts_of_pages_and_neighbours(ram: Ram, image: int) -> None:
    front = Blkfront(ram)
    front.data(*range(8))
    # 3 whole neighbours, then page 5 from sector 2 to 3, then its sector 4, then page 4's last, page 5's first
    front.request(
        READ, 1, 1, [(100, 0, 7), (101, 0, 7), (102, 0, 7), (105, 2, 3), (105, 4, 4), (104, 7, 7), (105, 0, 0)]
    )
    req = one(front)
    assert (req.iov_count, req.want, req.segments) == (3, 3 * 4096 + 5 * 512, 7)
    assert [len(view) for view in req.iov()] == [3 * 4096, 3 * 512, 2 * 512]
    assert req.preadv(image, 512) == req.want
    data = os.pread(image, req.want, 512)
    at = ram.page(100)
    assert ram.ram[at : at + 3 * 4096] == data[: 3 * 4096]
    at = ram.page(105)
    assert ram.ram[at + 1024 : at + 2560] == data[3 * 4096 : 3 * 4096 + 1536]
    assert ram.ram[at - 512 : at + 512] == data[-1024:]
    front.ring.done(req, 0)
    front.close()


def test_neighbours_in_different_slots_are_not_merged(ram: Ram) -> None:
    front = Blkfront(ram)
    ram.grant(100, 511)  # the last of slot 0; the memfd goes on in slot 1
    ram.grant(101, 0x100000)
    ram.grant(102, 0x100000 + 511)
    ram.grant(103, 0)
    # whichever of the two mappings lies right below the other here
    front.request(WRITE, 1, 0, [(100, 0, 7), (101, 0, 7), (102, 0, 7), (103, 0, 7)])
    req = one(front)
    assert req.iov_count == 4
    assert [len(view) for view in req.iov()] == [4096] * 4
    front.close()


def test_short_results_go_on(ram: Ram, image: int) -> None:
    front = Blkfront(ram)
    front.data(1, 2, 4)
    front.request(WRITE, 1, 0, [(101, 0, 7), (102, 0, 7), (104, 0, 7)])
    content = bytes(range(256)) * 48
    ram.ram[ram.page(101) : ram.page(101) + 8192] = content[:8192]
    ram.ram[ram.page(104) : ram.page(104) + 4096] = content[8192:]
    req = one(front)
    left = []
    for n in (0, 100, 8000, 92, 4000, 96):
        req.advance(n)
        left.append(b"".join(bytes(view) for view in req.iov()))
    assert left == [content[n:] for n in (0, 100, 8100, 8192, 12192, 12288)]
    assert req.iov_count == 0
    with pytest.raises(ValueError, match="past the end"):
        req.advance(1)
    front.ring.done(req, 0)
    assert ram.flags(101) == ram.flags(104) == 1  # everything is unpinned all the same
    front.close()


@pytest.mark.parametrize("abi", [64, 32])
def test_indirect_requests(ram: Ram, image: int, abi: int) -> None:
    front = Blkfront(ram, abi=abi)
    numbers = list(range(0, 128, 2))
    front.indirect(READ, 7, 16, front.data(*numbers))
    req = one(front)
    assert (req.op, req.id, req.sector, req.segments, req.iov_count) == (READ, 7, 16, 64, 64)
    assert ram.flags(90) == 1  # the list was copied and let go
    assert req.preadv(image, 8192) == 64 * 4096
    for n, number in enumerate(numbers):
        at = ram.page(100 + number)
        assert ram.ram[at : at + 4096] == os.pread(image, 4096, 8192 + 4096 * n)
    front.ring.done(req, 0)
    front.ring.push()
    assert front.responses() == [(7, READ, 0)]
    front.close()


def test_indirect_lists_of_more_than_a_page(ram: Ram) -> None:
    front = Blkfront(ram, max_indirect=1024)
    front.data(0)
    for gref, gfn in ((91, 91), (92, 92)):
        ram.grant(gref, gfn)
    entry = (100).to_bytes(4, "little") + b"\0\7\0\0"
    ram.ram[ram.page(91) : ram.page(91) + 4096] = entry * 512
    ram.ram[ram.page(92) : ram.page(92) + 8 * 88] = entry * 88
    front.indirect(WRITE, 7, 0, [], gref=91, count=600)
    at = front.byte(64 + 28 + 4)
    ram.ram[at : at + 4] = (92).to_bytes(4, "little")
    ram.grant(91, 91)
    req = one(front)
    assert (req.reason, req.segments, req.want) == ("", 600, 600 * 4096)
    assert ram.grants.pins_of(100) == (600, 0)
    front.close()
    assert ram.grants.pinned == 0


@pytest.mark.parametrize("abi", [64, 32])
def test_flush_and_discard(ram: Ram, abi: int) -> None:
    front = Blkfront(ram, abi=abi, sectors=1000)
    front.request(FLUSH, 1, 0, [])
    req = one(front)
    assert (req.op, req.status, req.want) == (FLUSH, 0, 0)
    front.ring.done(req, -2)
    front.discard(2, 100, 900, flag=1)
    req = one(front)
    assert (req.op, req.status, req.sector, req.nr_sectors, req.flag) == (DISCARD, 0, 100, 900, 1)
    front.ring.done(req, 0)
    front.discard(3, 101, 900)
    req = one(front)
    assert (req.status, req.reason) == (-1, "sectors 101 to 101 + 900 are past the end (1000)")
    front.ring.done(req, req.status)
    front.ring.push()
    assert front.responses() == [(1, 3, -2), (2, 5, 0), (3, 5, -1)]
    front.close()


def bad_requests(front: Blkfront) -> dict[str, tuple[object, int]]:
    ok = front.data(0)
    front.ram.grant(200, 3, domid=9)
    front.ram.grant(201, 0x3FF)
    front.ram.grant(202, 3, flags=5)
    return {
        "operation 2 is not supported": (lambda: front.request(2, 5, 0, ok), -2),
        "operation 4 is not supported": (lambda: front.request(4, 5, 0, ok), -2),
        "operation 255 is not supported": (lambda: front.request(255, 5, 0, ok), -2),
        "0 segments, 1 to 11": (lambda: front.request(READ, 5, 0, []), -1),
        "12 segments, 1 to 11": (lambda: front.request(READ, 5, 0, ok * 11, count=12), -1),
        "255 segments, 1 to 11": (lambda: front.request(WRITE, 5, 0, ok * 11, count=255), -1),
        "a flush has no segments": (lambda: front.request(FLUSH, 5, 0, ok), -1),
        "segment 1: sectors 4 to 3": (lambda: front.request(READ, 5, 0, [ok[0], (100, 4, 3)]), -1),
        "segment 0: sectors 0 to 8": (lambda: front.request(READ, 5, 0, [(100, 0, 8)]), -1),
        "segment 0: sectors 255 to 255": (lambda: front.request(WRITE, 5, 0, [(100, 255, 255)]), -1),
        "sectors 993 to 993 .* past the end": (lambda: front.request(READ, 5, 993, ok), -1),
        "sectors 18446744073709551608 to": (lambda: front.request(READ, 5, 2**64 - 8, ok), -1),
        "sectors 9223372036854775808 to": (lambda: front.request(WRITE, 5, 2**63, ok), -1),
        "grant 300: is not granted": (lambda: front.request(READ, 5, 0, [*ok * 10, (300, 0, 7)]), -1),
        "grant 200: is granted to domain 9": (lambda: front.request(READ, 5, 0, [(200, 0, 7)]), -1),
        "grant 201: frame 0x3ff": (lambda: front.request(READ, 5, 0, [*ok, (201, 0, 7)]), -1),
        "grant 202: is read-only": (lambda: front.request(READ, 5, 0, [(202, 0, 7)]), -1),
        "grant 4294967295: is outside": (lambda: front.request(WRITE, 5, 0, [(0xFFFFFFFF, 0, 7)]), -1),
        "0 indirect segments": (lambda: front.indirect(READ, 5, 0, []), -1),
        "65 indirect segments": (lambda: front.indirect(READ, 5, 0, [], count=65), -1),
        "65535 indirect segments": (lambda: front.indirect(READ, 5, 0, [], count=65535), -1),
        "operation 3 inside": (lambda: front.indirect(FLUSH, 5, 0, ok), -1),
        "operation 6 inside": (lambda: front.indirect(6, 5, 0, ok), -1),
        "grant 300: frame 0x400": (lambda: front.indirect(READ, 5, 0, ok, gref=300, list_gfn=0x400), -1),
        "segment 2: sectors 9 to 9": (lambda: front.indirect(READ, 5, 0, [*ok * 2, (100, 9, 9)]), -1),
        "grant 301: is not granted": (lambda: front.indirect(WRITE, 5, 0, [*ok * 63, (301, 0, 7)]), -1),
    }  # fmt: skip


@pytest.mark.parametrize("abi", [64, 32])
def test_xsa_361_362_365_367_a_bad_request_gets_one_answer_and_leaves_no_pin(ram: Ram, abi: int) -> None:
    front = Blkfront(ram, abi=abi, sectors=1000)
    for reason, (ask, status) in bad_requests(front).items():
        ask()  # type: ignore[operator]
        req = one(front)
        assert req.status == status, reason
        with pytest.raises(ValueError, match="past the end"):
            req.advance(1)
        assert req.iov_count == 0
        with pytest.raises(GuestError, match=reason):
            raise GuestError(req.reason)
        assert ram.grants.pinned == 1, reason
        op = req.op
        front.ring.done(req, req.status)
        front.ring.push()
        assert front.responses() == [(5, op, status)]
    assert ram.flags(100) == 1
    assert front.ring.bytes == 0
    front.close()


def test_a_read_only_disk(ram: Ram) -> None:
    front = Blkfront(ram, readonly=True)
    for ask in (
        lambda: front.request(WRITE, 1, 0, front.data(0)),
        lambda: front.indirect(WRITE, 1, 0, front.data(0)),
        lambda: front.discard(1, 0, 8),
    ):
        ask()
        req = one(front)
        assert (req.status, req.reason) == (-1, "the disk is read-only")
        front.ring.done(req, -1)
    front.request(FLUSH, 1, 0, [])
    assert one(front).status == 0
    front.close()


def test_what_is_not_offered_is_not_supported(ram: Ram) -> None:
    front = Blkfront(ram, max_indirect=0, most_segments=4)
    front.indirect(READ, 1, 0, front.data(0))
    assert one(front).status == -2
    front.request(READ, 1, 0, front.data(0, 1, 2, 3, 4))
    assert one(front).reason.startswith("5 segments, 1 to 4")
    front.close()


def test_reads_from_the_grants_frame_into_read_only_pages_never(ram: Ram) -> None:
    front = Blkfront(ram)
    front.request(WRITE, 1, 0, front.data(0, flags=5))
    req = one(front)
    assert req.status == 0
    assert ram.flags(100) == 5 | 8
    front.ring.done(req, 0)
    assert ram.flags(100) == 5
    front.close()


@pytest.mark.parametrize("jump", [33, 2**31, 2**32 - 1])
def test_xsa_39_an_index_jump_is_fatal(ram: Ram, jump: int, image: int) -> None:
    front = Blkfront(ram, start=2**32 - 7)
    front.put_word(0, 2**32 - 7 + jump)
    assert front.ring.pending()
    for call in (lambda: front.ring.take(5), lambda: front.ring.run(image, 5)):
        with pytest.raises(GuestError, match="request index jumped"):
            call()
    assert front.ring.inflight == 0
    front.close()


def test_requests_only_where_answers_were_published(ram: Ram) -> None:
    front = Blkfront(ram)
    for id in range(32):
        front.request(FLUSH, id, 0, [])
    front.publish()
    reqs = front.ring.take(32)
    front.ring.done(reqs[0], 0)
    front.put_word(0, 33)  # slot 0 holds our answer, which nobody has seen yet
    with pytest.raises(GuestError, match="request index jumped"):
        front.ring.take(1)
    front.put_word(0, 31)  # back, behind what was taken
    with pytest.raises(GuestError, match="request index jumped"):
        front.ring.take(1)
    front.close()


def test_a_request_is_done_once(ram: Ram, image: int) -> None:
    front = Blkfront(ram)
    front.request(READ, 1, 0, front.data(0))
    req = one(front)
    other = BlkRing(ram.grants, front.pages, abi=64, sectors=1)
    with pytest.raises(ValueError, match="another ring"):
        other.done(req, 0)
    front.ring.done(req, 0)
    for call in (
        lambda: front.ring.done(req, 0),
        lambda: req.preadv(image, 0),
        lambda: req.iov(),
        lambda: req.advance(1),
    ):
        with pytest.raises(ValueError, match="done"):
            call()
    assert repr(req) == "<Req: done>"
    other.close()
    front.close()


def test_close_unpins_and_ends_everything(ram: Ram) -> None:
    front = Blkfront(ram)
    for id in range(5):
        front.request(READ, id, 0, front.data(0, 1, 2))
    front.publish()
    reqs = front.ring.take(5)
    assert ram.grants.pinned == 16
    front.ring.close()
    front.ring.close()
    assert ram.grants.pinned == 1
    assert not front.ring.pending()
    for call in (lambda: front.ring.take(1), front.ring.push, front.ring.arm, lambda: front.ring.done(reqs[0], 0)):
        with pytest.raises(ValueError, match=r"closed|done"):
            call()
    front.close()


def test_run_answers_what_the_page_cache_has(ram: Ram, image: int) -> None:
    os.pread(image, 4096 * 512, 0)
    front = Blkfront(ram)
    front.request(READ, 1, 8, front.data(1, 2))
    front.request(WRITE, 2, 0, front.data(3))
    front.request(FLUSH, 3, 0, [])
    front.request(READ, 4, 4090, front.data(4))  # the last 6 sectors, and 2 past the end of the file: not whole
    front.request(READ, 5, 1 << 40, front.data(5))
    front.request(READ, 6, 16, front.data(6))
    front.publish()
    left = [req.id for req in front.ring.run(image, 32)]
    if left == [1, 2, 3, 4, 5, 6]:
        front.close()
        pytest.skip("RWF_NOWAIT reads are not served on this file system")
    assert left == [2, 3, 4, 5]
    assert ram.ram[ram.page(101) : ram.page(101) + 8192] == os.pread(image, 8192, 4096)
    front.ring.push()
    assert front.responses() == [(1, READ, 0), (6, READ, 0)]
    assert front.ring.inflight == 4
    assert ram.flags(101) == 1
    front.close()


def test_run_gives_everything_back_where_there_is_no_nowait(ram: Ram) -> None:
    fd = os.memfd_create("tmpfs")
    os.ftruncate(fd, 1 << 20)
    front = Blkfront(ram)
    for id in range(4):
        front.request(READ, id, 0, front.data(id))
    front.publish()
    left = front.ring.run(fd, 3)
    assert [req.id for req in left] == [0, 1, 2]
    assert left[0].preadv(fd, 0) == 4096
    assert left[1].preadv(-1, 0) == -9  # EBADF
    front.close()
    os.close(fd)


def test_arm_is_from_what_was_consumed(ram: Ram) -> None:
    front = Blkfront(ram, start=2**32 - 1)
    assert front.ring.arm() is False
    assert front.word(4) == 0
    front.request(FLUSH, 1, 0, [])
    front.request(FLUSH, 2, 0, [])
    front.publish()
    assert front.ring.arm() is True
    assert len(front.ring.take(1)) == 1
    assert front.ring.arm() is True
    assert front.ring.pending()
    assert len(front.ring.take(1)) == 1
    assert front.ring.arm() is False
    assert front.word(4) == 2
    front.close()


def test_xsa_391_403_notify_only_when_the_guest_asks(ram: Ram) -> None:
    front = Blkfront(ram)
    asked = []
    for event in (1, 1, 4, 4, 4, 9):
        front.put_word(12, event)
        front.request(FLUSH, 1, 0, [])
        req = one(front)
        front.ring.done(req, 0)
        asked.append(front.ring.push())
        assert front.ring.push() is False
    assert asked == [True, False, False, True, False, False]
    front.close()


FLIP = """
import mmap, os, sys
ram = mmap.mmap(int(sys.argv[1]), 1 << 20)
at = int(sys.argv[2])
print("on", flush=True)
good, bad = bytes.fromhex(sys.argv[4]), bytes.fromhex(sys.argv[5])
while os.getppid() == int(sys.argv[3]):
    for _ in range(1000):
        ram[at : at + len(good)] = bad
        ram[at : at + len(good)] = good
"""


def test_xsa_155_a_request_that_changes_while_it_is_read(ram: Ram) -> None:
    """XSA-155: count, sectors and grefs flip at full rate; what was validated is what is used."""
    front = Blkfront(ram, sectors=1000)
    front.data(0, 1)
    front.request(READ, 1, 8, [(100, 0, 7), (101, 0, 7)])
    good = ram.ram[front.byte(64) : front.byte(64) + 112]
    front.prod = 0
    front.request(WRITE, 2, 1 << 60, [(100, 7, 0), (999, 0, 255)], count=255)
    bad = ram.ram[front.byte(64) : front.byte(64) + 112]
    child = subprocess.Popen(
        [sys.executable, "-c", FLIP, str(ram.fd), str(front.byte(64)), str(os.getpid()), good.hex(), bad.hex()],
        pass_fds=[ram.fd],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    try:
        child.stdout.readline()
        rounds = good_ones = 0
        # most of what is seen is refused: our own answer in that slot, too
        while rounds < scaled(20_000) or (good_ones < 100 and rounds < 50_000):
            n = 32 * rounds & 0xFFFFFFFF
            rounds += 1
            front.put_word(0, n + 1)  # slot 0, again and again
            (req,) = front.ring.take(1)
            if req.status == 0:
                good_ones += 1
                assert req.op in (READ, WRITE)
                assert 0 < req.segments <= 11
                assert req.want == sum(len(view) for view in req.iov())
                assert req.sector + req.want // 512 <= 1000
            front.ring.done(req, req.status)
            front.ring.push()
            front.put_word(0, n + 32)
            for flush in front.ring.take(31):
                front.ring.done(flush, flush.status)
            front.ring.push()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert ram.grants.pinned == 1
    front.close()


class RingModel(RuleBasedStateMachine):
    """A ring under random requests, good and bad, answered in any order, against a plain model."""

    @initialize(abi=st.sampled_from([64, 32]), pages=st.sampled_from([1, 2]), start=st.sampled_from([0, 2**32 - 9]))
    def make(self, abi: int, pages: int, start: int) -> None:
        self.ram = Ram()
        self.front = Blkfront(self.ram, abi=abi, pages=pages, start=start, sectors=1000)
        self.asked: list[tuple[int, int, int, list[int]]] = []  # id, op, expected status, data pages
        self.taken: list[tuple[Req, tuple[int, int, int, list[int]]]] = []
        self.done: list[tuple[int, int, int]] = []
        self.serial = 0

    @rule(
        op=st.sampled_from([READ, WRITE]),
        numbers=st.lists(st.integers(0, 5), max_size=12),
        sector=st.sampled_from([0, 990]),
        indirect=st.booleans(),
        bad=st.integers(0, 12),
    )
    def ask(self, op: int, numbers: list[int], sector: int, indirect: bool, bad: int) -> None:
        if (self.front.prod - self.front.rsp_cons) & 0xFFFFFFFF == self.front.entries or (indirect and self.asked):
            return  # one list page: the next indirect request waits until the last was taken
        segments = self.front.data(*numbers)
        wrong = not 0 < len(numbers) <= (64 if indirect else 11) or sector + 8 * len(numbers) > 1000
        if bad < len(numbers):
            segments[bad] = (500, 0, 7)
            wrong = True
        self.serial += 1
        put = self.front.indirect if indirect else self.front.request
        put(op, self.serial, sector, segments[: 64 if indirect else 11], count=len(numbers))
        self.front.publish()
        self.asked.append((self.serial, op, -1 if wrong else 0, [] if wrong else numbers))

    @rule(most=st.integers(0, 9))
    def take(self, most: int) -> None:
        found = self.front.ring.take(most)
        assert len(found) == min(most, len(self.asked))
        for req in found:
            asked = self.asked.pop(0)
            assert (req.id, req.op, req.status, req.want) == (*asked[:3], 4096 * len(asked[3])) or req.status == -1
            self.taken.append((req, asked))

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if self.taken:
            req, asked = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            self.front.ring.done(req, asked[2])
            self.done.append(asked[:3])

    @rule()
    def push(self) -> None:
        self.front.ring.push()
        assert self.front.responses() == self.done
        self.done = []

    @invariant()
    def pins(self) -> None:
        if not hasattr(self, "front"):
            return
        held = [(100 + n, asked[1] == READ) for _, asked in self.taken for n in asked[3]]
        assert self.ram.grants.pinned == len(held) + len(self.front.pages)
        for gref in range(100, 106):
            if self.ram.flags(gref):
                expected = (8 if any(gref == pin for pin, _ in held) else 0) | (16 if (gref, True) in held else 0)
                assert self.ram.flags(gref) == 1 | expected
        assert self.front.ring.inflight == len(self.taken)

    def teardown(self) -> None:
        if hasattr(self, "front"):
            self.front.close()
            self.ram.close()


TestRingModel = RingModel.TestCase


def test_run_hands_answers_over_before_the_whole_ring_is_read(ram: Ram, image: int) -> None:
    os.pread(image, 4096 * 512, 0)
    front = Blkfront(ram)
    for id in range(5):
        front.request(READ, id, 8 * id, front.data(id))
    front.publish()
    left = front.ring.run(image, 32, 8192)
    if left:
        front.close()
        pytest.skip("RWF_NOWAIT reads are not served on this file system")
    front.ring.push()
    assert front.responses() == [(0, READ, 0), (1, READ, 0)]
    assert front.ring.pending()
    assert front.ring.run(image, 32, 4096 * 2 + 1) == []
    front.ring.push()
    assert front.responses() == [(2, READ, 0), (3, READ, 0), (4, READ, 0)]
    assert not front.ring.pending()
    front.close()
