"""evtchnd-micro with real guests: trixie's kernel as it is, and a small one that tries the hypercalls one by one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd.abi import PAGE_SIZE
from evtchnd.vmm.kvm_machine import Machine
from evtchnd.vmm.physmap import Memory
from lab.microguest import Evtchnd, Micro, kernel, linux_initrd, pvh_guest
from lab.patience import patient

MiB = 1 << 20
LINES = 300_000  # 1.9 MB

# First boot: write, sync, reboot. Second: read it again with a cold cache, move interrupts, power off.
SCRIPT = f"""
echo "guest: $(grep -c ^processor /proc/cpuinfo) processors"
mkdir /m; mount -t ext4 /dev/xvda /m || echo "guest: no mount"
if [ ! -e /m/numbers ]; then
  seq 1 {LINES} >/m/numbers; md5sum </m/numbers >/m/sum; sync
  echo "guest: written"; umount /m; reboot -f
fi
[ "$(md5sum </m/numbers)" = "$(cat /m/sum)" ] && echo "guest: read again"
echo 1 >/proc/irq/default_smp_affinity
grep -c xen-dyn /proc/interrupts
grep -E "xen-dyn|LOC|spinlock|timer0" /proc/interrupts
echo "guest: type"; read word; echo "guest: got $word"
dd if=/dev/zero of=/m/zeros bs=1M count=4 2>/dev/null; sync
umount /m; poweroff -f
"""


def ext4(folder: Path) -> Path:
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    return image


@pytest.fixture
def no_warning_of_the_kernel() -> Iterator[None]:
    """The lab's own kernel has nothing to complain about; what it says once a boot, it says again."""
    debug = Path("/sys/kernel/debug")
    if not debug.is_mount():
        subprocess.run(["mount", "-t", "debugfs", "debug", debug], check=True)
    (debug / "clear_warn_once").write_text("1")

    def warnings() -> list[str]:
        said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        return [line for line in said.splitlines() if "WARNING:" in line]

    before = warnings()
    yield
    assert warnings() == before


@pytest.mark.usefixtures("no_warning_of_the_kernel")
def test_linux_writes_reboots_reads_and_powers_off(images: Path) -> None:
    (images / "initrd").write_bytes(linux_initrd(SCRIPT))
    disk = ext4(images)
    arguments = ["--kernel", kernel(), "--initrd", images / "initrd", "--memory", "256M", "--vcpus", "2"]
    arguments += ["--append", "console=hvc0 quiet panic=-1", "--disk", f"{disk},raw,xvda,rw", "--disk-cache", "none"]
    with Evtchnd(images) as daemon:
        with Micro(daemon.vmm_socket, images, *arguments, "--console") as micro:
            micro.wait_for("guest: written", 60)
            micro.wait_for("guest: type", 60)
            micro.type("abracadabra\n")
            assert micro.ended(60) == 0, micro.said
            said, stats = micro.said, micro.stats()
        assert daemon.list() == []
    assert "guest: 2 processors" in said
    assert "guest: read again" in said
    assert "guest: got abracadabra" in said
    assert (stats["boots"], stats["ended"]) == (2, "poweroff")
    # boot, two disks' worth of I/O, a console: not one send has left the kernel, and nothing else that is frequent
    assert stats["hypercalls"].get("event_channel_op.send", 0) == 0
    assert sum(stats["hypercalls"].values()) < 400, stats
    assert stats["exits"]["xen"] == sum(stats["hypercalls"].values())
    assert "mmio" not in stats["exits"]
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True)
    numbers = subprocess.run(["debugfs", "-R", "cat numbers", disk], capture_output=True, check=True).stdout
    assert numbers.split() == [b"%d" % i for i in range(1, LINES + 1)]


# Dies with writes under way. 4 vCPUs, and RAM above the hole at 3 GiB.
PANIC = """
echo "guest: $(grep -c ^processor /proc/cpuinfo) processors, $(free -m | awk '/Mem/ {print $2}') MiB"
mkdir /m; mount -t ext4 /dev/xvda /m; echo begin >/m/begin; sync
for n in 1 2 3; do dd if=/dev/urandom of=/m/$n bs=64k count=200 conv=fsync 2>/dev/null & done
usleep 300000; echo c >/proc/sysrq-trigger
"""


def test_linux_dies_in_the_middle_of_its_writes(images: Path) -> None:
    (images / "initrd").write_bytes(linux_initrd(PANIC))
    disk = ext4(images)
    arguments = ["--kernel", kernel(), "--initrd", images / "initrd", "--memory", "3328M", "--vcpus", "4"]
    arguments += ["--append", "console=hvc0 quiet panic=-1", "--disk", f"{disk},raw,xvda,rw"]
    with Evtchnd(images) as daemon:
        with Micro(daemon.vmm_socket, images, *arguments, "--console") as micro:
            assert micro.ended(90) == 1, micro.said
            said, stats = micro.said, micro.stats()
        assert daemon.list() == []
        assert daemon.process.poll() is None
    assert re.search(r"guest: 4 processors, 3[0-9]{3} MiB", said), said
    assert "domain 1 (g1): crash: by SCHEDOP_shutdown" in said
    assert stats["ended"] == "crash"
    assert stats["hypercalls"].get("event_channel_op.send", 0) == 0
    subprocess.run(["e2fsck", "-fy", str(disk)], stdout=subprocess.DEVNULL)  # the journal
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True)
    begin = subprocess.run(["debugfs", "-R", "cat begin", disk], capture_output=True, check=True).stdout
    assert begin == b"begin\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pvh_guest(tmp_path_factory.mktemp("small"))


VALUES = {
    "magic": 1,
    "modules": 1,
    "module": ord("m"),
    "module_size": 5000,
    "module_line": len("arguments of it"),
    "version": 0x40011,
    "extraversion": 0,
    "extra": 2,
    "features": 0,
    "submap": 0x30F,
    "bad_pointer": -errno.EFAULT,
    "bad_struct": -errno.EFAULT,
    "unknown": -errno.ENOSYS,
    "unknown_op": -errno.ENOSYS,
    "memory_map": 0,
    "entries": 5,
    "ram_mib": 16,
    "decrease": 1,
    "given_back": 0,
    "populate": 1,
    "store_port": 1,
    "set_store": -errno.EPERM,
    "shared_info": 0,
    "in_a_hole": 0,
    "alloc": 0,
    "bind": 0,
    "bound_pending": 1,
    "send": 0,
    "sent_pending": 1,
    "moved": 0,
    "moved_pending": 1,
    "send_back": 0,
    "old_page": 0,
    "store_state": 2,  # interdomain: the daemon has it
    "send_closed": -errno.EINVAL,
    "is_up": 1,
    "query": 0,
    "max_frames": 32,
    "version2": -errno.ENOSYS,
    "in_ram": 0,
    "console_flags": 1,
    "store_frame": 0xFEFFA,
    "setup": 0,
    "frame_there": 1,
    "copy": 0,
    "copy_status": 0,
    "copied": 42,
    "copy_bad": 0,
    "copy_bad_status": -3,  # GNTST_bad_gntref
    "above_ram": 0,
    "kept_flags": 1 | 1 << 2,
    "second_frame": 0,
    "past_table": -errno.EINVAL,
    "removed": 0,
    "hole": 0xFF,
    "multicall": 0,
    "multi_first": 4096,
    "multi_second": -errno.ENOSYS,
    "multi_nested": -errno.EINVAL,
}


def started(daemon: DaemonProcess, small: Path, folder: Path, end: str, *more: str, domid: int = 1) -> Micro:
    (folder / "module").write_bytes(b"m" * 5000)
    module = f"{folder / 'module'} arguments of it"
    arguments = ["--kernel", os.fspath(small), "--module", module, "--memory", "16M", "--append", end, *more]
    return Micro(daemon.vmm_socket, folder, *arguments, domid=domid)


def test_each_hypercall_answers_a_32_bit_guest(small: Path, images: Path) -> None:
    with DaemonProcess(images) as daemon, started(daemon, small, images, "off") as micro:
        assert micro.ended() == 0, micro.said
        said = micro.values()
        assert {name: said.get(name) for name in VALUES} == VALUES
        stats = micro.stats()
        assert stats["hypercalls"]["hypercall.44"] == 2
        assert stats["ended"] == "poweroff"
        assert micro.said.count("hypercall.44: is not there (ENOSYS)") == 1
        assert micro.said.count("xen_version.extraversion: bad pointer: address 0xd8000000") == 1
        assert daemon.call("list") == []


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        ("poweroff", 0, "domain 1 (g1): poweroff: by SCHEDOP_shutdown"),
        ("crash", 1, "domain 1 (g1): crash: by SCHEDOP_shutdown"),
        ("reset", 0, "domain 1 (g1): reboot: by the reset port"),
        ("keyboard", 0, "domain 1 (g1): reboot: by the keyboard controller"),
        ("triple", 1, "domain 1 (g1): crash: vCPU 0: triple fault"),
    ],
)
def test_each_way_to_end(end: str, status: int, line: str, small: Path, images: Path) -> None:
    with DaemonProcess(images) as daemon, started(daemon, small, images, end, "--reboot", "exit") as micro:
        assert micro.ended() == status, micro.said
        assert line in micro.said
        assert "\nend=" not in micro.said  # it has not come back
        until(lambda: daemon.call("list") == [], "the domain stays", patient(10))


def test_a_soft_reset_begins_anew_on_the_same_memory(small: Path, images: Path) -> None:
    with DaemonProcess(images) as daemon, started(daemon, small, images, "soft") as micro:
        assert micro.ended(60) == 0, micro.said
        assert micro.said.count("bound_pending=1") == 2, micro.said
        assert micro.said.count("store_frame=1044474") == 2, micro.said
        said = micro.values()
        for name in ("shutdown", "shared_info", "bind", "in_ram", "above_ram"):
            assert said[name] == 0, name
        text = daemon.text()
        assert text.count("registered by pid") == 2
        assert "released by its VMM (reason 5)" in text


def test_the_guest_outlives_its_daemon(small: Path, images: Path) -> None:
    disk = ext4(images)
    first = DaemonProcess(images)
    with started(first, small, images, "stay", "--disk", f"{disk},raw,xvda,rw") as micro:
        micro.wait_for("\nend=0", 60)
        first.end_at_once()
        micro.wait_for("the daemon has gone: waiting for it", 60)
        with DaemonProcess(images) as second:
            micro.wait_for("the daemon is back", 60)
            info = second.call("info", 1)
            assert info["name"] == "g1", info
            micro.process.send_signal(signal.SIGTERM)
            assert micro.ended() == 0, micro.said
            until(lambda: second.call("list") == [], "the domain stays", patient(10))


def test_statistics_while_it_runs(small: Path, images: Path) -> None:
    with DaemonProcess(images) as daemon, started(daemon, small, images, "stay") as micro:
        micro.wait_for("\nend=0", 60)
        micro.process.send_signal(signal.SIGUSR1)
        until(micro.stats_file.exists, "no statistics", patient(10))
        assert micro.stats()["ended"] is None
        assert micro.stats()["hypercalls"]["multicall"] == 1
        micro.process.send_signal(signal.SIGINT)
        assert micro.ended() == 0, micro.said
        assert "domain 1 (g1): poweroff: by SIGINT" in micro.said


def test_memory_is_mapped_before_the_guest_runs() -> None:
    """What KVM maps is there: pages of the memfd that nobody has touched."""
    with contextlib.ExitStack() as undo:
        machine = undo.enter_context(Machine())
        memory = Memory("ram", MiB, undo)
        machine.add_memory(0, 0, memory.size, memory.address)
        vcpu = machine.add_vcpu(0)
        vcpu.pre_fault(0x10000, 0x30000)
        assert os.fstat(memory.fd).st_blocks * 512 == 0x30000
        vcpu.pre_fault(2 * MiB, PAGE_SIZE)  # no memory there: it is a hint
        vcpu.pre_fault(0xFF000, 0x2000)
        assert os.fstat(memory.fd).st_blocks * 512 == 0x31000
