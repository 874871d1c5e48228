"""The lab itself: KVM has everything, and evtchnd's daemon and worker serve a domain from its ext4 disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import emulator, prepare
from lab.machine import EVERYTHING, xen_capability
from lab.patience import patient


def file_system(path: Path) -> str:
    """Type of the file system that `path` lies on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return max((m for m in mounts if path.is_relative_to(m[1])), key=lambda m: len(m[1]))[2]


def test_kvm_has_every_xen_call() -> None:
    assert xen_capability() & EVERYTHING == EVERYTHING


def test_the_emulators_fault_is_mended() -> None:
    """Debian has another QEMU where this fails: emulator.py does not know its helper_vmrun."""
    lab = prepare.find()
    program = (lab.tree / "usr/bin/qemu-system-x86_64").read_bytes()
    assert lab.qemu.read_bytes() == emulator.mended(program)


def test_images_lie_on_a_real_file_system(images: Path) -> None:
    assert file_system(images) not in ("tmpfs", "overlay", "9p")


@pytest.mark.timeout(240)
def test_daemon_and_worker_serve_a_disk(images: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evtchnd.demo", "--dir", str(images)],
        capture_output=True,
        text=True,
        timeout=patient(200),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything is equal" in done.stdout


def test_descriptors_for_thousands_of_channels() -> None:
    import resource

    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 16384, os.uname()
