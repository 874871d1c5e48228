"""One queue of a vif: a transmit and a receive ring, one or two event channels, one queue of the TAP.

Both directions are stepped straight from what woke them: a kick or a poll that hit for what the guest sends, the loop's
reader of the TAP, or a poll of it, for what it receives. Nothing is in flight between two steps. What the guest sends
makes the other direction be polled, too, so that an answer is read without a turn of the loop.

A guest that posts no pages stops its receive ring: the TAP is not read any more (its reader is taken out, so that it
does not spin), the ring is armed and the guest's kick goes on with it; one that does not kick (no feature-rx-notify) is
looked at every LOOK_S. What waits longer than `drain_s` is dropped; after `stall_s` the vif is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from evtchnd._core import RxRing, TxRing
from evtchnd._core.netrx import NO_SLOTS, STEER, TAP_ERROR
from evtchnd._core.nettx import NO_CREDIT, TAP_FULL
from evtchnd.answers import Answers
from evtchnd.channel import Channel, on_failure
from evtchnd.grants import Page
from evtchnd.netif import MOST_FRAME
from evtchnd.worker.device import VifDevice

from . import netif
from .tap import GONE

if TYPE_CHECKING:
    from .vif import Vif

# Slots before the other direction, and the guest, hear of it. Of what it sends, half a ring: Linux' netfront asks to be
# told then, and refills that while the other half is served. Of what it receives, a quarter.
SENT = 128
BATCH = 64
# Linux' netback looks as often at a frontend that does not kick (its drain timeout then).
LOOK_S = 0.03
# A TAP that refuses reads for another reason than that it is gone is tried again this often.
AGAIN_S = 1.0


class Queue:
    """`map()`, then `channels`, then `start()`; `stop()`, `give_back()`."""

    tx: TxRing
    rx: RxRing

    def __init__(self, device: VifDevice, vif: Vif, number: int) -> None:
        self.number = number
        self.channels: list[Channel] = []
        self.starved = False
        self.stalled = False
        self._device = device
        self._vif = vif
        self._loop = device.loop
        self._pages: list[Page] = []
        self._answers: Answers | None = None
        self._mapped = False
        self._pumps: list[asyncio.Future[None]] = []
        self._reading = -1  # the descriptor that the loop reads
        self._writing = -1
        self._since = 0.0
        self._flushed = 0
        self._out_of_credit: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None

    def map(self, where: netif.Queue, rings: netif.Rings, *, again: bool) -> None:
        """The rings' pages. `again`: an earlier worker served them, and may have died at it. GuestError."""
        device = self._device
        for gref in (where.tx_gref, where.rx_gref):
            self._pages.append(device.grants.map(gref, write=True))
        self._answers = answers = Answers(device.answers_fd, self.number)
        gso = rings.sg and rings.csum4 and rings.csum6 and (rings.gso4 or rings.gso6)
        tx, rx = self._pages
        self.tx = TxRing(device.grants, tx, answers.tx, again=again)
        self.rx = RxRing(device.grants, rx, answers.rx, again=again, most_bytes=self.frame(gso), gso=gso, sg=rings.sg)
        self.rx.headroom = rings.xdp_headroom
        self._mapped = True
        self.tx.multicast = self._vif.multicast
        self.tx.queue = self.rx.queue = self.number

    def frame(self, gso: bool) -> int:
        """The longest frame that the TAP has for the guest."""
        return MOST_FRAME if gso else min(self._device.vif.mtu + 22, MOST_FRAME)

    def start(self, failed: Callable[[Exception], None]) -> None:
        """Serves."""
        tx, rx = self.channels[0], self.channels[-1]
        if tx is rx:
            self._drive(tx, self._both_pending, self._both_arm, failed, send=True, receive=True)
        else:
            self._drive(tx, self._tx_pending, self._tx_arm, failed, send=True, receive=False)
            self._drive(rx, self._rx_pending, self._rx_arm, failed, send=False, receive=True)
        self.read()

    def _drive(
        self,
        channel: Channel,
        pending: Callable[[], bool],
        arm: Callable[[], bool],
        failed: Callable[[Exception], None],
        *,
        send: bool,
        receive: bool,
    ) -> None:
        channel.watch(pending, arm)
        pump = channel.drive(self._serve(channel, send=send, receive=receive))
        self._pumps.append(pump)
        on_failure(pump, failed)

    async def _serve(self, channel: Channel, *, send: bool, receive: bool) -> None:
        """The pump: no wait but the one for work."""
        again = True  # an earlier worker may have died between its push and its notification
        while True:
            if again:
                channel.notify()
                again = False
            if send:
                self._send()
            if receive:
                self._receive()
            elif self.channels[-1] not in self._device.poller.live:
                self.channels[-1].step()  # for the answer, which is looked for from now on
            await channel.kicked()

    # ---- guest to TAP

    def _send(self) -> None:
        """One batch, or some: what has come meanwhile."""
        tx, vif = self.tx, self._vif
        if self._out_of_credit is not None or self._writing >= 0:
            return
        for _ in range(4):
            tx.credit = vif.rate.left()
            fd = vif.fd(self.number)
            tx.run(fd, SENT)
            vif.rate.spent(tx.credit)
            if tx.push():
                self.channels[0].notify()
            if tx.logs is not None:
                vif.captures.flush()
            if tx.tap_error:
                if fd >= 0:
                    vif.tap_failed(tx.tap_error)
                tx.tap_error = 0
            if tx.stopped == NO_CREDIT:
                self._out_of_credit = self._loop.call_later(vif.rate.wait(), self.go_on)
                break
            if tx.stopped == TAP_FULL:
                self._writing = fd
                self._loop.add_writer(self._writing, self._writable)
                break
            if not tx.pending():
                break

    def go_on(self) -> None:
        """There is credit again, or another limit."""
        if self._out_of_credit is not None:
            self._out_of_credit.cancel()
            self._out_of_credit = None
        if self._pumps:
            self.channels[0].step()

    def _writable(self) -> None:
        self._loop.remove_writer(self._writing)
        self._writing = -1
        self.channels[0].step()

    def _tx_pending(self) -> bool:
        return self._out_of_credit is None and self._writing < 0 and self.tx.pending()

    def _tx_arm(self) -> bool:
        return self._out_of_credit is None and self._writing < 0 and self.tx.arm()

    # ---- TAP to guest

    def read(self) -> None:
        """Hears of the TAP's packets (again: it may be another TAP now)."""
        self.silence()
        fd = self._vif.fd(self.number)
        if fd >= 0 and not self.starved and self._pumps:
            self._reading = fd
            self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        self._device.poller.woken()
        self.channels[-1].step()

    def silence(self) -> None:
        """Hears of them no more. Before the descriptor is closed."""
        if self._reading >= 0:
            self._loop.remove_reader(self._reading)
            self._reading = -1
        if self._writing >= 0:
            self._loop.remove_writer(self._writing)
            self._writing = -1
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _receive(self) -> None:
        """One batch."""
        rx = self.rx
        fd = self._vif.fd(self.number)
        if fd < 0 or (self._reading < 0 and not self.starved):
            return
        before = rx.posted.used
        rx.run(fd, BATCH)
        if rx.stopped == STEER:
            self._steer(fd)
        if rx.stopped == NO_SLOTS:
            self._starve(moved=rx.posted.used != before)
        elif self.starved:
            self._feed()
        if rx.stopped == TAP_ERROR:
            self._tap_error(rx.tap_error)
        if rx.push():
            self.channels[-1].notify()
        if rx.logs is not None:
            self._vif.captures.flush()

    def _steer(self, fd: int) -> None:
        """The guest has a say in which queue gets what: packets are read one by one, and some go to others."""
        rx = self.rx
        for _ in range(BATCH):
            target = self._vif.target(self, rx.hash_value) if rx.hash_type >= 0 else self
            if target is not self:
                if target.rx.adopt(rx):
                    target.adopted()
                else:
                    rx.drop_held()  # one waits there for pages already
            elif not rx.settle():
                return
            rx.run(fd, 1)
            if rx.stopped != STEER:
                return
        self._loop.call_soon(self.channels[-1].step)

    def adopted(self) -> None:
        """Another queue has read a packet that is this one's."""
        if self.rx.settle():
            if self.rx.push():
                self.channels[-1].notify()
            if self.rx.logs is not None:
                self._vif.captures.flush()
        else:
            self._loop.call_soon(self.channels[-1].step)

    def _tap_error(self, error: int) -> None:
        """No more reads: a TAP that is gone is readable for ever. Others are tried again in a while."""
        self.silence()
        self._vif.tap_failed(error)
        if error not in GONE:
            self._retry = self._loop.call_later(AGAIN_S, self.read)

    def _starve(self, *, moved: bool) -> None:
        """The guest has posted no page, or too few for the packet that waits."""
        now = self._loop.time()
        if not self.starved or moved:
            self._since = now
        if not self.starved:
            self.starved = True
            self.silence()
        if self._watch is None:
            self._watch = self._loop.call_later(self._pause(), self._starving)

    def _pause(self) -> float:
        vif = self._device.vif
        return max(min(vif.drain_s, vif.stall_s or vif.drain_s), 0.01) if self._vif.rings.rx_notify else LOOK_S

    def _starving(self) -> None:
        """Time has passed."""
        self._watch = None
        if not self.starved:
            return
        vif = self._device.vif
        waited = self._loop.time() - self._since
        if waited >= vif.drain_s:
            self.rx.drop_held()
            self._flushed += self._vif.tap.flush(self.number) if self._vif.fd(self.number) >= 0 else 0
        if waited >= vif.stall_s > 0 and self._vif.rings.rx_notify and not self.stalled:
            self.stalled = True
            self._vif.stalled(self)
        self._watch = self._loop.call_later(self._pause(), self._starving)
        self.channels[-1].step()

    def _feed(self) -> None:
        """There are pages again."""
        self.starved = False
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self.stalled:
            self.stalled = False
            self._vif.stalled(self)
        self.read()

    def _rx_pending(self) -> bool:
        """Pages, when they were missed; else a packet."""
        if self.starved:
            return self.rx.pending()
        return self._reading >= 0 and self.rx.waits(self._reading)

    def _rx_arm(self) -> bool:
        return self.starved and self.rx.arm()

    def _both_pending(self) -> bool:
        return self._tx_pending() or self._rx_pending()

    def _both_arm(self) -> bool:
        sends = self._tx_arm()
        return self._rx_arm() or sends

    # ---- the end

    def counters(self) -> dict[str, int]:
        """What only grows, plain integers by name."""
        if not self._mapped:
            return {}
        tx, rx = self.tx, self.rx
        return {
            "tx_packets": tx.packets,
            "tx_bytes": tx.bytes,
            "tx_slots": tx.slots,
            "tx_dropped_bad": tx.bad,
            "tx_dropped_grant": tx.no_grant,
            "tx_dropped_header": tx.no_header,
            "tx_dropped_tap": tx.no_tap,
            "tx_dropped_refused": tx.refused,
            "rx_packets": rx.packets,
            "rx_bytes": rx.bytes,
            "rx_slots": rx.posted.used,
            "rx_dropped_long": rx.too_long,
            "rx_dropped_multicast": rx.unwanted,
            "rx_dropped_expired": rx.expired + self._flushed,
            "rx_bad_grants": rx.posted.bad_grants,
            "rx_moved": rx.moved,
            "rx_waited": rx.waited,
            "rx_completed": rx.completed,
            "kicks": sum(channel.kicks for channel in self.channels),
            "wakeups": sum(channel.wakeups for channel in self.channels),
            "spurious_kicks": sum(channel.spurious for channel in self.channels),
            "notifications": sum(channel.notifications for channel in self.channels),
        }

    def stop(self) -> None:
        """Takes nothing more."""
        self.silence()
        for timer in (self._out_of_credit, self._watch):
            if timer is not None:
                timer.cancel()
        self._out_of_credit = self._watch = None
        for pump in self._pumps:
            pump.cancel()

    def give_back(self) -> None:
        """Unmaps. Idempotent."""
        if self._mapped:
            self.tx.close()
            self.rx.close()
        if self._answers is not None:
            self._answers.close()
        for page in self._pages:
            page.close()
