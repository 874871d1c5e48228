# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""An event channel's domain-0 end (evtchnd/channel.py tells how it works): what runs between a kick and its answer."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd import spurious
from evtchnd._core.poller import Poller
from evtchnd.errors import EvtchndError, VmmError

if not cython.compiled:

    def signal(eventfd: int) -> int:
        """0, or -errno."""
        try:
            os.eventfd_write(eventfd, 1)
        except OSError as error:
            return -(error.errno or 0)
        return 0


COMPILED: bool = bool(cython.compiled)


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
