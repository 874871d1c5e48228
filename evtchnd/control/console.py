"""A domain's consoles as the control plane holds them: their terminals, their logs, and what survives their worker.

The pty's slave is held open here, raw: a master whose slave nobody has open reads as EIO and polls as ready for ever,
and what a tool sets on the terminal would be gone with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import tty
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.control import descriptors, toolstack
from evtchnd.control.config import Config
from evtchnd.control.images import Images
from evtchnd.control.ports import Ports
from evtchnd.control.supervisor import Supervisor
from evtchnd.errors import EvtchndError, HostError, OperatorError, VmmError
from evtchnd.worker import messages as m
from evtchnd.worker.device import Params, console_key
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import Server

log = logging.getLogger(__name__)

# Linux' hvc_xen takes the last digit of the device's node for its number, and 0 is the primary console's.
MOST = 9
# Of one console here: both ends of the pty, two log files, two of its port.
DESCRIPTORS = 6


class Console:
    """One console. Owns its descriptors.

    page        port and guest frame of the primary console; None: a further one, by xenbus
    tty         the slave's path; "" where this host has no pty to give
    connected   what the live ring is (the worker's words), None while there is none
    reason      why it is off; "" while it is served
    leaving     a detach has given up waiting for the guest: it is removed when the guest lets it go
    """

    kind = "console"
    waits = False

    def __init__(self, domid: int, devid: int, page: tuple[int, int] | None) -> None:
        self.domid = domid
        self.devid = devid
        self.key = console_key(devid)
        self.page = page
        self.tty = ""
        self.log_path = ""
        self.connected: Params | None = None
        self.reason = ""
        self.leaving = False
        self.opened = self.closed = False
        self.settled = asyncio.Event()  # its backend serves it, or has given up
        self._pty: tuple[int, int] = (-1, -1)
        self._logs: tuple[int, int] = (-1, -1)

    @property
    def name(self) -> str:
        """As every line about it begins."""
        return f"domain {self.domid}: {self.kind} {self.devid}"

    async def open(self, log_dir: str, images: Images) -> None:
        """Makes the terminal, opens the log. What cannot be had is missing, with a line: the guest has its console."""
        self.opened = True
        try:
            descriptors.require(DESCRIPTORS, self.name)
            self._pty = os.openpty()
            tty.setraw(self._pty[1])
            self.tty = os.ttyname(self._pty[1])
        except (OSError, HostError) as exc:
            log.warning("%s: no pty: %s", self.name, exc.strerror if isinstance(exc, OSError) else exc)
        if log_dir:
            path = Path(log_dir) / f"domain-{self.domid}-console-{self.devid}.log"
            try:
                self._logs = await images.beside(str(path), lambda: _open_log(path), transport.close_all)
                self.log_path = str(path)
            except (OSError, OperatorError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else exc
                log.warning("%s: no log: %s: %s", self.name, path, reason)

    def attach(self, id: int) -> tuple[m.AttachConsole, list[int]]:
        """What its worker gets, and the descriptors that go along."""
        pty, logs = self._pty[0] >= 0, self._logs[0] >= 0
        message = m.AttachConsole(id, self.key, self.devid, self.page, pty, logs, self.connected)
        return message, [*self._pty[: int(pty)], *(self._logs if logs else ())]

    def close(self) -> list[int]:
        """Closes its pty; the log's descriptors are returned: closing those may block. Idempotent."""
        self.closed = True
        pty, logs = self._pty, self._logs
        self._pty = self._logs = (-1, -1)
        transport.close_all(fd for fd in pty if fd >= 0)
        return [fd for fd in logs if fd >= 0]


def _open_log(path: Path) -> tuple[int, int]:
    """The file, to be appended to, and the one that a full one is copied to."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags | os.O_APPEND, 0o640)
    try:
        return fd, os.open(f"{path}.1", flags, 0o640)
    except BaseException:
        os.close(fd)
        raise


class Consoles:
    """All of one domain, by number; `by_key` is the supervisor's view of them."""

    def __init__(
        self,
        domid: int,
        *,
        server: Server,
        store: Client,
        ports: Ports,
        images: Images,
        config: Config,
    ) -> None:
        self.by_key: dict[int, Console] = {}
        self._domid = domid
        self._label = f"domain {domid}"
        self._server = server
        self._store = store
        self._ports = ports
        self._images = images
        self._config = config
        self._supervisor: Supervisor | None = None
        self._over = False
        self._removing: set[asyncio.Task[None]] = set()

    def __getitem__(self, devid: int) -> Console:
        """OperatorError if it is not there."""
        found = self.by_key.get(console_key(devid))
        if found is None:
            raise OperatorError(f"{self._label}: no console {devid}", errno.ENOENT)
        return found

    def set_primary(self, port: int, gfn: int) -> None:
        """The guest's primary console, before START."""
        console = self.by_key.setdefault(console_key(0), Console(self._domid, 0, None))
        console.page = port, gfn

    def check_page(self, slots: Iterable[p.MemoryEntry]) -> None:
        """At START: VmmError if the primary console's page is in none of them. (The memory's table may come last.)"""
        primary = self.by_key.get(console_key(0))
        if primary is not None and primary.page is not None:
            gfn = primary.page[1]
            if not any(slot.gfn <= gfn < slot.gfn + slot.pages for slot in slots):
                raise VmmError(f"{self._label}: console page: guest frame {gfn:#x} is in no memory slot")

    async def start(self, supervisor: Supervisor, *, resumed: bool) -> None:
        """At START: terminals, nodes, and the primary one's port. VmmError, HostError: the port cannot be bound.

        resumed: nodes of before this process are there. Those of further consoles go: nobody has kept their terminals.
        """
        self._supervisor = supervisor
        if resumed:
            toolstack.remove_others(self._server, self._domid, "console", [each.devid for each in self.by_key.values()])
        for console in self.by_key.values():
            if not console.opened:
                await console.open(self._config.console.log_dir, self._images)
            if not (resumed and toolstack.console_again(self._server, console)):
                toolstack.add_console(self._server, console, self._config.console.buffer_bytes)
            if console.page is not None:
                # the worker asks for it again, and gets the same
                await self._ports.bind(console.key, [console.page[0]])

    async def serve(self) -> None:
        """After `start`: returns when the worker serves them, so that a guest's first words have a reader."""
        for console in list(self.by_key.values()):
            console.settled.clear()
            await self._running().attach_device(console)
            if console.page is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(console.settled.wait(), self._config.limits.request_s)

    async def attach(self, devid: int | None) -> Console:
        """A further console, the first free number if none is said. OperatorError: there is no place for it."""
        console = Console(self._domid, self._place(devid), None)
        await console.open(self._config.console.log_dir, self._images)
        try:
            self._place(console.devid)  # the domain may have changed meanwhile
        except OperatorError:
            await self._close([console])
            raise
        self.by_key[console.key] = console
        toolstack.add_console(self._server, console, self._config.console.buffer_bytes)
        await self._running().attach_device(console)
        if console.reason:
            await self._remove(console)
            raise OperatorError(f"{console.name}: {console.reason}")
        return console

    def _place(self, devid: int | None) -> int:
        """A free number. OperatorError."""
        self._running()
        free = [number for number in range(1, MOST + 1) if console_key(number) not in self.by_key]
        if devid is not None and not 1 <= devid <= MOST:
            raise OperatorError(f"{self._label}: console {devid}: not in 1..{MOST}, which Linux tells apart")
        if devid is None and not free:
            raise OperatorError(f"{self._label}: {MOST} further consoles are there already", errno.ENOSPC)
        if devid is not None and devid not in free:
            raise OperatorError(f"{self._label}: console {devid} is there already", errno.EEXIST)
        return free[0] if devid is None else devid

    def _running(self) -> Supervisor:
        if self._over:
            raise OperatorError(f"{self._label} has ended")
        if self._supervisor is None:
            raise OperatorError(f"{self._label} does not run yet")
        return self._supervisor

    async def detach(self, devid: int, *, force: bool) -> bool:
        """Takes a further console from the guest. True: by force. OperatorError: the guest holds on to it."""
        console, forced = self[devid], False
        if console.page is not None:
            raise OperatorError(f"{console.name}: the primary console stays as long as its domain")
        limit = self._config.limits.detach_s
        if not await toolstack.ask_to_leave(self._server, self._store, console, limit):
            if self.by_key.get(console.key) is console and console.connected is not None and not force:
                console.leaving = True
                raise OperatorError(
                    f"{console.name}: the guest did not let it go in {limit:g} s: it is removed when the guest does",
                    errno.EBUSY,
                )
            forced = True
        if self.by_key.get(console.key) is console:
            await self._running().detach_device(console)
        await self._remove(console)
        return forced

    def ended(self, console: Console) -> None:
        """The backend has ended by itself: after a detach that took too long, the rest of it happens now."""

        async def remove() -> None:
            await asyncio.sleep(toolstack.SEEN_S)
            await self._remove(console)

        if console.leaving and not console.reason:
            task = asyncio.get_running_loop().create_task(remove())
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def client(self, devid: int, fd: int, greeting: bytes) -> None:
        """Gives a client's stream socket to who serves the console. `fd` stays the caller's. OperatorError."""
        console = self[devid]
        if console.reason:
            raise OperatorError(f"{console.name}: off: {console.reason}")
        try:
            await self._running().client(console, lambda id: m.Client(id, console.key, greeting), fd)
        except (VmmError, HostError) as exc:
            raise OperatorError(str(exc)) from None

    async def _remove(self, console: Console) -> None:
        if self.by_key.get(console.key) is console:
            del self.by_key[console.key]
            self._ports.unbind(console.key, self._ports.of(console.key))
            toolstack.remove_device(self._server, console)
            await self._close([console])
            log.info("%s: removed", console.name)

    def end(self) -> None:
        """The domain ends: nothing is begun any more."""
        self._over = True

    async def close(self) -> None:
        """Closes all, for good."""
        consoles = list(self.by_key.values())
        self.by_key.clear()
        await self._close(consoles)

    async def _close(self, consoles: list[Console]) -> None:
        fds = [fd for console in consoles for fd in console.close()]
        if fds:
            try:
                await self._images.close(fds)
            except EvtchndError as exc:
                log.warning("%s: console's log: %s", self._label, exc)
