"""What a guest may do to blkback, and what a frontend notices of a backend."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from evtchnd.abi import GTF_PERMIT_ACCESS, PAGE_SIZE
from evtchnd.blkif import SECTOR_SIZE, X86_64, Op, Status
from evtchnd.guest.blkfront import Blkfront, Completion
from evtchnd.guest.domain import GuestFault
from oneprocess import open_fds
from scale import scaled
from vbd import VBD, front, host, image, load


async def test_xsa_350_connected_a_thousand_times(tmp_path: Path) -> None:
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
                op = 77 if what == "unknown operation" else build(0, disk.queues[0]._slots[0].grefs)[0]
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
async def test_xsa_39_an_index_jump_stops_that_device_and_no_other(
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
            with disk.queues[0]._ring_views[0].cast("I") as words:
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


async def test_xsa_155_requests_that_change_while_they_are_read(tmp_path: Path) -> None:
    """XSA-155: another vCPU rewrites the request all the time: each is answered once, nothing outside is touched."""
    file, content = image(tmp_path)
    half = len(content) // 2
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world, depth=1)
            disk.connect()
            stop = threading.Event()
            ring = disk.queues[0]._ring_views[0]

            def flip() -> None:
                rng = random.Random(3)
                counts = [bytes([2]), bytes([255]), bytes([0]), bytes([1])]
                while not stop.is_set():
                    slot = 64 + 112 * (disk.requests % 32)
                    ring[slot + 1 : slot + 2] = rng.choice(counts)
                    ring[slot + 24 : slot + 28] = rng.choice(disk.queues[0]._slots[0].grefs).to_bytes(4, "little")
                    ring[slot + 16 : slot + 24] = rng.choice((0, 8, 1 << 60)).to_bytes(8, "little")

            def answered(ident: int) -> None:
                """One response. The flipping thread may hit the second byte of its id: no fault of the backend's."""
                disk.push()
                disk.queues[0]._wait(30)
                (response,) = disk.ring.responses(32)
                seen, _, status = X86_64.response.unpack_from(response)
                assert (seen ^ ident) & ~0xFF00 == 0 and status in (Status.OKAY, Status.ERROR)
                disk.queues[0]._idle.append(disk.queues[0]._open.pop(ident))

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


async def test_xsa_295_grants_flip_while_they_are_pinned(tmp_path: Path) -> None:
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
                disk.queues[0]._finish(answer, 0)
            ident = disk.submit_read(0, 8)
            with pytest.raises(GuestFault, match="the response says 1"):
                disk.queues[0]._finish(X86_64.response.pack(ident, 1, 0), 0)
            disk.queues[0]._open.clear()
            ident = disk.submit_read(0, 8)
            gref = disk.queues[0]._open[ident].grefs[0]
            words = world.vm.grants.cast("I")
            words[2 * gref] |= 1 << 4
            with pytest.raises(GuestFault, match="still in use"):
                disk.queues[0]._finish(X86_64.response.pack(ident, 0, 0), 0)
            words[2 * gref] &= ~(1 << 4)
            words.release()
            disk.queues[0]._open.clear()  # what was never pushed
            disk.disconnect()

        await world.guest(guest)
