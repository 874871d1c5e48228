"""What a hostile guest costs its neighbour: the neighbour's load beside one that computes, and attacked, turn by turn.

The neighbour's guest (this process) and its worker share a CPU, the attacker and its worker another, and the control
plane is free to go where there is room: what is shared is the control plane, XenStore, the kernel and its memory, which
is what an attack could reach through. Where there is but one CPU, the scheduler's share is measured, too.

"Alone" is beside a guest that keeps its own CPU busy and does nothing else: two CPUs are often two threads of one core,
and beside an idle one the neighbour would be faster by what no daemon can give it.

The load is of the data plane: 4 KiB reads and writes at depth 4, every answer compared. Beside it the neighbour asks
XenStore one thing after another, in readings of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.attacker import disks
from evtchnd.bench.attacks import CASES
from evtchnd.bench.report import median
from evtchnd.bench.served import DEVID, DOMID, Daemon, soft_guest
from evtchnd.blkif import SECTORS_PER_PAGE, Status
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.xenstore import XenStore

ATTACKER = 9
# Of the storm: 16 disks of 7 queues, 112 ports besides XenStore's and the console's.
DISKS, QUEUES = 16, 7
PAGES = 1024
STORE_READS = 200
WARM_S = 0.3
END_S = 60.0
# Not isolated: beyond one of these (issue's own limits, for the data plane).
MOST_P99, LEAST_RATE = 2.0, 0.9


@dataclass(frozen=True)
class Reading:
    """Of one leg: requests a second, 99th percentile of a request and of a XenStore read in microseconds."""

    rate: float
    p99_us: float
    store_p99_us: float


def run(
    *, pairs: int = 3, seconds: float = 1.0, seed: int = 1, cases: Sequence[str] = (), folder: str = "/var/tmp"
) -> dict[str, float]:
    """Readings by name: `cases`, `not_isolated`, `neighbour_p99_over_alone` (the worst case's median over `pairs`),
    `neighbour_rate_over_alone` (the least), `neighbour_xenstore_p99_over_alone`, `leaks_fds`,
    `leaks_rss_over_baseline`; and for each case `CASE.p99_over_alone`, `CASE.rate_over_alone`,
    `CASE.xenstore_p99_over_alone`, `CASE.rounds`.

    pairs: of readings, `seconds` each leg. cases: names; none: all of attacks.CASES. HostError: something that should
    have worked has not (an answer that is wrong, an attacker that died).
    """
    chosen = [case.name for case in CASES if not cases or case.name in cases]
    readings: dict[str, float] = {"cases": len(chosen), "not_isolated": 0}
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-", dir=folder)))
        image = path / "neighbour.img"
        dice = random.Random(seed)
        content = bytearray(dice.randbytes(PAGES * PAGE_SIZE))
        image.write_bytes(content)
        config = f"[vbd]\nmax_queues = {QUEUES}\nmax_ring_page_order = 0\n"
        config += f"[[domains]]\ndomid = {ATTACKER}\ndisks = {disks(path, DISKS)!r}\n"
        daemon, _, domain, store = stack.enter_context(soft_guest(path, config))
        daemon.ctl("block-attach", str(DOMID), f"format=raw,vdev=xvda,target={image}")
        disk = Blkfront(domain, store, DEVID, depth=4, spin_us=0)
        disk.connect()
        stack.callback(disk.disconnect)
        worker: int = daemon.ctl("info", str(DOMID))["worker"]["pid"]
        stack.enter_context(_own_cpu(worker, daemon.pid))
        load = Load(disk, store, content, dice)
        for name in chosen:  # what is there once and for all is there now
            with Attack(daemon.runtime, name) as attack:
                attack.go(on=True)
                load.leg(WARM_S)
                attack.go(on=False)
        _settle(daemon)
        held = [_held(pid) for pid in (daemon.pid, worker)]
        for name in chosen:
            alone: list[Reading] = []
            attacked: list[Reading] = []
            with Attack(daemon.runtime, name) as attack:
                for number in range(pairs):
                    # who goes first changes: neither leg always meets the warmer machine
                    for going in (False, True) if number % 2 == 0 else (True, False):
                        attack.go(on=going)
                        (attacked if going else alone).append(load.leg(seconds))
                attack.go(on=False)
                readings[f"{name}.rounds"] = attack.rounds
            both = list(zip(attacked, alone, strict=True))
            p99 = readings[f"{name}.p99_over_alone"] = median([a.p99_us / b.p99_us for a, b in both])
            rate = readings[f"{name}.rate_over_alone"] = median([a.rate / b.rate for a, b in both])
            of_store = median([a.store_p99_us / b.store_p99_us for a, b in both])
            readings[f"{name}.xenstore_p99_over_alone"] = of_store
            readings["not_isolated"] += p99 > MOST_P99 or rate < LEAST_RATE
        _settle(daemon)
        now = [_held(pid) for pid in (daemon.pid, worker)]
    for key, worst in (("p99", max), ("rate", min), ("xenstore_p99", max)):
        readings[f"neighbour_{key}_over_alone"] = worst(readings[f"{name}.{key}_over_alone"] for name in chosen)
    readings["leaks_fds"] = sum(max(0, fds - before) for (fds, _), (before, _) in zip(now, held, strict=True))
    readings["leaks_rss_over_baseline"] = max(rss / before for (_, rss), (_, before) in zip(now, held, strict=True))
    return readings


@contextlib.contextmanager
def _own_cpu(worker: int, daemon: int) -> Iterator[None]:
    """This process and `worker` on one CPU, the workers that the daemon starts from now on on another."""
    before = os.sched_getaffinity(0)
    cpus = sorted(before)
    if len(cpus) > 1:
        os.sched_setaffinity(0, {cpus[0]})
        for pid in _family(daemon)[1:]:  # the zygote, and so each worker
            os.sched_setaffinity(pid, {cpus[1]})
        os.sched_setaffinity(worker, {cpus[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _family(pid: int) -> list[int]:
    """A process and all that have come from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in _family(int(child)))]


def _held(pid: int) -> tuple[int, int]:
    """Descriptors and resident pages of a process."""
    proc = Path(f"/proc/{pid}")
    return len(list((proc / "fd").iterdir())), int((proc / "statm").read_text().split()[1])


def _settle(daemon: Daemon) -> None:
    """The attacker's domain has been taken down."""
    deadline = time.monotonic() + END_S
    while any(each["domid"] == ATTACKER for each in daemon.ctl("list")):
        if time.monotonic() > deadline:
            raise HostError("the attacker's domain is still there")
        time.sleep(0.05)


class Load:
    """The neighbour's."""

    def __init__(self, disk: Blkfront, store: XenStore, content: bytearray, dice: random.Random) -> None:
        self._disk = disk
        self._store = store
        self._content = content
        self._dice = dice

    def leg(self, seconds: float) -> Reading:
        """One reading. HostError: an answer is wrong."""
        times: list[int] = []
        begin = time.perf_counter()
        while time.perf_counter() < begin + seconds or not times:
            times += self._batch()
        rate = len(times) / (time.perf_counter() - begin)
        asked = []
        for _ in range(STORE_READS):
            before = time.perf_counter_ns()
            self._store.read("name")
            asked.append(time.perf_counter_ns() - before)
        return Reading(rate, _p99(times) / 1000, _p99(asked) / 1000)

    def _batch(self) -> list[int]:
        disk, content, dice = self._disk, self._content, self._dice
        open_: dict[int, tuple[int, bytes]] = {}
        for page in dice.sample(range(PAGES), disk.room):
            data = dice.randbytes(PAGE_SIZE) if dice.random() < 0.5 else b""
            sector = page * SECTORS_PER_PAGE
            ident = disk.submit_write(sector, data) if data else disk.submit_read(sector, SECTORS_PER_PAGE)
            open_[ident] = page, data
        times = []
        while open_:
            for done in disk.complete():
                page, data = open_.pop(done.ident)
                at = page * PAGE_SIZE
                if data:
                    content[at : at + PAGE_SIZE] = data
                if done.status != Status.OKAY or (not data and done.data != content[at : at + PAGE_SIZE]):
                    raise HostError(f"page {page} of the neighbour's disk: a wrong answer, status {done.status}")
                times.append(done.nanoseconds)
        return times


def _p99(values: list[int]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


class Attack:
    """attacks.py in a process of its own, on the daemon's CPU. A context manager."""

    def __init__(self, runtime: Path, case: str) -> None:
        self.rounds = 0
        self._case = case
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evtchnd.bench.attacks", str(runtime), str(ATTACKER), case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        cpus = sorted(os.sched_getaffinity(1))
        if len(cpus) > 1:
            os.sched_setaffinity(self._process.pid, {cpus[1]})
        self._hear()

    def go(self, *, on: bool) -> None:
        """Attacks, or no more: the round that it was in has ended."""
        assert self._process.stdin
        self._process.stdin.write("go\n" if on else "stop\n")
        self._process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            self._process.wait()
            raise HostError(f"the attacker ({self._case}) has ended; its reason is on standard error")
        self.rounds = int(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
