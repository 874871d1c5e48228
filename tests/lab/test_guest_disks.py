"""Unmodified Linux kernels on evtchnd's disks: what xen-blkfront reads, writes and discards, and what becomes of it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lab.patience import patient
from lab.realguest import MIB, VCPUS, RealGuest, until
from scale import scaled

pytestmark = pytest.mark.timeout(120)
FIO = "cd /tmp && fio --ioengine=libaio --direct=1 --minimal"
# hash of each file below the folder, by its name
HASHES = "find . -type f -print0 | sort -z | xargs -0 sha256sum"


def used(image: Path) -> int:
    """Bytes that a sparse image takes."""
    return image.stat().st_blocks * 512


def scribble(guest: RealGuest, vdev: str, block: int, count: int, seek: int) -> str:
    """`count` blocks of random bytes from block `seek` of the disk on, around the guest's page cache; their SHA-256."""
    guest.run(f"head -c {block * count} /dev/urandom >/tmp/bytes")
    guest.run(f"dd if=/tmp/bytes of=/dev/{vdev} bs={block} oflag=direct seek={seek} 2>/dev/null", 30)
    return guest.run("sha256sum </tmp/bytes; rm /tmp/bytes").split()[0]


def test_root_file_system(guest: RealGuest) -> None:
    assert guest.run("uname -r") == guest.image.release
    assert guest.run("findmnt -no SOURCE,FSTYPE /") == "/dev/xvda ext4"
    assert "rw" in guest.run("findmnt -no OPTIONS /").split(",")


def test_what_the_frontend_negotiated(guest: RealGuest) -> None:
    path = "/local/domain/1/device/vbd/51728"
    assert guest.xenstore("read", f"{path}/ring-page-order") == "4"
    assert guest.xenstore("read", f"{path}/multi-queue-num-queues") == str(VCPUS)
    assert len(guest.run("ls /sys/block/xvdb/mq").split()) == VCPUS
    # 4 KiB each: requests of a MiB
    assert guest.run("cat /sys/block/xvdb/queue/max_segments") == "256"
    # flushes, no barriers; an image on a file system of 4 KiB blocks
    assert guest.run("cat /sys/block/xvdb/queue/write_cache") == "write back"
    queue = "/sys/block/xvdb/queue"
    assert guest.run(f"cat {queue}/logical_block_size {queue}/physical_block_size").split() == ["512", "4096"]
    assert (
        guest.run("dmesg | grep -c 'blkfront: xvdb: .*persistent grants: disabled; indirect descriptors: enabled'")
        == "1"
    )


@pytest.mark.parametrize("depth", [1, 32])
def test_fio_verifies(guest: RealGuest, depth: int) -> None:
    job = f"{FIO} --filename=/dev/xvdb --offset={depth}M --size={min(depth, 8)}M --iodepth={depth} --bs=4k --verify=md5"
    guest.run(f"{job} --name=w --rw=randwrite --verify_fatal=1", 60)
    # from the image again, not from the guest's memory, and in another order
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    guest.run(f"{job} --name=r --rw=randread --verify_fatal=1 --randseed=1", 60)
    guest.fails(f"{job} --name=r --rw=randread --verify_fatal=1 --offset=80M --size=4k")
    assert guest.device("xvdb")["counters"]["errors"] == 0


@pytest.mark.timeout(1200)
def test_fio_verifies_while_workers_die(guest: RealGuest) -> None:
    """Reads of what was written, beside the writes, over kills at any moment; then all of it once more."""
    job = f"{FIO} --filename=/dev/xvdb --offset=40M --size=4M --iodepth=16 --bs=4k --verify=md5 --verify_fatal=1"
    writes = f"{job} --name=w --rw=randwrite --verify_backlog=64 --loops=1000"
    # exec: $! is fio then, and no shell; what a shell begins beside itself does not hear SIGINT
    guest.run(f"({writes.replace('&& fio', '&& exec fio')} --time_based --runtime=1000) >/tmp/fio 2>&1 & job=$!")
    restarts = guest.call("Info")["worker"]["restarts"]
    chance = random.Random(1)
    kills = scaled(60, least=5)
    for kill in range(1, kills + 1):
        before = guest.device("xvdb")["counters"].get("requests", 0)
        until(lambda before=before: guest.device("xvdb")["counters"].get("requests", 0) > before + 20)  # type: ignore[misc]
        time.sleep(chance.random() * 0.3)
        pid = guest.call("Info")["worker"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: guest.call("Info")["worker"]["pid"] not in (0, pid))  # type: ignore[misc]
        assert guest.call("Info")["worker"]["restarts"] == restarts + kill
    assert guest.vmm is not None
    guest.vmm.rejoined(patient(20))
    guest.run("kill $job")  # it has found nothing wrong until now, else it would have ended
    guest.run("wait $job || true; ! grep -qi 'verify: bad\\|error' /tmp/fio", 60)
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    guest.run(f"{job} --name=w --rw=randwrite --loops=1", 60)
    guest.run(f"{job} --name=r --rw=randread --randseed=1", 60)
    assert guest.device("xvdb")["counters"]["errors"] == 0
    guest.fails("dmesg | grep -i 'blkfront.*error\\|i/o error, dev xvd\\|still in use'")


@pytest.mark.parametrize("depth", [1, 32])
def test_fio_trims(guest: RealGuest, depth: int) -> None:
    """What was trimmed takes no room any more, and reads as zeros."""
    begin, size = 64 * MIB, 8 * MIB
    area = f"--filename=/dev/xvdb --offset={begin} --size={size} --iodepth={depth}"
    guest.run(f"{FIO} --name=w --rw=write --bs=1M {area}", 30)
    full = used(guest.data)
    assert full >= size
    guest.run(f"{FIO} --name=t --rw=randtrim --bs=64k {area}", 30)
    assert used(guest.data) <= full - size + 64 * 1024
    with guest.data.open("rb") as file:
        file.seek(begin)
        assert not any(file.read(size))
    assert guest.run("dd if=/dev/xvdb iflag=direct bs=1M skip=64 count=8 2>/dev/null | tr -d '\\0' | wc -c") == "0"


def test_large_requests(guest: RealGuest) -> None:
    """Indirect segments: a MiB from guest to file in one request, sums equal."""
    before = guest.device("xvdb")["counters"]
    told = scribble(guest, "xvdb", MIB, 16, 96)
    after = guest.device("xvdb")["counters"]
    with guest.data.open("rb") as file:
        file.seek(96 * MIB)
        assert hashlib.sha256(file.read(16 * MIB)).hexdigest() == told
    assert after["sectors_written"] - before["sectors_written"] == 16 * MIB // 512
    assert after["requests"] - before["requests"] <= 32


def test_ext4_on_a_hot_attached_disk(guest: RealGuest) -> None:
    """A file system made by the guest, files of the guest; hashes taken here, and its metadata are clean."""
    image = guest.disk("xvdc", 128 * MIB)
    guest.attach("xvdc", image)
    guest.run("mkfs.ext4 -q /dev/xvdc && mount /dev/xvdc /mnt", 60)
    guest.run("tar -C / -cf - usr/bin usr/sbin etc | tar -C /mnt -xf - && sync", 120)
    told = guest.run(f"cd /mnt && {HASHES} | sha256sum; cd /", 60).split()[0]
    guest.run("umount /mnt", 30)
    guest.detach("xvdc")
    guest.vanishes("xvdc")
    done = subprocess.run(guest.lab.program("usr/sbin/e2fsck", "-fn", str(image)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    mounted = guest.folder / "mnt"
    mounted.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", image, mounted], check=True)
    try:
        command = ["sh", "-c", f"{HASHES} | sha256sum"]
        found = subprocess.run(command, cwd=mounted, capture_output=True, text=True, check=True).stdout
        names = sum(len(files) for _, _, files in os.walk(mounted))
    finally:
        subprocess.run(["umount", mounted], check=True)
        mounted.rmdir()
    assert found.split()[0] == told
    assert names > 200
    image.unlink()


def test_sectors_of_4096(guest: RealGuest) -> None:
    image = guest.disk("xvdd", 16 * MIB)
    guest.attach("xvdd", image, "sector-size=4096")
    assert guest.run(
        "cat /sys/block/xvdd/queue/logical_block_size /sys/block/xvdd/queue/physical_block_size"
    ).split() == ["4096", "4096"]
    assert guest.run("blockdev --getsize64 /dev/xvdd") == str(16 * MIB)
    told = scribble(guest, "xvdd", 4096, 8, 4088)
    guest.fails("dd if=/dev/zero of=/dev/xvdd bs=512 count=1 oflag=direct")
    guest.detach("xvdd")
    guest.vanishes("xvdd")
    assert hashlib.sha256(image.read_bytes()[-8 * 4096 :]).hexdigest() == told


def test_a_disk_that_grows(guest: RealGuest) -> None:
    """The guest sees the new end of a disk that it has mounted, and its file system takes it."""
    image = guest.disk("xvde", 32 * MIB)
    guest.attach("xvde", image)
    guest.run("mkfs.ext4 -q /dev/xvde && mount /dev/xvde /mnt && echo here >/mnt/file", 30)
    guest.call("BlockResize", device="xvde", size=64 * MIB)
    guest.run(f"for i in $(seq 100); do [ $(blockdev --getsize64 /dev/xvde) = {64 * MIB} ] && break; sleep 0.1; done")
    assert guest.run("blockdev --getsize64 /dev/xvde") == str(64 * MIB)
    guest.run(
        "resize2fs /dev/xvde && [ $(df --output=size -k /mnt | tail -1) -gt 50000 ] && cat /mnt/file && umount /mnt", 30
    )
    guest.detach("xvde")
    guest.vanishes("xvde")


def test_read_only(guest: RealGuest) -> None:
    image = guest.disk("xvdf", 16 * MIB)
    guest.attach("xvdf", image, "access=ro")
    assert guest.run("cat /sys/block/xvdf/ro") == "1"
    guest.fails("dd if=/dev/zero of=/dev/xvdf bs=4096 count=1 oflag=direct")
    guest.detach("xvdf")
    guest.vanishes("xvdf")
    assert used(image) == 0


def test_cdrom(guest: RealGuest) -> None:
    """Linux leaves a PV CD-ROM alone where it is no PV guest: it is offered, refused, and taken away again."""
    image = guest.disk("xvdg", 16 * MIB)
    guest.call("BlockAttach", disk=f"format=raw,vdev=xvdg,access=ro,devtype=cdrom,target={image}")
    path = "/local/domain/1/device/vbd/51808"
    assert guest.xenstore("read", f"{path}/device-type") == "cdrom"
    guest.run("dmesg | grep -q 'vbd-51808' || sleep 1")
    guest.fails("[ -b /dev/xvdg ]")
    guest.detach("xvdg")
    assert "51808" not in guest.xenstore("list", "/local/domain/1/device/vbd").split()


def test_driver_lets_go(guest: RealGuest) -> None:
    """The driver leaves a disk that is in nobody's use, and the host takes it away and gives it back.

    Linux does not come back to the same nodes: its frontend's state stays 6.
    """
    image = guest.disk("xvdi", 16 * MIB)
    guest.attach("xvdi", image)
    guest.run("echo needle | dd of=/dev/xvdi bs=512 seek=20000 conv=sync oflag=direct 2>/dev/null")
    guest.run("echo vbd-51840 >/sys/bus/xen/drivers/vbd/unbind", 30)
    guest.vanishes("xvdi")
    assert guest.xenstore("read", "/local/domain/1/device/vbd/51840/state") == "6"
    until(lambda: guest.device("xvdi")["state"] != 4)
    guest.detach("xvdi")
    guest.attach("xvdi", image)
    assert guest.run("dd if=/dev/xvdi bs=512 skip=20000 count=1 iflag=direct 2>/dev/null | head -c 6") == "needle"
    guest.detach("xvdi")
    guest.vanishes("xvdi")


def test_a_disk_pulled_during_io_and_put_back(guest: RealGuest) -> None:
    image = guest.disk("xvdh", 64 * MIB)
    guest.attach("xvdh", image)
    job = f"{FIO} --name=p --filename=/dev/xvdh --rw=randwrite --bs=4k --iodepth=16 --time_based --runtime=300"
    guest.run(f"({job} >/tmp/pulled 2>&1; echo $? >/tmp/pulled.status) & sleep 1")
    guest.detach("xvdh", force=True)
    guest.run("for i in $(seq 300); do [ -s /tmp/pulled.status ] && break; sleep 0.1; done", 60)
    assert guest.run("cat /tmp/pulled.status") != "0"
    guest.vanishes("xvdh")
    guest.attach("xvdh", image)
    guest.run(f"{FIO} --name=b --filename=/dev/xvdh --rw=randwrite --bs=4k --size=4M --iodepth=16 --verify=md5", 60)
    guest.detach("xvdh")
    guest.vanishes("xvdh")
    # the others have been served all the while, and Linux has seen nothing that should not be
    guest.run("dd if=/dev/xvda of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null")
    assert guest.run("dmesg | grep -E 'BUG|Oops|WARNING|still in use' || true") == ""
