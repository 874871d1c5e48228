# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""A channel and its poller (evtchnd/channel.py tells how they work): what runs between a kick and its answer."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd import spurious
from evtchnd._core.words import Mem
from evtchnd.errors import EvtchndError, VmmError
from evtchnd.seldom import Seldom

if not cython.compiled:
    from evtchnd._core.words import get32, put32

    def kicked_of(epoll: select.epoll, fds: Mem, most: int) -> int:
        """The descriptors whose kicks are there, into `fds`; -> how many."""
        found = epoll.poll(0, most)
        for i, (fd, _) in enumerate(found):
            put32(fds, 4 * i, fd)
        return len(found)

    def signal(eventfd: int) -> int:
        """0, or -errno."""
        try:
            os.eventfd_write(eventfd, 1)
        except OSError as error:
            return -(error.errno or 0)
        return 0


if TYPE_CHECKING:
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


class _Kick:
    """What a pump awaits: hands control back to whoever steps it, once."""

    __slots__ = ("_once",)

    def __init__(self) -> None:
        self._once = (self,)

    def __await__(self) -> Iterator[_Kick]:  # a tuple's iterator costs less than a generator
        return iter(self._once)


_KICK: Any = _Kick()


def _no() -> bool:
    return False


def _nothing(_name: str, _error: BaseException) -> None: ...


class Channel:
    """One event channel. Owns both descriptors: `close()` closes them.

    kick, notify: eventfds (VmmError otherwise; also for a kick that is an EFD_SEMAPHORE one, which would have to be
    read once a kick, 2**64 times if someone wrote that into it). Both are made non-blocking.
    name: for log lines and errors, as "domain 7: vbd 51712". Without a poller there is no polling: the ring is armed
    after every pump.

    Counters, plain integers: `kicks` (see there), `wakeups` (times that the loop heard of them), `spurious` (those that
    brought no work), `notifications`.
    """

    if TYPE_CHECKING:
        kick_fd: int
        notify_fd: int
        name: str
        wakeups: int
        spurious: int
        notifications: int
        closed: bool
        more: bool
        muted: bool
        until: int
        idle: int

    def __init__(self, kick: int, notify: int, *, name: str, poller: Poller | None = None) -> None:
        check_eventfd(kick, f"{name}: kick", semaphore_ok=False)
        check_eventfd(notify, f"{name}: notify", semaphore_ok=True)
        # The other end shares these file flags and could take O_NONBLOCK away again: it would stall its own domain.
        os.set_blocking(kick, False)
        os.set_blocking(notify, False)
        self.kick_fd = kick
        self.notify_fd = notify
        self.name = name
        self.wakeups = 0
        self.spurious = 0
        self.notifications = 0
        self.closed = False
        self._kicks = 0
        self._poller = poller
        self._own = False  # the poller is this channel's alone
        self._coro: Coroutine[Any, Any, None] | None = None
        self._done: asyncio.Future[None] | None = None
        self._running = False
        self._again = False
        # The poller's view; see Poller._look, _arm and mute. `until`: when it had no work for a window; 0: it just had.
        # `idle`: kicks in a row that brought none.
        self.pending: Callable[[], bool] = _no
        self.arm: Callable[[], bool] = _no
        self.more = False
        self.muted = False
        self.until = 0
        self.idle = 0

    @property
    def kicks(self) -> int:
        """What the kick eventfd has counted, by a read of it. Kicks fold: `wakeups` are fewer."""
        if self.count():
            self.step()  # epoll reports what is readable when it is asked: the kick that was just read is lost to it
        return self._kicks

    def count(self) -> int:
        """Takes what the kick eventfd has counted: those kicks are not heard any more."""
        count = 0
        if not self.closed:
            with suppress(BlockingIOError):
                count = os.eventfd_read(self.kick_fd)
        self._kicks += count
        return count

    def kicked(self) -> Awaitable[None]:
        """Returns when there may be work: a kick, a poll that hit, `step()`. The first one waits, too.

        Only inside a coroutine that `drive()` steps.
        """
        kick: Awaitable[None] = _KICK
        return kick

    def drive(self, coro: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        """Runs `coro` up to its first `kicked()` (it may work there already), then steps it from the reader callback.

        Its result or exception lands in the future. Cancelling the future closes the coroutine (GeneratorExit at its
        `await`). Call it once a channel, on the running loop.
        """
        if self._coro is not None or self.closed:
            coro.close()
            raise RuntimeError(f"{self.name}: a channel drives one coroutine")
        loop = asyncio.get_running_loop()
        if self._poller is None:
            self._poller = Poller(loop, max_us=0)
            self._own = True
        self._coro = coro
        self._done = loop.create_future()
        self._done.add_done_callback(self._ended)
        self._poller.listen(self)
        done = self._done
        self.advance()
        self._poller.pumped(True)
        return done

    def watch(self, pending: Callable[[], bool], arm: Callable[[], bool]) -> None:
        """What the poller looks at, and how it arms the ring before it looks away.

        pending: cheap, no effects; True: the pump has something to take. arm: True: there is something after all (to be
        seen after a full fence: a kick that came meanwhile may have been read already).
        Both must say False when the pump *cannot take more now* (its own bound reached), or the loop spins. What they
        raise ends the coroutine, with that error in `drive()`'s future.
        """
        if self.closed:
            return
        self.pending = pending
        self.arm = arm

    def step(self) -> None:
        """Something else (a completion, a restart) wakes the coroutine at once.

        Called from within the pump itself, the next `kicked()` returns immediately.
        """
        if self._running:
            self._again = True
        elif self._coro is not None:
            self.advance()
            poller = self._poller
            if poller is not None:
                poller.pumped(True)

    def notify(self) -> None:
        """Raises the guest's event: one eventfd write, never blocks."""
        self.notifications += 1
        error = signal(self.notify_fd)
        if error and error != -errno.EAGAIN:  # the counter is full, so an event is pending anyway
            raise OSError(-error, os.strerror(-error))

    def close(self) -> None:
        """Ends the coroutine, leaves the loop, closes both descriptors. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._cancel()
        for fd in {self.kick_fd, self.notify_fd}:
            os.close(fd)

    def advance(self) -> None:
        """One pump, without the poller's part: for the poller itself."""
        coro = self._coro
        if coro is None or self._running:
            self._again = self._running
            return
        self._running = True
        self._again = False
        try:
            while True:
                if coro.send(None) is not _KICK:
                    coro.throw(RuntimeError(f"{self.name}: a pump awaits kicked() and nothing else"))
                if not self._again:
                    break
                self._again = False
        except StopIteration:
            self.fail(None)
        except Exception as error:
            self.fail(error)
        except asyncio.CancelledError:
            self._cancel()
        finally:
            self._running = False
        if self._coro is not coro:  # closed from within its own pump
            coro.close()
            return
        self.more = False
        self.until = self.idle = 0
        if self._poller is not None:
            self._poller.live[self] = None

    def heard(self) -> bool:
        """It was kicked: one pump, for the poller. Whether its ring had something."""
        self.wakeups += 1
        pending, poller = self.pending, self._poller
        try:
            found = pending()
        except Exception as error:
            self.fail(error)
            return False
        looked_at = poller is not None and poller.looks_at(self) and pending is not _no
        if looked_at and poller is not None:
            poller.mute(self)
        if found:
            self.advance()
        elif not looked_at:
            self._heard_in_vain()
        else:
            self.spurious += 1
        return found

    def _heard_in_vain(self) -> None:
        """A kick without work. It is stepped all the same: a pump may have more to look at than `pending` says."""
        idle = self.idle + 1
        watched = self.pending is not _no
        self.advance()
        if watched and self._coro is not None and self._poller is not None:
            self.spurious += 1
            self.idle = idle
            if idle > spurious.FREE:
                self._poller.delay(self)

    def fail(self, error: Exception | None) -> None:
        """The coroutine is over (for the poller, too)."""
        if self._poller is not None and error is not None and not isinstance(error, EvtchndError):
            self._poller.defect(self.name, error)
        done = self._done
        self._leave()
        if done is None or done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _cancel(self) -> None:
        done = self._done
        self._leave()
        if done is not None:
            done.cancel()

    def _ended(self, _: asyncio.Future[None]) -> None:
        self._leave()

    def _leave(self) -> None:
        coro, self._coro = self._coro, None
        self.pending = self.arm = _no
        self.more = self.muted = False
        if self._poller is not None and self._done is not None:
            self._poller.forget(self)
            self._done = None
            if self._own:
                self._poller.close()
        # close() of a coroutine that is running (a pump that closes its own channel) raises: it ends by itself.
        if coro is not None and not self._running:
            coro.close()


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


def check_eventfd(fd: int, what: str, *, semaphore_ok: bool) -> None:
    """VmmError unless `fd` is an eventfd. The kernel tells in fdinfo (semaphores since 6.5; before, they pass)."""
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except FileNotFoundError:
        raise VmmError(f"{what}: descriptor {fd} is closed") from None
    except PermissionError:
        return  # a worker in its sandbox: the control plane, where it came from, has looked
    if "eventfd-count:" not in info:
        raise VmmError(f"{what}: descriptor {fd} is no eventfd")
    if not semaphore_ok and "eventfd-semaphore: 1" in info:
        raise VmmError(f"{what}: an EFD_SEMAPHORE eventfd counts down one by one: make it without")
