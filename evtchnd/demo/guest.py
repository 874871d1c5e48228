"""The demo's guest: a domain without KVM that reads an ext4 disk over its ring and writes to it.

Tells what it does on standard output, one JSON object a line: ready, progress, result, detached. Ends by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from evtchnd.abi import XenbusState
from evtchnd.blkif import SECTOR_SIZE
from evtchnd.demo.image import SCRATCH, SCRATCH_BYTES
from evtchnd.errors import EvtchndError
from evtchnd.guest.blkfront import Blkfront, Completion
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.guest.ext4 import Ext4, Extent
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

MEMORY = 64 << 20
DEVID = 51712  # xvda
DEPTH = 32
SEGMENTS = 32
BLOCK = 4096
RANDOM_READS = 20_000
# Nobody attaches a disk later than this to a demo.
ATTACH_S = 60.0
IDLE_S = 3600.0


def tell(event: str, **more: Any) -> None:
    # A kept demo has no reader any more.
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **more}), flush=True)


class Phase:
    """Counts what one part of the work took."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.bytes = 0
        self.times: list[int] = []
        self.begin = time.perf_counter()
        self._told = 0.0

    def count(self, done: Completion) -> None:
        if done.status:
            raise GuestFault(f"{self.name}: sector {done.sector}: status {done.status}")
        self.bytes += done.count * SECTOR_SIZE
        self.times.append(done.nanoseconds)
        now = time.perf_counter()
        if now - self._told > 0.1:
            self._told = now
            tell("progress", phase=self.name, done=min(self.bytes, self.total), total=self.total)

    def end(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.begin
        tell("progress", phase=self.name, done=self.total, total=self.total)
        ordered = sorted(self.times)
        return {
            "name": self.name,
            "requests": len(ordered),
            "bytes": self.bytes,
            "seconds": seconds,
            "p50_us": ordered[len(ordered) // 2] / 1000,
            "p99_us": ordered[len(ordered) * 99 // 100] / 1000,
        }


def read_all(disk: Blkfront, wanted: Iterable[tuple[int, int]], phase: Phase, depth: int = DEPTH) -> dict[int, bytes]:
    """Reads (sector, count) pieces with `depth` in flight; sector -> data."""
    found: dict[int, bytes] = {}
    pieces = iter(wanted)
    more = True
    while more or disk.in_flight:
        while more and disk.in_flight < depth:
            piece = next(pieces, None)
            if piece is None:
                more = False
            else:
                disk.submit_read(*piece)
        if disk.in_flight:
            for done in disk.complete():
                phase.count(done)
                found[done.sector] = done.data
    return found


def write_all(disk: Blkfront, pieces: Iterable[tuple[int, bytes]], phase: Phase) -> None:
    """Writes (sector, data) pieces at depth, then flushes."""
    for sector, data in pieces:
        while not disk.room:
            for done in disk.complete():
                phase.count(done)
        disk.submit_write(sector, data)
    while disk.in_flight:
        for done in disk.complete():
            phase.count(done)
    disk.flush()


def pieces_of(disk: Blkfront, extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """(sector, count) of requests that cover the extents."""
    for extent in extents:
        first, sectors = extent.disk_offset // SECTOR_SIZE, extent.length // SECTOR_SIZE
        for at in range(0, sectors, disk.most_sectors):
            yield first + at, min(disk.most_sectors, sectors - at)


def read_files(disk: Blkfront, fs: Ext4) -> tuple[dict[str, str], dict[str, Any]]:
    """SHA-256 of every file but the one that is overwritten later, and the phase's figures."""
    files = [(path, inode) for path, inode in fs.walk() if path != f"/{SCRATCH}"]
    hashes = {}
    phase = Phase("read", sum(inode.size for _, inode in files))
    for path, inode in files:
        data = bytearray(inode.size)
        extents = fs.extents(inode)
        found = read_all(disk, pieces_of(disk, extents), phase)
        for extent in extents:
            for sector, _count in pieces_of(disk, [extent]):
                at = extent.file_offset + sector * SECTOR_SIZE - extent.disk_offset
                part = found[sector][: max(0, inode.size - at)]
                data[at : at + len(part)] = part
        hashes[path] = hashlib.sha256(data).hexdigest()
    return hashes, phase.end()


def write_file(disk: Blkfront, fs: Ext4) -> tuple[str, int, list[dict[str, Any]]]:
    """Overwrites the scratch file and reads it back: SHA-256 of it, bad blocks, figures."""
    inode = next(inode for path, inode in fs.walk() if path == f"/{SCRATCH}")
    extents = fs.extents(inode)
    content = random.Random(2).randbytes(inode.size)
    where = {}
    for extent in extents:
        for sector, count in pieces_of(disk, [extent]):
            at = extent.file_offset + sector * SECTOR_SIZE - extent.disk_offset
            where[sector] = content[at : at + count * SECTOR_SIZE]
    writing = Phase("write", inode.size)
    write_all(disk, where.items(), writing)
    wrote = writing.end()
    reading = Phase("verify", inode.size)
    found = read_all(disk, pieces_of(disk, extents), reading)
    bad = sum(
        found[sector][at : at + BLOCK] != data[at : at + BLOCK]
        for sector, data in where.items()
        for at in range(0, len(data), BLOCK)
    )
    return hashlib.sha256(content).hexdigest(), bad, [wrote, reading.end()]


def random_reads(disk: Blkfront, depth: int, count: int) -> dict[str, Any]:
    """4 KiB reads all over the disk."""
    places = random.Random(depth)
    blocks = disk.sectors * SECTOR_SIZE // BLOCK
    phase = Phase(f"4k depth {depth}", count * BLOCK)
    sectors = BLOCK // SECTOR_SIZE
    read_all(disk, ((places.randrange(blocks) * sectors, sectors) for _ in range(count)), phase, depth)
    return phase.end()


def serve(vm: SoftVmm) -> None:
    """Waits for the disk, uses it, lets it go when the operator wants it back."""
    domain = Domain(vm)
    store = XenStore(domain)
    tell("ready")
    state = f"device/vbd/{DEVID}/state"
    store.wait_for(state, lambda value: value is not None, ATTACH_S)
    disk = Blkfront(domain, store, DEVID, depth=DEPTH, segments=SEGMENTS)
    disk.connect()
    fs = Ext4(lambda offset, length: read_bytes(disk, offset, length))
    hashes, read = read_files(disk, fs)
    written, bad, phases = write_file(disk, fs)
    deep = random_reads(disk, DEPTH, RANDOM_READS)
    shallow = random_reads(disk, 1, RANDOM_READS // 10)
    tell(
        "result",
        read=hashes,
        written=written,
        blocks=SCRATCH_BYTES // BLOCK,
        bad_blocks=bad,
        phases=[read, *phases, deep, shallow],
    )
    closing = (str(int(XenbusState.CLOSING)), str(int(XenbusState.CLOSED)), None)
    store.wait_for(f"{disk.bus.backend_path}/state", lambda value: value in closing, IDLE_S)
    disk.disconnect()
    tell("detached")
    signal.pause()


def read_bytes(disk: Blkfront, offset: int, length: int) -> bytes:
    """Any range of the disk's bytes."""
    first = offset // SECTOR_SIZE
    last = -(-(offset + length) // SECTOR_SIZE)
    data = disk.read(first, last - first)
    return data[offset - first * SECTOR_SIZE :][:length]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evtchnd.demo.guest", description=__doc__)
    parser.add_argument("--socket", required=True, help="the daemon's vmm.sock")
    parser.add_argument("--domid", type=int, required=True)
    arguments = parser.parse_args()

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    # Not closed at the end: this process ends as a VMM does, and the daemon sees its socket close.
    try:
        serve(SoftVmm(arguments.socket, arguments.domid, memory=MEMORY, name="demo"))
    except (EvtchndError, GuestFault, OSError) as exc:
        print(f"guest: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
