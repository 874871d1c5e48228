"""The console backend: io/console.h's two byte rings on one side, a pty, clients and a log on the other.

Linux spins while `out` is full, so it is emptied whatever the readers do: each has a bounded buffer of its own, and
what it does not take is dropped (`screen.py`). Typing is the other way round: it waits, first here, then at who types.

Both rings lie in the page, indices included, and nothing of them is kept here: every look begins with the page's own
indices, so that a worker which replaces another goes on where the rings are, and a guest that starts over on the same
page (kexec, a reboot) is followed. What has been taken from a ring is gone from it; what has not been stays there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from evtchnd import xenbus
from evtchnd.abi import XenbusState
from evtchnd.channel import Channel, on_failure
from evtchnd.errors import GuestError
from evtchnd.grants import Page
from evtchnd.seldom import Seldom
from evtchnd.stream import CONSOLE, CONSOLE_CONNECTED, CONSOLE_CONNECTION, ByteStream
from evtchnd.worker.device import ConsoleDevice, Params
from evtchnd.xenbus import Step

from .nodes import number
from .screen import Screen, nothing

log = logging.getLogger(__name__)

# What xl's toolstack and Linux' hvc_xen call them.
FRONTEND_NODES = ("ring-ref", "port")


async def run(device: ConsoleDevice) -> None:
    """Serves `device` until it is detached (returns) or cancelled.

    GuestError: the primary console's page or port cannot be had. HostError, ConnectionError: as every backend.
    """
    screen = Screen(device)
    device.accept = screen.accept
    try:
        if device.page is not None:
            await _primary(device, screen, device.page)
        else:
            await _by_xenbus(device, screen)
    finally:
        await screen.close()


async def _primary(device: ConsoleDevice, screen: Screen, page: tuple[int, int]) -> None:
    """The console that a guest has from the start: no handshake, no end but the domain's.

    Impossible indices stop it until they are possible again: nobody could ask this guest for a new ring.
    """
    port, gfn = page
    connection = Connection(device, screen, lasting=True)
    device.stats = lambda: {**screen.stats(), **connection.counters()}
    try:
        try:
            view = device.memory.view(gfn)
        except GuestError as error:
            raise GuestError(f"{device.name}: page: {error}") from None
        await connection.open(view, port, {"port": port, "gfn": gfn})
        await connection.served()
    finally:
        connection.close()


async def _by_xenbus(device: ConsoleDevice, screen: Screen) -> None:
    """A further console, with a handshake as every device's; a guest that breaks the rules loses its connection."""
    connection: Connection | None = None
    totals: Counter[str] = Counter()

    def stats() -> Mapping[str, int]:
        now = Counter(totals)
        if connection is not None:
            now.update(connection.counters())
        return {**screen.stats(), **now}

    async def connect(gref: int, port: int, *, again: bool) -> None:
        nonlocal connection
        new = Connection(device, screen)
        page = device.grants.map(gref, write=True)
        try:
            await new.open(page.view, port, {"gref": gref, "port": port}, page=page)
        except BaseException:
            page.close()
            raise
        new.on_failure(bus.fail)
        connection = new
        say(log.info, "attached again" if again else "connected", f"ring-ref {gref}, port {port}")

    def let_go() -> None:
        nonlocal connection
        if connection is not None:
            connection.close()
            totals.update(connection.counters())
            connection = None
        if device.connected is not None:
            device.connected_as(None)

    def say(how: Callable[..., None], what: str, detail: object) -> None:
        more = lines.due(what)
        if more is not None:
            how("%s: %s: %s%s", device.name, what, detail, more)

    lines = Seldom()
    device.stats = stats
    bus = xenbus.Backend(device.store, device.name, device.backend_path, device.frontend_path)
    async with bus:
        try:
            if device.connected is not None:
                await bus.resume()
                try:
                    await connect(device.connected["gref"], device.connected["port"], again=True)
                except GuestError as error:
                    bus.fail(error)
            async for step in bus:
                match step:
                    case Step.ANNOUNCE:
                        let_go()
                        await bus.announce({})
                    case Step.CONNECT:
                        try:
                            nodes = await bus.frontend_nodes(FRONTEND_NODES)
                            await connect(number(nodes, "ring-ref"), number(nodes, "port"), again=False)
                            await bus.switch(XenbusState.CONNECTED)
                        except GuestError as error:
                            bus.fail(error)
                    case Step.CLOSE:
                        await bus.switch(XenbusState.CLOSING)
                    case Step.FAIL:
                        say(log.error, "stopped", bus.failure)
                        let_go()
                        await bus.switch(XenbusState.CLOSING)
                    case Step.SHUT:
                        let_go()
                        await bus.switch(XenbusState.CLOSED)
        finally:
            if connection is not None:
                connection.close()


class Connection:
    """One page with its rings, the guest's port, and the pump.

    lasting: impossible indices do not end it; it goes on when they are possible again.
    """

    def __init__(self, device: ConsoleDevice, screen: Screen, *, lasting: bool = False) -> None:
        self._device = device
        self._screen = screen
        self._lasting = lasting
        self._stopped = False
        self._lines = Seldom()
        self._view: memoryview | None = None
        self._page: Page | None = None
        self._stream: ByteStream | None = None
        self._channel: Channel | None = None
        self._pump: asyncio.Future[None] | None = None

    async def open(self, view: memoryview, port: int, params: Params, *, page: Page | None = None) -> None:
        """Binds the port and serves the page behind `view`. Takes view and page, unless it raises GuestError (a
        port)."""
        (channel,) = await self._device.bind([port])
        self._channel, self._view, self._page = channel, view, page
        self._stream = stream = ByteStream(view, CONSOLE)
        view[CONSOLE_CONNECTION] = CONSOLE_CONNECTED
        self._device.connected_as(params)
        self._screen.wake = channel.step
        channel.watch(self._pending, self._pending)
        self._pump = channel.drive(self._serve(stream, channel))

    async def served(self) -> None:
        """Waits for the pump's end; raises what ended it."""
        if self._pump is not None:
            await self._pump

    def on_failure(self, failed: Callable[[Exception], Any]) -> None:
        """`failed` gets what ends the pump."""

        if self._pump is not None:
            on_failure(self._pump, failed)

    async def _serve(self, stream: ByteStream, channel: Channel) -> None:
        # who served it before may have died between its last byte and its notification
        due = True
        while True:
            try:
                due = self._move(stream) or due
                self._stopped = False
            except GuestError as error:
                if not self._lasting:
                    raise
                self._stop(error)
            if due:
                channel.notify()
                due = False
            await channel.kicked()

    def _move(self, stream: ByteStream) -> bool:
        """Once through both rings. True: something moved, which the guest has to hear of."""
        screen = self._screen
        stream.attach()
        data = stream.read(CONSOLE.to_back.size)
        if data:
            screen.show(data)
        count = stream.write(bytes(screen.typed)) if screen.typed else 0
        if count:
            screen.taken(count)
        return bool(data) or count > 0

    def _pending(self) -> bool:
        stream = self._stream
        if stream is None:
            return False
        try:
            stream.attach()
            return stream.available() > 0 or (len(self._screen.typed) > 0 and stream.room() > 0)
        except GuestError:
            return not self._stopped  # the pump meets it, too, and says so

    def _stop(self, error: GuestError) -> None:
        if not self._stopped and (more := self._lines.due("stopped")) is not None:
            log.error("%s: stopped until its indices are possible: %s%s", self._device.name, error, more)
        self._stopped = True

    def counters(self) -> dict[str, int]:
        """Plain integers by name."""
        channel = self._channel
        if channel is None:
            return {}
        return {
            "kicks": channel.kicks,
            "wakeups": channel.wakeups,
            "spurious_kicks": channel.spurious,
            "notifications": channel.notifications,
            "stopped": int(self._stopped),
        }

    def close(self) -> None:
        """Takes what is still there, gives port and page back. Idempotent."""
        stream, self._stream = self._stream, None
        if self._pump is not None:
            self._pump.cancel()
        if stream is not None:
            self._screen.wake = nothing
            with suppress(GuestError):
                self._move(stream)
            stream.close()
        if self._channel is not None:
            self._device.release(self._channel)
        if self._view is not None and self._page is None:
            self._view.release()
        if self._page is not None:
            self._page.close()
        self._view = self._page = None
