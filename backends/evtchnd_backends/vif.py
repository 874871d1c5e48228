"""One connection of a vif: its queues, and what they share: the TAP, the rate, the groups that the guest has joined."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from evtchnd.channel import Channel, on_failure
from evtchnd.errors import GuestError, HostError
from evtchnd.grants import Page
from evtchnd.netif import CTRL_REQUEST, CTRL_RESPONSE, parse_mac
from evtchnd.ring import BackRing, RingLayout
from evtchnd.seldom import Seldom
from evtchnd.worker.device import VifDevice

from . import netif
from .capture import Captures
from .hashing import Hashing
from .netqueue import Queue
from .rate import Rate
from .tap import GONE, Tap

log = logging.getLogger(__name__)

# XEN_NETBK_MCAST_MAX: as many groups as Linux' netback keeps
MOST_GROUPS = 64

_CTRL = RingLayout(CTRL_REQUEST.size, CTRL_RESPONSE.size, 1)


class Vif:
    """The rings that a frontend has published, served from `open()` to `close()`.

    tap: the TAP, another one after `retap`; no packet goes in or out while `fd` is -1
    """

    def __init__(self, device: VifDevice, tap: Tap, rings: netif.Rings, lines: Seldom, captures: Captures) -> None:
        self.tap = tap
        self.captures = captures
        self.rings = rings
        self.rate = Rate(device.vif.rate)
        self.groups: set[bytes] = set()
        self._device = device
        self._lines = lines
        self._gone = False
        self._filter = False
        self._queues: list[Queue] = []
        self._hashing = Hashing(device.grants, len(rings.queues))
        self._ctrl_page: Page | None = None
        self._ctrl: BackRing | None = None
        self._ctrl_pump: asyncio.Future[None] | None = None
        self._ctrl_channel: Channel | None = None

    async def open(self, failed: Callable[[Exception], None], *, again: bool) -> None:
        """Maps the rings, binds their ports, serves. `again`: the rings live, an earlier worker served them.

        GuestError (a gref, a port), HostError (the TAP): whatever was taken is given back. An error later on goes to
        `failed`.
        """
        device, rings = self._device, self.rings
        try:
            if again and device.connected is not None:
                self.groups |= {bytes.fromhex(group) for group in device.connected["groups"]}
                self._hashing.restore(device.connected["hash"])
            for number, where in enumerate(rings.queues):
                queue = Queue(device, self, number)
                self._queues.append(queue)
                queue.map(where, rings, again=again)
            ports = [port for where in rings.queues for port in dict.fromkeys((where.tx_port, where.rx_port))]
            if rings.ctrl is not None:
                self._ctrl_page = device.grants.map(rings.ctrl[0], write=True)
                self._ctrl = BackRing([self._ctrl_page.view], _CTRL)
                ports.append(rings.ctrl[1])
            bound = await device.bind(ports)
            channels = iter(bound)
            for queue, where in zip(self._queues, rings.queues, strict=True):
                count = 1 if where.tx_port == where.rx_port else 2
                queue.channels = [next(channels) for _ in range(count)]
            await self._report()
            self._set_up(fresh=not again)
            self._spread()
            self.captures.changed = self._captured
            self._captured()
            if self._ctrl is not None:
                self._ctrl_channel = bound[-1]
                self._listen(self._ctrl, bound[-1], failed)
            for queue in self._queues:
                queue.start(failed)
        except BaseException:
            await self.close()
            raise

    def _set_up(self, *, fresh: bool) -> None:
        """The TAP for these rings. What came for an earlier connection, with other offloads, is dropped."""
        rings, tap = self.rings, self.tap
        tap.use(len(rings.queues))
        gso = rings.sg and rings.xdp_headroom <= netif.MOST_HEADROOM_GSO
        tap.offload(csum4=rings.csum4, csum6=rings.csum6, gso4=gso and rings.gso4, gso6=gso and rings.gso6)
        if fresh:
            for queue in self._queues:
                tap.flush(queue.number)
        self._link()

    def _report(self) -> Awaitable[object]:
        """What the next worker has to know: from here on these rings survive this one."""
        groups = sorted(group.hex() for group in self.groups)
        return self._device.connected_as({**self.rings.params(), "groups": groups, "hash": self._hashing.params()})

    def _link(self) -> None:
        """The link as the host sees it: up while the operator wants it and the guest takes packets."""
        stalled = any(queue.stalled for queue in self._queues)
        if not self._gone:
            self.tap.carrier(on=self._device.vif.carrier and not stalled)

    # ---- what the queues ask and tell

    def fd(self, queue: int) -> int:
        """The TAP's queue; -1: nothing may go in or out."""
        return self.tap.fds[queue] if self._device.vif.carrier and not self._gone else -1

    def tap_failed(self, error: int) -> None:
        """A read or a write says so: it is down (packets are dropped meanwhile), or gone."""
        name = self._device.name
        if error in GONE:
            if not self._gone:
                self._gone = True
                for queue in self._queues:
                    queue.silence()
                if (more := self._lines.due("gone")) is not None:
                    log.error("%s: %s was deleted: packets are dropped until it is back%s", name, self.tap.name, more)
        elif error != errno.EIO and (more := self._lines.due(f"tap {error}")) is not None:
            log.error("%s: %s: %s%s", name, self.tap.name, os.strerror(error), more)
        elif error == errno.EIO and (more := self._lines.due("down")) is not None:
            log.warning("%s: %s is down: what the guest sends is dropped%s", name, self.tap.name, more)

    def stalled(self, queue: Queue) -> None:
        """A queue's guest takes nothing any more, or does so again."""
        self._link()
        if (more := self._lines.due("stalled")) is not None:
            what = "stalled: no receive slots, carrier off" if queue.stalled else "receives again"
            log.warning("%s: queue %d %s%s", self._device.name, queue.number, what, more)

    def multicast(self, add: bool, address: bytes) -> bool:
        """A group joined or left; False: there are too many, or this is none."""
        if not add:
            self.groups.discard(address)
        elif address in self.groups:
            return True
        elif len(self.groups) >= MOST_GROUPS or not address[0] & 1:
            return False
        else:
            self.groups.add(address)
        self._report()
        return True

    def target(self, queue: Queue, value: int) -> Queue:
        """The queue that a packet with this hash goes to."""
        number = self._hashing.queue(value)
        return self._queues[number] if number < len(self._queues) else queue

    # ---- the control ring

    def _listen(self, ring: BackRing, channel: Channel, failed: Callable[[Exception], None]) -> None:
        channel.watch(ring.pending, ring.arm)
        self._ctrl_pump = channel.drive(self._obey(ring, channel))
        on_failure(self._ctrl_pump, failed)

    async def _obey(self, ring: BackRing, channel: Channel) -> None:
        """The control ring's pump."""
        again = True
        while True:
            requests = ring.take(ring.entries)
            for request in requests:
                ring.respond(self._hashing.answer(request))
            if requests:
                self._spread()
                self._report()
            if ring.push() or again:
                channel.notify()
                again = False
            await channel.kicked()

    def _spread(self) -> None:
        """Every ring hashes as the guest has asked."""
        for queue in self._queues:
            queue.rx.hasher.set_key(self._hashing.key)
            queue.rx.hasher.kinds = self._hashing.active

    def _captured(self) -> None:
        """Every ring writes for those who look now."""
        for queue in self._queues:
            queue.tx.logs = queue.rx.logs = self.captures.logs

    # ---- changes

    def filter(self, *, on: bool) -> None:
        """Multicast that the guest has not joined is dropped, or not."""
        for queue in self._queues:
            queue.rx.groups = self.groups if on else None

    def headroom(self, size: int) -> None:
        """What comes from now on leaves so many bytes free at the start of each page."""
        self.rings = replace(self.rings, xdp_headroom=size)
        for queue in self._queues:
            queue.rx.headroom = size
        if not self._gone:
            self._set_up(fresh=False)
        self._report()

    def change(self) -> None:
        """The device's `vif` is another one: rate, carrier, mtu."""
        self.rate.limit(self._device.vif.rate)
        for queue in self._queues:
            if not queue.rx.gso:
                queue.rx.most_bytes = queue.frame(gso=False)
            queue.read()
            queue.go_on()
        self._link()

    def retap(self, tap: Tap) -> None:
        """The TAP was made anew."""
        for queue in self._queues:
            queue.silence()
        self.tap = tap
        self._gone = False
        self._set_up(fresh=True)
        for queue in self._queues:
            queue.read()
            queue.channels[0].step()
        log.info("%s: attached to %s again", self._device.name, tap.name)

    # ---- figures

    def counters(self) -> Mapping[str, int]:
        """What only grows, plain integers by name: of all queues, then `queue-N/` of each where there are several."""
        each = [queue.counters() for queue in self._queues]
        total: Counter[str] = Counter()
        for counted in each:
            total.update(counted)
        if len(each) > 1:
            for number, counted in enumerate(each):
                total.update({f"queue-{number}/{name}": value for name, value in counted.items()})
        return total

    def gauges(self) -> Mapping[str, int]:
        """What holds now."""
        return {
            "queues": len(self._queues),
            "starved": sum(queue.starved for queue in self._queues),
            "stalled": sum(queue.stalled for queue in self._queues),
            "waiting_bytes": sum(queue.rx.held for queue in self._queues),
            "groups": len(self.groups),
            "carrier": int(self._device.vif.carrier and not self._gone),
        }

    async def close(self, *, final: bool = False) -> None:
        """Takes nothing more, gives ports and pages back. Nothing is in flight.

        final: the device or the worker ends; the next worker finds the carrier as it is.
        """
        self.captures.forget()
        for queue in self._queues:
            queue.stop()
        if self._ctrl_pump is not None:
            self._ctrl_pump.cancel()
        if not self._gone and not final:
            self.tap.carrier(on=False)
        channels = [channel for queue in self._queues for channel in queue.channels]
        await self._device.unbind(channels + ([self._ctrl_channel] if self._ctrl_channel is not None else []))
        if self._ctrl is not None:
            self._ctrl.close()
        if self._ctrl_page is not None:
            self._ctrl_page.close()
        for queue in self._queues:
            queue.give_back()


def check(device: VifDevice, taps: Sequence[int]) -> Tap:
    """The TAP of a device. HostError: what was handed over cannot be served."""
    try:
        parse_mac(device.vif.mac)
    except GuestError as error:
        raise HostError(f"{device.name}: {error}") from None
    return Tap(taps, device.vif.name or device.name)
