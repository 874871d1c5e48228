"""blkback over disks of every kind: sectors of 4096 bytes, holes, a new size, CDs, O_DIRECT, very long requests."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from evtchnd.abi import PAGE_SIZE
from evtchnd.blkif import X86_64, Op, Status
from evtchnd.control.config import Vbd
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront, Queue
from scale import scaled
from vbd import MIB, VBD, front, host, image, load


def asked(disk: Blkfront | Queue, ident: int) -> int:
    """The status of the one request that is in flight."""
    (done,) = disk.complete()
    assert done.ident == ident
    return done.status


@pytest.mark.parametrize("engine", ["auto", "threads"])
async def test_sectors_of_4096_bytes(tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    """Everything on the wire counts in units of 512, and what is no whole sector is refused and changes nothing."""
    file, content = image(tmp_path)
    with file.open("ab") as more:
        more.write(b"tail" * 512)  # half a sector that the guest does not see
    async with host(mib=32) as world:
        world.attach(VBD, file, sector_size=4096, options=Vbd(engine=engine))

        def guest() -> None:
            disk = front(world, queues=2, segments=20)
            disk.connect()
            assert (disk.sectors, disk.sector_size) == (4 * MIB // 512, 4096)
            assert disk.physical_sector_size == 4096
            load(disk, content, scaled(4_000, least=200), unit=8)
            for sector, count in ((1, 8), (0, 1), (8, 12), (4, 4)):
                assert asked(disk, disk.submit_read(sector, count)) == Status.ERROR
                assert asked(disk, disk.submit_write(sector, b"!" * count * 512)) == Status.ERROR
                assert asked(disk, disk.submit_discard(sector, count)) == Status.ERROR
            # a sector may lie over two pages
            assert asked(disk, disk.submit_read(8, 8, first=5)) == Status.OKAY
            # the last one, and none behind it
            assert disk.read(disk.sectors - 8, 8) == content[-4096:]
            assert asked(disk, disk.submit_read(disk.sectors, 8)) == Status.ERROR
            disk.disconnect()

        await world.guest(guest)
    assert "8 sectors of 512 bytes at 1 are no whole sectors of 4096 bytes" in caplog.text
    assert file.read_bytes() == content + b"tail" * 512


async def test_a_physical_sector_divides_the_disk(tmp_path: Path) -> None:
    """io/blkif.h: the size must be a multiple of physical-sector-size."""
    file, _ = image(tmp_path, MIB + 1024)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            assert (disk.sectors, disk.sector_size, disk.physical_sector_size) == (2050, 512, 1024)
            disk.disconnect()

        await world.guest(guest)


async def test_a_discard_punches_a_hole(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        before = file.stat().st_blocks

        def guest() -> None:
            disk = front(world)
            disk.connect()
            if not disk.can_discard:
                pytest.skip("no holes here")
            bus = disk.bus
            granularity = bus.backend("discard-granularity")
            assert granularity % 512 == 0 and bus.backend("discard-alignment") == 0
            disk.flush()
            assert asked(disk, disk.submit_discard(2048, 4096)) == Status.OKAY
            assert (
                disk.read(2040, 4112)
                == content[2040 * 512 : 2048 * 512] + bytes(4096 * 512) + content[6144 * 512 : 6152 * 512]
            )
            disk.disconnect()

        await world.guest(guest)
        assert device.stats()["sectors_discarded"] == 4096
        assert file.stat().st_blocks <= before - 4096
        assert file.stat().st_size == len(content)


async def test_no_discard(tmp_path: Path) -> None:
    """The toolstack said `discard-enable` = 0; on a read-only disk there is none either."""
    file, content = image(tmp_path)
    for how in ({"discard": False}, {"readonly": True}):
        async with host() as world:
            world.attach(VBD, file, **how)  # type: ignore[arg-type]

            def guest() -> None:
                disk = front(world)
                disk.connect()
                assert not disk.can_discard
                assert disk.bus.backend("discard-granularity", -1) == -1
                assert asked(disk, disk.submit_discard(0, 8)) != Status.OKAY
                disk.disconnect()

            await world.guest(guest)
    assert file.read_bytes() == content


async def test_a_cd(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file, readonly=True, cdrom=True)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            assert disk.info == 1 | 2 | 4  # VDISK_CDROM, VDISK_REMOVABLE, VDISK_READONLY
            assert disk.read(0, 8) == content[:PAGE_SIZE]
            disk.disconnect()

        await world.guest(guest)


async def test_a_barrier_is_neither_offered_nor_taken(tmp_path: Path) -> None:
    file, content = image(tmp_path)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world)
            disk.connect()
            assert disk.bus.backend("feature-barrier", 0) == 0 and disk.bus.backend("feature-persistent") == 0
            barrier = Op.WRITE_BARRIER
            ident = disk.submit_raw(lambda i, grefs: X86_64.request(barrier, i, 0, [(grefs[0], 0, 7)]), op=barrier)
            assert asked(disk, ident) == Status.EOPNOTSUPP
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == content


async def test_a_new_size(tmp_path: Path) -> None:
    """Bounds follow on every queue, the node and the state's same value come in one transaction."""
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world, queues=2)
        await world.guest(disk.connect)
        with pytest.raises(HostError, match="16384 sectors of 512 bytes, and the image has 8192"):
            await device.resize(16384)
        os.truncate(file, 8 * MIB)
        seen: list[tuple[str | None, str | None]] = []
        async with world.client.watch(f"{world.backend(VBD)}/state") as watch:
            await anext(watch)
            await device.resize(16384)
            await anext(watch)
            nodes = [world.server.get(f"{world.backend(VBD)}/{name}") for name in ("state", "sectors")]
            seen.append((nodes[0], nodes[1]))
        assert seen == [("4", "16384")]

        def guest() -> None:
            disk.read_features()
            assert disk.sectors == 16384
            for number, queue in enumerate(disk.queues):
                queue.write(16383 - number, bytes([number + 65]) * 512)
                assert asked(queue, queue.submit_read(16384, 1)) == Status.ERROR
            disk.disconnect()

        await world.guest(guest)
        # closed: nothing to tell, and the next handshake has it
        os.truncate(file, 2 * MIB)
        await device.resize(4096)
        assert world.state(VBD) == "6" and world.server.get(f"{world.backend(VBD)}/sectors") == "16384"

        def again() -> None:
            new = front(world)
            new.connect()
            assert new.sectors == 4096
            new.disconnect()

        await world.guest(again)
    assert file.read_bytes() == content[: 2 * MIB]


async def test_new_sizes_while_frontends_come_and_go(tmp_path: Path) -> None:
    """The rewritten state is never an old one: a resize and a change of state that meet both hold."""
    file, _ = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        rounds = scaled(200, least=20)

        def guest() -> None:
            for _ in range(rounds):
                disk = front(world, depth=1, segments=1)
                disk.connect()
                disk.disconnect()

        work = asyncio.ensure_future(world.guest(guest))
        size = 4 * MIB
        while not work.done():
            size += 4096
            os.truncate(file, size)
            await device.resize(size // 512)
            await asyncio.sleep(0)  # it has nobody to tell while the device is closed, and does not wait then
        await work
        assert world.state(VBD) == "6"


@pytest.mark.parametrize("engine", ["auto", "threads"])
async def test_o_direct(tmp_path: Path, engine: str) -> None:
    file, content = image(tmp_path)
    try:
        os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT here")
    async with host(mib=32) as world:
        world.attach(VBD, file, direct=True, options=Vbd(engine=engine))

        def guest() -> None:
            disk = front(world, segments=20)
            disk.connect()
            load(disk, content, scaled(4_000, least=200))
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == content


async def test_the_largest_rings_with_indirect_segments(tmp_path: Path) -> None:
    """512 requests a ring, 256 segments each, as far as the guest's memory goes."""
    file, content = image(tmp_path, 8 * MIB)
    async with host(mib=64, frames=16) as world:
        world.attach(VBD, file)

        def guest() -> None:
            disk = front(world, ring_pages=16, segments=256, depth=26)
            disk.connect()
            assert disk.ring_size == 512 and disk.segments == 256
            load(disk, content, scaled(3_000, least=60))
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == content


@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("direct", [False, True])
async def test_more_vectors_than_one_call_takes(tmp_path: Path, engine: str, direct: bool) -> None:
    """4096 segments that do not touch one another, of half a page each: IOV_MAX is 1024."""
    file, content = image(tmp_path, 9 * MIB)
    count, half = 4096, PAGE_SIZE // 2
    async with host(mib=64, frames=16) as world:
        world.attach(VBD, file, direct=direct, options=Vbd(engine=engine, max_indirect_segments=4096))

        def guest() -> None:
            disk = front(world, segments=count, depth=1)
            disk.connect()
            assert disk.segments == count
            queue = disk.queues[0]
            slot = queue._idle[0]
            assert len(slot.table_grefs) == 8
            for index in range(count):
                slot.patch(index, 0, 3)

            def send(op: Op) -> int:
                ident = queue.submit_raw(lambda i, _: X86_64.indirect_request(op, i, 8, count, slot.table_grefs), op=op)
                return asked(queue, ident)

            assert send(Op.READ) == Status.OKAY
            read = b"".join(bytes(view[:half]) for view in slot.views)
            assert read == content[4096 : 4096 + count * half]
            for index, view in enumerate(slot.views):
                view[:half] = index.to_bytes(4, "little") * (half // 4)
            assert send(Op.WRITE) == Status.OKAY
            written = b"".join(index.to_bytes(4, "little") * (half // 4) for index in range(count))
            content[4096 : 4096 + len(written)] = written
            disk.disconnect()

        await world.guest(guest)
    assert file.read_bytes() == content
