"""A domain that does nothing wrong: a checked load on its disk and in XenStore, for as long as somebody attacks."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Self

from daemonprocess import DaemonProcess
from evtchnd.blkif import Status
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm
from vbd import VBD, load

DOMID = 8
MIB = 1 << 20


class Neighbour:
    """A context manager. `requests`: how many were answered, all of them right (else `check` raises)."""

    def __init__(self, daemon: DaemonProcess, image: Path) -> None:
        self.image = image
        self.content = bytearray(random.Random(DOMID).randbytes(4 * MIB))
        image.write_bytes(self.content)
        self.vm = SoftVmm(daemon.vmm_socket, DOMID, memory=32 * MIB)
        self.domain = Domain(self.vm)
        self.store = XenStore(self.domain)
        daemon.attach(DOMID, image)
        self.disk = Blkfront(self.domain, self.store, VBD, depth=4, spin_us=0)
        self.disk.connect()
        self.worker = daemon.worker(DOMID)
        self.requests = 0
        self._failed: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def _go_on(self) -> None:
        try:
            while not self._stop.is_set():
                load(self.disk, self.content, 20, seed=self.requests)
                self.store.write("data/round", str(self.requests))
                assert self.store.read("data/round") == str(self.requests)
                self.requests += 20
        except BaseException as error:
            self._failed = error

    def check(self, more_than: int) -> None:
        """It is served still."""
        for _ in range(3000):
            if self._failed is not None:
                raise AssertionError("the neighbour was harmed") from self._failed
            if self.requests > more_than:
                return
            self._stop.wait(0.01)
        raise AssertionError(f"the neighbour has had no answer since its request {more_than}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if kind is None:
            self.check(-1)
            self.disk.submit_flush()
            assert [done.status for done in self.disk.complete()] == [Status.OKAY]
            self.disk.disconnect()
        else:
            self.disk.forget()
        self.store.close()
        self.domain.close()
        self.vm.close()
        if kind is None:
            assert self.image.read_bytes() == self.content
