"""One domain's data plane: its memory, its grants, its devices, driven by the control plane's messages.

Closing order: backends, their channels, io_urings and descriptors, then grants, then memory (a page that is mapped
holds the memory map; see memory.py).
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from evtchnd._core.uring import Uring
from evtchnd.channel import Poller
from evtchnd.errors import EvtchndError, GuestError, HostError, VmmError
from evtchnd.grants import GrantTable
from evtchnd.memory import GuestMemory
from evtchnd.transport import close_all
from evtchnd.worker import messages as m
from evtchnd.worker.device import AnyDevice, ConsoleDevice, Device, VifDevice
from evtchnd.worker.link import Link
from evtchnd.xenstore.client import Client

log = logging.getLogger(__name__)

Backend = Callable[[Any], Coroutine[Any, Any, None]]  # gets the device of its kind (device.py)

# Messages that may wait for the control plane: it never waits for a worker, so more than this means it has stopped.
_MOST_WAITING = 1024
# Requests that one device's io_uring takes at a time; a ring of 16 pages has 512, what is above waits in the ring.
_URING_ENTRIES = 256


class Worker:
    """Serves `sock` until its other end closes. `backends`: the coroutine of each kind of device.

    alone: it has a process of its own, which ends with its control plane.
    die: ends this process, without a return, after a defect: what is in memory cannot be believed then, and the rings
    and journals can; another worker goes on from them. None: it cannot (another domain is served here, too), and the
    device alone is off.
    """

    def __init__(
        self,
        sock: socket.socket,
        backends: Mapping[str, Backend],
        *,
        alone: bool = False,
        die: Callable[[], None] | None = None,
    ) -> None:
        self._sock = sock
        self._alone = alone
        self._told = False  # to end
        self._backends = backends
        self._die = die
        self._ids = itertools.count(1)
        self._binds: dict[int, asyncio.Future[list[int]]] = {}
        self._keeps: dict[int, asyncio.Future[str]] = {}
        self._devices: dict[int, _Running] = {}
        self._attaching: dict[int, asyncio.Future[None]] = {}
        self._warned = False
        self._domain: _Domain | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """The worker's whole life."""
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self._link = Link(self._sock, self._received, self._closed, most=_MOST_WAITING)
        if self._die is not None:
            self._loop.set_exception_handler(self._raised)
        try:
            await self._over
        finally:
            for bind in self._binds.values():
                bind.cancel()
            for keep in self._keeps.values():
                keep.cancel()
            await asyncio.gather(*(running.end() for running in list(self._devices.values())))
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._link.close()
            if self._domain is not None:
                await self._domain.close()

    # -- defects

    def _defect(self, name: str, error: BaseException) -> None:
        """`error` is nobody's fault but ours: the worker ends, before anything that was in the middle goes on."""
        if self._die is None:
            return
        try:
            log.error("%s: a defect of evtchnd: its worker ends", name, exc_info=error)
        finally:  # a log line may need the memory that there is not
            self._die()

    def _raised(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback of the loop raised; what a task raised has its own ways."""
        error = context.get("exception")
        if "handle" in context and error is not None and not isinstance(error, EvtchndError):
            self._defect("worker" if self._domain is None else f"domain {self._domain.domid}: worker", error)
        loop.default_exception_handler(context)

    # -- messages

    def _closed(self, reason: str) -> None:
        if self._alone and not self._told and not reason:
            os._exit(0)
        if reason:
            log.error("worker: control plane: %s", reason)
        if not self._over.done():
            self._over.set_result(None)

    def _received(self, data: bytes, fds: list[int]) -> None:
        message = m.unpack(data)
        match message:
            case m.Bound():
                self._bound(message, fds)
            case m.Done():
                if (kept := self._keeps.get(message.id)) is not None and not kept.done():
                    kept.set_result(message.reason)
            case m.Memory():
                # Handled here and now, in the order of the messages: a device that comes next sees this memory.
                self._answer(message.id, lambda: self._memory(message, fds), fds)
            case m.Setup():
                self._domain = _Domain(message, socket.socket(fileno=fds[0]), self._loop)
                self._domain.poller.defect = self._defect
                self._send(m.Done(message.id))
            case m.Attach() | m.AttachConsole() | m.AttachVif():
                self._spawn(self._attach(message, fds), message.id)
            case m.Taps():
                self._answer(message.id, lambda: self._taps(message, fds), fds)
            case m.ChangeVif():
                self._spawn(self._change(message), message.id)
            case m.Client():
                self._answer(message.id, lambda: self._client(message, fds), fds)
            case m.Capture():
                self._answer(message.id, lambda: self._capture(message, fds), fds)
            case m.End():
                self._told = True
            case m.Detach():
                self._spawn(self._detach(message), message.id)
            case m.Resize():
                self._spawn(self._resize(message), message.id)
            case m.Count():
                self._send(m.Counted(message.id, self._counters()))
            case _:
                close_all(fds)
                log.error("worker: unexpected message %s", type(message).__name__)

    def _send(self, message: m.AnyMessage, fds: Sequence[int] = ()) -> None:
        self._link.send(m.pack(message), fds)

    def _answer(self, id: int, change: Callable[[], None], fds: list[int]) -> None:
        try:
            change()
        except (EvtchndError, OSError) as exc:
            self._send(m.Done(id, getattr(exc, "errno", None) or errno.EINVAL, str(exc)))
        else:
            self._send(m.Done(id))
        finally:
            close_all(fds)

    def _spawn(self, work: Coroutine[Any, Any, None], id: int) -> None:
        async def answered() -> None:
            try:
                await work
            except (EvtchndError, OSError) as exc:
                self._send(m.Done(id, getattr(exc, "errno", None) or errno.EINVAL, str(exc)))
            except Exception as exc:
                self._defect("worker", exc)
                log.exception("worker: a defect of evtchnd")
                self._send(m.Done(id, errno.EIO, f"defect: {exc!r}"))
            else:
                self._send(m.Done(id))

        task = self._loop.create_task(answered())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the domain

    def _ready(self) -> _Domain:
        if self._domain is None:
            raise HostError("worker: no Setup yet")
        return self._domain

    def _memory(self, change: m.Memory, fds: list[int]) -> None:
        domain = self._ready()
        for slot in change.slots_gone:
            domain.memory.remove(slot)
        for index in change.frames_gone:
            domain.grants.remove_frame(index)
        for new in change.slots:
            domain.memory.add(new.slot, new.gfn, new.pages, fds[new.fd], new.offset)
        for frame in change.frames:
            domain.grants.add_frame(frame.index, fds[frame.fd], frame.offset)

    def _client(self, client: m.Client, fds: list[int]) -> None:
        running = self._devices.get(client.devid)
        if running is None or not isinstance(running.device, ConsoleDevice):
            raise VmmError("the console is not served now", errno.ENODEV)
        running.device.accept(fds.pop(), client.greeting)

    def _counters(self) -> dict[int, dict[str, int]]:
        counters = {running.device.key: dict(running.device.stats()) for running in self._devices.values()}
        if self._domain is not None:
            counters[0] = {"pinned": self._domain.grants.pinned, "slots": len(self._domain.memory.slots)}
        return counters

    # -- devices

    async def _attach(self, attach: m.Attach | m.AttachConsole | m.AttachVif, fds: list[int]) -> None:
        devid = attach.devid
        if isinstance(attach, m.Attach):
            kind = attach.kind
        else:
            kind = "console" if isinstance(attach, m.AttachConsole) else "vif"
        try:
            domain = self._ready()
            backend = self._backends.get(kind)
            if backend is None:
                raise HostError(f"domain {domain.domid}: no backend for {kind}")
            if devid in self._devices or devid in self._attaching:
                raise HostError(f"domain {domain.domid}: {kind} {devid} is there already")
        except BaseException:
            close_all(fds)
            raise
        done = self._attaching[devid] = self._loop.create_future()
        try:
            if isinstance(attach, m.Attach):
                await self._begin(domain, attach, backend, fds)
            elif isinstance(attach, m.AttachVif):
                await self._begin_vif(domain, attach, backend, fds)
            else:
                await self._begin_console(domain, attach, backend, fds)
        finally:
            del self._attaching[devid]
            done.set_result(None)

    def _shared(self, domain: _Domain, store: Client, key: int, connected: dict[str, Any] | None) -> dict[str, Any]:
        """What a device of any kind gets."""
        return {
            "domid": domain.domid,
            "store": store,
            "memory": domain.memory,
            "grants": domain.grants,
            "poller": domain.poller,
            "loop": self._loop,
            "connected": connected,
            "bind": lambda ports: self._bind(key, ports),
            "unbind": lambda ports: self._send(m.Unbind(key, list(ports))),
            "report": lambda params: self._report(key, params),
        }

    def _report(self, key: int, params: dict[str, Any] | None) -> asyncio.Future[str]:
        id = next(self._ids)
        noted = self._keeps[id] = self._loop.create_future()
        noted.add_done_callback(lambda _: self._keeps.pop(id, None))
        self._send(m.Connected(key, params, id))
        return noted

    def _run(self, device: AnyDevice, backend: Backend, fds: list[int], drain_s: float) -> None:
        running = _Running(device, backend(device), fds, drain_s)
        self._devices[device.key] = running
        running.task.add_done_callback(lambda _: self._ended(running))

    async def _begin_console(self, domain: _Domain, attach: m.AttachConsole, backend: Backend, fds: list[int]) -> None:
        """Starts a console's backend. Takes its descriptors."""
        try:
            rest = iter(fds)
            device = ConsoleDevice(
                devid=attach.number,
                kind="console",
                page=attach.page,
                pty=next(rest) if attach.pty else -1,
                log=next(rest) if attach.logs else -1,
                old_log=next(rest) if attach.logs else -1,
                options=domain.setup.console,
                **self._shared(domain, await domain.store, attach.devid, attach.connected),
            )
        except BaseException:
            close_all(fds)
            raise
        self._run(device, backend, fds, domain.setup.drain_s)

    async def _begin_vif(self, domain: _Domain, attach: m.AttachVif, backend: Backend, fds: list[int]) -> None:
        """Starts a vif's backend. Takes its descriptors."""
        try:
            answers_fd, *taps = fds
            if len(taps) != attach.vif.queues:
                raise HostError(f"domain {domain.domid}: vif {attach.number}: {len(taps)} TAP queues")
            shared = self._shared(domain, await domain.store, attach.devid, attach.connected)
            device = VifDevice(
                devid=attach.number, kind="vif", vif=attach.vif, taps=taps, answers_fd=answers_fd, **shared
            )
        except BaseException:
            close_all(fds)
            raise
        self._run(device, backend, fds, domain.setup.drain_s)

    async def _begin(self, domain: _Domain, attach: m.Attach, backend: Backend, fds: list[int]) -> None:
        """Starts a disk's backend. Takes its descriptors."""
        uring = None
        try:
            disk_fd, journal_fd = fds
            store = await domain.store
            completions = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            fds = [*fds, completions]
            if domain.setup.vbd.engine != "threads":
                uring = await self._uring(domain, attach.devid, completions, journal_fd)
            device = Device(
                devid=attach.devid,
                kind=attach.kind,
                uring=uring,
                completions=completions,
                disk_fd=disk_fd,
                readonly=attach.readonly,
                cdrom=attach.cdrom,
                direct=attach.direct,
                journal_fd=journal_fd,
                options=attach.vbd or domain.setup.vbd,
                **self._shared(domain, store, attach.devid, attach.connected),
                sectors=attach.sectors,
                sector_size=attach.sector_size,
                holes=attach.holes,
                failed=attach.failed,
                flush_failed=lambda reason: self._send(m.Failed(attach.devid, reason)),
            )
        except BaseException:
            if uring is not None:
                uring.close()
            close_all(fds)
            raise
        self._run(device, backend, fds, domain.setup.drain_s)

    async def _uring(self, domain: _Domain, devid: int, completions: int, journal: int) -> Uring | None:
        """A device's io_uring, of which the control plane has a copy before the first request goes into it, and which
        keeps the journal locked (control/disk.py) while it has requests.

        None where the kernel refuses it and the config lets threads take its place.
        """
        uring = None
        try:
            uring = Uring(_URING_ENTRIES, eventfd=completions)
            uring.hold(journal)
            id = next(self._ids)
            kept = self._keeps[id] = self._loop.create_future()
            try:
                self._send(m.Keep(id, devid, uring.fd))
                reason = await kept
            finally:
                del self._keeps[id]
            if reason:
                raise HostError(reason)
        except BaseException as exc:
            if uring is not None:
                uring.close()
            if not isinstance(exc, HostError) or domain.setup.vbd.engine == "io_uring":
                raise
            if not self._warned:
                self._warned = True
                log.warning("domain %d: disks are served by threads: %s", domain.domid, exc)
            return None
        return uring

    async def _detach(self, detach: m.Detach) -> None:
        attaching = self._attaching.get(detach.devid)
        if attaching is not None:
            await asyncio.wait([attaching])
        running = self._devices.get(detach.devid)
        if running is not None:
            await running.end()

    async def _resize(self, resize: m.Resize) -> None:
        attaching = self._attaching.get(resize.devid)
        if attaching is not None:
            await asyncio.wait([attaching])
        running = self._devices.get(resize.devid)
        # else it is off; the next one that serves it gets the size with its Attach
        if running is not None and isinstance(running.device, Device):
            await running.device.resize(resize.sectors)

    def _vif(self, devid: int) -> tuple[_Running, VifDevice]:
        running = self._devices.get(devid)
        if running is None or not isinstance(running.device, VifDevice):
            raise VmmError("the vif is not served now", errno.ENODEV)
        return running, running.device

    def _taps(self, taps: m.Taps, fds: list[int]) -> None:
        running, device = self._vif(taps.devid)
        if len(fds) != device.vif.queues:
            raise HostError(f"{device.name}: {len(fds)} TAP queues, there were {device.vif.queues}")
        new, (answers_fd, *old) = list(fds), running.fds
        fds.clear()
        running.fds[:] = [answers_fd, *new]
        try:
            device.retap(new)
        finally:
            close_all(old)

    def _capture(self, capture: m.Capture, fds: list[int]) -> None:
        _, device = self._vif(capture.devid)
        device.capture(fds.pop(), capture.greeting, capture.snap, capture.frames)

    async def _change(self, change: m.ChangeVif) -> None:
        attaching = self._attaching.get(change.devid)
        if attaching is not None:
            await asyncio.wait([attaching])
        _, device = self._vif(change.devid)
        named = {name: getattr(change, name) for name in ("mtu", "rate", "carrier")}
        known = {name: value for name, value in named.items() if value is not None}
        await device.change(msgspec.structs.replace(device.vif, **known))

    def _ended(self, running: _Running) -> None:
        """The backend's coroutine is over, whoever ended it."""
        device = running.device
        error = None if running.task.cancelled() else running.task.exception()
        if isinstance(error, ConnectionError) and self._alone:
            os._exit(0)  # XenStore is the control plane's: that one has died, or starts another worker
        if error is not None and not isinstance(error, EvtchndError):
            self._defect(device.name, error)
        if self._devices.get(device.key) is running:
            del self._devices[device.key]
        for channel in device.left_over():
            device.release(channel)
        if isinstance(device, Device) and device.uring is not None:
            device.uring.close()
        # of a disk that hangs, the journal's lock goes with this process
        locked = device.journal_fd if isinstance(device, Device) and device.hung else -1
        close_all(fd for fd in running.fds if fd != locked)
        if not running.task.cancelled():
            self._send(m.Ended(device.key, _reason(device, error)))

    async def _bind(self, devid: int, ports: Sequence[int]) -> list[tuple[int, int]]:
        id = next(self._ids)
        future = self._binds[id] = self._loop.create_future()
        try:
            self._send(m.Bind(id, devid, list(ports)))
            fds = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                close_all(future.result())  # they came while the backend was being cancelled
            raise
        finally:
            self._binds.pop(id, None)
        return list(zip(fds[::2], fds[1::2], strict=True))

    def _bound(self, bound: m.Bound, fds: list[int]) -> None:
        future = self._binds.get(bound.id)
        if future is None or future.done():
            close_all(fds)
        elif bound.reason:
            future.set_exception(GuestError(bound.reason))
        else:
            future.set_result(fds)


def _reason(device: AnyDevice, error: BaseException | None) -> str:
    """Logs how a backend ended; what the control plane shows of it."""
    if error is None:
        log.info("%s: closed", device.name)
        return ""
    text = str(error)
    if isinstance(error, GuestError | VmmError | HostError | ConnectionError):  # the last: the control plane has gone
        log.error("%s: off", text if text.startswith(device.name) else f"{device.name}: {text}")
        return text
    log.error("%s: off: a defect of evtchnd", device.name, exc_info=error)
    return f"defect: {error!r}"


class _Domain:
    """What a worker's devices share."""

    def __init__(self, setup: m.Setup, store: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.setup = setup
        self.domid = setup.domid
        # a task, so that messages which follow this one find the memory at once
        self.store = loop.create_task(Client.from_socket(store))
        self.memory = GuestMemory()
        self.grants = GrantTable(self.memory, setup.domid)
        self.poller = Poller(loop, max_us=setup.poll.max_us)

    async def close(self) -> None:
        await (await self.store).close()
        self.poller.close()
        try:
            self.grants.close()
            self.memory.close()
        except RuntimeError as exc:
            # requests that did not end in time: a disk that hangs must not keep the worker from ending
            log.error("domain %d: %s", self.domid, exc)


class _Running:
    """A device whose backend runs."""

    def __init__(self, device: AnyDevice, run: Coroutine[Any, Any, None], fds: list[int], drain_s: float) -> None:
        self.device = device
        self.fds = fds
        self.task = device.loop.create_task(run, name=device.name)
        self._drain_s = drain_s

    async def end(self) -> None:
        """Cancels the backend and waits for its teardown, `drain_s` at most."""
        self.task.cancel()
        done, _ = await asyncio.wait([self.task], timeout=self._drain_s)
        if not done:
            log.error("%s: requests are still in flight after %g s", self.device.name, self._drain_s)
        # the task's callback, which closes what it held, has run once the loop has turned
        await asyncio.sleep(0)
