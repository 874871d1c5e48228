"""A domain with vbds for the tests of blkback: the host's side, an image, a frontend, a checked load."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from evtchnd.blkif import SECTOR_SIZE, Status
from evtchnd.guest.blkfront import Blkfront, Queue
from oneprocess import Host, LocalVm, open_fds

VBD = 51712


MIB = 1 << 20


@asynccontextmanager
async def host(*, mib: int = 16, frames: int = 4) -> AsyncIterator[Host]:
    """A domain; at the end nothing is left of it."""
    ours, theirs = socket.socketpair()
    with theirs:  # uvloop makes a socket of its own when it gets the first
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        transport.close()
        await asyncio.sleep(0.01)
    before = open_fds()
    vm = LocalVm(mib=mib, frames=frames)
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


def load(
    disk: Blkfront | Queue, content: bytearray, count: int, seed: int = 1, *, at_sector: int = 0, unit: int = 1
) -> None:
    """`count` random requests at the frontend's depth, every answer checked; ranges in flight never overlap.

    `content`: of the disk from `at_sector` on, which is all that is touched. unit: sectors that go together (1 or 8).
    """
    rng = random.Random(seed)
    busy: dict[int, tuple[int, int, bytes | None]] = {}
    sectors = len(content) // SECTOR_SIZE
    issued = answered = 0
    while answered < count:
        while issued < count and disk.room:
            op = rng.choices("rwf", (8, 8, 1))[0]
            size = rng.randint(1, (disk.most_sectors - 7) // unit) * unit
            first = rng.randint(0, 7)
            at = rng.randrange(0, sectors - size, unit)
            if op == "f":
                busy[disk.submit_flush()] = (-1, 0, None)
            elif any(a < at + size and at < a + n for a, n, _ in busy.values() if n):
                break
            elif op == "w":
                data = rng.randbytes(size * SECTOR_SIZE)
                busy[disk.submit_write(at_sector + at, data, first=first)] = (at, size, data)
            else:
                busy[disk.submit_read(at_sector + at, size, first=first)] = (at, size, None)
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
