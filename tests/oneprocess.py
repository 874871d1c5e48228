"""A guest and its backend in one process, of real parts: memfd, eventfds, a XenStore server, image files.

`LocalVm` is the guest's machine (what `evtchnd.guest` asks of one), `Host` the host's side of it. The guest's ends
block: run them in a thread (`await host.guest(function)`).
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from evtchnd import journal
from evtchnd._core.uring import Uring
from evtchnd.abi import PAGE_SIZE
from evtchnd.channel import Poller
from evtchnd.control import toolstack
from evtchnd.control.config import Vbd
from evtchnd.errors import GuestError
from evtchnd.grants import GrantTable
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.memory import GuestMemory, map_page
from evtchnd.worker.device import Device, Params
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import Server
from evtchnd_backends import blkback

T = TypeVar("T")

STORE_GFN, STORE_PORT = 1, 1
LONG = 60.0


def noted(_: object) -> asyncio.Future[None]:
    """What a device is told when its params are where they have to be."""
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


class LocalVm:
    """RAM and grant frames in sealed memfds, every port a pair of eventfds."""

    def __init__(self, domid: int = 7, *, mib: int = 16, frames: int = 4) -> None:
        self.domid = domid
        self.ram_pages = mib << 8
        self.frames = frames
        self.ram_fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram_fd, self.ram_pages * PAGE_SIZE)
        self.grant_fd = os.memfd_create("grants", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.grant_fd, frames * PAGE_SIZE)
        for fd in (self.ram_fd, self.grant_fd):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.ram = GuestMemory()
        self.ram.add(0, 0, self.ram_pages, self.ram_fd, 0)
        self._grants = mmap.mmap(self.grant_fd, frames * PAGE_SIZE)
        self.grants = memoryview(self._grants)
        self.store_gfn = STORE_GFN
        self.store_port = STORE_PORT
        self.ports: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._open(STORE_PORT)
        self._next = 2

    def _open(self, port: int) -> None:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.ports[port] = (os.eventfd(0, flags), os.eventfd(0, flags))

    def alloc_unbound(self, remote: int) -> int:
        with self._lock:
            port = self._next
            self._next += 1
            self._open(port)
            return port

    def send(self, port: int) -> None:
        os.eventfd_write(self.ports[port][0], 1)

    def wait(self, port: int, timeout: float) -> bool:
        fd = self.ports[port][1]
        if not select.select([fd], [], [], timeout)[0]:
            return False
        with suppress(BlockingIOError):
            os.eventfd_read(fd)
        return True

    def close_port(self, port: int) -> None:
        for fd in self.ports.pop(port):
            os.close(fd)

    def close(self) -> None:
        for port in list(self.ports):
            self.close_port(port)
        self.grants.release()
        self._grants.close()
        self.ram.close()
        os.close(self.ram_fd)
        os.close(self.grant_fd)


class Host:
    """XenStore, the domain's memory and grants as a worker has them, and its vbds."""

    def __init__(self, vm: LocalVm) -> None:
        self.vm = vm
        self.domid = vm.domid
        self.devices: dict[int, Device] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.reported: dict[int, Params | None] = {}
        self.bound: list[int] = []
        self._fds: list[int] = []

    async def __aenter__(self) -> Host:
        vm = self.vm
        self.server = Server()
        home = f"/local/domain/{self.domid}"
        self.server.write(home, "", perms=[f"n{self.domid}"])
        self.server.write(f"/local/domain/0/backend/vbd/{self.domid}", "", perms=["n0", f"r{self.domid}"])
        self.server.write(f"{home}/device/vbd", "", perms=[f"n{self.domid}"])
        self.server.introduce(self.domid)
        self._page = map_page(vm.ram_fd, STORE_GFN * PAGE_SIZE)
        self._ring = self.server.attach_ring(self.domid, self._page, *vm.ports[STORE_PORT])
        self.memory = GuestMemory()
        self.memory.add(0, 0, vm.ram_pages, vm.ram_fd, 0)
        self.grants = GrantTable(self.memory, self.domid)
        for index in range(vm.frames):
            self.grants.add_frame(index, vm.grant_fd, index * PAGE_SIZE)
        self.loop = asyncio.get_running_loop()
        self.poller = Poller(self.loop, max_us=50)
        self.domain = Domain(vm)
        self.store = XenStore(self.domain)
        self.client = await self.worker_client()
        return self

    async def worker_client(self) -> Client:
        """A worker's connection: domain 0, confined to its guest."""
        ours, theirs = socket.socketpair()
        self.server.attach_socket(theirs, confine=self.domid)
        return await Client.from_socket(ours)

    async def __aexit__(self, *exc: object) -> None:
        failed = None
        for devid in list(self.tasks):
            try:
                await self.kill(devid)
            except Exception as error:  # a reader that is left in the loop keeps uvloop from closing, for ever
                failed = failed or error
        self.poller.close()
        await self.client.close()
        self.store.close()
        self.domain.close()
        self._ring.close()
        await self.server.close()
        if failed is not None:
            raise failed
        self.grants.close()
        self.memory.close()
        self._page.close()
        for fd in self._fds:
            os.close(fd)

    # ---- the toolstack's part

    def write_nodes(self, devid: int) -> None:
        """What xl writes for a vbd."""
        front, back = f"/local/domain/{self.domid}/device/vbd/{devid}", self.backend(devid)
        with self.server.transaction() as t:
            own = [f"n{self.domid}", "r0"]
            t.write(front, "", perms=own)
            nodes: dict[str, str | int] = {
                "backend": back,
                "backend-id": 0,
                "state": 1,
                "virtual-device": devid,
                "device-type": "disk",
            }
            for name, value in nodes.items():
                t.write(f"{front}/{name}", value, perms=own)
            theirs = ["n0", f"r{self.domid}"]
            t.write(back, "", perms=theirs)
            nodes = {
                "frontend": front,
                "frontend-id": self.domid,
                "online": 1,
                "state": 1,
                "mode": "w",
                "device-type": "disk",
            }
            for name, value in nodes.items():
                t.write(f"{back}/{name}", value, perms=theirs)

    def backend(self, devid: int) -> str:
        return f"/local/domain/0/backend/vbd/{self.domid}/{devid}"

    def state(self, devid: int) -> str | None:
        return self.server.get(f"{self.backend(devid)}/state")

    def detach(self, devid: int) -> None:
        with self.server.transaction() as t:
            t.write(f"{self.backend(devid)}/online", 0)
            t.write(f"{self.backend(devid)}/state", 5)

    # ---- the worker's part

    def attach(
        self,
        devid: int,
        image: str | os.PathLike[str],
        *,
        readonly: bool = False,
        cdrom: bool = False,
        direct: bool = False,
        sector_size: int = 0,
        discard: bool = True,
        options: Vbd | None = None,
        nodes: bool = True,
    ) -> Device:
        """The nodes and the backend's coroutine."""
        if nodes:
            self.write_nodes(devid)
        if not discard:
            self.server.write(f"{self.backend(devid)}/discard-enable", "0")
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0)
        disk_fd = os.open(image, flags | os.O_CLOEXEC)
        options = options or Vbd()
        journal_fd = journal.create(512, queues=options.max_queues, name=f"vbd-{devid}")
        self._fds += [disk_fd, journal_fd]
        return self.run(
            devid,
            disk_fd,
            journal_fd,
            readonly=readonly,
            cdrom=cdrom,
            direct=direct,
            sector_size=sector_size,
            options=options,
            connected=None,
        )

    def run(
        self,
        devid: int,
        disk_fd: int,
        journal_fd: int,
        *,
        readonly: bool,
        options: Vbd,
        connected: Params | None,
        cdrom: bool = False,
        direct: bool = False,
        sector_size: int = 0,
        grants: GrantTable | None = None,
        memory: GuestMemory | None = None,
    ) -> Device:
        completions = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        uring = Uring(256, eventfd=completions) if options.engine != "threads" else None
        device = Device(
            domid=self.domid,
            devid=devid,
            kind="vbd",
            store=self.client,
            memory=memory or self.memory,
            grants=grants or self.grants,
            poller=self.poller,
            loop=self.loop,
            uring=uring,
            completions=completions,
            disk_fd=disk_fd,
            readonly=readonly,
            cdrom=cdrom,
            direct=direct,
            sector_size=sector_size,
            journal_fd=journal_fd,
            options=options,
            connected=connected,
            bind=self._bind,
            unbind=self._unbind,
            report=lambda params: noted(self._report(device, params)),
        )
        self.devices[devid] = device
        task = self.tasks[devid] = self.loop.create_task(blkback.run(device))

        def ended(_: asyncio.Task[None]) -> None:
            if uring is not None:
                uring.close()
            os.close(completions)

        task.add_done_callback(ended)
        return device

    def _report(self, device: Device, params: Params | None) -> None:
        self.reported[device.devid] = params
        if params is None:
            toolstack.forget_rings(self.server, device)

    async def _bind(self, ports: Sequence[int]) -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        if any(port not in self.vm.ports for port in ports):
            raise GuestError(f"port {list(ports)}: the VMM refuses")
        self.bound += ports
        return [(os.dup(self.vm.ports[port][0]), os.dup(self.vm.ports[port][1])) for port in ports]

    def _unbind(self, ports: Sequence[int]) -> None:
        for port in ports:
            self.bound.remove(port)

    async def kill(self, devid: int) -> None:
        """Cancels the backend: what a worker does at a detach by force and at its own end."""
        task = self.tasks.pop(devid)
        task.cancel()
        await asyncio.wait([task])
        for channel in self.devices[devid].left_over():
            await self.devices[devid].unbind([channel])
        if not task.cancelled() and task.exception() is not None:
            raise task.exception() or AssertionError

    async def guest(self, body: Callable[[], T]) -> T:
        """Runs the guest's blocking code in a thread; the error of a backend that ended meanwhile comes first."""
        try:
            return await asyncio.to_thread(body)
        finally:
            for task in self.tasks.values():
                if task.done() and not task.cancelled():
                    task.result()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until `condition()`."""
        for _ in range(int(LONG / 0.005)):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise TimeoutError(what)


def open_fds() -> list[str]:
    """What this process has open, by kind: comparable before and after."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder itself
            found.append(os.readlink(f"/proc/self/fd/{fd}").split(":[")[0])
    return sorted(found)
