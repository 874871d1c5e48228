"""`evtchnd --keep` in its own process: a daemon that is killed, and comes back with what was kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evtchnd.cli.process import evtchnctl

ROOT = Path(__file__).parent.parent


class KeptDaemon:
    """A context manager; ends with the daemon ended in order, and its log looked at."""

    def __init__(self, folder: Path, config: str = "") -> None:
        self.folder = folder
        self.vmm_socket = folder / "vmm.sock"
        self.log = folder / "log"
        (folder / "evtchnd.toml").write_text(config)
        # compiled once a run: each start takes half as long then
        compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled")}
        compiled.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "evtchnd", "--keep", "--config", str(folder / "evtchnd.toml")]
        with self.log.open("wb") as log:
            self.keeper = subprocess.Popen(
                [*command, "--runtime-dir", str(folder)],
                stderr=log,
                cwd=ROOT,
                env=compiled,
            )
        self.wait(1)

    def served(self) -> int:
        """How often a daemon has been ready."""
        return self.text().count(" serves in ")

    def wait(self, served: int) -> None:
        """Until so many daemons were ready."""
        until(lambda: self.served() >= served, f"the daemon does not start:\n{self.text()}")

    @property
    def pid(self) -> int:
        """The daemon's, 0 while there is none."""
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the daemon; the keeper starts the next one at once."""
        with contextlib.suppress(ProcessLookupError):
            if pid := self.pid:
                os.kill(pid, number)

    def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends the daemon, waits until the next one serves."""
        before = self.served()
        self.kill(number)
        self.wait(before + 1)

    def held(self) -> list[str]:
        """What the keeper holds: where its descriptors lead."""
        folder = Path(f"/proc/{self.keeper.pid}/fd")
        return sorted(str((folder / name).readlink()) for name in os.listdir(folder))

    def state_of(self, domid: int) -> int:
        """The memfd that the keeper holds of a domain, opened; the caller's."""
        folder = Path(f"/proc/{self.keeper.pid}/fd")
        for name in os.listdir(folder):
            if f"memfd:evtchnd-{domid} " in str((folder / name).readlink()):
                return os.open(folder / name, os.O_RDWR)
        raise FileNotFoundError(f"no state of domain {domid}")

    def ctl(self, *arguments: str) -> Any:
        """`evtchnctl -o json`. HostError with what it says."""
        return evtchnctl(self.folder, *arguments)

    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        self.keeper.send_signal(signal.SIGCONT)
        self.keeper.send_signal(signal.SIGTERM)
        self.keeper.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if kind is not None:
            print(self.text())
        else:
            assert self.keeper.returncode == 0, self.text()
            assert "defect" not in self.text(), self.text()
            assert "Traceback" not in self.text(), self.text()


def until(true: Callable[[], object], what: str = "in time", seconds: float = 30.0) -> None:
    """Waits for a condition; no test depends on how long it takes."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
