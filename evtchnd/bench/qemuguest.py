"""A real guest of QEMU's own Xen backends (xen-disk, xen-console, xen-net-device), on KVM's Xen support: our peer.

At its best: an I/O thread, io_uring, interrupts in the kernel but for the IOAPIC (Xen's channels want that split). Its
disk has neither indirect segments nor persistent grants; its network device has no scatter-gather, no segmentation and
one queue, and moves packets in QEMU's main loop. What it says goes to `qemu.log` of the folder.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evtchnd.bench.driven import Driven
from evtchnd.errors import HostError

XEN = "kvm,xen-version=0x40011,kernel-irqchip=split"
# It ends by a signal of its own at a guest's power off (10.0: SIGSEGV), which harms nothing.
END_S = 30.0


@dataclass(frozen=True)
class Disk:
    """A raw image as the guest's xvd*, through the host's page cache or around it."""

    vdev: str
    image: Path
    readonly: bool = False
    direct: bool = False


@dataclass(frozen=True)
class Nic:
    """A TAP that is there, in the network namespace `netns` (`ip netns`; "": this one), as the guest's eth0."""

    tap: str
    mac: str
    netns: str = ""


class QemuGuest:
    """Started at once; `console` takes commands when `booted` has returned."""

    side = "qemu"

    def __init__(
        self,
        qemu: Sequence[str],
        folder: Path,
        *,
        kernel: Path,
        initramfs: Path,
        append: str,
        disks: Sequence[Disk],
        nics: Sequence[Nic] = (),
        memory_mib: int,
        vcpus: int = 1,
        poll_us: int = 32,
    ) -> None:
        # `ip netns exec` becomes what it runs: the same process
        place = next((["ip", "netns", "exec", nic.netns] for nic in nics if nic.netns), [])
        command = [
            *place,
            *qemu,
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-M",
            "pc",
            "-accel",
            XEN,
            "-cpu",
            "host",
        ]
        command += ["-smp", str(vcpus), "-m", str(memory_mib)]
        command += ["-object", f"iothread,id=io,poll-max-ns={poll_us * 1000}"]
        command += ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", append]
        command += ["-chardev", "stdio,id=console,signal=off", "-device", "xen-console,chardev=console"]
        for disk in disks:
            flags = f"read-only={_switch(disk.readonly)},cache.direct={_switch(disk.direct)}"
            file = f"file.driver=file,file.aio=io_uring,file.locking=off,file.filename={disk.image}"
            file += f",file.cache.direct={_switch(disk.direct)}"
            command += ["-blockdev", f"driver=raw,node-name={disk.vdev},{flags},{file}"]
            command += ["-device", f"xen-disk,drive={disk.vdev},vdev={disk.vdev},iothread=io"]
        for number, nic in enumerate(nics):
            # it has no use for a vnet header, and would skip one in each packet
            tap = f"tap,id=net{number},ifname={nic.tap},script=no,downscript=no,vnet_hdr=off"
            command += ["-netdev", tap, "-device", f"xen-net-device,netdev=net{number},mac={nic.mac}"]
        self._log = folder / "qemu.log"
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdin is not None and self._process.stdout is not None
        self.console = Driven(self._process.stdout.fileno(), self._process.stdin.fileno())

    def said(self) -> str:
        """The end of what QEMU has logged."""
        return self._log.read_text(errors="replace")[-500:]

    def pids(self) -> list[int]:
        """Whose CPU time is this side's: all of QEMU is one process."""
        return [self._process.pid]

    def counters(self) -> dict[str, int]:
        """QEMU counts no events."""
        return {}

    def booted(self, seconds: float) -> float:
        """Seconds from the start of QEMU to the first line of the guest's init. HostError with what it said."""
        try:
            self.console.wait(r"@@ init .*", seconds)
            took = time.monotonic() - self._began
            self.console.wait(r"@@ ready .*", seconds)
        except HostError as exc:
            raise HostError(f"QEMU: {exc}; its log ends with {self.said()!r}") from None
        return took

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The guest is powered off, if it still runs."""
        with contextlib.suppress(HostError, OSError):
            self.console.send("sync; poweroff -f")
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _switch(on: bool) -> str:
    return "on" if on else "off"
