"""blkback with several queues: one ring, one event channel, one journal each, one disk for all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evtchnd._core.blk import BlkRing
from evtchnd.abi import PAGE_SIZE
from evtchnd.blkif import SECTOR_SIZE, X86_32, X86_64, Layout, Op, Status
from evtchnd.control.config import Vbd
from evtchnd.errors import HostError
from evtchnd.grants import GrantTable
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import GuestFault
from evtchnd.guest.xenbus import Frontend
from evtchnd.journal import Journal
from evtchnd.memory import GuestMemory
from oneprocess import Host
from scale import scaled
from vbd import VBD, front, host, image, load


def side_by_side(disk: Blkfront, content: bytearray, count: int, seed: int = 1) -> None:
    """A checked load on each queue in a thread of its own, each on a part of the disk of its own."""
    part = len(content) // len(disk.queues) // PAGE_SIZE * PAGE_SIZE

    def one(number: int) -> bytearray:
        mine = content[number * part : (number + 1) * part]
        load(disk.queues[number], mine, count, seed + number, at_sector=number * part // SECTOR_SIZE)
        return mine

    with ThreadPoolExecutor(len(disk.queues)) as vcpus:
        for number, mine in enumerate(vcpus.map(one, range(len(disk.queues)))):
            content[number * part : (number + 1) * part] = mine


@pytest.mark.parametrize(
    ("queues", "layout", "pages", "segments", "engine"),
    [
        (2, X86_64, 1, 11, "auto"),
        (4, X86_64, 1, 32, "auto"),
        (4, X86_64, 4, 3, "threads"),
        (3, X86_32, 2, 20, "auto"),
        (4, X86_64, 16, 1, "auto"),
    ],
)
async def test_load(tmp_path: Path, queues: int, layout: Layout, pages: int, segments: int, engine: str) -> None:
    file, content = image(tmp_path)
    async with host(mib=64, frames=16) as world:
        device = world.attach(VBD, file, options=Vbd(engine=engine))
        disk = front(world, queues=queues, layout=layout, ring_pages=pages, segments=segments, depth=32)

        def guest() -> None:
            disk.connect()
            side_by_side(disk, content, scaled(5_000, least=100))

        await world.guest(guest)
        assert len(world.bound) == queues
        stats = device.stats()
        assert stats["queues"] == queues and stats["in_flight"] == 0
        for name in ("requests", "responses", "sectors_read", "sectors_written", "flushes", "kicks", "notifications"):
            each = [stats[f"queue-{number}/{name}"] for number in range(queues)]
            assert sum(each) == stats[name], name
        assert min(stats[f"queue-{number}/requests"] for number in range(queues)) >= 100
        assert stats["requests"] == stats["responses"] == sum(queue.responses for queue in disk.queues)
        await world.guest(disk.disconnect)
        assert world.state(VBD) == "6"
        assert device.stats()["requests"] == stats["requests"]
    assert file.read_bytes() == content


async def test_one_queue_s_answer_does_not_wait_for_another_s_kick(tmp_path: Path) -> None:
    """Both have a request at the disk; each guest's thread sleeps on its own port and is woken there."""
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)
        disk = front(world, queues=2)

        def guest() -> None:
            disk.connect()
            for _ in range(scaled(500, least=50)):
                # half pages are not written at once but go through the io_uring, and complete together
                idents = [
                    queue.submit_write(8 * number, b"%d" % number * 2048) for number, queue in enumerate(disk.queues)
                ]
                for queue in disk.queues:
                    queue.push()
                for ident, queue in zip(idents[::-1], disk.queues[::-1], strict=True):
                    (done,) = queue.complete(10.0)
                    assert (done.ident, done.status) == (ident, Status.OKAY)
            disk.disconnect()

        await world.guest(guest)
        content[:2048], content[4096:6144] = b"0" * 2048, b"1" * 2048
    assert file.read_bytes() == content


async def test_another_number_of_queues_after_a_reconnect(tmp_path: Path) -> None:
    """Fewer, more, one: each handshake reads its own, and a journal that was used before is begun anew."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)

        def guest(count: int) -> None:
            disk = front(world, queues=count)
            disk.connect()
            side_by_side(disk, content, 50, seed=count)
            disk.disconnect()

        for count in (4, 2, 1, 3):
            await world.guest(lambda count=count: guest(count))  # type: ignore[misc]
            assert device.stats()["requests"] == device.stats()["responses"]
    assert file.read_bytes() == content


async def test_more_queues_than_offered_are_refused(tmp_path: Path) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file, options=Vbd(max_queues=2))

        def guest() -> None:
            with pytest.raises(GuestFault, match="takes 2 queues"):
                front(world, queues=3).connect()
            disk = front(world, queues=2)
            disk.connect()
            disk.disconnect()

        await world.guest(guest)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues: 0 queues, 1 to 4 are possible"),
        ({"multi-queue-num-queues": "4000000000"}, "multi-queue-num-queues: 4000000000 queues"),
        ({"multi-queue-num-queues": "two"}, "multi-queue-num-queues: 'two' is no number"),
        ({"multi-queue-num-queues": "3"}, "queue-2/ring-ref0: missing"),
        ({"queue-1/event-channel": "?"}, "queue-1/event-channel: '?' is no number"),
        ({"queue-1/event-channel": "9999"}, "the VMM refuses"),
        ({"queue-1/event-channel": "same"}, "event-channel: one port for two queues"),
        ({"queue-1/ring-ref": "same"}, "ring-ref: the same page twice"),
        ({"queue-1/ring-ref": "2047"}, "grant"),
    ],
)
async def test_bad_nodes_stop_the_device_with_a_line_and_it_may_begin_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, str], line: str
) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def bad() -> None:
            disk = front(world, queues=2)
            real = disk.nodes

            def nodes() -> dict[str, str]:
                found = real()
                for name, value in change.items():
                    found[name] = found[name.replace("queue-1", "queue-0")] if value == "same" else value
                return found

            disk.nodes = nodes  # type: ignore[method-assign]
            with pytest.raises(GuestFault, match="closed instead of connecting"):
                disk.connect()
            disk.release()

        await world.guest(bad)
        assert any(line in each for each in caplog.messages), caplog.messages
        assert world.bound == [] and world.grants.pinned == 0

        def good() -> None:
            bus = Frontend(world.store, "vbd", VBD)
            bus.switch(6)  # type: ignore[arg-type]
            bus.wait_backend(6)  # type: ignore[arg-type]
            disk = front(world, queues=2)
            disk.connect()
            assert disk.queues[1].read(0, 8) == content[:PAGE_SIZE]
            disk.disconnect()

        await world.guest(good)


async def test_an_index_jump_in_one_queue_stops_the_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, _ = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world, queues=3)
            disk.connect()
            queue = disk.queues[2]
            with queue._ring_views[0].cast("I") as words:
                words[0] += 1000
            world.vm.send(queue.port)
            disk.bus.wait_backend(5)  # type: ignore[arg-type]
            disk.bus.switch(6)  # type: ignore[arg-type]
            disk.bus.wait_backend(6)  # type: ignore[arg-type]
            disk.release()

        await world.guest(guest)
        stopped = [each for each in caplog.messages if "request index jumped" in each]
        assert len(stopped) == 1 and stopped[0].startswith(f"domain 7: vbd {VBD}: stopped")


async def test_idle_is_idle(tmp_path: Path) -> None:
    """After a load on all queues the poller arms every ring and sleeps."""
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)
        disk = front(world, queues=4)

        def guest() -> None:
            disk.connect()
            side_by_side(disk, content, 100)

        await world.guest(guest)
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.25
        await world.guest(disk.disconnect)


async def test_cancelled_under_load_and_attached_again(tmp_path: Path) -> None:
    """Orderly ends of a worker, again and again: all rings live on, everything taken is answered once."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world, queues=4, depth=8)
        stop = threading.Event()

        def guest() -> None:
            disk.connect()
            seed = 0
            while not stop.is_set():
                seed += 10
                side_by_side(disk, content, 30, seed)
            disk.disconnect()

        work = asyncio.ensure_future(asyncio.to_thread(guest))
        await world.until(lambda: world.reported.get(VBD) is not None, "connected")
        for _ in range(scaled(50, least=5)):
            await asyncio.sleep(0.02)
            params = world.reported[VBD]
            await world.kill(VBD)
            assert world.grants.pinned == 0
            device = world.run(
                VBD, device.disk_fd, device.journal_fd, readonly=False, options=device.options, connected=params
            )
        stop.set()
        await work
    assert file.read_bytes() == content


async def test_what_a_dead_worker_left_in_each_queue_is_done_once(tmp_path: Path) -> None:
    """Queue 0 died after its take, queue 1 with answers that were not published, queue 2 before its notification."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world, queues=3, depth=8)
        await world.guest(disk.connect)
        params = world.reported[VBD]
        assert params is not None and len(params["queues"]) == 3
        await world.kill(VBD)
        for number, queue in enumerate(disk.queues):
            for index in range(8):
                block = 8 * number + index
                data = bytes([block + 1]) * PAGE_SIZE
                queue.submit_write(8 * block, data)
                content[block * PAGE_SIZE : (block + 1) * PAGE_SIZE] = data
            assert not queue.ring.arm()  # the guest sleeps: it must be notified
            queue.push()

        # The worker that dies: its pins stay in the guest's table, its mappings go with the process (here: never).
        grants = second_view(world)
        for number, where in enumerate(params["queues"]):
            pages = [grants.map(gref, write=True) for gref in where["grefs"]]
            ring = BlkRing(
                grants,
                pages,
                abi=64,
                journal=Journal(device.journal_fd, number),
                sectors=disk.sectors,
                max_indirect=256,
            )
            assert ring.attach() == []
            taken = ring.take(32)
            assert len(taken) == 8
            for req in taken[4:] if number else ():
                assert req.op == Op.WRITE and req.pwritev(device.disk_fd, req.sector * SECTOR_SIZE) == req.want
                ring.done(req, Status.OKAY)
            if number == 2:
                assert ring.push()  # and dies: nobody tells the guest
            abandoned.append(ring)

        again = world.run(
            VBD, device.disk_fd, device.journal_fd, readonly=False, options=device.options, connected=params
        )

        def guest() -> None:
            for queue in disk.queues:
                assert world.vm.wait(queue.port, 30), "the guest is not woken"
                seen = set()
                while queue.in_flight:
                    for done in queue.complete():
                        assert done.status == Status.OKAY
                        seen.add(done.ident)
                assert len(seen) == 8
            disk.disconnect()

        await world.guest(guest)
        # those that were answered by the dead one are at most published again, not done again
        done = [again.stats()[f"queue-{number}/requests"] for number in range(3)]
        assert done == [8, 4, 4]
    assert file.read_bytes() == content


def second_view(world: Host) -> GrantTable:
    memory = GuestMemory()
    memory.add(0, 0, world.vm.ram_pages, world.vm.ram_fd, 0)
    grants = GrantTable(memory, world.domid)
    for index in range(world.vm.frames):
        grants.add_frame(index, world.vm.grant_fd, index * PAGE_SIZE)
    return grants


abandoned: list[BlkRing] = []


async def test_a_journal_without_room_for_a_queue_is_refused(tmp_path: Path) -> None:
    """A worker with another config than the journal was made for says so, and gives everything back."""
    file, _ = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file, options=Vbd(max_queues=1))
        await world.until(lambda: world.state(VBD) == "2", "InitWait")
        await world.kill(VBD)
        world.run(VBD, device.disk_fd, device.journal_fd, readonly=False, options=Vbd(), connected=None)
        offered = f"{world.backend(VBD)}/multi-queue-max-queues"
        await world.until(lambda: world.server.get(offered) == "4", "the other worker's nodes")
        disk = front(world, queues=2, timeout=5.0)
        connecting: Callable[[], None] = disk.connect
        work = asyncio.ensure_future(asyncio.to_thread(connecting))
        await world.until(world.tasks[VBD].done, "the device ends")
        with pytest.raises(HostError, match="1 queues, queue 1 is not there"):
            world.tasks[VBD].result()
        with pytest.raises(GuestFault):
            await work
        world.tasks.pop(VBD)
        disk.release()
        assert world.grants.pinned == 0
