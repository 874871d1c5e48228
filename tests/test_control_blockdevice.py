"""A block device with sectors of 4096 bytes through the daemon: a loop device, where this machine lets one be made."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

MIB = 1 << 20


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(random.Random(4).randbytes(8 * MIB))
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", "--sector-size", "4096", backing],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device with sectors of 4096 bytes can be made here")
    path = made.stdout.strip()
    yield Path(path)
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_sectors_holes_and_a_new_size(tmp_path: Path, backing: Path, device: Path, cache: str) -> None:
    content = bytearray(backing.read_bytes())
    with DaemonProcess(tmp_path) as daemon, SoftVmm(daemon.vmm_socket, 7, memory=32 * MIB) as vm:
        for wrong in ("sector-size=512", "sector-size=512,cache=none"):
            with pytest.raises(RuntimeError, match="its sectors have 4096 bytes, the guest's cannot have 512"):
                daemon.call("attach_block", 7, f"vdev=xvda,{wrong},target={device}")
        devid = daemon.call("attach_block", 7, f"vdev=xvda,cache={cache},target={device}")["devid"]
        domain = Domain(vm)
        store = XenStore(domain)
        disk = Blkfront(domain, store, devid, queues=2)
        disk.connect()
        assert (disk.sectors, disk.sector_size, disk.physical_sector_size) == (16384, 4096, 4096)
        assert disk.read(0, 16384) == content
        disk.queues[1].write(8, b"new!" * 1024)
        content[4096:8192] = b"new!" * 1024
        # a sector that lies over two pages
        ident = disk.submit_write(16, b"over" * 1024, first=3)
        (done,) = disk.complete()
        assert (done.ident, done.status) == (ident, 0)
        content[8192:12288] = b"over" * 1024
        (done,) = disk.complete() if disk.submit_read(1, 8) else ()
        assert done.status == -1
        if disk.can_discard:
            assert disk.bus.backend("discard-granularity") % 4096 == 0
            before = backing.stat().st_blocks
            disk.submit_discard(2048, 4096)
            (done,) = disk.complete()
            assert done.status == 0
            disk.flush()
            content[MIB : 3 * MIB] = bytes(2 * MIB)
            assert disk.read(2040, 4112) == content[2040 * 512 : 6152 * 512]
            assert backing.stat().st_blocks <= before - 4096
        with pytest.raises(RuntimeError, match="a block device has the size that its own tools give it"):
            daemon.call("resize_block", 7, "xvda", 16 * MIB)
        os.truncate(backing, 12 * MIB)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        assert daemon.call("resize_block", 7, "xvda")["sectors"] == 24576
        disk.read_features()
        assert disk.sectors == 24576
        disk.write(24568, b"last" * 1024)
        disk.flush()
        content += bytes(4 * MIB - 4096) + b"last" * 1024
        assert disk.read(0, 24576) == content
        disk.disconnect()
        store.close()
        domain.close()
