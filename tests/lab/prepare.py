"""Makes the lab from Debian packages, into a cache outside the tree; what is there already is used again.

    ${EVTCHND_LAB:-${XDG_CACHE_HOME:-~/.cache}/evtchnd/lab}/
        tree-KEY/       trixie by debootstrap (0.9 GB, one or two minutes, root), KEY from what it is made of
        boot-KEY/       its kernel, an initramfs, its QEMU (emulator.py)
        python-KEY/     wheels for trixie's Python, unpacked (what of it pip can find)
        guest-*-KEY/    real guests (guestimage.py)
        consoles/       of boots that died

Whatever Debian the host is: its own QEMU may be too old (7.2 with thread=multi dies in the kernel's code patching), and
its kernel may not have CONFIG_KVM_XEN (bookworm's has not).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lab import debian, emulator, guestimage, initramfs
from lab.machine import HERE, Lab, LabMissing

SUITE = "trixie"
PACKAGES = [
    "busybox-static",
    "e2fsprogs",
    "ethtool",
    "fio",
    "grub-xen-host",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kexec-tools",
    "kmod",
    "libatomic1",
    "linux-image-amd64",
    "python3",
    "python3-venv",
    "qemu-system-x86",
    "xenstore-utils",
]
MODULES = ["9p", "9pnet_virtio", "overlay", "crc32c_generic", "ext4", "virtio_blk", "virtio_pci", "kvm_amd"]
MODULES += ["bridge", "loop", "tun", "veth"]
SCRIPTS = ["init", "start"]
PYTHON = "3.13"
# What the tests that run on trixie's Python import.
WHEELS = ["hypothesis", "msgspec", "pytest>=9", "pytest-asyncio", "pytest-timeout", "uvloop"]


def cache() -> Path:
    """Where the lab lies."""
    if own := os.environ.get("EVTCHND_LAB"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evtchnd" / "lab"


def tree_of(folder: Path) -> Path:
    return folder / f"tree-{debian.key(SUITE, PACKAGES)}"


def packages_of(folder: Path) -> Path:
    """A sys.path entry for trixie's Python; absent where pip found no wheels."""
    return folder / f"python-{debian.key(PYTHON, WHEELS)}"


def find() -> Lab:
    """The lab, as it was prepared; LabMissing. Makes the initramfs when only that is not there."""
    folder = cache()
    tree = tree_of(folder)
    if not tree.is_dir():
        raise LabMissing(f"the lab is not prepared in {folder}: make lab")
    modules = debian.modules_of(tree)
    scripts = {name: (HERE / name).read_bytes() for name in SCRIPTS}
    makers = [Path(maker.__file__).read_bytes() for maker in (initramfs, emulator)]
    boot = folder / f"boot-{debian.key(tree.name, modules.name, MODULES, scripts, makers)}"
    if not boot.is_dir():
        part = boot.with_name(f"{boot.name}.part-{os.getpid()}")
        part.mkdir()
        (part / "initramfs").write_bytes(initramfs.build(tree / "usr/bin/busybox", modules, MODULES, scripts))
        shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", part / "vmlinuz")
        _copy_qemu(tree / "usr/bin/qemu-system-x86_64", part / "qemu")
        try:
            part.rename(boot)
        except OSError:  # somebody else was quicker
            shutil.rmtree(part)
    return Lab(folder, tree, boot / "vmlinuz", boot / "initramfs", boot / "qemu")


def _copy_qemu(source: Path, target: Path) -> None:
    program = source.read_bytes()
    mended = emulator.mended(program)
    if mended is None:
        debian.say("this QEMU's helper_vmrun is unknown (tests/lab/emulator.py): guests with two CPUs may hang")
    target.write_bytes(mended or program)
    target.chmod(0o755)


def prepare() -> Lab:
    """The lab, made if it is not there. LabMissing says in one line what is missing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise LabMissing(f"the lab wants Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    lab = _made()
    for suite in guestimage.SUITES:
        guestimage.find(lab, suite)  # its initramfs, so that the lab finds it made
    return lab


def _made() -> Lab:
    folder = cache()
    if tree_of(folder).is_dir() and packages_of(folder).is_dir() and not guestimage.missing(find()):
        return find()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not tree_of(folder).is_dir():
                _make_tree(folder)
            lab = find()
            if not packages_of(folder).is_dir():
                _make_packages(folder)
            for suite in guestimage.missing(lab):
                guestimage.make(lab, suite, SUITE)
    except OSError as exc:
        raise LabMissing(f"the lab cannot be made: {exc}") from exc
    return lab


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One preparation at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_tree(folder: Path) -> None:
    tree = tree_of(folder)
    part = tree.with_name(f"{tree.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    debian.say(f"debootstrap of Debian {SUITE} into {tree} (about two minutes)")
    debian.debootstrap(folder, SUITE, PACKAGES, part)
    part.rename(tree)


def _make_packages(folder: Path) -> None:
    """Optional: without it the tests on trixie's Python are skipped."""
    target = packages_of(folder)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"--target={part}"]
    command += [f"--python-version={PYTHON}", "--implementation=cp", "--only-binary=:all:", *platforms, *WHEELS]
    try:
        debian.run(folder, *command)
        part.rename(target)
    except LabMissing as exc:
        debian.say(f"no packages for Python {PYTHON}, its tests are skipped: {exc}")
