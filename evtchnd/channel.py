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
Therefore it is tried, always with the longest window: a try ends with MOST_IN_VAIN windows in a row that found nothing,
and after a try that did not pay the next one waits for twice as many short sleeps. A window that each miss halves would
soon be shorter than every pause of a guest that comes back within the longest one two times in three.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from evtchnd._core.channel import Channel, check_eventfd
from evtchnd._core.poller import MOST_IN_VAIN, MOST_KICKED, MOST_SKIPPED, WAKE_NS, Poller

__all__ = [
    "MOST_IN_VAIN",
    "MOST_KICKED",
    "MOST_SKIPPED",
    "WAKE_NS",
    "Channel",
    "Poller",
    "Source",
    "check_eventfd",
    "on_failure",
]


class Source(Protocol):
    """Where completions come from (an io_uring, a disk's threads): one eventfd, and a cheap look.

    `pending()` also hands over what was queued and not yet submitted. `ready()` sorts what has completed to its
    owners and wakes them, normally through `Channel.step`.
    """

    @property
    def eventfd(self) -> int: ...
    def pending(self) -> bool: ...
    def ready(self) -> None: ...


def on_failure(pump: asyncio.Future[None], failed: Callable[[Exception], object]) -> None:
    """`failed` gets the error that ends a pump (or a task); an end without one, or by a cancellation, is not told."""

    def ended(pump: asyncio.Future[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if isinstance(error, Exception):
            failed(error)

    pump.add_done_callback(ended)
