"""Domains on KVM for tests: the agent is compiled once, the eventfds belong to another process."""

from __future__ import annotations

import functools
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evtchnd.errors import HostError
from evtchnd.vmm import kvm_agent
from evtchnd.vmm.kvm_machine import Machine

TIMEOUT = 60.0


@functools.cache
def agent(long_mode: bool = True) -> bytes:
    return kvm_agent.build(long_mode=long_mode)


@functools.cache
def why_no_kvm() -> str:
    """Why no guest runs here; "": one does."""
    try:
        Machine().close()
        agent()
    except (HostError, OSError) as error:
        return str(error)
    return ""


class Reader:
    """Another process that owns an eventfd: reads it until a number of kicks has come, says how many did.

    A child without threads of its own: it only reads, and answers on a socket.
    """

    def __init__(self, fd: int, wanted: int) -> None:
        self._sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._sock.close()
                _read(fd, wanted, theirs)
            finally:
                os._exit(0)
        theirs.close()

    def total(self, timeout: float = TIMEOUT) -> tuple[int, int]:
        """(kicks, wake-ups) once all that were wanted have come."""
        self._sock.settimeout(timeout)
        try:
            return struct.unpack("<QQ", self._sock.recv(16))  # type: ignore[return-value]
        finally:
            self.close()

    def close(self) -> None:
        self._sock.close()
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0


def _read(fd: int, wanted: int, sock: socket.socket) -> None:
    total = wakeups = 0
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sock, select.POLLIN)
    while total < wanted:
        poll.poll()
        try:
            total += os.eventfd_read(fd)
        except BlockingIOError:
            return  # the other end has closed the socket
        wakeups += 1
    sock.sendall(struct.pack("<QQ", total, wakeups))


@contextmanager
def writer(fd: int) -> Iterator[Callable[[], None]]:
    """Another process that owns an eventfd and writes it when told to."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            while theirs.recv(1):
                os.eventfd_write(fd, 1)
                theirs.sendall(b".")
        finally:
            os._exit(0)
    theirs.close()

    def write() -> None:
        ours.sendall(b".")
        ours.recv(1)

    try:
        yield write
    finally:
        ours.close()
        os.waitpid(pid, 0)


def eventfds() -> int:
    """How many eventfds this process holds."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry) == "anon_inode:[eventfd]"
        except FileNotFoundError:
            continue
    return count
