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

__all__ = ["FRONTEND_NODES", "Op", "Ring", "Status", "features", "frontend_ring"]

# No `protocol` node: the header says "native", but Linux' and QEMU's backends on x86 take it for the 32-bit layout,
# also for 64-bit guests; every frontend that is in use was tested against one of them.
DEFAULT_PROTOCOL = blkif.X86_32.name

_U32 = 1 << 32


@dataclass(frozen=True)
class Ring:
    """Where a frontend has its ring: `grefs` of 1, 2, 4, 8 or 16 pages, `port`, and the layout of its entries."""

    grefs: tuple[int, ...]
    port: int
    layout: Layout

    def __str__(self) -> str:
        pages = len(self.grefs)
        return f"{self.layout.name}, {pages} ring page{'s' if pages > 1 else ''}, port {self.port}"

    def params(self) -> dict[str, Any]:
        """Plain values that `from_params` understands."""
        return {"grefs": list(self.grefs), "port": self.port, "protocol": self.layout.name}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Ring:
        return cls(tuple(params["grefs"]), params["port"], blkif.LAYOUTS[params["protocol"]])


def features(
    *,
    sectors: int,
    sector_size: int,
    physical_sector_size: int,
    readonly: bool,
    cdrom: bool,
    max_ring_page_order: int,
    max_indirect_segments: int,
    discard: tuple[int, int] | None = None,
) -> dict[str, str]:
    """The backend's nodes. `discard`: granularity and alignment in bytes, None where the disk cannot.

    feature-persistent is 0: guest RAM is mapped, and with it blkfront would copy every page. There is no barrier,
    only a flush. The deprecated twins of max-ring-page-order are for frontends of Citrix' and old Windows drivers.
    """
    info = (blkif.VDISK_READONLY if readonly else 0) | (blkif.VDISK_CDROM if cdrom else 0)
    nodes: dict[str, int] = {
        "sectors": sectors,
        "sector-size": sector_size,
        "physical-sector-size": physical_sector_size,
        "info": info,
        "feature-flush-cache": 1,
        "feature-persistent": 0,
        "max-ring-page-order": max_ring_page_order,
        "max-ring-pages": 1 << max_ring_page_order,
    }
    if max_indirect_segments:
        nodes["feature-max-indirect-segments"] = max_indirect_segments
    if discard is not None:
        nodes |= {"feature-discard": 1, "discard-granularity": discard[0], "discard-alignment": discard[1]}
    return {name: str(value) for name, value in nodes.items()}


FRONTEND_NODES = (
    "ring-page-order",
    "num-ring-pages",
    "ring-ref",
    *(f"ring-ref{index}" for index in range(16)),
    "event-channel",
    "protocol",
)
"""Every node of the frontend that `frontend_ring` looks at."""


def frontend_ring(nodes: Mapping[str, str], *, max_order: int) -> Ring:
    """What the frontend published; `nodes` holds those of FRONTEND_NODES that exist.

    Linux writes `ring-ref` for one page and `ring-refN` with `ring-page-order` for more; others write `ring-ref0`
    for one. GuestError names the node that is missing, no number, or out of range.
    """
    name = nodes.get("protocol", DEFAULT_PROTOCOL)
    if name not in blkif.LAYOUTS:
        raise GuestError(f"protocol: {_quoted(name)} is none of {', '.join(blkif.LAYOUTS)}")
    pages = _pages(nodes, max_order)
    if pages == 1 and "ring-ref" in nodes:
        grefs = [_number(nodes, "ring-ref")]
    else:
        grefs = [_number(nodes, f"ring-ref{index}") for index in range(pages)]
    if len(set(grefs)) != len(grefs):
        raise GuestError(f"ring-ref: the same page twice: {grefs}")
    port = _number(nodes, "event-channel")
    if port == 0:
        raise GuestError("event-channel: port 0 is never valid")
    return Ring(tuple(grefs), port, blkif.LAYOUTS[name])


def _pages(nodes: Mapping[str, str], max_order: int) -> int:
    if "ring-page-order" in nodes:
        order = _number(nodes, "ring-page-order")
        if order > max_order:
            raise GuestError(f"ring-page-order: {order} is above the limit of {max_order}")
        return 1 << order
    if "num-ring-pages" in nodes:
        pages = _number(nodes, "num-ring-pages")
        if pages == 0 or pages & (pages - 1) or pages > 1 << max_order:
            raise GuestError(f"num-ring-pages: {pages} is no power of two up to {1 << max_order}")
        return pages
    return 1


def _number(nodes: Mapping[str, str], name: str) -> int:
    """A decimal u32: what "%u" prints, and nothing else that int() would take (signs, blanks, underscores)."""
    text = nodes.get(name)
    if text is None:
        raise GuestError(f"{name}: missing")
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < _U32):
        raise GuestError(f"{name}: {_quoted(text)} is no number")
    return int(text)


def _quoted(text: str) -> str:
    """A guest's text for a log line: printable, short."""
    return repr(text if len(text) <= 32 else text[:32] + "...")
