"""The daemon is killed, restarted, killed again while guests use their disks: a pause, and nothing else.

Real processes: `evtchnd --keep` holds the descriptors (tests/unit has the same under systemd), soft guests resume by
themselves, every block that a guest reads or wrote is checked.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.checkedload import BLOCK, CheckedLoad
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import MiB, SoftVmm
from keptdaemon import KeptDaemon, until
from scale import scaled

BLOCKS = 256
DEVID = 51712


class Guest:
    """A soft guest with a disk, which is attached by an operator or passed by its VMM."""

    def __init__(self, daemon: KeptDaemon, domid: int, *, passed: bool = False, queues: int = 1) -> None:
        self.domid = domid
        self.path = daemon.folder / f"{domid}.img"
        self.path.write_bytes(bytes(BLOCKS * BLOCK))
        self._fd = os.open(self.path, os.O_RDWR) if passed else -1
        self.vm = SoftVmm(daemon.vmm_socket, domid, memory=16 * MiB, name=f"guest{domid}", come_back=True)
        self.domain = Domain(self.vm)
        self.store = XenStore(self.domain)
        if passed:
            self.vm.disk(DEVID, "xvda", self._fd)
        else:
            daemon.ctl("block-attach", str(domid), f"{self.path},raw,xvda,w")
        self.front = Blkfront(self.domain, self.store, DEVID, queues=queues)
        self.front.connect()
        self.load = CheckedLoad(self.front, BLOCKS, seed=domid)

    def run(self, requests: int = 50) -> None:
        """Until so many more requests are answered."""
        before = self.load.answered
        until(lambda: self.load.failed or self.load.answered >= before + requests, f"domain {self.domid} hangs", 60)
        if self.load.failed:
            raise self.load.failed

    def check(self) -> None:
        """Ends the load; the image is what the guest was told."""
        self.load.stop()
        self.front.flush()
        assert self.path.read_bytes() == self.load.image()

    def close(self, *, release: bool = True) -> None:
        self.front.release() if not release else self.front.disconnect()
        self.store.close()
        self.domain.close()
        self.vm.close(release=release)
        if self._fd >= 0:
            os.close(self._fd)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[KeptDaemon]:
    with KeptDaemon(tmp_path) as made:
        yield made


@pytest.mark.parametrize("passed", [False, True], ids=["attached", "passed"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_s_disk_goes_on(daemon: KeptDaemon, number: signal.Signals, passed: bool) -> None:
    guest = Guest(daemon, 7, passed=passed)
    guest.load.start()
    rng = random.Random(number)
    for _ in range(scaled(60, least=3)):
        guest.run()
        time.sleep(rng.random() / 50)
        daemon.restart(number)
    guest.run()
    guest.check()
    (device,) = daemon.ctl("info", "7")["devices"]
    assert (device["state"], device["vdev"]) == (4, "xvda")
    guest.close()
    until(lambda: daemon.ctl("list") == [], "the domain is still there")
