"""What the two ends of a vbd say to each other in XenStore (the node lists of xen/include/public/io/blkif.h).

The ring's entries are in `evtchnd.blkif`; a guest writes everything that is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evtchnd import blkif
from evtchnd.blkif import Layout, Op, Status
from evtchnd.errors import GuestError

from .nodes import number, quoted

__all__ = ["SHARED_NODES", "Op", "Queue", "Rings", "Status", "features", "frontend_rings", "queue_nodes"]

# No `protocol` node: the header says "native", but Linux' and QEMU's backends on x86 take it for the 32-bit layout,
# also for 64-bit guests; every frontend that is in use was tested against one of them.
DEFAULT_PROTOCOL = blkif.X86_32.name


@dataclass(frozen=True)
class Queue:
    """One ring: `grefs` of 1, 2, 4, 8 or 16 pages, and the guest's `port`."""

    grefs: tuple[int, ...]
    port: int


@dataclass(frozen=True)
class Rings:
    """Where a frontend has its rings, all of one size, and the layout of their entries."""

    layout: Layout
    queues: tuple[Queue, ...]

    def __str__(self) -> str:
        pages, count = len(self.queues[0].grefs), len(self.queues)
        rings = f"{pages} ring page{'s' if pages > 1 else ''}"
        ports = ", ".join(str(queue.port) for queue in self.queues)
        where = f"{count} queues of {rings}, ports {ports}" if count > 1 else f"{rings}, port {ports}"
        return f"{self.layout.name}, {where}"

    def params(self) -> dict[str, Any]:
        """Plain values that `from_params` understands."""
        queues = [{"grefs": list(queue.grefs), "port": queue.port} for queue in self.queues]
        return {"protocol": self.layout.name, "queues": queues}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Rings:
        queues = tuple(Queue(tuple(queue["grefs"]), queue["port"]) for queue in params["queues"])
        return cls(blkif.LAYOUTS[params["protocol"]], queues)


def features(
    *,
    sectors: int,
    sector_size: int,
    physical_sector_size: int,
    readonly: bool,
    cdrom: bool,
    max_queues: int,
    max_ring_page_order: int,
    max_indirect_segments: int,
    discard: tuple[int, int] | None = None,
) -> dict[str, str]:
    """The backend's nodes. `discard`: granularity and alignment in bytes, None where the disk cannot, or may not.

    `sectors` is in units of 512 bytes, whatever sector-size is: Linux' frontend gives the node as it is to a function
    with that unit (drivers/block/xen-blkfront.c: `set_capacity(gd, capacity)` in xlvbd_alloc_gendisk, for a new size
    `set_capacity_and_notify(info->gd, sectors)` in blkfront_connect). The header of Xen 4.17 says "in units of
    sector-size"; Linux' frontend does not do that.

    feature-persistent is 0: guest RAM is mapped, and with it blkfront would copy every page. There is no barrier,
    only a flush. The deprecated twins of max-ring-page-order are for frontends of Citrix' and old Windows drivers.
    """
    # A CD is removable to QEMU's backend and to libxl, too.
    info = (blkif.VDISK_READONLY if readonly else 0) | (blkif.VDISK_CDROM | blkif.VDISK_REMOVABLE if cdrom else 0)
    nodes: dict[str, int] = {
        "sectors": sectors,
        "sector-size": sector_size,
        "physical-sector-size": physical_sector_size,
        "info": info,
        "feature-flush-cache": 1,
        "feature-persistent": 0,
        "multi-queue-max-queues": max_queues,
        "max-ring-page-order": max_ring_page_order,
        "max-ring-pages": 1 << max_ring_page_order,
    }
    if max_indirect_segments:
        nodes["feature-max-indirect-segments"] = max_indirect_segments
    nodes["feature-discard"] = int(discard is not None)
    if discard is not None:
        nodes |= {"discard-granularity": discard[0], "discard-alignment": discard[1]}
    return {name: str(value) for name, value in nodes.items()}


SHARED_NODES = ("protocol", "ring-page-order", "num-ring-pages", "multi-queue-num-queues")
"""The frontend's nodes that hold for every queue."""


def queue_nodes(shared: Mapping[str, str], *, max_order: int, max_queues: int) -> list[str]:
    """Every other node that `frontend_rings` looks at, given those of SHARED_NODES that exist. GuestError as there."""
    pages = _pages(shared, max_order)
    names = ["event-channel", "ring-ref", *(f"ring-ref{index}" for index in range(pages))]
    return [f"{folder}{name}" for folder in _folders(shared, max_queues) for name in names]


def frontend_rings(nodes: Mapping[str, str], *, max_order: int, max_queues: int) -> Rings:
    """What the frontend published; `nodes` holds those of SHARED_NODES and `queue_nodes` that exist.

    Linux writes `ring-ref` for one page and `ring-refN` with `ring-page-order` for more; others write `ring-ref0`
    for one. GuestError names the node that is missing, no number, or out of range.
    """
    name = nodes.get("protocol", DEFAULT_PROTOCOL)
    if name not in blkif.LAYOUTS:
        raise GuestError(f"protocol: {quoted(name)} is none of {', '.join(blkif.LAYOUTS)}")
    pages = _pages(nodes, max_order)
    queues = tuple(_queue(nodes, folder, pages) for folder in _folders(nodes, max_queues))
    grefs = [gref for queue in queues for gref in queue.grefs]
    if len(set(grefs)) != len(grefs):
        raise GuestError(f"ring-ref: the same page twice: {grefs}")
    ports = [queue.port for queue in queues]
    if len(set(ports)) != len(ports):
        raise GuestError(f"event-channel: one port for two queues: {ports}")
    return Rings(blkif.LAYOUTS[name], queues)


def _queue(nodes: Mapping[str, str], folder: str, pages: int) -> Queue:
    if pages == 1 and f"{folder}ring-ref" in nodes:
        grefs = [number(nodes, f"{folder}ring-ref")]
    else:
        grefs = [number(nodes, f"{folder}ring-ref{index}") for index in range(pages)]
    port = number(nodes, f"{folder}event-channel")
    if port == 0:
        raise GuestError(f"{folder}event-channel: port 0 is never valid")
    return Queue(tuple(grefs), port)


def _folders(nodes: Mapping[str, str], max_queues: int) -> list[str]:
    """Where each queue's nodes are: those of a single one lie beside the others, without a folder."""
    count = number(nodes, "multi-queue-num-queues") if "multi-queue-num-queues" in nodes else 1
    if not 0 < count <= max_queues:
        raise GuestError(f"multi-queue-num-queues: {count} queues, 1 to {max_queues} are possible")
    return [""] if count == 1 else [f"queue-{index}/" for index in range(count)]


def _pages(nodes: Mapping[str, str], max_order: int) -> int:
    if "ring-page-order" in nodes:
        order = number(nodes, "ring-page-order")
        if order > max_order:
            raise GuestError(f"ring-page-order: {order} is above the limit of {max_order}")
        return 1 << order
    if "num-ring-pages" in nodes:
        pages = number(nodes, "num-ring-pages")
        if pages == 0 or pages & (pages - 1) or pages > 1 << max_order:
            raise GuestError(f"num-ring-pages: {pages} is no power of two up to {1 << max_order}")
        return pages
    return 1
