"""An event channel's domain-0 end: an eventfd that the guest kicks, an eventfd that notifies it; adaptive polling.

How a kick becomes work. The `Poller` has an epoll of its own with all kick eventfds in it, and the loop has only that
one descriptor; its reader callback steps the backend's coroutine (its *pump*) with `send()`: no task, no Event, no
Queue lies between, since each of them costs more than the request itself:

```python
channel.watch(ring.pending, ring.arm)
done = channel.drive(pump())            # a future: the pump's end, or its error
async def pump():
    while True:
        await channel.kicked()          # a kick, a poll that hit, or step()
        ...take, process, push...       # no other await in here
        channel.notify()                # if push() said so
```

After a pump the worker's one `Poller` looks at the ring's producer and at every completion source for a bounded time,
in slices between which the loop runs. While it looks, that ring is not armed: the guest sees an old req_event and sends
no kick. Only then it arms the ring, which looks a last time, and sleeps.

What it looks at are the *live* channels, those that were pumped and are not armed yet. One that had no work for a
window is armed and no longer looked at, however busy the others are: the next kick makes it live again. So a look, a
sleep and a kick cost the same with four thousand channels as with one.

Kick eventfds are in the epoll edge-triggered: each write is one event, so nobody reads them. With thousands of channels
most of a kick's cost is memory that is cold when it comes, and so there is little of it: one epoll entry in the kernel,
the `Channel` and its coroutine here, none of the loop's own objects. A guest that kicks a ring which is not armed is
not heard until it is: its kicks then cost nobody anything. One that kicks a ring which is armed, and brings nothing, is
heard late after the first few (spurious.py); a kick that brings work, in the same look that finds it, ends that.

The window adapts, as KVM's halt polling does (Documentation/virt/kvm/halt-polling.rst), with one difference. KVM
compares the time it slept with the longest window. Here that time contains the wake-up of this CPU, which is often
longer than the window itself, so it cannot tell a guest that comes back after 20 us from one that comes back after 80.
Therefore it is tried: a hit doubles the window, a miss halves it down to nothing, and after a try that did not pay the
next one waits for twice as many short sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Protocol

from . import spurious
from .errors import VmmError
from .seldom import Seldom

log = logging.getLogger(__name__)

SLICE_NS = 20_000
"""How long a poll keeps the loop from other descriptors: about what one batch of a full ring costs."""
LEAST_NS = 6_000
"""A shorter window than this pays for itself only by chance: a look at eight rings takes one or two us."""
WAKE_NS = 100_000
"""What waking an idle CPU takes at most (50-100 us were measured): a sleep of up to the longest window plus this may
have been a short pause of the guest, and is worth a try."""
MOST_KICKED = 64
"""Channels whose kicks are taken before the loop turns; the epoll keeps the others, in order."""
MOST_SKIPPED = 1024
"""After tries that never paid, one short sleep in so many is tried again: below 0.1 % of the CPU."""


_HEARD = select.EPOLLIN | select.EPOLLET


class Source(Protocol):
    """Where completions come from (an io_uring, a disk's threads): one eventfd, and a cheap look.

    `pending()` also hands over what was queued and not yet submitted. `ready()` sorts what has completed to its
    owners and wakes them, normally through `Channel.step`.
    """

    @property
    def eventfd(self) -> int: ...
    def pending(self) -> bool: ...
    def ready(self) -> None: ...


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


def on_failure(pump: asyncio.Future[None], failed: Callable[[Exception], object]) -> None:
    """`failed` gets the error that ends a pump (or a task); an end without one, or by a cancellation, is not told."""

    def ended(pump: asyncio.Future[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if isinstance(error, Exception):
            failed(error)

    pump.add_done_callback(ended)


class Channel:
    """One event channel. Owns both descriptors: `close()` closes them.

    kick, notify: eventfds (VmmError otherwise; also for a kick that is an EFD_SEMAPHORE one, which would have to be
    read once a kick, 2**64 times if someone wrote that into it). Both are made non-blocking.
    name: for log lines and errors, as "domain 7: vbd 51712". Without a poller there is no polling: the ring is armed
    after every pump.

    Counters, plain integers: `kicks` (see there), `wakeups` (times that the loop heard of them), `spurious` (those that
    brought no work), `notifications`.
    """

    # One of thousands is cold when its kick comes: it lies in one piece.
    __slots__ = (
        "__weakref__",
        "_again",
        "_coro",
        "_done",
        "_kicks",
        "_own",
        "_poller",
        "_running",
        "arm",
        "closed",
        "idle",
        "kick_fd",
        "more",
        "muted",
        "name",
        "notifications",
        "notify_fd",
        "pending",
        "spurious",
        "until",
        "wakeups",
    )

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
        self._poller.pumped(found=True)
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
                poller.pumped(found=True)

    def notify(self) -> None:
        """Raises the guest's event: one eventfd write, never blocks."""
        self.notifications += 1
        try:
            os.eventfd_write(self.notify_fd, 1)
        except BlockingIOError:
            return  # the counter is full, so an event is pending anyway

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
            self._in_vain()
        else:
            self.spurious += 1
        return found

    def _in_vain(self) -> None:
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
        self._sources: tuple[Source, ...] = ()
        self._users: list[Source] = []
        self._next: asyncio.Handle | None = None
        self._busy = False
        self._deadline = 0
        self._slept_at: int | None = None
        self._skip = 0
        self._skipped = 0
        self._closed = False
        self._kicks = select.epoll()
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
        slept_at, self._slept_at = self._slept_at, None
        if slept_at is None or self.window_ns or not self._max:
            return
        if self._clock() - slept_at > self._max + WAKE_NS:
            return
        if self._skipped < self._skip:
            self._skipped += 1
            return
        self._skipped = 0
        self._skip = min(self._skip * 2 + 1, MOST_SKIPPED)
        self.window_ns = self._max

    def pumped(self, *, found: bool) -> None:
        """After a pump: look on for a while, or arm and sleep. Kicks that brought no work do not keep it awake."""
        if self._busy or self._closed:
            return
        if self._next is not None:
            if found:
                self._deadline = self._clock() + self.window_ns
        elif self.window_ns:
            self._deadline = self._clock() + self.window_ns
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
        end = min(now + SLICE_NS, self._deadline)
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
                        self.window_ns = min(self.window_ns * 2, self._max)
                        self._deadline = now + self.window_ns
                if now >= end:
                    break
        finally:
            self._busy = False
        if self._closed:
            return
        if now < self._deadline:
            self._settle(now)
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
            halved = self.window_ns >> 1
            self.window_ns = halved if halved >= LEAST_NS else 0

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
            self._deadline = self._clock() + self.window_ns
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
            self.pumped(found=channel.heard())
        elif channel.idle:
            channel.idle -= 1  # it was silent for as long as it was not heard
        heard = channel.kick_fd < len(self._by_fd) and self._by_fd[channel.kick_fd] is channel
        if heard and channel not in self._late and not channel.muted:
            self._kicks.modify(channel.kick_fd, _HEARD)

    def _on_kicks(self) -> None:
        self.woken()
        found = False
        for fd, _ in self._kicks.poll(0, MOST_KICKED):
            channel = self._by_fd[fd]
            if channel is not None:  # else closed by one before it
                found = channel.heard() or found
            if self._closed:
                return
        self.pumped(found=found)

    def _on_completion(self, source: Source) -> None:
        with suppress(BlockingIOError):
            os.read(source.eventfd, 8)
        # What a poll already took leaves its count in the eventfd: that is no reason to look again.
        if source.pending():
            self.woken()
            source.ready()
            self.pumped(found=True)


def check_eventfd(fd: int, what: str, *, semaphore_ok: bool) -> None:
    """VmmError unless `fd` is an eventfd. The kernel tells in fdinfo (semaphores since 6.5; before, they pass)."""
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except FileNotFoundError:
        raise VmmError(f"{what}: descriptor {fd} is closed") from None
    if "eventfd-count:" not in info:
        raise VmmError(f"{what}: descriptor {fd} is no eventfd")
    if not semaphore_ok and "eventfd-semaphore: 1" in info:
        raise VmmError(f"{what}: an EFD_SEMAPHORE eventfd counts down one by one: make it without")
