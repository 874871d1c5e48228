"""What a new worker has to wait for: requests that a dead one has left to the kernel."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from evtchnd import transport
from evtchnd._core.uring import Uring
from evtchnd.control.config import Config, Vbd
from evtchnd.control.disk import Disk, Image
from evtchnd.control.supervisor import Supervisor, _Worker, drained
from evtchnd.worker import messages as m


def a_disk() -> Disk:
    image = Image(os.memfd_create("disk"), 512)
    return Disk(7, 51712, "xvda", image, target="x", readonly=False, cdrom=False, vbd=Vbd())


@contextmanager
def left_in_flight(disk: Disk, count: int) -> Iterator[int]:
    """`count` reads of a dead worker's io_uring, of which the disk keeps a copy: a byte to what is given ends one."""
    read, write = os.pipe()
    eventfd = os.eventfd(0)
    uring = Uring(8, eventfd=eventfd)
    buffer = ctypes.create_string_buffer(8)
    iov = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), 1))
    for tag in range(count):
        assert uring.readv(read, ctypes.addressof(iov), 1, 0, tag)
    uring.submit()
    disk.keep_uring(os.dup(uring.fd))
    yield write
    uring.close()
    for fd in (read, write, eventfd):
        os.close(fd)


async def test_a_replay_waits_for_the_old_requests() -> None:
    disk = a_disk()
    with left_in_flight(disk, 2) as write:
        waits = asyncio.create_task(drained(disk, lambda: True))
        for _ in range(2):
            await asyncio.sleep(0.05)
            assert not waits.done()
            os.write(write, b"x")
        await asyncio.wait_for(waits, 20)
        transport.close_all(disk.close())
        assert disk.close() == []


async def test_a_disk_that_is_detached_is_waited_for_no_longer() -> None:
    disk = a_disk()
    with left_in_flight(disk, 1) as write:
        waits = asyncio.create_task(drained(disk, lambda: disk.fd >= 0))
        await asyncio.sleep(0.05)
        assert not waits.done()
        transport.close_all(disk.close())
        await asyncio.wait_for(waits, 20)
        os.write(write, b"x")


async def test_a_worker_that_dies_while_its_disk_is_waited_for_takes_nothing_from_the_next_one() -> None:
    """Both wait for the storage; the one that is alive gets the disk, and the copy of its own io_uring stays."""
    disk = a_disk()
    eventfd = os.eventfd(0)
    new = Uring(8, eventfd=eventfd)
    with left_in_flight(disk, 1) as write:
        supervisor = Supervisor(_Owner(disk), None, Config())  # type: ignore[arg-type]
        dead, alive = _Worker(), _Worker()
        supervisor._worker = dead
        waits = [asyncio.create_task(supervisor._attach(dead, disk))]
        await asyncio.sleep(0.4)  # it looks seldom now
        supervisor._worker = alive
        waits.append(asyncio.create_task(supervisor._attach(alive, disk)))
        await asyncio.sleep(0)
        assert not alive.given
        os.write(write, b"x")
        async with asyncio.timeout(20):
            while not alive.given:
                await asyncio.sleep(0)
        disk.keep_uring(os.dup(new.fd))  # what the worker says next
        alive.unlinked.set_result("")
        await asyncio.wait(waits, timeout=20)
        assert disk.uring >= 0 and not dead.given
        transport.close_all(disk.close())
    new.close()
    os.close(eventfd)


class _Process:
    """A worker that says of any descriptor that it is its io_uring."""

    pid = 1

    def copy(self, number: int) -> int:
        return os.dup(number)

    def kill(self) -> None: ...
    def close(self) -> None: ...


class _Owner:
    domid = 7
    running = True

    def __init__(self, disk: Disk) -> None:
        self.disks = {disk.devid: disk}
        self.consoles = SimpleNamespace(by_key={})


async def test_what_a_worker_calls_its_io_uring_must_be_one() -> None:
    """The control plane maps it: a file that is cut short is a SIGBUS, for all domains."""
    disk = a_disk()
    supervisor = Supervisor(_Owner(disk), None, Config())  # type: ignore[arg-type]
    worker = _Worker()
    worker.process = _Process()
    empty, eventfd = os.memfd_create("empty"), os.eventfd(0)
    assert supervisor._keep_uring(worker, m.Keep(1, disk.devid, empty)) == f"descriptor {empty} is no io_uring"
    assert disk.uring == -1
    uring = Uring(8, eventfd=eventfd)
    assert supervisor._keep_uring(worker, m.Keep(2, disk.devid, uring.fd)) == ""
    assert disk.uring >= 0
    uring.close()
    transport.close_all([*disk.close(), empty, eventfd])
