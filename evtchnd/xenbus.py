"""The backend's end of a device's handshake: io/xenbus.h's states, as a table of (own, frontend's) -> what to do.

Both ends write their `state` node and watch the other's. A frontend is a guest: any value may come at any time, in any
order, as often as it likes; so nothing is remembered but the own state, and each look at the frontend's node is a fresh
one. Events only say "look again" (a million writes fold into one look).

The usual way                     kexec, a reloaded driver          an operator's detach
  own  1 2       4   5 6            own  4   5   6   2   ...          own  4 (node: 5, online: 0)   5   6
  front    1 3     4 5   6          front  5   6   1   3              front                       5   6
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from enum import Enum, auto
from typing import Self

from evtchnd.abi import XenbusState
from evtchnd.xenstore.client import Client, Transaction, Watch

log = logging.getLogger(__name__)


class Step(Enum):
    """What the backend has to do next; each ends by a call that changes the own state."""

    STAY = auto()  # nothing: wait for a change
    ANNOUNCE = auto()  # let go of an earlier ring; publish the features: `announce()`
    CONNECT = auto()  # the frontend has published its ring: take it, then `switch(CONNECTED)`
    CLOSE = auto()  # the frontend is closing: `switch(CLOSING)`; its ring is served on until it has closed
    SHUT = auto()  # let go of the ring: `switch(CLOSED)`
    RECONFIGURE = auto()  # look at what the frontend may change; `switch(RECONFIGURED)`, CONNECTED once it is Connected
    FAIL = auto()  # `fail()` was called: let go of the ring, `switch(CLOSING)`


_1, _2, _4, _5, _6, _8 = (
    XenbusState.INITIALISING,
    XenbusState.INIT_WAIT,
    XenbusState.CONNECTED,
    XenbusState.CLOSING,
    XenbusState.CLOSED,
    XenbusState.RECONFIGURED,
)
_A, _C, _X, _S, _R, _o = Step.ANNOUNCE, Step.CONNECT, Step.CLOSE, Step.SHUT, Step.RECONFIGURE, Step.STAY

# own state -> the step for each state of the frontend, UNKNOWN (no node, or no state in it) to RECONFIGURED.
#   (2, unknown): the toolstack is not ready with the frontend's nodes. (4, 1): a frontend that starts over without a
#   word, as a guest after a crash does: the ring that it had is let go. (5, 1), (6, 1): the next handshake.
#   (6, 5): a kexec'd kernel drives what it found through 5, 6, 1 and wants to see 5, 6, 2.
#   (4, 7), (8, 4): Linux' netfront changes its XDP headroom so; for backends where nothing can be changed it is STAY.
#   (6, 3): it published a ring for a backend that is not there: Linux' frontends never do; they wait for our 2.
TRANSITIONS: Mapping[XenbusState, tuple[Step, ...]] = {
    #     0   1   2   3   4   5   6   7   8
    _1: (_A, _A, _A, _A, _A, _A, _A, _A, _A),
    _2: (_o, _o, _o, _C, _C, _X, _S, _o, _o),
    _4: (_S, _A, _o, _o, _o, _X, _S, _R, _o),
    _5: (_S, _A, _o, _o, _o, _o, _S, _o, _o),
    _6: (_o, _A, _o, _o, _o, _X, _o, _o, _o),
    _8: (_S, _A, _o, _o, _R, _X, _S, _o, _o),
}

_STATES = {str(int(state)): state for state in XenbusState}

# The frontend holds no ring in these: a detach does not wait for it, a new worker does not look for it.
_WITHOUT_RING = frozenset({XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.CLOSED})


def parse_state(text: str | None) -> XenbusState:
    """A `state` node's value; UNKNOWN for a missing node and for anything that is no state."""
    return _STATES.get(text or "", XenbusState.UNKNOWN)


def next_step(own: XenbusState, front: XenbusState, *, online: bool = True, reconfigures: bool = False) -> Step:
    """The table, and what an operator's detach (`online` = 0) changes in it: nothing is begun any more."""
    if not online and (own in (_1, _2, _6) or front in _WITHOUT_RING):
        return Step.SHUT
    step = TRANSITIONS[own][front]
    return Step.STAY if step is Step.RECONFIGURE and not reconfigures else step


class Backend:
    """One device's handshake.

    ```
    async with Backend(store, name, backend_path, frontend_path) as bus:
        async for step in bus:          # never STAY; ends when the device is closed and no longer wanted
            ...
    ```
    """

    def __init__(
        self, store: Client, name: str, backend_path: str, frontend_path: str, *, reconfigures: bool = False
    ) -> None:
        """reconfigures: RECONFIGURE is among the steps."""
        self.name = name
        self.state = XenbusState.INITIALISING
        self.front = XenbusState.UNKNOWN
        self.failure: Exception | None = None  # why the last FAIL
        self._failure: Exception | None = None
        self._reconfigures = reconfigures
        self._store = store
        self._backend = backend_path
        self._frontend = frontend_path
        self._changed = asyncio.Event()
        self._stack = AsyncExitStack()
        self._lost: BaseException | None = None
        self._writing = asyncio.Lock()  # `state` in the store and here, as one

    async def __aenter__(self) -> Self:
        try:
            for path in (f"{self._frontend}/state", f"{self._backend}/online"):
                watch = await self._stack.enter_async_context(self._store.watch(path))
                follower = asyncio.get_running_loop().create_task(self._follow(watch))
                self._stack.callback(follower.cancel)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _follow(self, watch: Watch) -> None:
        try:
            async for _ in watch:
                self._changed.set()
        except Exception as exc:
            self._lost = exc
            self._changed.set()

    async def resume(self) -> bool:
        """An earlier worker had connected: no handshake, the frontend must not notice.

        False: the frontend has let go of its ring meanwhile. Its pages and grants may be another's now: touch nothing,
        the next step says what is to be done.
        """
        self.state = XenbusState.CONNECTED
        if parse_state(await self._store.get(f"{self._frontend}/state")) in _WITHOUT_RING:
            return False
        if parse_state(await self._store.get(f"{self._backend}/state")) in (_2, _8):
            await self.switch(XenbusState.CONNECTED)  # it had not come to that
        return True

    def fail(self, failure: Exception) -> None:
        """The ring cannot be served any more: the next step is FAIL."""
        self._failure = failure
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Step:
        """Waits for the next step that is not STAY. ConnectionError when XenStore is gone."""
        while True:
            self._changed.clear()
            if self._lost is not None:
                raise self._lost
            if self._failure is not None:
                self.failure, self._failure = self._failure, None
                return Step.FAIL
            online = await self.online()
            if not online and self.state is XenbusState.CLOSED:
                # once more: the toolstack writes 5 when it detaches, also over the 6 of a device that was closed before
                await self.switch(XenbusState.CLOSED)
                raise StopAsyncIteration
            self.front = parse_state(await self._store.get(f"{self._frontend}/state"))
            step = next_step(self.state, self.front, online=online, reconfigures=self._reconfigures)
            if step is not Step.STAY:
                log.debug("%s: %s, frontend %s: %s", self.name, self.state.name, self.front.name, step.name)
                return step
            await self._changed.wait()

    async def online(self) -> bool:
        """False once an operator detaches the device."""
        return await self._store.get(f"{self._backend}/online") != "0"

    async def announce(self, nodes: Mapping[str, str]) -> None:
        """Publishes the backend's `nodes` and InitWait, all at once."""
        await self._write(XenbusState.INIT_WAIT, nodes)

    async def frontend_nodes(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the frontend's nodes `names` that exist."""
        found = {}
        for name in names:
            value = await self._store.get(f"{self._frontend}/{name}")
            if value is not None:
                found[name] = value
        return found

    async def switch(self, state: XenbusState) -> None:
        """Writes the own state."""
        await self._write(state, {})

    async def update(self, nodes: Mapping[str, str]) -> None:
        """Publishes changed `nodes` while the device is offered or connected, and `state` anew with its same value.

        That write fires the frontend's watch: it looks at the nodes again (how Linux' blkfront learns of a new size).
        """
        async with self._writing:
            if self.state in (_2, _4, _8):
                await self._write_all(self.state, nodes)

    async def _write(self, state: XenbusState, nodes: Mapping[str, str]) -> None:
        async with self._writing:
            await self._write_all(state, nodes)
            self.state = state

    async def _write_all(self, state: XenbusState, nodes: Mapping[str, str]) -> None:
        """Nothing is written where the toolstack has removed the device: that would bring its folder back."""

        async def body(transaction: Transaction) -> None:
            if await transaction.exists(self._backend):
                for name, value in {**nodes, "state": str(int(state))}.items():
                    await transaction.write(f"{self._backend}/{name}", value)

        await self._store.transact(body)
