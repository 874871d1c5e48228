"""A worker by its control plane's messages: memory, a device with its port, refusals, the end of it all."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from evtchnd import transport
from evtchnd.abi import PAGE_SIZE
from evtchnd.control.config import Poll, Vbd
from evtchnd.errors import GuestError
from evtchnd.worker import messages as m
from evtchnd.worker.device import Device
from evtchnd.worker.domain import Worker
from evtchnd.worker.link import Link
from evtchnd.xenstore.server import Server

PAGES = 64


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Control:
    """The control plane's end, by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.said: list[m.AnyMessage] = []
        self.kicks: dict[int, int] = {}
        self.notifies: dict[int, int] = {}
        self.refuse_ports = ""
        self.refuse_uring = ""
        self._next = 0
        self._news = asyncio.Event()
        self.link = Link(sock, self._received, lambda _: self._news.set(), most=64)

    def id(self) -> int:
        self._next += 1
        return self._next

    async def ask(self, message: m.AnyMessage, fds: list[int] | None = None) -> m.AnyMessage:
        self.link.send(m.pack(message), fds or [])
        return await self.wait(lambda said: isinstance(said, m.Done | m.Counted) and said.id == message.id)  # type: ignore[union-attr]

    async def wait(self, want: Callable[[m.AnyMessage], bool]) -> m.AnyMessage:
        async with asyncio.timeout(20):
            while True:
                for said in self.said:
                    if want(said):
                        self.said.remove(said)
                        return said
                self._news.clear()
                await self._news.wait()

    def _received(self, data: bytes, fds: list[int]) -> None:
        assert not fds
        message = m.unpack(data)
        if isinstance(message, m.Bind) and self.refuse_ports:
            self.link.send(m.pack(m.Bound(message.id, self.refuse_ports)))
        elif isinstance(message, m.Bind):
            for port in message.ports:
                self.kicks[port], self.notifies[port] = os.eventfd(0), os.eventfd(0)
            pairs = [fd for port in message.ports for fd in (self.kicks[port], self.notifies[port])]
            self.link.send(m.pack(m.Bound(message.id)), pairs)
        elif isinstance(message, m.Keep):
            self.link.send(m.pack(m.Done(message.id, reason=self.refuse_uring)))
        self.said.append(message)
        self._news.set()

    def close(self) -> None:
        self.link.close()
        transport.close_all([*self.kicks.values(), *self.notifies.values()])


async def echo(device: Device) -> None:
    """A backend of one port, whose number is on the disk; each kick adds one to the first word of frame 5."""
    port = int(os.pread(device.disk_fd, 16, 0).rstrip(b"\0") or b"0")
    if not port:
        raise GuestError(f"{device.name}: ring-ref: 'abc' is no number")
    (channel,) = await device.bind([port])
    await device.store.write(f"{device.backend_path}/state", "4")
    device.connected_as({"port": port})
    count = 0
    device.stats = lambda: {"kicks": count, "uring": int(device.uring is not None)}

    async def pump() -> None:
        nonlocal count
        while True:
            await channel.kicked()
            count += 1
            with device.memory.view(5) as page:
                page[0] = count
            channel.notify()
            if count == 3:
                return

    await channel.drive(pump())
    raise RuntimeError("three kicks are one too many")


@asynccontextmanager
async def worker(die: Callable[[], None] | None = None) -> AsyncIterator[Control]:
    """A worker as a task, with its XenStore, set up."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = Server()
    task = asyncio.create_task(Worker(theirs, {"vbd": echo}, die=die).run())
    control = Control(ours)
    a, b = socket.socketpair()
    server.attach_socket(a, domid=0, confine=7)
    server.mkdir("/local/domain/0/backend/vbd/7/51712", perms=["n0", "r7"])
    setup = m.Setup(control.id(), 7, Poll(), Vbd(), 10.0)
    assert await control.ask(setup, [b.fileno()]) == m.Done(setup.id)
    b.close()
    control.server = server  # type: ignore[attr-defined]
    yield control
    control.close()
    await asyncio.wait_for(task, 20)
    await server.close()
    await asyncio.sleep(0.01)  # transports close a turn later


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    async with worker() as control:
        yield control


def ram(pages: int = PAGES) -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE_SIZE)
    return fd


async def counted_by(fd: int) -> int:
    """Waits for an eventfd (which the channel has made non-blocking)."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await asyncio.wait_for(ready.wait(), 20)
    finally:
        loop.remove_reader(fd)
    return os.eventfd_read(fd)


def image(content: bytes) -> int:
    fd = os.memfd_create("disk")
    os.write(fd, content.ljust(4096, b"\0"))
    return fd


async def add_memory(control: Control, fd: int) -> m.AnyMessage:
    slots = [m.Slot(0, 0, 0, PAGES // 2, 0), m.Slot(1, 0, PAGES, PAGES // 2, PAGES // 2 * PAGE_SIZE)]
    return await control.ask(m.Memory(control.id(), [], slots, [], [m.Frame(0, 0, 0)]), [fd])


async def attach(control: Control, disk: int) -> m.AnyMessage:
    message = m.Attach(control.id(), "vbd", 51712, False, False, False, None)
    journal = os.memfd_create("journal")
    try:
        return await control.ask(message, [disk, journal])
    finally:
        transport.close_all([disk, journal])


async def test_a_device_serves_its_port(control: Control) -> None:
    fd = ram()
    assert await add_memory(control, fd) == m.Done(2)
    assert await attach(control, image(b"9")) == m.Done(3)
    await control.wait(lambda said: isinstance(said, m.Connected) and said.params == {"port": 9})
    assert control.server.read("/local/domain/0/backend/vbd/7/51712/state") == "4"  # type: ignore[attr-defined]
    os.eventfd_write(control.kicks[9], 1)
    assert await counted_by(control.notifies[9]) == 1
    assert os.pread(fd, 1, 5 * PAGE_SIZE) == b"\1"
    counted = await control.ask(m.Count(4))
    assert isinstance(counted, m.Counted)
    assert counted.counters == {51712: {"kicks": 1, "uring": 1}, 0: {"pinned": 0, "slots": 2}}
    assert await control.ask(m.Detach(5, 51712)) == m.Done(5)
    await control.wait(lambda said: said == m.Unbind(51712, [9]))
    os.close(fd)


async def test_a_guest_s_fault_ends_its_device_alone(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    assert await attach(control, image(b"")) == m.Done(2)
    ended = await control.wait(lambda said: isinstance(said, m.Ended))
    assert ended == m.Ended(51712, "domain 7: vbd 51712: ring-ref: 'abc' is no number")
    lines = [record.message for record in caplog.records if record.name.startswith("evtchnd")]
    assert lines == ["domain 7: vbd 51712: ring-ref: 'abc' is no number: off"]
    assert await attach(control, image(b"9")) == m.Done(3)
    await control.wait(lambda said: isinstance(said, m.Connected) and said.params == {"port": 9})


async def test_a_port_that_the_vmm_refuses(control: Control) -> None:
    control.refuse_ports = "domain 7: device 51712: port 9 is closed"
    await attach(control, image(b"9"))
    ended = await control.wait(lambda said: isinstance(said, m.Ended))
    assert isinstance(ended, m.Ended)
    assert ended.reason == control.refuse_ports


async def test_a_defect_is_told_as_one(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    fd = ram()
    await add_memory(control, fd)
    os.close(fd)
    await attach(control, image(b"9"))
    await control.wait(lambda said: isinstance(said, m.Connected))
    for _ in range(3):
        os.eventfd_write(control.kicks[9], 1)
        await counted_by(control.notifies[9])
    ended = await control.wait(lambda said: isinstance(said, m.Ended))
    assert isinstance(ended, m.Ended)
    assert "three kicks" in ended.reason
    await control.wait(lambda said: said == m.Unbind(51712, [9]))
    assert "a defect of evtchnd" in caplog.text


async def test_a_worker_of_its_own_process_ends_by_a_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a pump, in a device's own coroutine, in any callback of the loop; not by a guest's fault."""
    deaths: list[None] = []
    loop = asyncio.get_running_loop()
    async with worker(lambda: deaths.append(None)) as control:
        fd = ram()
        await add_memory(control, fd)
        os.close(fd)
        await attach(control, image(b""))
        await control.wait(lambda said: isinstance(said, m.Ended))
        assert not deaths
        loop.call_soon(lambda: 1 // 0)
        await asyncio.sleep(0.01)
        assert len(deaths) == 1
        await attach(control, image(b"9"))
        await control.wait(lambda said: isinstance(said, m.Connected))
        for _ in range(3):
            os.eventfd_write(control.kicks[9], 1)
            await counted_by(control.notifies[9])
        # the pump of `echo` ends in order, what awaits it raises; here, where die() returns, it tells all the same
        await control.wait(lambda said: isinstance(said, m.Ended))
        assert len(deaths) == 2
    loop.set_exception_handler(None)
    lines = [record.message for record in caplog.records if record.message.endswith("its worker ends")]
    assert lines == [
        "domain 7: worker: a defect of evtchnd: its worker ends",
        "domain 7: vbd 51712: a defect of evtchnd: its worker ends",
    ]


async def test_without_io_uring_threads_serve(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    control.refuse_uring = "pidfd_getfd: Operation not permitted"
    await attach(control, image(b"9"))
    await control.wait(lambda said: isinstance(said, m.Connected))
    counted = await control.ask(m.Count(9))
    assert isinstance(counted, m.Counted)
    assert counted.counters[51712]["uring"] == 0
    assert "domain 7: disks are served by threads: pidfd_getfd" in caplog.text


async def test_memory_that_is_wrong(control: Control) -> None:
    fd = ram()
    await add_memory(control, fd)
    over = await control.ask(m.Memory(control.id(), [], [m.Slot(2, 0, 1, 1, 0)], [], []), [fd])
    assert isinstance(over, m.Done)
    assert over.errno
    assert "overlaps slot 0" in over.reason
    gone = await control.ask(m.Memory(control.id(), [7], [], [], []))
    assert isinstance(gone, m.Done)
    assert "slot 7 is not there" in gone.reason
    good = await control.ask(m.Memory(control.id(), [0], [m.Slot(2, 0, 1, 1, 0)], [0], []), [fd])
    assert isinstance(good, m.Done)
    assert not good.errno
    os.close(fd)


async def test_the_end_comes_with_devices_that_run_and_leaves_nothing() -> None:
    counts = set()
    for turn in range(4):
        async with worker() as control:
            fd = ram()
            await add_memory(control, fd)
            os.close(fd)
            await attach(control, image(b"9"))
            await control.wait(lambda said: isinstance(said, m.Connected))
        if turn:  # the first one opens what the loop itself keeps
            counts.add(descriptors())
    assert len(counts) == 1
