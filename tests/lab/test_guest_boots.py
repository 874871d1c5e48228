"""Kernels that evtchnd-micro does not start itself: from the guest's own disk by GRUB, and the next by kexec."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import guestimage, prepare
from lab.realguest import APPEND, VCPUS, RealGuest, Start

pytestmark = pytest.mark.timeout(120)
# one suite: each boot of these is most of a minute
NEWEST = guestimage.SUITES[:1]
GRUB = "usr/lib/grub-xen/grub-i386-xen_pvh.bin"
GRUB_CFG = f"""\
set timeout=0
menuentry Debian {{
    linux /boot/vmlinuz {APPEND}
    initrd /boot/initrd.img
}}
"""


def install(guest: RealGuest) -> None:
    """A kernel, and GRUB's menu, in the root file system."""
    mounted = guest.folder / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-o", "loop", guest.root, mounted], check=True)
    try:
        boot = mounted / "boot"
        (boot / "grub").mkdir(parents=True)
        (boot / "grub/grub.cfg").write_text(GRUB_CFG)
        (boot / "vmlinuz").write_bytes(guest.image.kernel.read_bytes())
        (boot / "initrd.img").write_bytes(guest.image.initramfs.read_bytes())
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.fixture(params=NEWEST)
def by_grub(request: pytest.FixtureRequest, images: Path) -> Iterator[RealGuest]:
    """A guest whose VMM has nothing but GRUB, and a disk."""
    found = RealGuest(request.param, images, start=Start(prepare.find().tree / GRUB), installed=install)
    yield found
    found.close()


def test_grub(by_grub: RealGuest) -> None:
    """A 32-bit boot loader with drivers of its own, and a 64-bit kernel behind it that has timers on both CPUs."""
    assert by_grub.run("uname -r") == by_grub.image.release
    assert by_grub.run("cat /proc/cmdline") == f"BOOT_IMAGE=/boot/vmlinuz {APPEND}"
    assert by_grub.run("nproc") == str(VCPUS)
    by_grub.run("taskset -c 0 sleep 0.1 && taskset -c 1 sleep 0.1")
    path = "/local/domain/1/device/vbd/51712"
    assert by_grub.xenstore("read", f"{path}/protocol") == "x86_64-abi"
    assert by_grub.xenstore("read", f"{path}/multi-queue-num-queues") == str(VCPUS)


@pytest.mark.parametrize("guests", NEWEST, indirect=True)
def test_kexec(guest: RealGuest) -> None:
    """The next kernel finds Xen as the first one did: a soft reset, and frontends that begin anew."""
    files, image = guest.folder / "files", guest.disk("boot", 128 << 20)
    files.mkdir()
    for name, file in (("vmlinuz", guest.image.kernel), ("initrd", guest.image.initramfs)):
        (files / name).write_bytes(file.read_bytes())
    guest.lab.mkfs(image, "-d", str(files))
    guest.attach("xvdc", image)
    guest.run("echo before >/root/kept; mkdir -p /tmp/boot; mount -o ro /dev/xvdc /tmp/boot")
    guest.run('kexec -s -l /tmp/boot/vmlinuz --initrd=/tmp/boot/initrd --append="$(cat /proc/cmdline) again"', 60)
    guest.run("umount /tmp/boot")
    assert guest.vmm is not None
    guest.vmm.console.send("mount -o remount,ro /; kexec -e")
    guest.comes_back()
    assert guest.run("cat /proc/cmdline").endswith(" again")
    assert guest.run("cat /root/kept; rm /root/kept") == "before"
    assert guest.run("nproc") == str(VCPUS)
    assert "soft reset" in guest.vmm.said()
