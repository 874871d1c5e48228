"""netback: one vif from its first node in XenStore to its end, over a TAP that the control plane made.

`run` is the life of a device; a `Vif` is one connection of it, with a pair of rings a queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from evtchnd import xenbus
from evtchnd.abi import XenbusState
from evtchnd.channel import on_failure
from evtchnd.errors import GuestError
from evtchnd.seldom import Seldom
from evtchnd.worker import messages as m
from evtchnd.worker.device import VifDevice
from evtchnd.xenbus import Step

from . import netif
from .capture import Captures
from .vif import Vif, check

log = logging.getLogger(__name__)

# How long the host's side (bridge, script) may take; libxl gives its hotplug scripts 40 s
HOTPLUG_S = 40.0


async def run(device: VifDevice) -> None:
    """Serves `device` until it is detached (returns) or cancelled.

    A guest that breaks the rules loses its connection: one log line, state Closing; it may begin again. HostError,
    ConnectionError: this host cannot serve it.
    """
    vif: Vif | None = None
    totals: Counter[str] = Counter()
    captures = Captures(device)
    tap = check(device, device.taps)
    if device.connected is None:
        tap.carrier(on=False)  # else it is up: a worker that is replaced shall not be seen

    def stats() -> Mapping[str, int]:
        now = Counter(totals)
        if vif is not None:
            now.update(vif.counters())
            now.update(vif.gauges())
        now.update(captures.stats())
        return now

    async def connect(rings: netif.Rings, *, again: bool) -> None:
        nonlocal vif
        new = Vif(device, tap, rings, lines, captures)
        await new.open(bus.fail, again=again)
        vif = new
        await filtering()
        say(log.info, "attached again" if again else "connected", rings)

    async def published() -> netif.Rings:
        """What the frontend says of its rings."""
        nodes = await bus.frontend_nodes(netif.SHARED_NODES)
        nodes |= await bus.frontend_nodes(netif.queue_nodes(nodes, max_queues=device.vif.queues))
        return netif.frontend_rings(nodes, max_queues=device.vif.queues)

    async def filtering() -> None:
        asked = await device.store.get(f"{device.frontend_path}/request-multicast-control")
        if vif is not None:
            vif.filter(on=asked not in (None, "", "0"))

    async def follow() -> None:
        async with device.store.watch(f"{device.frontend_path}/request-multicast-control") as watch:
            async for _ in watch:
                await filtering()

    async def hotplugged() -> None:
        """Waits until the host's side is there, as Linux' netback does. GuestError, so that the guest may try again."""
        path = f"{device.backend_path}/hotplug-status"
        async with device.store.watch(path) as watch, asyncio.timeout(HOTPLUG_S):
            async for _ in watch:
                status = await device.store.get(path)
                if status in (None, "connected"):  # none: nobody has anything to do there
                    return
                if status == "error":
                    break
        raise GuestError("hotplug-status: the host's side of the interface is not there")

    async def reconfigure() -> None:
        """What a frontend changes while it is connected: room for XDP (Linux' read_xenbus_frontend_xdp)."""
        nodes = await bus.frontend_nodes(["xdp-headroom"])
        if vif is not None:
            vif.headroom(netif.xdp_headroom(nodes))
        await bus.switch(XenbusState.CONNECTED if bus.front is XenbusState.CONNECTED else XenbusState.RECONFIGURED)

    async def change(new: m.Vif) -> None:
        moved = {
            name: str(int(getattr(new, name)))
            for name in ("mtu", "carrier")
            if getattr(new, name) != getattr(device.vif, name)
        }
        device.vif = new
        if vif is not None:
            vif.change()
        if moved:
            await bus.update(moved)

    def retap(taps: Sequence[int]) -> None:
        nonlocal tap
        tap = check(device, taps)
        device.taps = list(taps)
        if vif is not None:
            vif.retap(tap)
        else:
            tap.carrier(on=False)

    async def let_go() -> None:
        nonlocal vif
        if vif is not None:
            old, vif = vif, None
            await old.close()
            totals.update(old.counters())
        if device.connected is not None:  # also after an attempt to attach again that failed
            await device.connected_as(None)

    def say(how: Callable[..., None], what: str, detail: object) -> None:
        more = lines.due(what)
        if more is not None:
            how("%s: %s: %s%s", device.name, what, detail, more)

    lines = Seldom()
    device.stats = stats
    device.change = change
    device.retap = retap
    device.capture = captures.accept
    bus = xenbus.Backend(device.store, device.name, device.backend_path, device.frontend_path, reconfigures=True)
    async with bus:
        follower = device.loop.create_task(follow())
        on_failure(follower, bus.fail)
        try:
            if device.connected is not None and await bus.resume():
                try:
                    await connect(netif.Rings.from_params(device.connected), again=True)
                except GuestError as error:
                    bus.fail(error)
            async for step in bus:
                match step:
                    case Step.ANNOUNCE:
                        await let_go()
                        await bus.announce(features(device))
                    case Step.CONNECT:
                        try:
                            await hotplugged()
                            await connect(await published(), again=False)
                            await bus.switch(XenbusState.CONNECTED)
                        except (GuestError, TimeoutError) as error:
                            bus.fail(error)
                    case Step.RECONFIGURE:
                        try:
                            await reconfigure()
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
            follower.cancel()
            if vif is not None:
                await vif.close(final=True)
            await captures.close()


def features(device: VifDevice) -> dict[str, str]:
    """The backend's nodes for this vif."""
    vif = device.vif
    return netif.features(mtu=vif.mtu, carrier=vif.carrier, max_queues=vif.queues, ctrl=vif.hash)
