"""blkback with the guest's ends in one process: real rings, grants, XenStore and image files."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from pathlib import Path

import pytest

from evtchnd._core.blk import BlkRing
from evtchnd.abi import PAGE_SIZE
from evtchnd.blkif import SECTOR_SIZE, X86_32, X86_64, Layout, Op, Status
from evtchnd.control.config import Vbd
from evtchnd.grants import GrantTable
from evtchnd.guest.domain import GuestFault
from evtchnd.journal import Journal
from evtchnd.memory import GuestMemory
from scale import scaled
from vbd import VBD, front, host, image, load


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
        pages = [grants.map(gref, write=True) for gref in params["queues"][0]["grefs"]]
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
