"""A frontend in C, compiled against Xen's own ring.h and blkif.h, on the backend: an oracle for every layout."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from evtchnd.abi import PAGE_SIZE, XenbusState
from evtchnd.blkif import X86_32, X86_64, Layout
from evtchnd.guest.xenbus import Frontend
from evtchnd.ring import FrontRing, RingLayout
from oneprocess import Host
from scale import scaled
from vbd import VBD, host

SOURCE = Path(__file__).parent / "c" / "blkfront.c"
BLOCKS = 512
LAYOUTS = pytest.mark.parametrize("layout", [X86_64, X86_32], ids=lambda layout: layout.name)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The frontend for each layout."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    if not Path("/usr/include/xen/io/blkif.h").exists():
        pytest.skip("no libxen-dev")
    folder = tmp_path_factory.mktemp("c")
    for layout in (X86_64, X86_32):
        define = ["-DX86_32"] if layout is X86_32 else []
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", *define, "-o", folder / layout.name, SOURCE]
        subprocess.run(command, check=True)
    return {layout.name: folder / layout.name for layout in (X86_64, X86_32)}


@dataclass
class Shared:
    """A connected ring and the pages that the program uses; ours is only the handshake."""

    world: Host
    bus: Frontend
    program: Path
    arguments: dict[str, int]

    async def run(self, mode: str, **more: int) -> list[str]:
        """Runs the program; -> its lines. Fails with what it wrote to standard error."""
        vm = self.world.vm
        arguments = {**self.arguments, **more}
        fds = (arguments["ram"], arguments["kick"], arguments["notify"])
        command = [str(self.program), mode, *(f"{name}={value}" for name, value in arguments.items())]
        assert vm.ram_fd == fds[0]
        done = await asyncio.to_thread(subprocess.run, command, pass_fds=fds, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().split("\n")[:-1]


@asynccontextmanager
async def shared(
    tmp_path: Path, programs: dict[str, Path], layout: Layout, *, pages: int = 1, depth: int = 32, per_slot: int = 11
) -> AsyncIterator[Shared]:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(BLOCKS * PAGE_SIZE))
    async with host(mib=32) as world:
        world.attach(VBD, file)
        domain, vm = world.domain, world.vm
        ring_gfn = domain.alloc(pages)
        views = [vm.ram.view(ring_gfn + index) for index in range(pages)]
        FrontRing(views, RingLayout(layout.request_size, layout.response_size, pages)).close()
        for view in views:
            view.release()
        ring_grefs = [domain.grant(ring_gfn + index) for index in range(pages)]
        data = domain.alloc(depth * per_slot)
        grefs = [domain.grant(data + index) for index in range(depth * per_slot)]
        tables = domain.alloc(depth)
        table_grefs = [domain.grant(tables + index) for index in range(depth)]
        assert grefs == list(range(grefs[0], grefs[0] + len(grefs)))
        assert table_grefs == list(range(table_grefs[0], table_grefs[0] + depth))
        port = vm.alloc_unbound(0)

        def connect() -> Frontend:
            bus = Frontend(world.store, "vbd", VBD)
            bus.wait_backend(XenbusState.INIT_WAIT)
            nodes = {"ring-ref": str(ring_grefs[0])}
            if pages > 1:
                nodes = {f"ring-ref{index}": str(gref) for index, gref in enumerate(ring_grefs)}
                nodes["ring-page-order"] = str(pages.bit_length() - 1)
            nodes |= {"event-channel": str(port), "protocol": layout.name}
            bus.switch(XenbusState.INITIALISED, nodes)
            bus.wait_backend(XenbusState.CONNECTED)
            bus.switch(XenbusState.CONNECTED)
            return bus

        bus = await world.guest(connect)
        arguments = {
            "ram": vm.ram_fd,
            "kick": vm.ports[port][0],
            "notify": vm.ports[port][1],
            "ring": ring_gfn * PAGE_SIZE,
            "ring_pages": pages,
            "start": 0,
            "data": data * PAGE_SIZE,
            "tables": tables * PAGE_SIZE,
            "gref": grefs[0],
            "table_gref": table_grefs[0],
            "per_slot": per_slot,
            "depth": depth,
            "seed": 7,
        }
        yield Shared(world, bus, programs[layout.name], arguments)

        def close() -> None:
            bus.switch(XenbusState.CLOSING)
            bus.wait_backend(XenbusState.CLOSING)
            bus.switch(XenbusState.CLOSED)
            bus.wait_backend(XenbusState.CLOSED)

        await world.guest(close)
        for gref in (*ring_grefs, *grefs, *table_grefs):
            domain.end_grant(gref)  # raises if the backend still had it


def block(index: int, version: int) -> bytes:
    """What the program writes: each word from its sector, the version and its place."""
    if not version:
        return bytes(PAGE_SIZE)
    words = (
        ((sector * 0x9E3779B97F4A7C15 & (1 << 64) - 1) ^ version << 8 ^ place).to_bytes(8, "little")
        for sector in range(index * 8, index * 8 + 8)
        for place in range(64)
    )
    return b"".join(words)


@LAYOUTS
@pytest.mark.parametrize(("pages", "depth", "indirect"), [(1, 32, 0), (1, 1, 0), (2, 40, 0), (16, 128, 0), (1, 16, 40)])
async def test_every_word_is_where_it_was_written(
    tmp_path: Path, programs: dict[str, Path], layout: Layout, pages: int, depth: int, indirect: int
) -> None:
    count = scaled(100_000, least=500)
    per_slot = indirect or 11
    async with shared(tmp_path, programs, layout, pages=pages, depth=depth, per_slot=per_slot) as ends:
        summary, *versions = await ends.run("verify", count=count, blocks=BLOCKS, indirect=indirect)
        answered, flushes, *_ = map(int, summary.split())
        assert answered == count and flushes
    content = (tmp_path / "disk.img").read_bytes()
    for index, version in enumerate(versions):
        assert content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] == block(index, int(version)), index


@LAYOUTS
async def test_bad_requests(tmp_path: Path, programs: dict[str, Path], layout: Layout) -> None:
    async with shared(tmp_path, programs, layout) as ends:
        domain, page = ends.world.domain, ends.world.domain.alloc(1)
        foreign, outside = domain.grant(page, domid=9), domain.grant(1 << 24)
        readonly = domain.grant(page, readonly=True)
        (cases,) = await ends.run(
            "bad",
            sectors=BLOCKS * 8,
            unused_gref=2000,
            foreign_gref=foreign,
            outside_gref=outside,
            readonly_gref=readonly,
            max_indirect=256,
        )
        device = ends.world.devices[VBD]
        assert device.stats()["refused"] == int(cases)
        for gref in (foreign, outside, readonly):
            domain.end_grant(gref)


@LAYOUTS
@pytest.mark.parametrize("by", [33, 1 << 31, (1 << 32) - 1])
async def test_index_jumps(
    tmp_path: Path, programs: dict[str, Path], layout: Layout, by: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with shared(tmp_path, programs, layout) as ends:
        with caplog.at_level(logging.ERROR):
            await ends.run("jump", by=by)
            await ends.world.guest(lambda: ends.bus.wait_backend(XenbusState.CLOSING))
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert record.getMessage().startswith(f"domain 7: vbd {VBD}: stopped: ring: request index jumped")
