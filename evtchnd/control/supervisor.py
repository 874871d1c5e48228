"""A domain's worker: started, asked, and started again when it dies.

A worker that dies takes nothing with it: memory, grant frames, eventfds, disks, journals and the io_uring are held by
the control plane, so the next worker gets the same ones and attaches to the rings as they are. What has to wait is a
disk whose old io_uring still has requests in flight (they outlive SIGKILL): a replay before their end could be
overwritten by them.

Whoever changes the domain changes the control plane's tables first and tells the worker then; a worker that is not
there at that moment gets the tables when it comes.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evtchnd import transport
from evtchnd._core.uring import inflight_of
from evtchnd.control.config import Config
from evtchnd.control.disk import Disk
from evtchnd.control.zygote import Process, Workers
from evtchnd.errors import HostError, VmmError
from evtchnd.worker import messages as m
from evtchnd.worker.link import Link

if TYPE_CHECKING:
    from evtchnd.control.console import Consoles
    from evtchnd.control.vif import Vifs
    from evtchnd.worker.device import Params

log = logging.getLogger(__name__)

# Messages that a worker has not read: a domain's tables and its disks many times over.
_MOST_WAITING = 4096
# How often a dead worker's io_uring is looked at: from the time of one request to a tenth of a second.
_LOOK_S, _LOOK_MOST_S = 0.001, 0.1
# Requests of a dead worker that are still in flight after this are worth a line in the log.
_SLOW_S = 10.0


class Attachable(Protocol):
    """A console or a vif."""

    key: int
    closed: bool
    waits: bool  # for the end of a worker that had it before this process
    connected: Params | None
    reason: str
    settled: asyncio.Event

    @property
    def name(self) -> str: ...

    def attach(self, id: int) -> tuple[m.AnyMessage, list[int]]:
        """What a worker is told of it, and the descriptors that go along."""


class Owner(Protocol):
    """The domain, as its supervisor sees it."""

    domid: int
    running: bool  # its disks have their nodes
    disks: dict[int, Disk]
    consoles: Consoles
    vifs: Vifs

    def memory_messages(self, id: Callable[[], int]) -> Iterable[tuple[m.Memory, list[int]]]:
        """All slots and grant frames."""

    def store_socket(self) -> socket.socket:
        """A new XenStore connection for a worker, confined to the domain."""

    def kick(self, devid: int) -> None:
        """Kicks every port of a device, as if its guest had: requests may have come while nobody looked."""

    async def bind(self, devid: int, ports: list[int]) -> list[int]: ...
    def unbind(self, devid: int, ports: list[int]) -> None: ...
    def disk_ended(self, disk: Disk) -> None: ...
    def device_ended(self, device: Attachable) -> None: ...
    def rings_gone(self, device: Disk | Attachable) -> None: ...
    def note(self) -> None:
        """What is known of a device has changed: the next control plane has to know it."""


class _Worker:
    """One worker that runs."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.unlinked: asyncio.Future[str] = loop.create_future()
        self.link: Link | None = None
        self.process: Process | None = None
        self.answers: dict[int, asyncio.Future[m.Done | m.Counted]] = {}
        self.given: set[int] = set()  # disks that it has got

    def send(self, message: m.AnyMessage, fds: Sequence[int] = ()) -> None:
        if self.link is not None:
            self.link.send(m.pack(message), fds)

    def ask(
        self, id: int, message: m.AnyMessage, fds: Sequence[int] = ()
    ) -> Coroutine[Any, Any, m.Done | m.Counted | None]:
        """Sends now; what it returns waits for the answer, or for None when the worker ended without one."""
        answer = self.answers[id] = asyncio.get_running_loop().create_future()
        self.send(message, fds)
        return self._answer(id, answer)

    async def _answer(self, id: int, answer: asyncio.Future[m.Done | m.Counted]) -> m.Done | m.Counted | None:
        try:
            if not self.unlinked.done():
                both: list[asyncio.Future[Any]] = [answer, self.unlinked]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            self.answers.pop(id, None)


class Supervisor:
    """`start()` returns when the domain has a worker; from then on it always has one, or gets one, until `end()`."""

    def __init__(self, owner: Owner, workers: Workers, config: Config) -> None:
        self.restarts = 0
        self.failing = ""  # why the domain is marked: its workers do not live
        self._owner = owner
        self._workers = workers
        self._config = config
        self._name = f"domain {owner.domid}: worker"
        self._ids = itertools.count(1)
        self._worker: _Worker | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._life: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The worker's, None while there is none."""
        worker = self._worker
        return worker.process.pid if worker is not None and worker.process is not None else None

    async def start(self) -> None:
        """HostError if no worker can be started, VmmError if it refuses the domain's memory."""
        worker = await self._begin()
        self._life = asyncio.get_running_loop().create_task(self._keep(worker))

    async def end(self) -> None:
        """Ends the worker: in order, or with SIGKILL when that takes too long. Idempotent."""
        life, self._life = self._life, None
        if life is not None:
            life.cancel()
            await asyncio.wait([life])
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        worker, self._worker = self._worker, None
        if worker is not None:
            await self._finish(worker)

    # -- what the domain asks of its worker

    async def change(self, message: Callable[[int], m.AnyMessage], fds: Sequence[int] = ()) -> None:
        """Tells the worker of a change in the tables. VmmError if it refuses. No worker: the next one gets it."""
        worker = self._worker
        if worker is not None:
            id = next(self._ids)
            answer = await worker.ask(id, message(id), fds)
            if isinstance(answer, m.Done) and answer.errno:
                raise VmmError(answer.reason, answer.errno)

    async def attach(self, disk: Disk) -> None:
        """Gives a disk to the worker."""
        worker = self._worker
        if worker is not None:
            await self._attach(worker, disk)

    def resume(self, disk: Disk) -> None:
        """As `attach`, beside what goes on: what workers before this process have left may take its time."""
        worker = self._worker
        if worker is not None:
            self._spawn(self._attach(worker, disk))

    async def detach(self, disk: Disk) -> None:
        """Takes a disk away; returns when its backend has ended."""
        worker = self._worker
        await self.change(lambda id: m.Detach(id, disk.devid))
        if worker is not None:
            worker.given.discard(disk.devid)

    async def attach_device(self, device: Attachable) -> None:
        """Gives a console or a vif to the worker."""
        worker = self._worker
        if worker is not None:
            await self._attach_device(worker, device)

    def resume_device(self, device: Attachable, gone: Coroutine[Any, Any, None]) -> None:
        """As attach_device, once `gone` says that workers before this process are; beside what goes on."""

        async def resume() -> None:
            await gone
            device.waits = False
            await self.attach_device(device)

        device.waits = True
        self._spawn(resume())

    async def detach_device(self, device: Attachable) -> None:
        """As detach."""
        worker = self._worker
        await self.change(lambda id: m.Detach(id, device.key))
        if worker is not None:
            worker.given.discard(device.key)

    async def client(self, device: Attachable, message: Callable[[int], m.AnyMessage], fd: int) -> None:
        """Gives somebody's socket to the worker, or to the next one if that one dies. VmmError, HostError."""
        try:
            async with asyncio.timeout(self._config.limits.request_s):
                while True:
                    worker = self._worker
                    if worker is not None:
                        id = next(self._ids)
                        answer = await worker.ask(id, message(id), [fd])
                        if isinstance(answer, m.Done) and answer.errno not in (0, errno.ENODEV):
                            raise VmmError(answer.reason, answer.errno)
                        if isinstance(answer, m.Done) and not answer.errno:
                            return
                    await asyncio.sleep(_LOOK_MOST_S)
        except TimeoutError:
            raise HostError(f"{device.name}: no worker serves it now") from None

    async def counters(self) -> dict[int, dict[str, int]]:
        """Of each device, by number; {} while there is no worker or when it is too busy to tell."""
        worker = self._worker
        if worker is None:
            return {}
        id = next(self._ids)
        try:
            answer = await asyncio.wait_for(worker.ask(id, m.Count(id)), self._config.limits.request_s)
        except TimeoutError:
            return {}
        return answer.counters if isinstance(answer, m.Counted) else {}

    # -- its life

    async def _begin(self) -> _Worker:
        """A worker with the domain's memory; its disks follow."""
        owner, config = self._owner, self._config
        worker = _Worker()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                worker.process = await self._workers.worker(theirs, lambda how: _settle(worker.ended, how))
        except BaseException:
            ours.close()
            raise
        worker.link = Link(
            ours,
            lambda data, fds: self._received(worker, data, fds),
            lambda reason: _settle(worker.unlinked, reason),
            most=_MOST_WAITING,
        )
        try:
            asked = []
            id = next(self._ids)
            with owner.store_socket() as store:
                setup = m.Setup(id, owner.domid, config.poll, config.vbd, config.limits.drain_s, config.console)
                asked.append(worker.ask(id, setup, [store.fileno()]))
                asked += [worker.ask(msg.id, msg, fds) for msg, fds in owner.memory_messages(lambda: next(self._ids))]
                self._worker = worker
                answers = await asyncio.gather(*asked)
            for answer in answers:
                if answer is None:
                    raise HostError(f"{self._name} ended at its start")
                if isinstance(answer, m.Done) and answer.errno:
                    raise VmmError(answer.reason, answer.errno)
        except BaseException:
            self._worker = None
            await self._finish(worker)
            raise
        return worker

    async def _keep(self, worker: _Worker | None) -> None:
        """Starts a worker again and again: at once, then after a pause that doubles, until one lives for a while."""
        limits = self._config.limits
        pause, deaths = 0.0, 0
        while True:
            if worker is not None:
                if await self._lives(worker):
                    pause, deaths = 0.0, 0
                    self._mark("")
                how = await self._wait(worker)
                self._worker = None
                await self._finish(worker)
                soon = f" in {pause:g} s" if pause else ""
                pid = worker.process.pid if worker.process else 0
                log.error("%s %d %s: starting another%s", self._name, pid, how, soon)
                deaths += 1
                if deaths >= limits.worker_deaths:
                    self._mark(f"{deaths} workers died in a row, the last one {how}")
            await asyncio.sleep(pause)
            pause = min(max(pause * 2, limits.restart_pause_s), limits.restart_pause_max_s)
            try:
                worker = await self._begin()
                self.restarts += 1
                if self._owner.running:
                    devices: list[Attachable] = list(self._owner.consoles.by_key.values())
                    for device in [*devices, *self._owner.vifs.by_key.values()]:
                        if not device.reason:
                            self._spawn(self._attach_device(worker, device))
                    for disk in list(self._owner.disks.values()):
                        if not disk.reason:
                            self._spawn(self._attach(worker, disk))
            except (HostError, VmmError, OSError) as exc:  # no descriptor is free, for one
                worker = None
                log.error("%s: %s: next try in %g s", self._name, exc, pause)
                deaths += 1
                if deaths >= limits.worker_deaths:
                    self._mark(f"no worker after {deaths} tries: {exc}")

    async def _lives(self, worker: _Worker) -> bool:
        """Waits until it has lived for as long as the longest pause; False: it has ended before."""
        ends = [worker.ended, worker.unlinked]
        done, _ = await asyncio.wait(
            ends, timeout=self._config.limits.restart_pause_max_s, return_when=asyncio.FIRST_COMPLETED
        )
        return not done

    def _mark(self, reason: str) -> None:
        """The domain as failing, or with "" as served again; a line when it changes."""
        was, self.failing = self.failing, reason
        if reason and not was:
            most = self._config.limits.restart_pause_max_s
            log.error(
                "%s: %s: the domain is marked as failing and its devices pause: see above for what ends its workers; "
                "another one is tried each %g s at least",
                *(self._name, reason, most),
            )
        elif was and not reason:
            log.warning("%s: lives: the domain is served again", self._name)

    async def _wait(self, worker: _Worker) -> str:
        """How the worker ended. Its last words have been read then."""
        await asyncio.wait([worker.ended, worker.unlinked], return_when=asyncio.FIRST_COMPLETED)
        if not worker.ended.done():
            await asyncio.wait([worker.ended], timeout=self._config.limits.drain_s)
            if not worker.ended.done() and worker.process is not None:
                worker.process.kill()
        how = await worker.ended or "ended"
        why = await worker.unlinked
        return f"{how} ({why})" if why else how

    async def _finish(self, worker: _Worker) -> None:
        """Ends a worker if it has not ended, and lets go of it."""
        if worker.link is not None:
            worker.send(m.End())
            worker.link.close()
        _settle(worker.unlinked, "")
        if worker.process is not None:
            if not worker.ended.done():
                # it drains its disks first
                await asyncio.wait([worker.ended], timeout=self._config.limits.drain_s + 1)
            if not worker.ended.done():
                log.error("%s %d does not end: killed", self._name, worker.process.pid)
                worker.process.kill()
                await worker.ended
            worker.process.close()

    async def _attach(self, worker: _Worker, disk: Disk) -> None:
        def wanted() -> bool:
            return self._worker is worker and disk.fd >= 0 and disk.devid not in worker.given

        if disk.uring >= 0:
            await drained(disk, wanted)
        elif disk.resumed:
            await freed(disk, wanted)
        if not wanted():  # the worker died meanwhile: what is kept now may be the next one's io_uring
            return
        disk.keep_uring(-1)
        worker.given.add(disk.devid)
        id = next(self._ids)
        attach = m.Attach(
            id,
            disk.kind,
            disk.devid,
            disk.readonly,
            disk.cdrom,
            disk.direct,
            disk.connected,
            sectors=disk.sectors,
            sector_size=disk.sector_size,
            vbd=disk.vbd,
            holes=disk.holes,
            failed=disk.failed,
        )
        journal = disk.lend()
        try:
            asked = worker.ask(id, attach, [disk.fd, journal])
        finally:
            os.close(journal)
        answer = await asked
        if isinstance(answer, m.Done) and answer.errno:
            disk.reason = answer.reason
            log.error("%s: off: %s", disk.name, answer.reason)
        elif disk.connected is not None:
            self._owner.kick(disk.devid)

    async def _attach_device(self, worker: _Worker, device: Attachable) -> None:
        if self._worker is not worker or device.closed or device.waits or device.key in worker.given:
            return
        worker.given.add(device.key)
        id = next(self._ids)
        message, fds = device.attach(id)
        answer = await worker.ask(id, message, fds)
        if isinstance(answer, m.Done) and answer.errno:
            device.reason = answer.reason
            device.settled.set()
            log.error("%s: off: %s", device.name, answer.reason)
        elif device.connected is not None:
            self._owner.kick(device.key)

    def _device(self, key: int) -> Attachable | None:
        return self._owner.consoles.by_key.get(key) or self._owner.vifs.by_key.get(key)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a defect of evtchnd", self._name, exc_info=error)

    # -- what the worker says

    def _received(self, worker: _Worker, data: bytes, fds: list[int]) -> None:
        message = m.unpack(data)
        match message:
            case m.Done() | m.Counted():
                answer = worker.answers.get(message.id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case m.Bind():
                self._spawn(self._bind(worker, message))
            case m.Unbind():
                self._owner.unbind(message.devid, message.ports)
            case m.Connected() if message.devid in self._owner.disks:
                disk = self._owner.disks[message.devid]
                disk.connected = message.params
                if message.params is None:
                    self._owner.rings_gone(disk)
                self._noted(worker, message)
            case m.Keep():
                worker.send(m.Done(message.id, reason=self._keep_uring(worker, message)))
            case m.Failed() if message.devid in self._owner.disks:
                self._owner.disks[message.devid].failed = message.reason
            case m.Ended() if message.devid in self._owner.disks:
                disk = self._owner.disks[message.devid]
                worker.given.discard(disk.devid)
                disk.connected = None
                disk.reason = message.reason
                self._owner.note()
                self._owner.disk_ended(disk)
            case m.Connected() if (device := self._device(message.devid)) is not None:
                device.connected = message.params
                device.settled.set()
                if message.params is None:
                    self._owner.rings_gone(device)
                self._noted(worker, message)
            case m.Ended() if (device := self._device(message.devid)) is not None:
                worker.given.discard(device.key)
                device.connected = None
                device.reason = message.reason
                device.settled.set()
                self._owner.device_ended(device)
            case m.Connected():
                self._noted(worker, message)
            case _:
                log.debug("%s: %s of no device", self._name, type(message).__name__)
        transport.close_all(fds)

    def _noted(self, worker: _Worker, message: m.Connected) -> None:
        self._owner.note()
        worker.send(m.Done(message.id))

    def _keep_uring(self, worker: _Worker, keep: m.Keep) -> str:
        disk = self._owner.disks.get(keep.devid)
        if disk is None or worker.process is None:
            return "the device is gone"
        try:
            fd = worker.process.copy(keep.number)
        except HostError as exc:
            return f"its io_uring cannot be kept over a restart: {exc}"
        # it is mapped here one day, and a file that was cut short would be a SIGBUS
        if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[io_uring]":
            os.close(fd)
            return f"descriptor {keep.number} is no io_uring"
        disk.keep_uring(fd)
        return ""

    async def _bind(self, worker: _Worker, bind: m.Bind) -> None:
        try:
            fds = await self._owner.bind(bind.devid, bind.ports)
        except (VmmError, HostError, OSError) as exc:
            worker.send(m.Bound(bind.id, str(exc)))
        else:
            worker.send(m.Bound(bind.id), fds)


def _settle(future: asyncio.Future[str], text: str) -> None:
    if not future.done():
        future.set_result(text)


async def drained(disk: Disk, wanted: Callable[[], bool]) -> None:
    """Waits until the requests that a dead worker left to the kernel have ended, as long as that is `wanted`."""
    # -1: it was detached meanwhile
    await _ended(disk, wanted, lambda: inflight_of(disk.uring) if disk.uring >= 0 else 0)


class Lent(Protocol):
    """A device that workers have locked as long as they serve it."""

    @property
    def name(self) -> str: ...
    def free(self) -> bool: ...


async def freed(device: Lent, wanted: Callable[[], bool] = lambda: True) -> None:
    """The same of the workers of a control plane before this one, and of those workers themselves."""
    await _ended(device, wanted, lambda: int(not device.free()))


async def _ended(disk: Lent, wanted: Callable[[], bool], left: Callable[[], int]) -> None:
    loop = asyncio.get_running_loop()
    warn = loop.time() + _SLOW_S
    pause = _LOOK_S
    while wanted() and (count := left()):
        if loop.time() > warn:
            warn = float("inf")
            log.warning("%s: %d requests of a worker that died may still be in flight: waiting", disk.name, count)
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LOOK_MOST_S)
