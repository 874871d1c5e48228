"""How long guests wait when the daemon is killed: soft guests under a checked load, `evtchnd --keep` and SIGKILL.

A guest's pause is the longest time in which none of its requests was answered; each has one in flight when the daemon
is killed. Guests are spread over a few processes, each with its own VMMs: this one only kills and waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evtchnd.cli.process import evtchnctl
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.checkedload import BLOCK, CheckedLoad
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import MiB, SoftVmm

DEVID, BLOCKS = 51712, 64
# Requests a second of all guests together: the load is there and checked, and does not take the processors that those
# who come later need to come back.
_RATE = 500
_START_S = 120.0
_PROCESSES = 4


def restarts(domains: int, rounds: int, *, seed: int = 0) -> dict[str, float]:
    """Kills the daemon of `domains` guests `rounds` times.

    Returns "restart_ms_p50", "restart_ms_p99", "restart_ms_max" (of all guests and rounds), "requests", and
    "bad_blocks", whose content is not what the guest was told. HostError: a guest was not served any more.
    """
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-restarts-")))
        keeper = stack.enter_context(_kept(folder))
        shares = [list(range(1 + n, domains + 1, _PROCESSES)) for n in range(min(_PROCESSES, domains))]
        guests = [stack.enter_context(_Guests(folder, domains / _RATE, share)) for share in shares]
        for each in guests:
            each.wait()
        for _ in range(rounds):
            time.sleep(0.2 + rng.random() / 10)
            for each in guests:
                each.ask("mark")
            os.kill(_daemon(keeper.pid), signal.SIGKILL)
            for each in guests:
                each.ask("served")
        done = [each.ask("end") for each in guests]
    pauses = sorted(pause for each in done for pause in each["pauses"])
    return {
        "restart_ms_p50": _quantile(pauses, 0.5),
        "restart_ms_p99": _quantile(pauses, 0.99),
        "restart_ms_max": _quantile(pauses, 1.0),
        "requests": sum(each["requests"] for each in done),
        "bad_blocks": sum(each["bad_blocks"] for each in done),
    }


def _quantile(seconds: list[float], part: float) -> float:
    return round(1000 * seconds[min(len(seconds) - 1, int(part * len(seconds)))], 1)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "evtchnd", "--keep", "--runtime-dir", str(folder)]
    (folder / "evtchnd.toml").write_text("")
    # compiled once, as in an installation, whatever the environment says
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with (folder / "log").open("wb") as log:
        keeper = subprocess.Popen([*command, "--config", str(folder / "evtchnd.toml")], stderr=log, env=environment)
    try:
        until = time.monotonic() + _START_S
        while not (folder / "control.sock").exists():
            if keeper.poll() is not None or time.monotonic() > until:
                raise HostError(f"the daemon did not start: {(folder / 'log').read_text().strip()}")
            time.sleep(0.01)
        yield keeper
    except BaseException:
        shutil.copy(folder / "log", Path(tempfile.gettempdir()) / "evtchnd-restarts.log")
        raise
    finally:
        keeper.terminate()
        keeper.wait()


def _daemon(keeper: int) -> int:
    """The process that the keeper has started."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


class _Guests:
    """Some guests in a process of their own. A context manager."""

    def __init__(self, folder: Path, think_s: float, domids: list[int]) -> None:
        command = [sys.executable, "-m", "evtchnd.bench.restarts", str(folder), str(think_s), *map(str, domids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> dict[str, Any]:
        """For what it has to say. HostError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HostError("a process of guests has ended: what it said is above")
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, what: str) -> dict[str, Any]:
        """As `wait`, after a line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.wait()

    def __enter__(self) -> _Guests:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Guest:
    def __init__(self, folder: Path, domid: int, think_s: float) -> None:
        self.path = folder / f"{domid}.img"
        self.path.write_bytes(bytes(BLOCKS * BLOCK))
        self.vm = SoftVmm(folder / "vmm.sock", domid, memory=16 * MiB, come_back=True)
        domain = Domain(self.vm)
        evtchnctl(folder, "block-attach", str(domid), f"{self.path},raw,xvda,w")
        self.front = Blkfront(domain, XenStore(domain), DEVID, depth=1, spin_us=0)
        self.front.connect()
        self.load = CheckedLoad(self.front, BLOCKS, depth=1, seed=domid, think_s=think_s)
        self.load.start()
        self.pauses: list[float] = []
        self._resumed = 0
        self._answered = 0

    def mark(self) -> None:
        self.load.mark()
        self.load.hurry()
        self._resumed, self._answered = self.vm.resumed, 0

    def served(self) -> bool:
        """Whether it was resumed and is answered again; notes its pause then."""
        if self.load.failed is not None:
            raise self.load.failed
        if not self._answered and self.vm.resumed > self._resumed:
            self._answered = self.load.answered + 1
        if not self._answered or self.load.answered <= self._answered:
            return False
        self.load.mark()
        self.pauses.append(self.load.pauses[-1])
        return True


def _say(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


def _main(folder: Path, think_s: float, domids: list[int]) -> None:
    """One process of guests; it is told what to do by lines."""
    guests = [_Guest(folder, domid, think_s) for domid in domids]
    _say({})
    for line in sys.stdin:
        match line.strip():
            case "mark":
                for guest in guests:
                    guest.mark()
                _say({})
            case "served":
                until, waiting = time.monotonic() + _START_S, list(guests)
                while waiting := [guest for guest in waiting if not guest.served()]:
                    if time.monotonic() > until:
                        raise HostError(f"{len(waiting)} guests are not served any more")
                    time.sleep(0.01)
                _say({})
            case "end":
                bad = 0
                for guest in guests:
                    guest.load.stop()
                    guest.front.flush()
                    is_, told = guest.path.read_bytes(), guest.load.image()
                    bad += sum(is_[at : at + BLOCK] != told[at : at + BLOCK] for at in range(0, len(told), BLOCK))
                pauses = [pause for guest in guests for pause in guest.pauses]
                _say({"pauses": pauses, "requests": sum(guest.load.answered for guest in guests), "bad_blocks": bad})


if __name__ == "__main__":
    _main(Path(sys.argv[1]), float(sys.argv[2]), [int(each) for each in sys.argv[3:]])
