"""A real guest as the lab's tests have it: daemon, evtchnd-micro, a console that takes commands, Xen's own tools."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench.evtchndguest import DOMID, EvtchndGuest
from evtchnd.bench.qemuguest import Disk
from evtchnd.bench.served import Daemon
from evtchnd.cli.varlink import Client
from evtchnd.errors import HostError
from lab import guestimage, prepare
from lab.patience import patient

MIB = 1 << 20
VCPUS = 2
# what blkfront takes by itself is less: 32 segments a request, a ring of one page
APPEND = (
    "console=hvc0 quiet root=/dev/xvda driven "
    "xen_blkfront.max_indirect_segments=256 xen_blkfront.max_ring_page_order=4 xen_blkfront.max_queues=4"
)


@dataclass(frozen=True)
class Start:
    kernel: Path
    append: str = ""
    initramfs: Path | None = None


class RealGuest:
    """Booted. xvda is its root file system, xvdb 256 MiB that are nobody's; both images lie in `folder`.

    `start`: what the VMM starts instead of the guest's own kernel and initramfs; `installed` gets the root file system
    before the first boot.
    """

    def __init__(
        self,
        suite: str,
        folder: Path,
        *,
        start: Start | None = None,
        installed: Callable[[RealGuest], None] = lambda guest: None,
    ) -> None:
        self.lab = prepare.find()
        self.image = guestimage.find(self.lab, suite)
        self.folder = folder
        self.root, self.data = folder / "xvda", self.disk("xvdb", 256 * MIB)
        subprocess.run(["cp", "--sparse=always", self.image.root, self.root], check=True)
        self._start = start or Start(self.image.kernel, APPEND, self.image.initramfs)
        installed(self)
        # tests kill workers one after the other: no long pauses
        pauses = "restart_pause_max_s = 0.5\nworker_deaths = 1000\n"
        self.daemon = Daemon(folder, f"[limits]\ndetach_s = {patient(10)}\n{pauses}")
        self.vmm: EvtchndGuest | None = None
        try:
            self.boot()
        except BaseException:
            self.close()
            raise

    def boot(self) -> None:
        self.vmm = EvtchndGuest(
            self.daemon,
            self.folder,
            kernel=self._start.kernel,
            initramfs=self._start.initramfs,
            append=self._start.append,
            disks=[Disk("xvda", self.root), Disk("xvdb", self.data)],
            memory_mib=512,
            vcpus=VCPUS,
        )
        self.vmm.booted(patient(30))
        self.run("set -o pipefail")

    @property
    def alive(self) -> bool:
        """Whether it can be used on: it runs, and has not begun anew without being asked."""
        return self.vmm is not None and self.vmm.alive and not self.vmm.console.over

    def close(self) -> None:
        if self.vmm is not None:
            self.vmm.close()
            self.vmm = None
        self.daemon.stop()

    def comes_back(self) -> None:
        """After a reboot: the same VMM, console and daemon."""
        assert self.vmm is not None
        self.vmm.rebooted(patient(60))
        self.run("set -o pipefail")

    def ended(self) -> int:
        """The VMM's exit status, once the guest has powered off."""
        assert self.vmm is not None
        return self.vmm.ended(patient(30))

    def check_root(self) -> subprocess.CompletedProcess[str]:
        """e2fsck of the root file system, which nobody uses any more; nothing is repaired."""
        command = self.lab.program("usr/sbin/e2fsck", "-fn", str(self.root))
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def run(self, command: str, seconds: float = 10) -> str:
        """What a command prints in the guest; HostError where it fails, or takes longer than `seconds` of a host."""
        assert self.vmm is not None
        try:
            return self.vmm.console.run(command, patient(seconds)).strip()
        except (HostError, OSError) as error:  # the console's other end has gone
            raise HostError(f"{error}; evtchnd-micro's log ends with {self.vmm.said()!r}") from None

    def fails(self, command: str, seconds: float = 10) -> str:
        """The same for a command that has to fail."""
        return self.run(f"! {{ {command}; }} 2>&1", seconds)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call of the operator's socket about this guest. OperatorError."""
        with Client(self.daemon.runtime / "control.sock", timeout=patient(30)) as client:
            return client.call(f"io.evtchnd.{method}", domid=DOMID, **parameters)

    def domains(self) -> list[dict[str, Any]]:
        """All that the daemon has."""
        with Client(self.daemon.runtime / "control.sock", timeout=patient(30)) as client:
            found: list[dict[str, Any]] = client.call("io.evtchnd.List")["domains"]
        return found

    def device(self, vdev: str) -> dict[str, Any]:
        """What the daemon says of one disk."""
        found: dict[str, Any] = next(d for d in self.call("Info")["devices"] if d["vdev"] == vdev)
        return found

    def xenstore(self, tool: str, *arguments: str) -> str:
        """One of Debian's xenstore-utils on the host, as domain 0."""
        done = subprocess.run(
            self.lab.program(f"usr/bin/xenstore-{tool}", *arguments),
            env=os.environ | {"XENSTORED_PATH": str(self.daemon.runtime / "xenstored.sock")},
            capture_output=True,
            text=True,
            timeout=patient(10),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def disk(self, name: str, size: int) -> Path:
        """A new image, a hole from its begin to its end."""
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def attach(self, vdev: str, image: Path, *more: str) -> None:
        """Returns once the guest has the disk."""
        self.call("BlockAttach", disk=",".join(["format=raw", f"vdev={vdev}", *more, f"target={image}"]))
        self.appears(vdev)

    def detach(self, vdev: str, *, force: bool = False) -> None:
        self.call("BlockDetach", device=vdev, force=force)

    def appears(self, vdev: str) -> None:
        size = f"$(cat /sys/block/{vdev}/size 2>/dev/null || echo 0)"
        self.run(f'for i in $(seq 200); do [ "{size}" != 0 ] && break; sleep 0.1; done; [ "{size}" != 0 ]', 30)

    def vanishes(self, vdev: str) -> None:
        self.run(f"for i in $(seq 200); do [ -b /dev/{vdev} ] || break; sleep 0.1; done; [ ! -b /dev/{vdev} ]", 30)

    def hypercalls(self) -> dict[str, int]:
        """Those that have left the guest for the VMM so far, by name."""
        assert self.vmm is not None
        counts: dict[str, int] = self.vmm.stats(patient(10))["hypercalls"]
        return counts

    def interrupts(self) -> dict[str, int]:
        """/proc/interrupts: what an interrupt is (`xen-percpu -virq timer0`) -> how often, on all CPUs."""
        counts: dict[str, int] = {}
        for line in self.run("cat /proc/interrupts").splitlines()[1:]:
            words = line.split()
            what = " ".join(words[1 + VCPUS :])
            counts[what] = counts.get(what, 0) + sum(int(word) for word in words[1 : 1 + VCPUS] if word.isdigit())
        return counts


def until(what: Callable[[], bool], seconds: float = 10) -> None:
    """Waits until it is so."""
    end = time.monotonic() + patient(seconds)
    while not what():
        assert time.monotonic() < end, f"not so within {patient(seconds):.0f} s"
        time.sleep(0.05)
