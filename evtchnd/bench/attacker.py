"""A guest that attacks: a soft domain whose disks the daemon's configuration names (`disks`), so that it has them again
whenever it comes back.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from evtchnd.abi import XenbusState
from evtchnd.errors import HostError, VmmError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

MiB = 1 << 20
VBD = 51712
# The host has to answer within this, busy as the attack makes it.
PATIENCE_S = 30.0


def disks(folder: Path, count: int, size: int = MiB) -> list[str]:
    """Images of the attacker, as the configuration names them."""
    specs = []
    for number in range(count):
        image = folder / f"attacker-{number}.img"
        image.write_bytes(bytes(size))
        specs.append(f"{image},raw,xvd{chr(ord('a') + number)},w")
    return specs


class Attacker:
    """A domain and what it has connected. A context manager. `rounds`: how many rounds it has done."""

    def __init__(self, vmm_socket: Path, domid: int, *, seed: int = 1) -> None:
        self.vmm_socket = vmm_socket
        self.domid = domid
        self.dice = random.Random(seed)
        self.rounds = 0
        self.fronts: dict[tuple[int, int], Blkfront] = {}
        self._life = contextlib.ExitStack()
        self.begin()

    def begin(self) -> None:
        """It boots."""
        with contextlib.ExitStack() as life:
            self.vm = life.enter_context(self._registered())
            self.domain = Domain(self.vm)
            life.callback(self.domain.close)
            self.store = XenStore(self.domain)
            life.callback(self.store.close)
            self._life = life.pop_all()

    def _registered(self) -> SoftVmm:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return SoftVmm(self.vmm_socket, self.domid, memory=32 * MiB)
            except (VmmError, HostError):  # the one before is still being taken down
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def end(self) -> None:
        """As a VMM that ends in order; what was connected is gone with it."""
        for front in self.fronts.values():
            front.forget()
        self.fronts.clear()
        self._life.close()

    def reboot(self) -> None:
        """The domain ends and begins again."""
        self.end()
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an attack that fails leaves pages in use: what that breaks here must not hide why
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self.end()

    def front(self, devid: int = VBD, *, queues: int = 1) -> Blkfront:
        """A disk of it, connected."""
        known = self.fronts.get((devid, queues))
        if known is not None:
            return known
        self.store.wait_for(f"device/vbd/{devid}/backend", lambda value: value is not None, PATIENCE_S)
        front = Blkfront(
            self.domain, self.store, devid, queues=queues, depth=4, segments=1, spin_us=0, timeout=PATIENCE_S
        )
        front.connect()
        self.fronts[devid, queues] = front
        return front

    def drop(self, front: Blkfront) -> None:
        """Closes a connection that the host may have closed first."""
        self.fronts.pop((front.devid, len(front.queues)))
        front.bus.switch(XenbusState.CLOSED)
        front.bus.wait_backend(XenbusState.CLOSED)
        front.release()

    @contextlib.contextmanager
    def ring(self, front: Blkfront) -> Iterator[tuple[memoryview, memoryview]]:
        """Its first ring's page, as bytes and as words."""
        with self.vm.ram.view(front.ring_gfn) as page, page.cast("I") as words:
            yield page, words


def until(ready: Callable[[], bool], what: str) -> None:
    """Waits for what the host has to do; GuestFault: it has not."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            raise GuestFault(what)
        time.sleep(0.0005)
