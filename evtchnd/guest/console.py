"""The guest's end of a console (io/console.h), as Linux' hvc_xen drives it: writes spin while the ring is full."""

from __future__ import annotations

import time
from typing import Self

from evtchnd.abi import PAGE_SIZE, XenbusState
from evtchnd.guest.domain import Domain, GuestFault, Machine
from evtchnd.guest.xenbus import Frontend
from evtchnd.guest.xenstore import XenStore
from evtchnd.stream import CONSOLE, ByteStream

# A guest that spins as long as this is a hung guest to whoever waits for it.
DEFAULT_TIMEOUT = 10.0
# Linux yields its CPU between two looks at a full ring.
_YIELD_S = 0.0001


class Console:
    """A console's page and port; the primary one is `Console(vm, vm.console_gfn, vm.console_port)` of a SoftVmm."""

    def __init__(self, vm: Machine, gfn: int, port: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.port = port
        self._vm = vm
        self._timeout = timeout
        self._view = vm.ram.view(gfn)
        self._stream = ByteStream(self._view, CONSOLE, "front")
        self._further: tuple[Domain, Frontend, int, int] | None = None  # with its page and grant

    @classmethod
    def connect(cls, domain: Domain, store: XenStore, devid: int, *, timeout: float = DEFAULT_TIMEOUT) -> Self:
        """A further console, by xenbus: publishes its page and port, waits for the backend."""
        bus = Frontend(store, "console", devid, timeout=timeout)
        gfn = domain.alloc(1)
        with domain.vm.ram.view(gfn) as page:
            page[:] = bytes(PAGE_SIZE)
        gref = domain.grant(gfn)
        port = domain.vm.alloc_unbound(bus.backend_domid)
        bus.switch(XenbusState.INITIALISED, {"ring-ref": str(gref), "port": str(port)})
        bus.wait_backend(XenbusState.CONNECTED)
        bus.switch(XenbusState.CONNECTED)
        console = cls(domain.vm, gfn, port, timeout=timeout)
        console._further = (domain, bus, gfn, gref)
        return console

    def write(self, data: bytes) -> int:
        """All of `data`; -> how often the ring was full. GuestFault: nobody empties it."""
        deadline = time.monotonic() + self._timeout
        full = 0
        while data:
            count = self._stream.write(data)
            if count:
                self._vm.send(self.port)
                data = data[count:]
                continue
            full += 1
            if time.monotonic() > deadline:
                raise GuestFault(f"console: the ring is full for {self._timeout:g} s")
            time.sleep(_YIELD_S)
        return full

    def read(self, count: int) -> bytes:
        """At least one and at most `count` bytes. GuestFault: no event told of any in time."""
        while not (data := self._stream.read(count)):
            if not self._vm.wait(self.port, self._timeout):
                raise GuestFault(f"console: nothing is typed for {self._timeout:g} s")
        self._vm.send(self.port)
        return data

    def close(self) -> None:
        """Lets go of the page; a further console is taken down, as a driver does when its backend closes."""
        self._stream.close()
        self._view.release()
        if self._further is not None:
            domain, bus, gfn, gref = self._further
            self._further = None
            bus.switch(XenbusState.CLOSING)
            bus.wait_backend(XenbusState.CLOSING, XenbusState.CLOSED)
            bus.switch(XenbusState.CLOSED)
            bus.wait_backend(XenbusState.CLOSED)
            domain.end_grant(gref)
            domain.free(gfn, 1)
            domain.vm.close_port(self.port)
