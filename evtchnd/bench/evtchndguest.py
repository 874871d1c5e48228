"""A real guest of evtchnd: the daemon, its worker, and evtchnd-micro as the VMM. Logs lie in the folder."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from evtchnd.bench.driven import Driven
from evtchnd.bench.qemuguest import Disk
from evtchnd.bench.served import Daemon
from evtchnd.cli.varlink import Client
from evtchnd.errors import HostError, OperatorError

DOMID = 1
END_S = 30.0
LOOK_S = 0.05


class EvtchndGuest:
    """Started at once, at a daemon that runs already."""

    side = "evtchnd"

    def __init__(
        self,
        daemon: Daemon,
        folder: Path,
        *,
        kernel: Path,
        initramfs: Path | None,
        append: str,
        disks: Sequence[Disk],
        vifs: Sequence[str] = (),
        memory_mib: int,
        vcpus: int = 1,
        domid: int = DOMID,
    ) -> None:
        """`vifs`: as `evtchnctl network-attach` takes them."""
        self.domid = domid
        self._daemon = daemon
        self._stats = folder / f"stats{domid}.json"
        self._stats.unlink(missing_ok=True)
        command = [sys.executable, "-m", "evtchnd.vmm.micro", "--socket", str(daemon.runtime / "vmm.sock")]
        command += ["--domid", str(domid), "--kernel", str(kernel), "--append", append]
        command += ["--initrd", str(initramfs)] if initramfs else []
        command += ["--memory", f"{memory_mib}M", "--vcpus", str(vcpus), "--stats-json", str(self._stats)]
        for disk in disks:
            access = "ro" if disk.readonly else "rw"
            command += ["--disk", f"format=raw,vdev={disk.vdev},access={access},target={disk.image}"]
        for vif in vifs:
            command += ["--vif", vif]
        self._log = folder / f"micro{domid}.log"
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._socket: socket.socket | None = None
        self._driven: Driven | None = None
        self._counted: dict[str, int] = {}

    def said(self) -> str:
        """The end of what evtchnd-micro has logged."""
        return self._log.read_text(errors="replace")[-500:]

    @property
    def console(self) -> Driven:
        """Takes commands once `booted` has returned."""
        if self._driven is None:
            raise HostError("the guest has not been waited for")
        return self._driven

    def pids(self) -> list[int]:
        """Whose CPU time is this side's: VMM, control plane and worker."""
        return [self._process.pid, self._daemon.pid, self._info()["worker"]["pid"]]

    def counters(self) -> dict[str, int]:
        """The disks' kicks, wake-ups of the worker for them, and notifications, since the last call."""
        disks = [device["counters"] for device in self._info()["devices"] if device["kind"] == "vbd"]
        counts = {name: sum(disk[name] for disk in disks) for name in ("kicks", "wakeups", "notifications")}
        gained = {name: count - self._counted.get(name, 0) for name, count in counts.items()}
        self._counted = counts
        return gained

    def _info(self) -> Any:
        with Client(self._daemon.runtime / "control.sock") as client:
            return client.call("io.evtchnd.Info", domid=self.domid)

    def booted(self, seconds: float) -> float:
        """Seconds from the start of the VMM to the first line of the guest's init. HostError with what it said."""
        try:
            self._connect(seconds)
            self.console.wait(r"@@ init .*", seconds)
            took = time.monotonic() - self._began
            self.console.wait(r"@@ ready .*", seconds)
        except HostError as exc:
            raise HostError(f"evtchnd-micro: {exc}; its log ends with {self.said()!r}") from None
        return took

    def rebooted(self, seconds: float) -> None:
        """Waits for the guest that its VMM starts again; it is another domain, and another console. HostError."""
        self.console.ends(seconds)
        if self._socket is not None:
            self._socket.close()
        self.booted(seconds)

    def rejoined(self, seconds: float) -> None:
        """Connects to the console anew: the worker that served it has gone, the guest has not. HostError."""
        if self._socket is not None:
            self._socket.close()
        self._connect(seconds)
        # what the console has said before comes again
        mark = f"@@ again {time.monotonic_ns()}"
        self.console.send(f"echo {mark}")
        self.console.wait(mark, seconds)
        self.console.status(seconds)

    def _connect(self, seconds: float) -> None:
        """To the console, as soon as the domain is there."""
        end = time.monotonic() + seconds
        while True:
            try:
                with Client(self._daemon.runtime / "control.sock") as client:
                    self._socket, first = client.upgrade("io.evtchnd.Console", domid=self.domid, devid=0)
                break
            except OperatorError as exc:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise HostError(f"no console: {exc}") from None
            time.sleep(LOOK_S)
        self._driven = Driven(self._socket.fileno(), self._socket.fileno(), first)

    @property
    def alive(self) -> bool:
        """Whether the VMM still runs."""
        return self._process.poll() is None

    def ended(self, seconds: float) -> int:
        """The VMM's exit status, once the guest has ended. HostError."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise HostError(f"the guest has not ended within {seconds:.0f} s") from None

    def stats(self, seconds: float) -> dict[str, Any]:
        """What evtchnd-micro --stats-json tells, by now. HostError."""
        end = time.monotonic() + seconds
        self._stats.unlink(missing_ok=True)
        self._process.send_signal(signal.SIGUSR1)
        while not self._stats.exists():
            if not self.alive or time.monotonic() > end:
                raise HostError(f"evtchnd-micro told nothing; its log ends with {self.said()!r}")
            time.sleep(LOOK_S)
        found: dict[str, Any] = json.loads(self._stats.read_text())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The guest is powered off, if it still runs and listens."""
        with contextlib.suppress(HostError, OSError, subprocess.TimeoutExpired):
            if self.alive and not self.console.over:
                self.console.send("sync; poweroff -f")
                self._process.wait(END_S)
        self._process.kill()
        self._process.wait()
        if self._socket is not None:
            self._socket.close()
