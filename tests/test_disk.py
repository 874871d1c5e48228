"""The disk side on real files, with requests out of a real ring; by io_uring and by threads."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import random
import resource
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bareguest import Blkfront, Ram
from evtchnd._core.uring import Uring
from evtchnd.channel import Poller
from evtchnd.control.disk import check_passed
from evtchnd.errors import HostError
from evtchnd_backends import bounce, threads
from evtchnd_backends.disk import SLOW_NS, RawDisk
from evtchnd_backends.threads import THREADS
from scale import scaled

READ, WRITE, BARRIER, FLUSH, DISCARD = 0, 1, 2, 3, 5
OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
SIZE = 4 << 20


class Bench:
    """A ring, a disk, an image, and what the disk has answered."""

    def __init__(self, ram: Ram, path: Path, engine: str, *, direct: bool = False, **options: Any) -> None:
        self.ram = ram
        self.path = path
        self.front = Blkfront(ram, pages=4, sectors=path.stat().st_size // 512 or SIZE // 512)
        self.fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.uring = Uring(options.pop("entries", 64), eventfd=self.event) if engine == "uring" else None
        self.poller: Poller | None = None
        if options.pop("polled", True):
            self.poller = options["poller"] = Poller(asyncio.get_running_loop(), max_us=0)
        self.woken = asyncio.Event()
        self.ids = 0
        self.statuses: dict[int, int] = {}
        self.disk = RawDisk(
            self.fd,
            readonly=options.pop("readonly", False),
            uring=self.uring,
            eventfd=self.event,
            wake=self.woken.set,
            name="domain 7: vbd 51712",
            **options,
        )

    def ask(self, op: int, sector: int, segments: list[tuple[int, int, int]] | int = 0, *, flag: int = 0) -> int:
        """Starts one request; -> its id. `segments`: of a discard, the sectors."""
        self.ids += 1
        if isinstance(segments, int):
            if op == DISCARD:
                self.front.discard(self.ids, sector, segments, flag)
            else:
                self.front.request(op, self.ids, sector, [])
        elif len(segments) > 11:
            self.front.indirect(op, self.ids, sector, segments)
        else:
            self.front.request(op, self.ids, sector, segments)
        self.front.publish()
        (req,) = self.front.ring.take(1)
        assert req.status == OKAY or op == BARRIER, req.reason
        self.disk.start(req)
        return self.ids

    def collect(self) -> None:
        for req, status in self.disk.finished():
            assert req.id not in self.statuses
            self.statuses[req.id] = status
            self.front.ring.done(req, status)
        self.front.ring.push()
        assert all(self.statuses[id] == status for id, _, status in self.front.responses())

    async def idle(self) -> None:
        """Until nothing is in flight."""
        async with asyncio.timeout(60):
            while True:
                self.woken.clear()
                self.collect()
                if not self.disk.inflight:
                    return
                await self.woken.wait()

    async def answer(self, *ask: Any, **more: Any) -> int:
        id = self.ask(*ask, **more)
        await self.idle()
        return self.statuses[id]

    def fill(self, number: int, data: bytes) -> None:
        at = self.ram.page(100 + number)
        self.ram.ram[at : at + len(data)] = data

    def page(self, number: int) -> bytes:
        at = self.ram.page(100 + number)
        return bytes(self.ram.ram[at : at + 4096])

    async def close(self) -> None:
        await self.disk.close()
        if self.poller is not None:
            self.poller.close()
        self.front.close()
        if self.uring is not None:
            self.uring.close()
        os.close(self.event)
        os.close(self.fd)


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    assert ram.grants.pinned == 0
    ram.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["uring", "threads"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def bench(ram: Ram, image: Path, engine: str) -> AsyncIterator[Bench]:
    bench = Bench(ram, image, engine)
    yield bench
    await bench.close()


def forget(fd: int) -> None:
    """Out of the page cache."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


async def test_pages_that_o_direct_refuses_go_through_memory_of_our_own(
    ram: Ram, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that wants each vector aligned to 4096 bytes, and a buffer that takes several pieces a request."""
    real = threads.transfer
    refused = taken = 0

    def strict(fd: int, write: bool, iov_addr: int, iov_count: int, offset: int) -> int:
        nonlocal refused, taken
        vectors = ctypes.cast(iov_addr, ctypes.POINTER(ctypes.c_uint64))
        if any(vectors[word] % 4096 for word in range(2 * iov_count)):
            refused += 1
            return -errno.EINVAL
        taken += 1
        return real(fd, write, iov_addr, iov_count, offset)

    monkeypatch.setattr(threads, "transfer", strict)
    monkeypatch.setattr(bounce, "BYTES", 16384)
    bench = Bench(ram, image, "threads", direct=True)
    model = bytearray(image.read_bytes())
    dice = random.Random(3)
    for _ in range(scaled(100, least=20)):
        asked = []
        pages = iter(range(400))
        for place in dice.sample(range(0, SIZE // 512 - 128, 128), 6):  # side by side: they wait for the buffer
            segments = []
            count = 0
            for page in [next(pages) for _ in range(dice.choice([1, 2, 14, 30]))]:
                bench.front.data(page)
                first, last = dice.choice([(0, 7), (2, 5), (7, 7), (0, 0)])
                segments.append((100 + page, first, last))
                count += last - first + 1
            if count % 8:  # whole sectors of 4096 bytes, as the disk has them
                bench.front.data(page := next(pages))
                segments.append((100 + page, 0, 7 - count % 8))
            write = dice.random() < 0.5
            at = place * 512
            for gref, first, last in segments:
                size = (last - first + 1) * 512
                if write:
                    data = dice.randbytes(size)
                    bench.fill(gref - 100, bytes(first * 512) + data)
                    model[at : at + size] = data
                at += size
            asked.append((bench.ask(WRITE if write else READ, place, segments), write, place, segments))
        await bench.idle()
        for ident, write, place, segments in asked:
            assert bench.statuses[ident] == OKAY
            at = place * 512
            for gref, first, last in [] if write else segments:
                size = (last - first + 1) * 512
                assert bench.page(gref - 100)[first * 512 : (last + 1) * 512] == model[at : at + size]
                at += size
    assert refused and taken
    # one that fails in the buffer, too, is an error, and those behind it are served
    idents = [bench.ask(READ, 0, [*bench.front.data(0, 1), (102, 0, 3)]) for _ in range(1) if bench.front.data(2)]
    idents.append(bench.ask(WRITE, 8, [(100, 0, 3), (101, 0, 3)]))
    await bench.idle()
    assert [bench.statuses[ident] for ident in idents] == [ERROR, OKAY]
    await bench.close()


@pytest.mark.parametrize("direct", [False, True])
async def test_the_image_equals_the_model(ram: Ram, image: Path, engine: str, direct: bool) -> None:
    bench = Bench(ram, image, engine, direct=direct)
    model = bytearray(image.read_bytes())
    dice = random.Random(7)
    for _ in range(scaled(1000)):
        reads: list[tuple[int, list[tuple[int, int, int]]]] = []
        sectors = sorted(dice.sample(range(0, SIZE // 512 - 128, 128), dice.randrange(1, 8)))
        pages = iter(range(400))
        for place in sectors:  # side by side, never overlapping
            sector = place + dice.choice([0, 0, 8, 3])
            segments = []
            for page in [next(pages) for _ in range(dice.choice([1, 2, 11, 14]))]:
                bench.front.data(page)
                first, last = dice.choice([(0, 7), (0, 7), (0, 7), (2, 5), (7, 7)])
                segments.append((100 + page, first, last))
            count = sum(last - first + 1 for _, first, last in segments)
            match dice.choice(["read", "write", "write", "flush", "discard"]):
                case "read":
                    bench.ask(READ, sector, segments)
                    reads.append((sector, segments))
                case "write":
                    at = sector * 512
                    for gref, first, last in segments:
                        data = dice.randbytes((last - first + 1) * 512)
                        bench.fill(gref - 100, bytes(first * 512) + data)
                        model[at : at + len(data)] = data
                        at += len(data)
                    bench.ask(WRITE, sector, segments)
                case "flush":
                    bench.ask(FLUSH, 0)
                case "discard":
                    bench.ask(DISCARD, sector, count)
                    model[sector * 512 : (sector + count) * 512] = bytes(count * 512)
        await bench.idle()
        for sector, segments in reads:
            at = sector * 512
            for gref, first, last in segments:
                n = (last - first + 1) * 512
                assert bench.page(gref - 100)[first * 512 : first * 512 + n] == model[at : at + n]
                at += n
        if dice.random() < 0.2:
            forget(bench.fd)
    assert set(bench.statuses.values()) == {OKAY}
    assert len(bench.statuses) == bench.ids
    assert image.read_bytes() == model
    await bench.close()


async def test_cold_and_beyond_four_gigabytes(ram: Ram, image: Path, engine: str) -> None:
    os.truncate(image, 6 << 30)
    bench = Bench(ram, image, engine)
    assert bench.disk.sectors == (6 << 30) // 512
    sector = bench.disk.sectors - 8
    bench.fill(0, b"end" * 1024)
    assert await bench.answer(WRITE, sector, bench.front.data(0)) == OKAY
    forget(bench.fd)
    assert await bench.answer(READ, sector, bench.front.data(1)) == OKAY
    assert bench.page(1) == bench.page(0)
    await bench.close()


async def test_whole_pages_are_written_inline_parts_are_not(bench: Bench) -> None:
    bench.front.data(*range(40))
    whole = [(100 + n, 0, 7) for n in range(11)]
    bench.ask(WRITE, 80, whole)
    assert bench.disk.inline == 1
    assert bench.disk.inflight == 1  # until it is collected
    bench.collect()
    assert bench.disk.inflight == 0
    for sector, segments in ((1, whole), (80, [(100, 0, 6)]), (80, [(100 + n, 0, 7) for n in range(33)])):
        bench.ask(WRITE, sector, segments)
    await bench.idle()
    assert bench.disk.inline == 1
    assert set(bench.statuses.values()) == {OKAY}


async def test_writes_that_the_kernel_holds_up_leave_the_loop(ram: Ram, image: Path, engine: str) -> None:
    now, step = [0], 1000
    bench = Bench(ram, image, engine, clock=lambda: now.append(now[-1] + step) or now[-1])
    inline = 0

    async def write(*, slow: bool = False) -> bool:
        """Whether it was inline."""
        nonlocal step, inline
        step = SLOW_NS + 1 if slow else 1000
        assert await bench.answer(WRITE, 0, bench.front.data(0)) == OKAY
        before, inline = inline, bench.disk.inline
        return inline > before

    assert await write()
    for cool in (100_000_000, 200_000_000, 400_000_000):
        assert await write(slow=True)
        for _ in range(10):
            assert not await write()
        now.append(now[-1] + cool - 1_000_000)
        assert not await write()
        now.append(now[-1] + 1_000_000)
        assert await write()
    now.append(now[-1] + 10_000_000_000)
    assert await write(slow=True)
    now.append(now[-1] + 100_000_000)
    assert await write()
    await bench.close()


async def test_flushes_share_an_fdatasync(bench: Bench) -> None:
    for _ in range(6):
        bench.ask(FLUSH, 0)
    if bench.uring is not None:
        assert bench.uring.inflight == 1
    assert bench.disk._tag == 1
    await bench.idle()
    assert bench.disk._tag == 2
    assert list(bench.statuses.values()) == [OKAY] * 6


async def test_a_failed_fdatasync_stays_failed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    saved = os.dup(bench.fd)
    read, write = os.pipe()
    bench.disk.is_block = True  # no look at the length, which a pipe has not
    os.dup2(read, bench.disk.fd)  # fdatasync: EINVAL
    for _ in range(3):
        bench.ask(FLUSH, 0)
    await bench.idle()
    os.dup2(saved, bench.disk.fd)
    assert await bench.answer(FLUSH, 0) == ERROR
    assert set(bench.statuses.values()) == {ERROR}
    assert await bench.answer(WRITE, 0, bench.front.data(0)) == OKAY
    assert caplog.messages == [
        "domain 7: vbd 51712: fdatasync: Invalid argument: every flush fails until the disk is attached again"
    ]
    for fd in (saved, read, write):
        os.close(fd)


async def test_a_truncated_image_is_an_error(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(bench.path, 8192 + 512)
    assert await bench.answer(READ, 8, bench.front.data(0)) == OKAY
    assert await bench.answer(READ, 16, bench.front.data(0)) == ERROR  # the first 512 bytes are there
    assert await bench.answer(READ, 800, bench.front.data(0)) == ERROR
    assert await bench.answer(WRITE, 800, bench.front.data(0)) == ERROR
    assert await bench.answer(WRITE, 801, bench.front.data(0)) == ERROR
    assert await bench.answer(DISCARD, 0, 8) == ERROR
    assert await bench.answer(FLUSH, 0) == ERROR
    assert bench.path.stat().st_size == 8192 + 512
    assert caplog.messages == ["domain 7: vbd 51712: read at byte 8704: no data: the image is shorter than its disk"]
    assert bench.disk.errors == 6
    os.truncate(bench.path, SIZE)
    assert await bench.answer(WRITE, 800, bench.front.data(0)) == OKAY
    assert await bench.answer(FLUSH, 0) == OKAY


async def test_no_space(ram: Ram, tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    """RLIMIT_FSIZE stands in for a full disk: a write ends short, the next one fails."""
    path = tmp_path / "sparse"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    bench = Bench(ram, path, engine)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    segments = bench.front.data(0, 2, 4)
    for number in (0, 2, 4):
        bench.fill(number, bytes([number + 1]) * 4096)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        for sector in (112, 113):  # inline, and not
            assert await bench.answer(WRITE, sector, segments) == ERROR
        assert await bench.answer(WRITE, 112 - 8, segments) == OKAY
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert await bench.answer(WRITE, 113, segments) == OKAY
    assert path.read_bytes()[113 * 512 :][:12288] == b"\x01" * 4096 + b"\x03" * 4096 + b"\x05" * 4096
    assert caplog.messages == [
        "domain 7: vbd 51712: write at byte 65536: File too large: "
        "a limit of file sizes (LimitFSIZE, ulimit -f) is below the image's"
    ]
    await bench.close()


async def test_errors_are_told_once_a_minute(ram: Ram, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0
    bench = Bench(ram, image, "threads", clock=lambda: now)
    os.truncate(image, 512)
    for minute in range(3):
        now = minute * 60_000_000_000
        for _ in range(5):
            assert await bench.answer(READ, 80, bench.front.data(0)) == ERROR
    assert len(caplog.messages) == 3
    assert bench.disk.errors == 15
    await bench.close()


async def test_discard(bench: Bench) -> None:
    assert bench.disk.discard == (4096, 0)
    before = bench.path.stat().st_blocks
    assert await bench.answer(DISCARD, 8, 80) == OKAY
    assert await bench.answer(DISCARD, 8, 0) == OKAY
    assert await bench.answer(DISCARD, 8, 80, flag=1) == EOPNOTSUPP  # a promise of secure erasure
    assert bench.path.read_bytes()[4096:][: 80 * 512] == bytes(80 * 512)
    assert bench.path.stat().st_blocks == before - 80
    assert bench.path.stat().st_size == SIZE


async def test_read_only_and_unknown(ram: Ram, image: Path, engine: str) -> None:
    bench = Bench(ram, image, engine, readonly=True)
    before = image.read_bytes()
    assert bench.disk.discard is None
    assert await bench.answer(WRITE, 0, bench.front.data(0)) == ERROR
    assert await bench.answer(DISCARD, 0, 8) == EOPNOTSUPP
    assert await bench.answer(BARRIER, 0, bench.front.data(0)) == EOPNOTSUPP
    assert await bench.answer(FLUSH, 0) == OKAY
    assert await bench.answer(READ, 0, bench.front.data(0)) == OKAY
    assert image.read_bytes() == before
    await bench.close()


async def test_more_than_the_ring_takes_waits(ram: Ram, image: Path) -> None:
    bench = Bench(ram, image, "uring", entries=4)
    forget(bench.fd)
    for number in range(100):
        bench.ask(READ, 8 * number, bench.front.data(number))
    await bench.idle()
    data = image.read_bytes()
    for number in range(100):
        assert bench.page(number) == data[4096 * number : 4096 * number + 4096]
    assert set(bench.statuses.values()) == {OKAY}
    await bench.close()


async def test_a_non_blocking_descriptor_is_made_blocking(ram: Ram, image: Path) -> None:
    fd = os.open(image, os.O_RDWR | os.O_NONBLOCK)
    RawDisk(fd, readonly=False, uring=None, eventfd=0)
    assert os.get_blocking(fd)
    os.close(fd)


async def test_short_results_go_on_behind_what_is_done(ram: Ram, image: Path) -> None:
    bench = Bench(ram, image, "uring")
    source, fill = os.pipe()
    saved = os.dup(bench.fd)
    os.dup2(source, bench.fd)  # gives what is there, as a file may
    bench.disk.is_block = True
    data = random.Random(3).randbytes(8192)
    id = bench.ask(READ, 0, bench.front.data(0, 2))
    for start, end in ((0, 1000), (1000, 5000), (5000, 8192)):
        assert bench.statuses == {}
        os.write(fill, data[start:end])
        tag = bench.disk._tag
        async with asyncio.timeout(30):
            while not bench.statuses and bench.disk._tag == tag:
                bench.collect()
                await asyncio.sleep(0)
    assert bench.statuses == {id: OKAY}
    assert bench.page(0) + bench.page(2) == data
    os.dup2(saved, bench.fd)
    for fd in (source, fill, saved):
        os.close(fd)
    await bench.close()


async def test_an_answer_that_nobody_took_is_pending(bench: Bench) -> None:
    assert not bench.disk.pending()
    bench.ask(WRITE, 0, bench.front.data(0))
    assert bench.disk.pending()
    bench.collect()
    assert not bench.disk.pending()


async def test_close_waits_and_leaves_nothing(ram: Ram, image: Path, engine: str) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for polled in (True, False):
        bench = Bench(ram, image, engine, polled=polled)
        forget(bench.fd)
        for number in range(20):
            bench.ask(READ, 8 * number, bench.front.data(number))
        await bench.disk.close()
        await bench.disk.close()
        assert bench.disk.inflight == 0
        await bench.close()
    assert count() == before


async def test_a_thread_that_comes_back_late_meets_nobody_s_file(ram: Ram, image: Path, tmp_path: Path) -> None:
    """A disk that hangs is closed by force; its descriptors' numbers go to the next disks."""
    bench = Bench(ram, image, "threads")
    release = threading.Event()
    for _ in range(THREADS):  # each hangs in the storage
        bench.disk._engine._push(lambda: int(release.wait(30)), (), 1 << 40)  # type: ignore[attr-defined]
    bench.fill(0, b"W" * 4096)
    bench.ask(WRITE, 1, [(100, 1, 1)] if bench.front.data(0) else [])
    hung = list(bench.disk._engine._threads)  # type: ignore[attr-defined]
    await bench.disk.close(0.05)
    numbers = [bench.fd, bench.event]
    for fd in numbers:
        os.close(fd)
    others = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab"]
    assert sorted(others) == sorted(numbers)
    release.set()
    for thread in hung:
        await asyncio.to_thread(thread.join)
    assert [os.fstat(fd).st_size for fd in others] == [0, 0]
    assert image.read_bytes()[512:1024] != b"W" * 512  # nor is it written when nobody answers for it any more
    os.close(others.pop())
    os.close(others.pop())
    for fd in bench.disk._own:
        os.close(fd)
    bench.front.close()
    assert bench.poller is not None
    bench.poller.close()


async def test_close_has_a_deadline(ram: Ram, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(ram, image, "uring")
    empty, fill = os.pipe()
    saved = os.dup(bench.fd)
    os.dup2(empty, bench.fd)  # a storage that hangs
    bench.disk.is_block = True
    id = bench.ask(READ, 0, bench.front.data(0))
    await bench.disk.close(0.05)
    assert caplog.messages == ["domain 7: vbd 51712: 1 requests are still at the disk after 0.05 s"]
    assert bench.disk.inflight == 1
    os.write(fill, b"x" * 4096)
    while not bench.uring.pending():
        await asyncio.sleep(0.001)
    bench.collect()
    assert bench.statuses == {id: OKAY}
    os.dup2(saved, bench.fd)
    for fd in (empty, fill, saved):
        os.close(fd)
    await bench.close()


async def test_an_owner_that_does_not_collect_does_not_spin(ram: Ram, image: Path) -> None:
    bench = Bench(ram, image, "uring")
    bench.disk.wake = None
    forget(bench.fd)
    bench.ask(READ, 0, bench.front.data(0))
    bench.uring.submit()
    await asyncio.sleep(0.1)
    slices = bench.poller.slices
    await asyncio.sleep(0.05)
    assert bench.poller.slices - slices <= 1
    bench.collect()
    assert bench.statuses == {1: OKAY}
    await bench.close()


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    read, write = os.pipe()
    small = os.open(tmp_path / "small", os.O_RDWR | os.O_CREAT)
    os.write(small, b"x" * 511)
    folder = os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    for fd, reason in ((read, "neither a file"), (folder, "neither a file"), (small, "511 bytes")):
        with pytest.raises(HostError, match=f"d: {reason}"):
            RawDisk(fd, readonly=False, uring=None, name="d")
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in (read, write, small, folder):
        os.close(fd)


async def test_a_block_device(ram: Ram, image: Path, engine: str) -> None:
    try:
        made = subprocess.run(
            ["losetup", "--show", "-f", image], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no loop device: {error}")
    try:
        # what the control plane reads in sysfs
        with os.fdopen(os.open(made.stdout.strip(), os.O_RDONLY)) as device:
            holes = check_passed(device.fileno(), readonly=True).holes
        bench = Bench(ram, Path(made.stdout.strip()), engine, holes=holes)
        assert bench.disk.is_block
        assert bench.disk.sectors == SIZE // 512
        assert (bench.disk.sector_size, bench.disk.physical_sector_size) == (512, 512)
        bench.fill(0, b"block" * 800)
        assert await bench.answer(WRITE, 8, bench.front.data(0)) == OKAY
        assert await bench.answer(FLUSH, 0) == OKAY
        forget(bench.fd)
        assert await bench.answer(READ, 8, bench.front.data(1)) == OKAY
        assert bench.page(1) == bench.page(0)
        logging.getLogger(__name__).info("discard: %s", bench.disk.discard)
        if bench.disk.discard is not None:
            assert await bench.answer(DISCARD, 8, 8) == OKAY
            assert await bench.answer(READ, 8, bench.front.data(1)) == OKAY
            assert bench.page(1) == bytes(4096)
        await bench.close()
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True, timeout=20)
