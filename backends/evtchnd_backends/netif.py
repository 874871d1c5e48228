"""What the two ends of a vif say to each other in XenStore (the node lists of xen/include/public/io/netif.h).

The rings' entries are in `evtchnd.netif`; a guest writes everything that is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evtchnd.errors import GuestError
from evtchnd_backends.nodes import number

# Linux' netfront asks for 256 (XDP_PACKET_HEADROOM) or none. netif.h allows 0x7fff, which no page has.
MOST_HEADROOM = 2048
# With more than this a packet of 64 KiB does not fit 18 pages: it is segmented before.
MOST_HEADROOM_GSO = 256


@dataclass(frozen=True)
class Queue:
    """One pair of rings, a page each. `tx_port` and `rx_port` are the same one without split event channels."""

    tx_gref: int
    rx_gref: int
    tx_port: int
    rx_port: int


@dataclass(frozen=True)
class Rings:
    """What a frontend published: its queues, its control ring (gref, port), and what it takes.

    csum4, csum6   packets to it may come without a checksum
    gso4, gso6     and unsegmented
    sg             and in several pages
    rx_notify      it kicks when it has posted pages; else the ring has to be looked at
    xdp_headroom   bytes that it wants free in front of what is in a page
    """

    queues: tuple[Queue, ...]
    ctrl: tuple[int, int] | None = None
    sg: bool = False
    csum4: bool = True
    csum6: bool = False
    gso4: bool = False
    gso6: bool = False
    rx_notify: bool = False
    xdp_headroom: int = 0

    def __str__(self) -> str:
        ports = ", ".join(
            str(queue.tx_port) if queue.tx_port == queue.rx_port else f"{queue.tx_port}/{queue.rx_port}"
            for queue in self.queues
        )
        takes = [name for name in ("sg", "csum4", "csum6", "gso4", "gso6") if getattr(self, name)]
        count = len(self.queues)
        return f"{count} queue{'s' if count > 1 else ''}, ports {ports}, {' '.join(takes) or 'no offloads'}"

    def params(self) -> dict[str, Any]:
        """Plain values that `from_params` understands."""
        return {**asdict(self), "queues": [asdict(queue) for queue in self.queues]}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Rings:
        plain = {name: value for name, value in params.items() if name in cls.__dataclass_fields__}
        queues = tuple(Queue(**queue) for queue in params["queues"])
        ctrl = params["ctrl"]
        return cls(**{**plain, "queues": queues, "ctrl": tuple(ctrl) if ctrl else None})


def features(*, mtu: int, carrier: bool, max_queues: int, ctrl: bool) -> dict[str, str]:
    """The backend's nodes. `feature-rx-flip` = 0: pages are never given away."""
    nodes: dict[str, int] = {
        "feature-sg": 1,
        "feature-gso-tcpv4": 1,
        "feature-gso-tcpv6": 1,
        "feature-ipv6-csum-offload": 1,
        "feature-rx-copy": 1,
        "feature-rx-flip": 0,
        "feature-multicast-control": 1,
        "feature-dynamic-multicast-control": 1,
        "feature-split-event-channels": 1,
        "feature-xdp-headroom": 1,
        "multi-queue-max-queues": max_queues,
        "mtu": mtu,
        "carrier": int(carrier),
    }
    if ctrl:
        nodes["feature-ctrl-ring"] = 1
    return {name: str(value) for name, value in nodes.items()}


SHARED_NODES = (
    "multi-queue-num-queues",
    "request-rx-copy",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "ctrl-ring-ref",
    "event-channel-ctrl",
    "xdp-headroom",
)
"""The frontend's nodes that hold for every queue."""

_QUEUE_NODES = ("tx-ring-ref", "rx-ring-ref", "event-channel", "event-channel-tx", "event-channel-rx")


def queue_nodes(shared: Mapping[str, str], *, max_queues: int) -> list[str]:
    """Every other node that `frontend_rings` looks at, given those of SHARED_NODES that exist. GuestError as there."""
    return [f"{folder}{name}" for folder in _folders(shared, max_queues) for name in _QUEUE_NODES]


def frontend_rings(nodes: Mapping[str, str], *, max_queues: int) -> Rings:
    """What the frontend published; `nodes` holds those of SHARED_NODES and `queue_nodes` that exist.

    GuestError names the node that is missing, no number, or impossible.
    """
    if not _flag(nodes, "request-rx-copy"):
        raise GuestError("request-rx-copy: not asked for, and page flipping is not supported")
    queues = tuple(_queue(nodes, folder) for folder in _folders(nodes, max_queues))
    ctrl = None
    if "ctrl-ring-ref" in nodes:
        ctrl = (number(nodes, "ctrl-ring-ref"), _port(nodes, "event-channel-ctrl"))
    grefs = [gref for queue in queues for gref in (queue.tx_gref, queue.rx_gref)] + ([ctrl[0]] if ctrl else [])
    if len(set(grefs)) != len(grefs):
        raise GuestError(f"ring-ref: the same page twice: {grefs}")
    ports = [port for queue in queues for port in {queue.tx_port, queue.rx_port}] + ([ctrl[1]] if ctrl else [])
    if len(set(ports)) != len(ports):
        raise GuestError(f"event-channel: one port for two queues: {ports}")
    return Rings(
        queues,
        ctrl,
        sg=_flag(nodes, "feature-sg"),
        csum4=not _flag(nodes, "feature-no-csum-offload"),
        csum6=_flag(nodes, "feature-ipv6-csum-offload"),
        gso4=_flag(nodes, "feature-gso-tcpv4"),
        gso6=_flag(nodes, "feature-gso-tcpv6"),
        rx_notify=_flag(nodes, "feature-rx-notify"),
        xdp_headroom=xdp_headroom(nodes),
    )


def xdp_headroom(nodes: Mapping[str, str]) -> int:
    """Of the frontend's node, 0 without it. GuestError: more than MOST_HEADROOM."""
    value = number(nodes, "xdp-headroom") if "xdp-headroom" in nodes else 0
    if value > MOST_HEADROOM:
        raise GuestError(f"xdp-headroom: {value} bytes of a page, {MOST_HEADROOM} are possible")
    return value


def _queue(nodes: Mapping[str, str], folder: str) -> Queue:
    grefs = number(nodes, f"{folder}tx-ring-ref"), number(nodes, f"{folder}rx-ring-ref")
    if f"{folder}event-channel" in nodes:
        port = _port(nodes, f"{folder}event-channel")
        return Queue(*grefs, port, port)
    tx, rx = _port(nodes, f"{folder}event-channel-tx"), _port(nodes, f"{folder}event-channel-rx")
    if tx == rx:
        raise GuestError(f"{folder}event-channel: split, and both are port {tx}")
    return Queue(*grefs, tx, rx)


def _folders(nodes: Mapping[str, str], max_queues: int) -> list[str]:
    """Where each queue's nodes are: those of a single one lie beside the others, without a folder."""
    count = number(nodes, "multi-queue-num-queues") if "multi-queue-num-queues" in nodes else 1
    if not 0 < count <= max_queues:
        raise GuestError(f"multi-queue-num-queues: {count} queues, 1 to {max_queues} are possible")
    return [""] if count == 1 else [f"queue-{index}/" for index in range(count)]


def _flag(nodes: Mapping[str, str], name: str) -> bool:
    return name in nodes and number(nodes, name) != 0


def _port(nodes: Mapping[str, str], name: str) -> int:
    port = number(nodes, name)
    if port == 0:
        raise GuestError(f"{name}: port 0 is never valid")
    return port
