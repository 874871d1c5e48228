"""Before the loop sleeps it looks at the sockets a while longer, when that has paid lately.

Clients ask one thing after another: the next request comes some tens of microseconds after the reply. A CPU that went
to sleep in between takes longer to wake than the request takes, and finds its caches cold: then a request costs five
times as much as in a row. So looking costs less CPU time than sleeping would, as long as there is something to see.

A hit doubles the window, a miss halves it down to nothing, and after tries that did not pay the next one waits for
twice as many short sleeps, as for a worker's (channel.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter_ns

from ..channel import MOST_SKIPPED, WAKE_NS

LEAST_NS = 6_000
"""A shorter window than this pays for itself only by chance."""


class Looking:
    """`max_us`: the longest window, 0 for none. `clock` in nanoseconds."""

    def __init__(
        self,
        max_us: int,
        *,
        clock: Callable[[], int] = perf_counter_ns,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = loop  # None: the one that runs when the first client comes
        self._clock = clock
        self._max = max_us * 1000
        self._window = self._max
        self._until = 0
        self._fresh = False
        self._last = 0
        self._skip = 0  # short sleeps until the next try
        self._skipped = 1
        self._handle: asyncio.Handle | None = None

    def joined(self) -> None:
        """A client has come, whose ways are not known yet: looking is tried again at once."""
        self._window, self._skip, self._skipped = self._max, 0, 1

    def came(self) -> None:
        """A client has sent something."""
        if not self._max:
            return
        now = self._clock()
        last, self._last = self._last, now
        if self._handle is not None:
            self._window = min(self._max, 2 * self._window)
            self._skipped = 1
        elif self._window < LEAST_NS:
            if now - last > self._max + WAKE_NS:
                return
            self._skip -= 1
            if self._skip > 0:
                return
            self._window = self._max
        self._fresh = True
        if self._handle is None:
            self._soon()

    def _soon(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._look)

    def _look(self) -> None:
        now = self._clock()
        if self._fresh:
            # the window begins when what came is served
            self._fresh = False
            self._until = now + self._window
        if now < self._until:
            self._soon()
            return
        self._handle = None
        self._window //= 2
        if self._window < LEAST_NS:
            self._window = 0
            self._skipped = min(2 * self._skipped, MOST_SKIPPED)
            self._skip = self._skipped

    def close(self) -> None:
        """It looks no more."""
        self._max = 0
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
