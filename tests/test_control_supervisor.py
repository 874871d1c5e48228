"""What a new worker has to wait for: requests that a dead one has left to the kernel."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct

from evtchnd._core.uring import Uring
from evtchnd.control.config import Vbd
from evtchnd.control.disk import Disk
from evtchnd.control.supervisor import drained


async def test_a_replay_waits_for_the_old_requests() -> None:
    read, write = os.pipe()  # a disk that takes as long as we like
    eventfd = os.eventfd(0)
    uring = Uring(8, eventfd=eventfd)
    buffer = ctypes.create_string_buffer(8)
    iov = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), 1))
    disk = Disk(7, 51712, "xvda", os.memfd_create("disk"), target="x", readonly=False, cdrom=False, vbd=Vbd())
    for tag in range(2):
        assert uring.readv(read, ctypes.addressof(iov), 1, 0, tag)
    uring.submit()
    disk.keep_uring(os.dup(uring.fd))
    waits = asyncio.create_task(drained(disk))
    for _ in range(2):
        await asyncio.sleep(0.05)
        assert not waits.done()
        os.write(write, b"x")
    await asyncio.wait_for(waits, 20)
    disk.close()
    disk.close()
    uring.close()
    for fd in (read, write, eventfd):
        os.close(fd)
