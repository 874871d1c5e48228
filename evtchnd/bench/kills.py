"""Workers killed at random under a checked load: what their guests saw, and how long they waited.

Several domains of one daemon, each with a disk of its own and a process that is its guest. The guest keeps its ring
busy with reads, writes (whole pages, which the worker writes at once, and others, which go through its io_uring) and
flushes, and checks every answer against a model; at random moments it kills its worker, some of them while they
restore the ring. A guest is a soft one, or (`kvm`) one on this host's KVM.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.served import Daemon
from evtchnd.blkif import SECTORS_PER_PAGE, Op, Status
from evtchnd.cli.varlink import Client
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.kvm_vm import KvmVmm
from evtchnd.vmm.soft import SoftVmm

# The pause of a worker that dies again soon is a tenth of a second, so that thousands of kills do not take a day; none
# is marked as failing.
CONFIG = "[limits]\nrestart_pause_s = 0.1\nrestart_pause_max_s = 0.1\nworker_deaths = 1000\n"
BLOCKS = 1024
DEPTH = 24
_FIRST_DOMID = 7
_MEMORY = 32 << 20
_WAIT_S = 60.0
# Longer than restart_pause_max_s: the worker has lived, and the next one comes at once.
_LIVED_S = 0.12
# One kill in so many meets a worker while it begins.
_EARLY = 5


@dataclass
class Seen:
    """Of one guest. restarts_ms: from a kill to the first answer after it, without those of early kills."""

    kills: int = 0
    answers: int = 0
    bad_blocks: int = 0
    duplicates: int = 0
    restarts_ms: list[float] = field(default_factory=list)


class Load:
    """Requests of a guest, none of which overlap while they are in flight, and what its disk must hold."""

    def __init__(self, front: Blkfront, seed: int) -> None:
        self.seen = Seen()
        self.model = bytearray(BLOCKS * PAGE_SIZE)
        self._front = front
        self._chance = random.Random(seed)
        self._open: dict[int, tuple[int, int, bytes]] = {}  # ident -> op, block, what is written
        self._serial = 0

    def fill(self) -> None:
        """As many requests as may be in flight, published."""
        front, chance = self._front, self._chance
        busy = {block for _, block, _ in self._open.values()}
        while len(self._open) < DEPTH and front.room:
            op = chance.choices((Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE), (6, 10, 1))[0]
            block = chance.choice([n for n in (chance.randrange(BLOCKS) for _ in range(9)) if n not in busy])
            data = b""
            if op == Op.FLUSH_DISKCACHE:
                ident, block = front.submit_flush(), -1
            elif op == Op.READ:
                ident = front.submit_read(block * SECTORS_PER_PAGE, SECTORS_PER_PAGE)
            else:
                self._serial += 1
                data = self._serial.to_bytes(8, "little") * (512 // 8 * chance.choice((8, 8, 1, 5)))
                ident = front.submit_write(block * SECTORS_PER_PAGE, data)
            busy.add(block)
            self._open[ident] = (op, block, data)
        front.push()

    def collect(self, timeout: float = _WAIT_S) -> int:
        """Checks the answers that come, of which there is at least one; how many."""
        done = self._front.complete(timeout)
        for each in done:
            op, block, data = self._open.pop(each.ident)
            at = block * PAGE_SIZE
            if each.status != Status.OKAY:
                self.seen.bad_blocks += 1
            elif op == Op.WRITE:
                self.model[at : at + len(data)] = data
            elif op == Op.READ and each.data != self.model[at : at + PAGE_SIZE]:
                self.seen.bad_blocks += 1
        self.seen.answers += len(done)
        return len(done)

    def settle(self) -> None:
        """Waits for all answers."""
        while self._open:
            self.collect()

    @property
    def pending(self) -> bool:
        """Whether there are answers that were not collected."""
        return self._front.ring.pending()


class Target:
    """The worker of one domain."""

    def __init__(self, control: Path, domid: int) -> None:
        self._client = Client(control, timeout=_WAIT_S)
        self._domid = domid

    def find(self, other_than: int = 0) -> int:
        """The pid of the one that runs. HostError if none comes."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            pid = int(self._client.call("io.evtchnd.Info", domid=self._domid)["worker"]["pid"])
            if pid not in (0, other_than):
                return pid
            time.sleep(0.001)
        raise HostError(f"domain {self._domid}: no worker comes")

    def close(self) -> None:
        self._client.close()


def kill(pid: int) -> None:
    """SIGKILL; returns when it is dead. One that has died already is as good."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], _WAIT_S)
        finally:
            os.close(pidfd)


def guest(runtime: Path, image: Path, domid: int, kills: int, seed: int, kvm: bool) -> Seen:
    """One domain, from its begin to its end, and the kills of its worker."""
    chance = random.Random(f"{seed} {domid}")
    with contextlib.ExitStack() as stack:
        kind = KvmVmm if kvm else SoftVmm
        vm = stack.enter_context(kind(runtime / "vmm.sock", domid, memory=_MEMORY))
        domain = Domain(vm)
        stack.callback(domain.close)
        store = XenStore(domain)
        stack.callback(store.close)
        with Client(runtime / "control.sock", timeout=_WAIT_S) as control:
            control.call("io.evtchnd.BlockAttach", domid=domid, disk=f"format=raw,vdev=xvda,access=rw,target={image}")
        front = Blkfront(domain, store, 51712, depth=DEPTH, segments=1)
        front.connect()
        load = Load(front, chance.randrange(1 << 30))
        target = Target(runtime / "control.sock", domid)
        stack.callback(target.close)
        try:
            _kill_workers(load, target, kills, chance)
            load.settle()
            front.flush()
            front.disconnect()
        except GuestFault as exc:
            if "not in flight" not in str(exc):
                raise
            load.seen.duplicates += 1
    content = image.read_bytes()
    load.seen.bad_blocks += sum(
        content[at : at + PAGE_SIZE] != load.model[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)
    )
    return load.seen


def _kill_workers(load: Load, target: Target, kills: int, chance: random.Random) -> None:
    pid = target.find()
    while load.seen.kills < kills:
        _work(load, _LIVED_S + chance.random() * 0.05)
        early = chance.randrange(_EARLY) == 0
        load.fill()
        _spin(chance.random() * 0.002)
        began = time.perf_counter()
        kill(pid)
        load.seen.kills += 1
        while load.pending:  # what it had published
            load.collect()
        if early and load.seen.kills < kills:
            pid = target.find(other_than=pid)
            _spin(chance.random() * 0.01)
            kill(pid)
            load.seen.kills += 1
        load.fill()
        load.collect()
        if not early:
            load.seen.restarts_ms.append(1000 * (time.perf_counter() - began))
        pid = target.find(other_than=pid)


def _work(load: Load, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load.fill()
        load.collect()


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@contextlib.contextmanager
def served(domains: int) -> Iterator[tuple[Daemon, list[Path]]]:
    """A daemon, and an image of zeros for each domain."""
    with tempfile.TemporaryDirectory(prefix="evtchnd-kills-") as name:
        folder = Path(name)
        images = [folder / f"{number}.img" for number in range(domains)]
        for image in images:
            image.write_bytes(bytes(BLOCKS * PAGE_SIZE))
        daemon = Daemon(folder, CONFIG)
        try:
            yield daemon, images
        finally:
            daemon.stop()


def run(kills: int, seed: int, *, domains: int = 2, kvm: bool = False) -> dict[str, float]:
    """Readings: kills.run, kills.answers, kills.bad_blocks, kills.duplicates, worker_restart_ms_p50 and _p99.

    kills: of all domains together. worker_restart_ms: from SIGKILL to the first answer that the dead worker had not
    published, as its guest sees it (restarts of workers that had lived for `restart_pause_max_s`: they have no pause).
    """
    each = -(-kills // domains)
    with served(domains) as (daemon, images), ProcessPoolExecutor(domains, mp_context=get_context("spawn")) as pool:
        guests = [
            pool.submit(guest, daemon.runtime, image, _FIRST_DOMID + number, each, seed, kvm)
            for number, image in enumerate(images)
        ]
        seen = [each.result() for each in guests]
    restarts = sorted(ms for one in seen for ms in one.restarts_ms)
    return {
        "kills.run": sum(one.kills for one in seen),
        "kills.answers": sum(one.answers for one in seen),
        "kills.bad_blocks": sum(one.bad_blocks for one in seen),
        "kills.duplicates": sum(one.duplicates for one in seen),
        "worker_restart_ms_p50": statistics.median(restarts),
        "worker_restart_ms_p99": restarts[min(len(restarts) - 1, int(len(restarts) * 0.99))],
    }
