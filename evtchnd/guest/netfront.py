"""A guest's network frontend: handshake, one or several queues, each with what it sends and receives (netqueue.py)."""

from __future__ import annotations

from evtchnd.abi import XenbusState
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.guest.netqueue import Frame, Queue
from evtchnd.guest.xenbus import Frontend
from evtchnd.guest.xenstore import XenStore
from evtchnd.netif import parse_mac

__all__ = ["Frame", "Netfront", "Queue"]

DEFAULT_TIMEOUT = 30.0


class Netfront:
    """One network interface. Not for several threads at once; each of its `queues` may have a thread of its own.

    queues     pairs of rings | split: two event channels each
    sg, csum, gso   what it says that it takes (csum and gso: for IPv4 and IPv6)
    notify     it kicks when it has posted pages
    post       pages that are posted at the start
    nodes      further nodes that it publishes, or other values for those it does
    """

    mac: bytes

    def __init__(
        self,
        domain: Domain,
        store: XenStore,
        devid: int = 0,
        *,
        queues: int = 1,
        split: bool = True,
        sg: bool = True,
        csum: bool = True,
        gso: bool = True,
        notify: bool = True,
        post: int = 256,
        nodes: dict[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self.domain = domain
        self.devid = devid
        self.queues: list[Queue] = []
        self._store = store
        self._count = queues
        self._split = split
        self._post = post
        self._timeout = timeout
        self._further = nodes or {}
        self._features = {
            "request-rx-copy": 1,
            "feature-rx-notify": int(notify),
            "feature-sg": int(sg),
            "feature-gso-tcpv4": int(gso),
            "feature-gso-tcpv6": int(gso),
            "feature-ipv6-csum-offload": int(csum),
            "feature-no-csum-offload": int(not csum),
        }

    def connect(self) -> None:
        """The handshake, up to Connected on both ends: as Linux', from Initialising to Connected at once."""
        self.bus = bus = Frontend(self._store, "vif", self.devid, timeout=self._timeout)
        if bus.state() != XenbusState.INITIALISING:
            bus.switch(XenbusState.INITIALISING)
        bus.wait_backend(XenbusState.INIT_WAIT)
        if not bus.backend("feature-rx-copy", 0):
            raise GuestFault(f"vif {self.devid}: the backend has no feature-rx-copy")
        most = bus.backend("multi-queue-max-queues", 1)
        if self._count > most:
            raise GuestFault(f"vif {self.devid}: the backend takes {most} queues")
        if self._split and not bus.backend("feature-split-event-channels", 0):
            raise GuestFault(f"vif {self.devid}: the backend has no split event channels")
        self.mac = parse_mac(self._store.read(f"{bus.path}/mac"))
        for index in range(self._count):
            name = f"vif {self.devid}: queue {index}"
            queue = Queue(self.domain, name, bus.backend_domid, split=self._split, timeout=self._timeout)
            self.queues.append(queue)
            queue.post(self._post)
        bus.switch(XenbusState.CONNECTED, self.nodes())
        if bus.wait_backend(XenbusState.CONNECTED, XenbusState.CLOSING, XenbusState.CLOSED) != XenbusState.CONNECTED:
            raise GuestFault(f"vif {self.devid}: the backend closed instead of connecting")
        for queue in self.queues:
            queue.push()
            self.domain.vm.send(queue.ports[-1])

    def nodes(self) -> dict[str, str]:
        """What it publishes: with one queue all of it side by side, with more a folder for each."""
        nodes = {name: str(value) for name, value in self._features.items()}
        if self._count == 1:
            nodes |= self.queues[0].nodes()
        else:
            nodes["multi-queue-num-queues"] = str(self._count)
            for index, queue in enumerate(self.queues):
                nodes |= {f"queue-{index}/{name}": value for name, value in queue.nodes().items()}
        return {**nodes, **self._further}

    def xdp(self, headroom: int) -> None:
        """Wants so many bytes free in front of each page's data, as Linux does for an XDP program; 0: none any more."""
        self.bus.switch(XenbusState.RECONFIGURING, {"xdp-headroom": str(headroom)})
        states = XenbusState.RECONFIGURED, XenbusState.CLOSING, XenbusState.CLOSED
        if self.bus.wait_backend(*states) != XenbusState.RECONFIGURED:
            raise GuestFault(f"vif {self.devid}: the backend closed instead of taking {headroom} bytes of headroom")
        self.bus.switch(XenbusState.CONNECTED)
        self.bus.wait_backend(XenbusState.CONNECTED)

    def disconnect(self) -> None:
        """Closes: 5, 6 on both ends; pages, grants and ports are free again."""
        self.bus.switch(XenbusState.CLOSING)
        self.bus.wait_backend(XenbusState.CLOSING, XenbusState.CLOSED)
        self.bus.switch(XenbusState.CLOSED)
        self.bus.wait_backend(XenbusState.CLOSED)
        self.release()

    def release(self) -> None:
        """Takes everything back. GuestFault if the backend still uses a page."""
        for queue in self.queues:
            queue.release()
        self.queues = []
