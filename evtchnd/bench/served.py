"""evtchnd's side of a benchmark: daemon, worker, and a soft guest whose connected ring is lent to a C program."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.ends import Ends
from evtchnd.cli.process import evtchnctl
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

DOMID = 1
DEVID = 51712
START_S = 120.0  # an emulated machine under load took more than 20


class Daemon:
    """`python -m evtchnd`; configuration and log in `folder`. Ended by `stop()`."""

    def __init__(self, folder: Path, config: str = "") -> None:
        # not below `folder`, which may be deep: a socket's path ends at 107 bytes
        self.runtime = Path(tempfile.mkdtemp(prefix="evtchnd-"))
        self._log = folder / "evtchnd.log"
        file = folder / "evtchnd.toml"
        file.write_text(config)
        command = [sys.executable, "-m", "evtchnd", "--config", str(file), "--runtime-dir", str(self.runtime)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        while not (self.runtime / "control.sock").exists():
            if self._process.poll() is not None or time.monotonic() > begin + START_S:
                self.stop()
                raise HostError(f"the daemon did not start: {self._log.read_text().strip()}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        """Of the control plane."""
        return self._process.pid

    def ctl(self, *arguments: str) -> Any:
        """What `evtchnctl -o json` prints. HostError with its message."""
        return evtchnctl(self.runtime, *arguments)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.runtime, ignore_errors=True)


@contextlib.contextmanager
def soft_guest(folder: Path, config: str) -> Iterator[tuple[Daemon, SoftVmm, Domain, XenStore]]:
    """A daemon, and a guest without KVM that it serves."""
    with contextlib.ExitStack() as stack:
        daemon = Daemon(folder, config)
        stack.callback(daemon.stop)
        vm = stack.enter_context(SoftVmm(daemon.runtime / "vmm.sock", DOMID, name="bench"))
        domain = Domain(vm)
        stack.callback(domain.close)
        store = XenStore(domain)
        stack.callback(store.close)
        yield daemon, vm, domain, store


def in_a_row(grefs: Sequence[int]) -> None:
    """HostError where the C programs, which count from the first one, would meet another grant."""
    if list(grefs) != list(range(grefs[0], grefs[0] + len(grefs))):
        raise HostError("the guest's grant references are not in a row")


class Served:
    """A disk of a soft guest, connected: `ends` for the load, `pid` of the worker that serves it."""

    def __init__(self, folder: Path, image: Path, *, poll_us: int, data_pages: int, tables: int = 32) -> None:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(soft_guest(folder, f"[poll]\nmax_us = {poll_us}\n"))
            self.daemon, vm, domain, store = guest
            self.daemon.ctl("block-attach", str(DOMID), f"format=raw,vdev=xvda,access=ro,target={image}")
            disk = Blkfront(domain, store, DEVID, depth=1)
            disk.connect()
            stack.callback(disk.disconnect)
            first = domain.alloc(tables + data_pages)
            grefs = [domain.grant(first + index) for index in range(tables + data_pages)]
            in_a_row(grefs)
            self.ends = Ends(
                ram=vm.ram_fd,
                kick=vm.kick_fd(disk.port),
                notify=vm.irq_fd(disk.port),
                ring_offset=disk.ring_gfn * PAGE_SIZE,
                indirect_offset=first * PAGE_SIZE,
                gref=grefs[tables],
                indirect_gref=grefs[0],
            )
            self.pid: int = self.info()["worker"]["pid"]
            self._stack = stack.pop_all()

    def info(self) -> Any:
        """`evtchnctl info` of the guest."""
        return self.daemon.ctl("info", str(DOMID))

    def pin(self, cpu: int) -> None:
        """The worker's CPU; the control plane shares it, it has nothing to do."""
        os.sched_setaffinity(self.pid, {cpu})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
