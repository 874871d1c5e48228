# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Who looks at channels: hears their kicks, polls for a while, arms them and sleeps (evtchnd/channel.py)."""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd import spurious
from evtchnd._core.words import Mem
from evtchnd.seldom import Seldom

if not cython.compiled:
    from evtchnd._core.words import get32, put32

    def kicked_of(epoll: select.epoll, fds: Mem, most: int) -> int:
        """The descriptors whose kicks are there, into `fds`; -> how many."""
        found = epoll.poll(0, most)
        for i, (fd, _) in enumerate(found):
            put32(fds, 4 * i, fd)
        return len(found)


if TYPE_CHECKING:
    from evtchnd._core.channel import Channel
    from evtchnd.channel import Source

COMPILED: bool = bool(cython.compiled)

log = logging.getLogger("evtchnd.channel")

SLICE_NS = 20_000
"""How long a poll keeps the loop from other descriptors: about what one batch of a full ring costs."""
WAKE_NS = 100_000
"""What waking an idle CPU takes at most (50-100 us were measured): a sleep of up to the longest window plus this may
have been a short pause of the guest, and is worth a try."""
MOST_SLICE_NS = 200_000
TURNS = 4
"""A slice is at least so many times as long as the loop's turn before it: else most of a window goes by unseen where a
turn is slow (an emulated machine: 80 us). Up to MOST_SLICE_NS."""
MOST_IN_VAIN = 4
"""Windows in a row that found nothing end a try."""
MOST_KICKED = 64
"""Channels whose kicks are taken before the loop turns; the epoll keeps the others, in order."""
MOST_SKIPPED = 1024
"""After tries that never paid, a try comes after so many short sleeps: below 0.4 % of the CPU."""

_HEARD = select.EPOLLIN | select.EPOLLET


def _nothing(_name: str, _error: BaseException) -> None: ...


class Poller:
    """Adaptive polling: one a worker.

    max_us: the longest window in us; 0: never polls. Counters: `slices`, `hits` (polls that found work), `misses`
    (windows that found none), `sleeps`. `live`: the channels that are not armed, kept by them; a set in order.
    `defect`, settable: gets a channel's name and what ended its pump and is our own fault, before anyone else.
    `close()` when no channel needs it any more.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, max_us: int = 50, clock: Callable[[], int] = perf_counter_ns
    ) -> None:
        self.loop = loop
        self.window_ns = self._max = max_us * 1000
        self.slices = 0
        self.hits = 0
        self.misses = 0
        self.sleeps = 0
        self._clock = clock
        self.live: dict[Channel, None] = {}
        self.defect: Callable[[str, BaseException], None] = _nothing
        self._sources: tuple[Source, ...] = ()
        self._users: list[Source] = []
        self._next: asyncio.Handle | None = None
        self._busy = False
        self._deadline = 0
        self._slept_at = 0  # 0: awake
        self._left_at = 0
        self._in_vain = 0
        self._skip = 0
        self._skipped = 0
        self._closed = False
        self._kicks = select.epoll()
        self._epoll: Any = self._kicks.fileno() if cython.compiled else self._kicks
        self._fds = Mem(bytearray(4 * MOST_KICKED))
        self._by_fd: list[Channel | None] = []  # a dict's entry would be two more cold cache lines
        self._late: dict[Channel, asyncio.TimerHandle] = {}
        self._lines = Seldom()
        loop.add_reader(self._kicks.fileno(), self._on_kicks)

    def listen(self, channel: Channel) -> None:
        """Hears of the channel's kicks, those included that came before."""
        fd = channel.kick_fd
        self._by_fd.extend([None] * (fd + 1 - len(self._by_fd)))
        self._by_fd[fd] = channel
        # edge-triggered: an eventfd tells of every write, read or not
        self._kicks.register(fd, _HEARD)

    def forget(self, channel: Channel) -> None:
        """Ends that; before the descriptor is closed, since others hold copies of it and epoll goes by the file."""
        self.live.pop(channel, None)
        late = self._late.pop(channel, None)
        if late is not None:
            late.cancel()
        if not self._closed:
            self._by_fd[channel.kick_fd] = None
            with suppress(FileNotFoundError, PermissionError):  # somebody has put another file in its place
                self._kicks.unregister(channel.kick_fd)

    def add_source(self, source: Source) -> None:
        """Looks at `source`, and reads its eventfd when asleep. Counted: one `remove_source` for each."""
        self._users.append(source)
        if source in self._sources:
            return
        self._sources = (*self._sources, source)
        os.set_blocking(source.eventfd, False)
        self.loop.add_reader(source.eventfd, self._on_completion, source)

    def remove_source(self, source: Source) -> None:
        if source not in self._users:
            return
        self._users.remove(source)
        if source not in self._users:
            self._sources = tuple(other for other in self._sources if other is not source)
            self.loop.remove_reader(source.eventfd)

    def close(self) -> None:
        """Leaves the loop; channels and sources stay their owners'. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.loop.remove_reader(self._kicks.fileno())
        self._kicks.close()
        self._by_fd.clear()
        for source in self._sources:
            self.loop.remove_reader(source.eventfd)
        self._sources = ()
        self.live.clear()
        for timer in self._late.values():
            timer.cancel()
        self._late.clear()
        self._users.clear()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def woken(self) -> None:
        """A descriptor woke the loop: decides whether polling is worth a try again."""
        slept_at, self._slept_at = self._slept_at, 0
        if not slept_at or self.window_ns or not self._max:
            return
        if self._clock() - slept_at > self._max + WAKE_NS:
            return
        if self._skipped < self._skip:
            self._skipped += 1
            return
        self._skipped = 0
        self._skip = min(self._skip * 2 + 1, MOST_SKIPPED)
        self.window_ns = self._max
        self._in_vain = 0

    def pumped(self, found: bool) -> None:
        """After a pump: look on for a while, or arm and sleep. Kicks that brought no work do not keep it awake."""
        if self._busy or self._closed:
            return
        if self._next is not None:
            if found:
                self._deadline = self._clock() + self.window_ns
        elif self.window_ns:
            self._left_at = self._clock()
            self._deadline = self._left_at + self.window_ns
            self._next = self.loop.call_soon(self._look)
        else:
            self._sleep()

    def _look(self) -> None:
        """One slice of polling. With a window of 0: one look, when arming found more."""
        self._next = None
        self._busy = True
        self.slices += 1
        clock = self._clock
        now = clock()
        # a turn of the loop that takes long takes a smaller part of the window
        slice = min(max(SLICE_NS, TURNS * (now - self._left_at)), MOST_SLICE_NS)
        end = min(now + slice, self._deadline)
        live = tuple(self.live)
        try:
            while True:
                hit = False
                for channel in live:
                    try:
                        if channel.more or channel.pending():
                            channel.advance()
                            hit = True
                    except Exception as error:
                        channel.fail(error)
                for source in self._sources:
                    if source.pending():
                        source.ready()
                        hit = True
                now = clock()
                if hit:
                    live = tuple(self.live)  # what was stepped may have stepped others
                    if self.window_ns:
                        self.hits += 1
                        self._skip >>= 1
                        self._in_vain = 0
                        self._deadline = now + self.window_ns
                if now >= end:
                    break
        finally:
            self._busy = False
        if self._closed:
            return
        if now < self._deadline:
            self._settle(now)
            self._left_at = now
            self._next = self.loop.call_soon(self._look)
        else:
            self._missed()
            self._sleep()

    def _settle(self, now: int) -> None:
        """Arms what had no work for a window, while others go on."""
        for channel in tuple(self.live):
            if not channel.until:
                channel.until = now + self.window_ns
            elif channel.until <= now:
                self._arm(channel)

    def _arm(self, channel: Channel) -> bool:
        """True: it has more, and stays live; the next look steps it."""
        try:
            if channel.muted:
                channel.count()  # before it is armed: what is kicked from then on counts
            channel.more = channel.arm()
        except Exception as error:
            channel.fail(error)
        if not channel.more:
            self.live.pop(channel, None)
            if channel.muted:
                channel.muted = False
                self._kicks.modify(channel.kick_fd, _HEARD)  # tells at once if it has been kicked
        return channel.more

    def _missed(self) -> None:
        if self.window_ns:
            self.misses += 1
            self._in_vain += 1
            if self._in_vain == MOST_IN_VAIN:
                self.window_ns = 0

    def _sleep(self) -> None:
        """Arms every live ring; any that has more is stepped by the next look."""
        self._busy = True
        more = False
        try:
            for source in self._sources:
                if source.pending():
                    source.ready()
                    more = True
            for channel in tuple(self.live):
                more = self._arm(channel) or more
        finally:
            self._busy = False
        if more:
            self._left_at = self._clock()
            self._deadline = self._left_at + self.window_ns
            self._next = self.loop.call_soon(self._look)
        else:
            self.sleeps += 1
            self._slept_at = self._clock()

    def looks_at(self, channel: Channel) -> bool:
        """It is being polled: a kick of it was not asked for."""
        return self.window_ns > 0 and channel in self.live

    def mute(self, channel: Channel) -> None:
        """Its guest kicks a ring that is not armed: not heard until it is. Such a kick then wakes nobody."""
        channel.muted = True
        self._kicks.modify(channel.kick_fd, 0)

    def delay(self, channel: Channel) -> None:
        """Its guest kicks, and brings nothing: not heard for a while. Whatever else steps it does so as before."""
        delay = spurious.delay_s(channel.idle, len(self._late))
        self._kicks.modify(channel.kick_fd, 0)
        channel.count()  # what is kicked from now on is told apart; it is armed after this, which looks once more
        self._late[channel] = self.loop.call_later(delay, self._listen_again, channel)
        if channel.idle == spurious.FREE + 1 and (more := self._lines.due("late")) is not None:
            log.warning(
                "%s: kicked %d times in a row without work: heard late, by %g to %g ms, until a kick brings some%s",
                *(channel.name, channel.idle, spurious.FIRST_S * 1000, spurious.LONGEST_S * 1000, more),
            )

    def _listen_again(self, channel: Channel) -> None:
        del self._late[channel]
        if channel.count():
            self.pumped(channel.heard())
        elif channel.idle:
            channel.idle -= 1  # it was silent for as long as it was not heard
        heard = channel.kick_fd < len(self._by_fd) and self._by_fd[channel.kick_fd] is channel
        if heard and channel not in self._late and not channel.muted:
            self._kicks.modify(channel.kick_fd, _HEARD)

    def _on_kicks(self) -> None:
        self.woken()
        found = False
        n = kicked_of(self._epoll, self._fds.p, MOST_KICKED)
        for i in range(n):
            channel = self._by_fd[get32(self._fds.p, 4 * i)]
            if channel is not None:  # else closed by one before it
                found = channel.heard() or found
            if self._closed:
                return
        self.pumped(found)

    def _on_completion(self, source: Source) -> None:
        with suppress(BlockingIOError):
            os.read(source.eventfd, 8)
        # What a poll already took leaves its count in the eventfd: that is no reason to look again.
        if source.pending():
            self.woken()
            source.ready()
            self.pumped(True)
