"""blkback: one vbd from its first node in XenStore to its end, over a raw file or block device.

`run` is the life of a device; a `Vbd` is one connection of it, with one ring and one event channel a queue.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from evtchnd import xenbus
from evtchnd.abi import XenbusState
from evtchnd.errors import GuestError
from evtchnd.seldom import Seldom
from evtchnd.worker.device import Device
from evtchnd.xenbus import Step

from . import blkif
from .disk import RawDisk
from .vbd import Vbd

log = logging.getLogger(__name__)


async def run(device: Device) -> None:
    """Serves `device` until it is detached (returns) or cancelled.

    A guest that breaks the rules loses its connection: one log line, state Closing; it may begin again. HostError,
    ConnectionError: this host cannot serve it.
    """
    vbd: Vbd | None = None
    totals: Counter[str] = Counter()

    def stats() -> Mapping[str, int]:
        now = Counter(totals)
        if vbd is not None:
            now.update(vbd.counters())
            now.update(vbd.gauges())
        return now

    async def connect(rings: blkif.Rings, *, again: bool) -> None:
        nonlocal vbd
        new = Vbd(device, disk, rings)
        await new.open(bus.fail, again=again)
        vbd = new
        say(log.info, "attached again" if again else "connected", rings)

    async def published() -> blkif.Rings:
        """What the frontend says of its rings."""
        options = device.options
        nodes = await bus.frontend_nodes(blkif.SHARED_NODES)
        most = {"max_order": options.max_ring_page_order, "max_queues": options.max_queues}
        nodes |= await bus.frontend_nodes(blkif.queue_nodes(nodes, **most))
        return blkif.frontend_rings(nodes, **most)

    async def resize(sectors: int) -> None:
        # What was in the guest's hands stays valid: the new end first, then the guest learns of it.
        disk.resize(sectors)
        if vbd is not None:
            vbd.resize(sectors)
        await bus.update({"sectors": str(sectors)})
        log.info("%s: has %d sectors of 512 bytes now", device.name, sectors)

    async def let_go() -> None:
        nonlocal vbd
        if vbd is not None:
            await vbd.close()
            totals.update(vbd.counters())
            vbd = None
        if device.connected is not None:  # also after an attempt to attach again that failed
            await device.connected_as(None)

    def say(how: Callable[..., None], what: str, detail: object) -> None:
        more = lines.due(what)
        if more is not None:
            how("%s: %s: %s%s", device.name, what, detail, more)

    lines = Seldom()

    disk = RawDisk(
        device.disk_fd,
        readonly=device.readonly,
        uring=device.uring,
        eventfd=device.completions,
        direct=device.direct,
        sectors=device.sectors,
        sector_size=device.sector_size,
        holes=device.holes,
        failed=device.failed,
        on_failed=device.flush_failed,
        poller=device.poller,
        name=device.name,
    )
    device.stats = stats
    device.resize = resize
    bus = xenbus.Backend(device.store, device.name, device.backend_path, device.frontend_path)
    async with bus:
        try:
            # the toolstack's word, as Linux' backend reads it: not there is yes
            if await device.store.get(f"{device.backend_path}/discard-enable") == "0":
                disk.discard = None
            if device.connected is not None and await bus.resume():
                try:
                    await connect(blkif.Rings.from_params(device.connected), again=True)
                except GuestError as error:
                    bus.fail(error)
            async for step in bus:
                match step:
                    case Step.ANNOUNCE:
                        await let_go()
                        await bus.announce(features(device, disk))
                    case Step.CONNECT:
                        try:
                            await connect(await published(), again=False)
                            await bus.switch(XenbusState.CONNECTED)
                        except GuestError as error:
                            bus.fail(error)
                    case Step.CLOSE:
                        await bus.switch(XenbusState.CLOSING)
                    case Step.FAIL:
                        say(log.error, "stopped", bus.failure)
                        await let_go()
                        await bus.switch(XenbusState.CLOSING)
                    case Step.SHUT:
                        await let_go()
                        await bus.switch(XenbusState.CLOSED)
        finally:
            if vbd is not None:
                await vbd.close(final=True)
            await disk.close()
            device.hung = bool(disk.inflight)
            if vbd is not None and not disk.inflight:
                vbd.give_back()


def features(device: Device, disk: RawDisk) -> dict[str, str]:
    """The backend's nodes for this disk."""
    return blkif.features(
        sectors=disk.sectors,
        sector_size=disk.sector_size,
        physical_sector_size=disk.physical_sector_size,
        readonly=device.readonly,
        cdrom=device.cdrom,
        max_queues=device.options.max_queues,
        max_ring_page_order=device.options.max_ring_page_order,
        max_indirect_segments=device.options.max_indirect_segments,
        discard=disk.discard,
    )
