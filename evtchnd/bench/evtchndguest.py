"""A real guest of evtchnd: the daemon, its worker, and evtchnd-micro as the VMM. Logs lie in the folder."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from evtchnd.bench.driven import Driven
from evtchnd.bench.qemuguest import Disk
from evtchnd.bench.served import Daemon
from evtchnd.errors import HostError

DOMID = 1
END_S = 30.0


class EvtchndGuest:
    """Started at once, at a daemon that runs already; `console` takes commands when `booted` has returned."""

    side = "evtchnd"

    def __init__(
        self,
        daemon: Daemon,
        folder: Path,
        *,
        kernel: Path,
        initramfs: Path,
        append: str,
        disks: Sequence[Disk],
        memory_mib: int,
        vcpus: int = 1,
    ) -> None:
        self._daemon = daemon
        self._stats = folder / "stats.json"
        self._stats.unlink(missing_ok=True)
        command = [sys.executable, "-m", "evtchnd.vmm.micro", "--socket", str(daemon.runtime / "vmm.sock")]
        command += ["--domid", str(DOMID), "--kernel", str(kernel), "--initrd", str(initramfs), "--append", append]
        command += ["--memory", f"{memory_mib}M", "--vcpus", str(vcpus), "--console", "--stats-json", str(self._stats)]
        for disk in disks:
            access = "ro" if disk.readonly else "rw"
            command += ["--disk", f"format=raw,vdev={disk.vdev},access={access},target={disk.image}"]
        self._log = folder / "micro.log"
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdin is not None and self._process.stdout is not None
        self.console = Driven(self._process.stdout.fileno(), self._process.stdin.fileno())

    def pids(self) -> list[int]:
        """Whose CPU time is this side's: VMM, control plane and worker."""
        return [self._process.pid, self._daemon.pid, self._daemon.ctl("info", str(DOMID))["worker"]["pid"]]

    def booted(self, seconds: float) -> float:
        """Seconds from the start of the VMM to the first line of the guest's init. HostError with what it said."""
        try:
            self.console.wait(r"@@ init .*", seconds)
            took = time.monotonic() - self._began
            self.console.wait(r"@@ ready .*", seconds)
        except HostError as exc:
            raise HostError(f"evtchnd-micro: {exc}; its log ends with {self._log.read_text()[-500:]!r}") from None
        return took

    def exits(self) -> dict[str, Any]:
        """Exits of the vCPUs by reason; once the guest has ended."""
        found: dict[str, Any] = json.loads(self._stats.read_text()) if self._stats.exists() else {}
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
