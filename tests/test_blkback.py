"""blkback with the guest's ends in one process: real rings, grants, XenStore and image files."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from evtchnd._core.blk import BlkRing
from evtchnd.abi import GTF_PERMIT_ACCESS, PAGE_SIZE
from evtchnd.blkif import SECTOR_SIZE, X86_32, X86_64, Layout, Op, Status
from evtchnd.control.config import Vbd
from evtchnd.grants import GrantTable
from evtchnd.guest.blkfront import Blkfront, Completion
from evtchnd.guest.domain import GuestFault
from evtchnd.journal import Journal
from evtchnd.memory import GuestMemory
from oneprocess import Host, LocalVm, open_fds
from scale import scaled

VBD = 51712
MIB = 1 << 20


@asynccontextmanager
async def host(*, mib: int = 16) -> AsyncIterator[Host]:
    """A domain; at the end nothing is left of it."""
    ours, theirs = socket.socketpair()
    with theirs:  # uvloop makes a socket of its own when it gets the first
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        transport.close()
        await asyncio.sleep(0.01)
    before = open_fds()
    vm = LocalVm(mib=mib)
    try:
        async with Host(vm) as world:
            yield world
            for devid in list(world.tasks):
                await world.kill(devid)
            assert world.grants.pinned == 0
            assert world.bound == []
    finally:
        vm.close()
    for _ in range(100):  # uvloop closes a socket some turns later
        if open_fds() == before:
            break
        await asyncio.sleep(0.01)
    assert open_fds() == before


def image(path: Path, size: int = 4 * MIB) -> tuple[Path, bytearray]:
    content = bytearray(random.Random(7).randbytes(size))
    file = path / "disk.img"
    file.write_bytes(content)
    return file, content


def front(world: Host, **options: object) -> Blkfront:
    # a guest that spins would keep the interpreter from its own backend
    return Blkfront(world.domain, world.store, VBD, **{"spin_us": 0, **options})  # type: ignore[arg-type]


def load(disk: Blkfront, content: bytearray, count: int, seed: int = 1) -> None:
    """`count` random requests at the frontend's depth, every answer checked; ranges in flight never overlap."""
    rng = random.Random(seed)
    busy: dict[int, tuple[int, int, bytes | None]] = {}
    sectors = len(content) // SECTOR_SIZE
    issued = answered = 0
    while answered < count:
        while issued < count and disk.room:
            op = rng.choices("rwf", (8, 8, 1))[0]
            size = rng.randint(1, disk.most_sectors - 7)
            first = rng.randint(0, 7)
            at = rng.randrange(sectors - size)
            if op == "f":
                busy[disk.submit_flush()] = (-1, 0, None)
            elif any(a < at + size and at < a + n for a, n, _ in busy.values() if n):
                break
            elif op == "w":
                data = rng.randbytes(size * SECTOR_SIZE)
                busy[disk.submit_write(at, data, first=first)] = (at, size, data)
            else:
                busy[disk.submit_read(at, size, first=first)] = (at, size, None)
            issued += 1
        for done in disk.complete():
            at, size, written = busy.pop(done.ident)
            assert done.status == Status.OKAY, done
            begin, end = at * SECTOR_SIZE, (at + size) * SECTOR_SIZE
            if written is not None:
                content[begin:end] = written
            elif size:
                assert done.data == content[begin:end], f"sector {at}: not what was written"
            answered += 1
    assert not busy and not disk.in_flight


@pytest.mark.parametrize(
    ("layout", "pages", "segments", "engine", "regrant"),
    [
        (X86_64, 1, 11, "auto", False),
        (X86_64, 1, 32, "auto", False),
        (X86_64, 4, 11, "threads", False),
        (X86_64, 16, 3, "auto", False),
        (X86_64, 1, 24, "threads", True),
        (X86_32, 1, 11, "auto", True),
        (X86_32, 2, 20, "auto", False),
    ],
)
async def test_load(tmp_path: Path, layout: Layout, pages: int, segments: int, engine: str, regrant: bool) -> None:
    file, content = image(tmp_path)
    async with host(mib=32) as world:
        device = world.attach(VBD, file, options=Vbd(engine=engine))

        def guest() -> None:
            disk = front(world, layout=layout, ring_pages=pages, segments=segments, regrant=regrant)
            disk.connect()
            assert disk.sectors == len(content) // SECTOR_SIZE
            assert disk.segments == segments
            load(disk, content, scaled(20_000, least=200))
            disk.disconnect()
            assert disk.requests == disk.responses

        await world.guest(guest)
        stats = device.stats()
        assert stats["requests"] == stats["responses"] >= 200
        assert stats["notifications"] <= stats["responses"]
        assert world.state(VBD) == "6"
        assert world.reported[VBD] is None
    assert file.read_bytes() == content


async def test_one_after_the_other(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            assert disk.can_flush and not disk.readonly
            assert disk.read(0, disk.sectors) == content
            disk.write(3, b"\xaa" * 9 * SECTOR_SIZE)
            disk.flush()
            assert disk.read(2, 11) == content[1024:1536] + b"\xaa" * 4608 + content[6144:6656]
            disk.disconnect()

        await world.guest(guest)


async def test_discard_reads_zeros(tmp_path: Path) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            if disk.can_discard:
                disk.submit_discard(80, 160)
                (done,) = disk.complete()
                assert done.status == Status.OKAY
                assert disk.read(80, 160) == bytes(160 * SECTOR_SIZE)
            disk.disconnect()

        await world.guest(guest)


async def test_a_readonly_disk(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file, readonly=True)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            assert disk.readonly
            disk.submit_write(0, bytes(SECTOR_SIZE))
            (done,) = disk.complete()
            assert done.status == Status.ERROR
            assert disk.read(0, 8) == content[:PAGE_SIZE]
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == content


async def test_what_is_not_offered_is_not_taken(tmp_path: Path) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file, options=Vbd(max_ring_page_order=0, max_indirect_segments=0))

        def guest() -> None:
            with pytest.raises(GuestFault, match="rings of 1 pages"):
                front(world, ring_pages=2).connect()
            disk = front(world, segments=32)
            disk.connect()
            assert disk.segments == 11
            disk.submit_raw(lambda ident, grefs: X86_64.indirect_request(Op.READ, ident, 0, 12, grefs[:1]), op=6)
            (done,) = disk.complete()
            assert done.status < 0
            disk.disconnect()

        await world.guest(guest)


async def test_connected_a_thousand_times(tmp_path: Path) -> None:
    """XSA-350: descriptors, pins, ports and tasks are back where they were after every connection."""
    file, content = image(tmp_path, 64 * 1024)
    async with host() as world:
        world.attach(VBD, file)
        await world.until(lambda: world.state(VBD) == "2", "InitWait")
        await asyncio.to_thread(int)  # the thread of to_thread is there, with what it holds
        baseline = open_fds()
        tasks = len(asyncio.all_tasks())

        def guest() -> None:
            disk = front(world, depth=4)
            disk.connect()
            assert disk.read(0, 8) == content[:PAGE_SIZE]
            disk.disconnect()

        for _ in range(scaled(1000, least=5)):
            await world.guest(guest)
            assert world.grants.pinned == 0 and world.bound == []
        await world.until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks end")
        assert open_fds() == baseline
        world.detach(VBD)
        await world.until(world.tasks[VBD].done, "the device ends")
        assert world.state(VBD) == "6"


async def test_kexec(tmp_path: Path) -> None:
    """A kernel that was left in the middle of a connection: the next one drives 5, 6, 1 and begins anew."""
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            old = front(world, depth=2)
            old.connect()
            old.submit_read(0, 8)
            old.push()
            bus = old.bus
            for state, wanted in ((5, 5), (6, 6), (1, 2)):
                bus.switch(state)  # type: ignore[arg-type]
                bus.wait_backend(wanted)  # type: ignore[arg-type]
            old.release()
            new = front(world)
            new.connect()
            assert new.read(8, 8) == content[PAGE_SIZE : 2 * PAGE_SIZE]
            new.disconnect()

        await world.guest(guest)


async def test_a_frontend_that_starts_over_without_a_word(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            old = front(world, depth=2)
            old.connect()
            old.bus.switch(1)  # type: ignore[arg-type]
            new = front(world)
            new.connect()
            assert new.read(0, 1) == content[:SECTOR_SIZE]
            old.release()
            new.disconnect()

        await world.guest(guest)


async def test_detach_waits_for_the_guest(tmp_path: Path) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)
        disk = front(world)
        await world.guest(disk.connect)
        world.detach(VBD)
        assert not world.tasks[VBD].done()
        assert await world.guest(lambda: disk.read(0, 1))  # served until the guest lets it go
        await world.guest(disk.disconnect)
        await world.until(world.tasks[VBD].done, "the device ends")


async def test_detach_without_a_frontend(tmp_path: Path) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)
        await world.until(lambda: world.state(VBD) == "2", "InitWait")
        world.detach(VBD)
        await world.until(world.tasks[VBD].done, "the device ends")
        assert world.state(VBD) == "6"


BREAK: list[tuple[str, Callable[[dict[str, str]], dict[str, str]], str]] = [
    ("text", lambda n: {**n, "ring-ref": "abc"}, "ring-ref: 'abc' is no number"),
    ("no port", lambda n: {**n, "event-channel": "999"}, "port"),
    ("unused gref", lambda n: {**n, "ring-ref": "2000"}, "2000"),
    ("gref out of the table", lambda n: {**n, "ring-ref": "4000000000"}, "4000000000"),
    ("protocol", lambda n: {**n, "protocol": "sparc-abi"}, "protocol: 'sparc-abi'"),
    ("order", lambda n: {**n, "ring-page-order": "9"}, "ring-page-order: 9"),
]


@pytest.mark.parametrize(("change", "line"), [case[1:] for case in BREAK], ids=[case[0] for case in BREAK])
async def test_a_wrong_handshake_stops_that_device_and_it_may_begin_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, str]], dict[str, str]],
    line: str,
) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            bad = front(world)
            write_all = world.store.write_all
            world.store.write_all = lambda folder, nodes: write_all(folder, change(dict(nodes)))  # type: ignore
            try:
                with pytest.raises(GuestFault, match="closed instead of connecting"):
                    bad.connect()
            finally:
                world.store.write_all = write_all  # type: ignore[method-assign]
            bad.bus.switch(6)  # type: ignore[arg-type]
            bad.bus.wait_backend(6)  # type: ignore[arg-type]
            for name in world.store.ls(bad.bus.path):
                if name.startswith("ring-"):
                    world.store.rm(f"{bad.bus.path}/{name}")
            bad.release()
            good = front(world)
            good.connect()
            assert good.read(0, 1) == content[:SECTOR_SIZE]
            good.disconnect()

        with caplog.at_level(logging.ERROR):
            await world.guest(guest)
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert record.getMessage().startswith(f"domain 7: vbd {VBD}: ") and line in record.getMessage()


def entry(op: int, ident: int, segments: list[tuple[int, int, int]], *, sector: int = 0, count: int = -1) -> bytes:
    whole = bytearray(X86_64.request(op, ident, sector, segments))
    if count >= 0:
        whole[1] = count
    return bytes(whole)


BAD: dict[str, Callable[[int, list[int]], bytes]] = {
    "unused gref": lambda i, g: entry(0, i, [(2000, 0, 7)]),
    "gref out of the table": lambda i, g: entry(0, i, [(1 << 30, 0, 7)]),
    "no segments": lambda i, g: entry(0, i, []),
    "12 segments": lambda i, g: entry(1, i, [(g[0], 0, 7)] * 11, count=12),
    "255 segments": lambda i, g: entry(1, i, [(g[0], 0, 7)] * 11, count=255),
    "last before first": lambda i, g: entry(0, i, [(g[0], 4, 3)]),
    "last sector 8": lambda i, g: entry(0, i, [(g[0], 0, 8)]),
    "behind the end": lambda i, g: entry(0, i, [(g[0], 0, 7)], sector=8192 - 7),
    "far behind the end": lambda i, g: entry(1, i, [(g[0], 0, 7)], sector=(1 << 64) - 1),
    "unknown operation": lambda i, g: entry(77, i, [(g[0], 0, 7)]),
}


async def test_bad_requests_are_answered_and_the_disk_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            for what, build in BAD.items():
                op = 77 if what == "unknown operation" else build(0, disk._slots[0].grefs)[0]
                disk.submit_raw(build, op=op)
                (done,) = disk.complete()
                assert done.status == (Status.EOPNOTSUPP if op == 77 else Status.ERROR), what
                assert disk.read(0, 1) == content[:SECTOR_SIZE]
            for _ in range(1000):
                disk.submit_raw(BAD["no segments"], op=0)
                disk.complete()
            disk.disconnect()

        with caplog.at_level(logging.WARNING):
            await world.guest(guest)
        assert device.stats()["refused"] == 1000 + len(BAD)
        lines = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
        assert len(lines) <= 11  # a line for each power of two
        assert lines[0].startswith(f"domain 7: vbd {VBD}: request ")
    assert file.read_bytes() == content


async def test_another_domains_gref_and_a_frame_outside_ram(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            foreign = world.domain.grant(600, domid=9)
            outside = world.domain.grant(1 << 30)
            readonly = world.domain.grant(600, readonly=True)
            for gref in (foreign, outside, readonly):
                disk.submit_raw(lambda i, g, r=gref: entry(Op.READ, i, [(r, 0, 7)]), op=0)  # type: ignore[misc]
                (done,) = disk.complete()
                assert done.status == Status.ERROR
            disk.submit_raw(lambda i, g: entry(Op.WRITE, i, [(readonly, 0, 7)]), op=1)
            (done,) = disk.complete()
            assert done.status == Status.OKAY
            for gref in (foreign, outside, readonly):
                world.domain.end_grant(gref)
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == bytes(PAGE_SIZE) + content[PAGE_SIZE:]


@pytest.mark.parametrize("by", [33, 1 << 31, -1])
async def test_an_index_jump_stops_that_device_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by: int
) -> None:
    file, content = image(tmp_path)
    other = tmp_path / "other.img"
    other.write_bytes(content)
    beside = bytearray(content)
    async with host(mib=32) as world:
        world.attach(VBD, file)
        world.attach(VBD + 16, other)
        neighbour = Blkfront(world.domain, world.store, VBD + 16, spin_us=0)
        disk = front(world)

        def guest() -> None:
            neighbour.connect()
            disk.connect()
            assert disk.read(0, 1) == content[:SECTOR_SIZE]
            with disk._ring_views[0].cast("I") as words:
                words[0] = (words[0] + by) & 0xFFFFFFFF
            world.vm.send(disk.port)
            disk.bus.wait_backend(5)  # type: ignore[arg-type]
            load(neighbour, beside, 200)

        with caplog.at_level(logging.ERROR):
            await world.guest(guest)
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert record.getMessage().startswith(f"domain 7: vbd {VBD}: ") and "index" in record.getMessage()
        busy = world.grants.pinned

        def again() -> None:
            disk.bus.switch(6)  # type: ignore[arg-type]
            disk.bus.wait_backend(6)  # type: ignore[arg-type]
            disk.release()
            disk.connect()
            assert disk.read(0, 1) == content[:SECTOR_SIZE]
            disk.disconnect()
            neighbour.disconnect()

        await world.guest(again)
        assert world.grants.pinned < busy
    assert other.read_bytes() == beside
    assert file.read_bytes() == content


async def test_requests_that_change_while_they_are_read(tmp_path: Path) -> None:
    """XSA-155: another vCPU rewrites the request all the time: each is answered once, nothing outside is touched."""
    file, content = image(tmp_path)
    half = len(content) // 2
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world, depth=1)
            disk.connect()
            stop = threading.Event()
            ring = disk._ring_views[0]

            def flip() -> None:
                rng = random.Random(3)
                counts = [bytes([2]), bytes([255]), bytes([0]), bytes([1])]
                while not stop.is_set():
                    slot = 64 + 112 * (disk.requests % 32)
                    ring[slot + 1 : slot + 2] = rng.choice(counts)
                    ring[slot + 24 : slot + 28] = rng.choice(disk._slots[0].grefs).to_bytes(4, "little")
                    ring[slot + 16 : slot + 24] = rng.choice((0, 8, 1 << 60)).to_bytes(8, "little")

            def answered(ident: int) -> None:
                """One response. The flipping thread may hit the second byte of its id: no fault of the backend's."""
                disk.push()
                disk._wait(30)
                (response,) = disk.ring.responses(32)
                seen, _, status = X86_64.response.unpack_from(response)
                assert (seen ^ ident) & ~0xFF00 == 0 and status in (Status.OKAY, Status.ERROR)
                disk._idle.append(disk._open.pop(ident))

            thread = threading.Thread(target=flip)
            thread.start()
            try:
                for _ in range(scaled(20_000)):
                    answered(disk.submit_read(0, 8))
                    answered(disk.submit_write(len(content) // SECTOR_SIZE - 8, bytes(PAGE_SIZE)))
            finally:
                stop.set()
                thread.join()
            disk.disconnect()

        await world.guest(guest)
        assert world.grants.pinned == 0
    assert file.read_bytes()[16384:half] == content[16384:half]


async def test_grants_flip_while_they_are_pinned(tmp_path: Path) -> None:
    """XSA-295: flags and domid change continuously; every request is answered, by data or by an error."""
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world, depth=1)
            disk.connect()
            stop = threading.Event()
            gref = world.domain.grant(700)
            words = world.vm.grants.cast("I")

            def flip() -> None:
                while not stop.is_set():
                    words[2 * gref] = GTF_PERMIT_ACCESS | 9 << 16
                    words[2 * gref] = GTF_PERMIT_ACCESS

            thread = threading.Thread(target=flip)
            thread.start()
            seen = set()
            try:
                for _ in range(scaled(20_000)):
                    disk.submit_raw(lambda i, g: entry(Op.READ, i, [(gref, 0, 7)]), op=0)
                    (done,) = disk.complete()
                    seen.add(done.status)
            finally:
                stop.set()
                thread.join()
            words[2 * gref] = 0
            words.release()
            assert seen <= {Status.OKAY, Status.ERROR}
            disk.disconnect()

        await world.guest(guest)
        assert world.grants.pinned == 0


async def test_an_image_that_is_too_small_now(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            os.truncate(file, len(content) // 2)
            disk.submit_read(len(content) // SECTOR_SIZE - 8, 8)
            (done,) = disk.complete()
            assert done.status == Status.ERROR
            assert disk.read(0, 8) == content[:PAGE_SIZE]
            disk.disconnect()

        await world.guest(guest)


async def test_idle_is_idle(tmp_path: Path) -> None:
    """After a load neither end's loop turns: the poller armed and sleeps."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world)

        def guest() -> None:
            disk.connect()
            load(disk, content, 100)

        await world.guest(guest)
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.25
        assert device.stats()["requests"] == device.stats()["responses"]
        await world.guest(disk.disconnect)


async def test_cancelled_under_load_and_attached_again(tmp_path: Path) -> None:
    """An orderly end of a worker: everything taken is answered, the ring lives on, the next one goes on with it."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world)
        stop = threading.Event()

        def guest() -> None:
            disk.connect()
            seed = 0
            while not stop.is_set():
                seed += 1
                load(disk, content, 50, seed)
            disk.disconnect()

        work = asyncio.ensure_future(asyncio.to_thread(guest))
        await world.until(lambda: world.reported.get(VBD) is not None, "connected")
        for _ in range(scaled(100, least=5)):
            await asyncio.sleep(0.02)
            params = world.reported[VBD]
            await world.kill(VBD)
            assert world.grants.pinned == 0
            device = world.run(
                VBD,
                device.disk_fd,
                device.journal_fd,
                readonly=False,
                options=device.options,
                connected=params,
            )
        stop.set()
        await work
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("died", ["after take", "before publishing", "before the notification"])
async def test_what_a_dead_worker_left_is_done_once(tmp_path: Path, died: str) -> None:
    """Requests that were in flight are done again, those that were answered are not, and the guest is woken."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world, depth=16)
        await world.guest(disk.connect)
        params = world.reported[VBD]
        assert params is not None
        await world.kill(VBD)

        wanted = {}
        for index in range(8):
            data = bytes([index + 1]) * PAGE_SIZE
            wanted[disk.submit_write(index * 8, data)] = b""
            content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = data
            at = (100 + index) * PAGE_SIZE
            wanted[disk.submit_read(at // SECTOR_SIZE, 8)] = bytes(content[at : at + PAGE_SIZE])
        assert not disk.ring.arm()  # the guest sleeps: it must be notified
        disk.push()

        # The worker that dies: its pins stay in the guest's table, its mappings go with the process (here: never).
        memory = GuestMemory()
        memory.add(0, 0, world.vm.ram_pages, world.vm.ram_fd, 0)
        grants = GrantTable(memory, world.domid)
        for index in range(world.vm.frames):
            grants.add_frame(index, world.vm.grant_fd, index * PAGE_SIZE)
        pages = [grants.map(gref, write=True) for gref in params["grefs"]]
        ring = BlkRing(
            grants,
            pages,
            abi=64,
            journal=Journal(device.journal_fd),
            sectors=disk.sectors,
            max_indirect=256,
        )
        assert ring.attach() == []
        taken = ring.take(32)
        assert len(taken) == 16
        if died != "after take":
            for req in taken[4:8]:
                run = req.preadv if req.op == Op.READ else req.pwritev
                assert run(device.disk_fd, req.sector * SECTOR_SIZE) == req.want
                ring.done(req, Status.OKAY)
        if died == "before the notification":
            assert ring.push()  # and dies: nobody tells the guest
        abandoned.append(ring)

        again = world.run(
            VBD, device.disk_fd, device.journal_fd, readonly=False, options=device.options, connected=params
        )

        def guest() -> None:
            assert world.vm.wait(disk.port, 30), "the guest is not woken"
            while disk.in_flight:
                for done in disk.complete():
                    assert done.status == Status.OKAY
                    assert done.data == wanted.pop(done.ident)
            assert not wanted
            disk.disconnect()

        await world.guest(guest)
        # answered by the dead one: at most published again, not done again
        assert again.stats()["requests"] == (16 if died == "after take" else 12)
    assert file.read_bytes() == content


abandoned: list[BlkRing] = []


async def test_a_wrong_response_is_noticed(tmp_path: Path) -> None:
    """The frontend's own checks: twice answered, never asked, another operation, a page still in use."""
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            ident = disk.submit_read(0, 8)
            done: list[Completion] = disk.complete()
            assert [d.ident for d in done] == [ident]
            answer = X86_64.response.pack(ident, 0, 0)
            with pytest.raises(GuestFault, match="not in flight"):
                disk._finish(answer, 0)
            ident = disk.submit_read(0, 8)
            with pytest.raises(GuestFault, match="the response says 1"):
                disk._finish(X86_64.response.pack(ident, 1, 0), 0)
            disk._open.clear()
            ident = disk.submit_read(0, 8)
            gref = disk._open[ident].grefs[0]
            words = world.vm.grants.cast("I")
            words[2 * gref] |= 1 << 4
            with pytest.raises(GuestFault, match="still in use"):
                disk._finish(X86_64.response.pack(ident, 0, 0), 0)
            words[2 * gref] &= ~(1 << 4)
            words.release()
            disk._open.clear()  # what was never pushed
            disk.disconnect()

        await world.guest(guest)
