"""Guests for evtchnd-micro: trixie's own kernel with a script for its init, and a small one that makes hypercalls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from daemonprocess import until
from lab import initramfs
from lab.patience import patient

ROOT = Path(__file__).parent.parent.parent
PVH_GUEST = ROOT / "tests/c/pvhguest.c"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in /mods/*.ko; do insmod "$m" || echo "insmod $m failed"; done
n=0; while [ ! -b /dev/xvda ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n+1)); done
"""


def tree() -> Path:
    """trixie's, of which the lab is made."""
    return Path(os.environ["EVTCHND_LAB_TREE"])


def modules() -> Path:
    return max((tree() / "usr/lib/modules").iterdir())


def kernel() -> Path:
    return tree() / "boot" / f"vmlinuz-{modules().name}"


def linux_initrd(script: str) -> bytes:
    """busybox, blkfront, ext4, and what to do once /dev/xvda is there."""
    names = ["xen_blkfront", "ext4", "crc32c_generic"]
    return initramfs.build(tree() / "usr/bin/busybox", modules(), names, {"init": (INIT + script).encode()})


def pvh_guest(folder: Path) -> Path:
    """tests/c/pvhguest.c, compiled for 32-bit protected mode."""
    out = folder / "pvhguest"
    flags = ["-m32", "-ffreestanding", "-fno-pie", "-no-pie", "-fno-stack-protector", "-mno-sse", "-O1", "-Wall"]
    flags += ["-Werror", "-nostdlib", "-static", "-Wl,-Ttext-segment=0x200000,--build-id=none,-e,start"]
    subprocess.run(["gcc", *flags, "-o", out, PVH_GUEST], check=True)
    return out


class Evtchnd:
    """The daemon as it is started by hand, with the operator's socket that `--console` needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.vmm_socket = self.folder / "vmm.sock"
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "evtchnd", "--runtime-dir", self.folder], stderr=log, cwd=ROOT
            )
        until((self.folder / "control.sock").exists, "no daemon", patient(20))

    def list(self) -> Any:
        command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", self.folder, "-o", "json", "list"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait()


class Micro:
    """An evtchnd-micro in its own process. What it writes is in `said`; a context manager that ends with it ended."""

    def __init__(self, socket: Path, folder: Path, *args: str | Path, domid: int = 1) -> None:
        self.stats_file = folder / f"stats{domid}"
        command = [sys.executable, "-m", "evtchnd.vmm.micro", "--socket", socket, "--domid", str(domid)]
        command += ["--timeout", str(patient(10)), "--stats-json", self.stats_file, *args]
        self.process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        self._text = bytearray()
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._news:
                self._text += data
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def said(self) -> str:
        return self._text.decode(errors="replace").replace("\r", "")

    def wait_for(self, text: str, seconds: float = 20.0) -> None:
        """Until it has said that."""
        with self._news:
            there = self._news.wait_for(
                lambda: text in self.said or not self._reader.is_alive() or self.process.poll() is not None,
                patient(seconds),
            )
        assert there, f"'{text}' did not come:\n{self.said}"
        assert text in self.said, f"it ended without '{text}':\n{self.said}"

    def type(self, text: str) -> None:
        """At the guest's console (--console)."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def ended(self, seconds: float = 20.0) -> int:
        """Its exit status."""
        try:
            status = self.process.wait(patient(seconds))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.said}") from None
        self._reader.join(patient(10))
        return status

    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.stats_file.read_text())
        return told

    def values(self) -> dict[str, int]:
        """The last `name=value` of each name that the small guest has said."""
        pairs = (line.split("=") for line in self.said.splitlines() if line.count("=") == 1 and " " not in line)
        return {name: int(value) for name, value in pairs}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
