"""Domains on KVM for tests: the agent is compiled once, the eventfds belong to another process."""

from __future__ import annotations

import functools
import os
import select
import socket
import struct
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


class Other:
    """Another process that owns eventfds, as a worker does. Made before there are threads or a VM: it forks."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._sock.close()
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._sock.settimeout(TIMEOUT)

    def write(self, fd: int, count: int = 1) -> None:
        """It writes the eventfd so often."""
        self._ask(b"w", fd, count)
        self._sock.recv(16)

    def read(self, fd: int, wanted: int) -> None:
        """It begins to read the eventfd, until it has heard `wanted` kicks; `heard` waits for that."""
        self._ask(b"r", fd, wanted)

    def heard(self) -> tuple[int, int]:
        """(kicks, wake-ups)."""
        kicks, wakeups = struct.unpack("<QQ", self._sock.recv(16))
        return kicks, wakeups

    def close(self) -> None:
        self._sock.close()
        os.waitpid(self._pid, 0)

    def _ask(self, what: bytes, fd: int, count: int) -> None:
        socket.send_fds(self._sock, [struct.pack("<cQ", what, count)], [fd])


def _serve(sock: socket.socket) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 16, 1)
        if not data:
            return
        what, count = struct.unpack("<cQ", data)
        kicks = wakeups = 0
        if what == b"w":
            for _ in range(count):
                os.eventfd_write(fds[0], 1)
        while what == b"r" and kicks < count:
            poll = select.poll()
            poll.register(fds[0], select.POLLIN)
            poll.register(sock, 0)  # the other side has gone
            if any(events & select.POLLHUP for _, events in poll.poll()):
                return
            kicks += os.eventfd_read(fds[0])
            wakeups += 1
        os.close(fds[0])
        sock.sendall(struct.pack("<QQ", kicks, wakeups))


def eventfds() -> int:
    """How many eventfds this process holds."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry) == "anon_inode:[eventfd]"
        except FileNotFoundError:
            continue
    return count
