"""Who has more to do than its share waits here, and goes on in turns with the others.

A client's first request is served when it comes. Whoever has sent more at once is served one request a turn, SLICE of
all of them between two looks at the sockets: so a client with one request now and then waits for SLICE requests and
for one of each of the others, however much those have sent. Long walks go on for WALK_S each time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Protocol

# A request costs 5-20 us, a look at the sockets 2
SLICE = 8
WALK_S = 0.0002


class Pump(Protocol):
    """A connection with requests that wait."""

    def turn(self) -> bool:
        """Serves one. False: there is none left that can be served."""


class Turns:
    """`settle` is called after every slice: it sends what has come up for anybody."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._waiting: deque[Pump] = deque()
        self._walks: deque[Generator[None, None, None]] = deque()
        self._handle: asyncio.Handle | None = None

    def add(self, pump: Pump) -> None:
        """It is not in here yet."""
        self._waiting.append(pump)
        self._soon()

    def discard(self, pump: Pump) -> None:
        """It has ended."""
        if pump in self._waiting:
            self._waiting.remove(pump)

    def walk(self, steps: Generator[None, None, None]) -> None:
        """Goes through `steps`, each of a fraction of a millisecond."""
        self._walks.append(steps)
        self._soon()

    def _soon(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._handle = None
        waiting = self._waiting
        for _ in range(min(SLICE, len(waiting))):
            # it may have ended while another one was served
            if not waiting:
                break
            pump = waiting.popleft()
            if pump.turn():
                waiting.append(pump)
        if self._walks:
            self._step()
        self._settle()
        if waiting or self._walks:
            self._soon()

    def _step(self) -> None:
        end = time.perf_counter() + WALK_S
        steps = self._walks[0]
        try:
            next(steps)
            while time.perf_counter() < end:
                next(steps)
            self._walks.rotate(-1)
        except StopIteration:
            self._walks.popleft()

    def close(self) -> None:
        """Nothing goes on."""
        self._waiting.clear()
        while self._walks:
            self._walks.popleft().close()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
