"""A network namespace of a benchmark's own: TAPs' addresses, sockets in it. It has no name, and goes with us."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from evtchnd.control.tap import entered, open_tap
from evtchnd.errors import HostError

T = TypeVar("T")

# linux/socket.h, linux/if_packet.h
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_QDISC_BYPASS = 263, 15, 20
# linux/if_tun.h: checksums, TSO for IPv4 and IPv6, ECN: what a frontend with all offloads gets
_TUNSETOFFLOAD, _OFFLOADS = 0x400454D0, 0xF
_SINK_PORT, ECHO_PORT = 9, 7


@dataclass(frozen=True)
class Link:
    """A TAP with its host's and its guest's end; addresses as numbers, MACs as text."""

    name: str
    host: int
    guest: int
    mac: str
    host_mac: str


class Namespace:
    """`path`: for `netns=`. HostError where none can be made: it takes root, /dev/net/tun and iproute2."""

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise HostError("net: `ip` is missing: apt-get install iproute2")
        self._files = contextlib.ExitStack()
        self._fd = _unshared()
        self._files.callback(os.close, self._fd)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.ip("link set lo up")
        self.run(_no_ipv6)

    def run(self, body: Callable[[], T]) -> T:
        """`body` there, in this thread."""
        with entered(self._fd):
            return body()

    def ip(self, text: str) -> str:
        """iproute2's `ip TEXT`. HostError."""
        done = self.run(lambda: subprocess.run(["ip", *text.split()], capture_output=True, text=True, check=False))
        if done.returncode:
            raise HostError(f"net: ip {text}: {done.stderr.strip()}")
        return done.stdout

    def link(self, name: str, net: int, mac: str) -> Link:
        """Gives a TAP that is there the address 10.77.`net`.1, and its guest's end, `mac`, 10.77.`net`.7."""
        self.ip(f"addr add 10.77.{net}.1/24 dev {name}")
        self.ip(f"link set {name} up")
        self.ip(f"neigh add 10.77.{net}.7 lladdr {mac} dev {name}")
        base = 10 << 24 | 77 << 16 | net << 8
        return Link(name, base + 1, base + 7, mac, self.ip(f"-br link show {name}").split()[2])

    def tap(self, name: str) -> int:
        """A TAP as evtchnd makes them, for who reads and writes it by itself: its descriptor, this object's."""
        (fd,) = open_tap(name, 1, self._fd).fds
        self._files.callback(os.close, fd)
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOADS)
        return fd

    def packet_socket(self, link: Link) -> int:
        """Frames from the host to a TAP, each behind a struct virtio_net_hdr of 10 bytes."""
        sock = self.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._files.enter_context(sock)
        for option in (_PACKET_VNET_HDR, _PACKET_QDISC_BYPASS):
            sock.setsockopt(_SOL_PACKET, option, 1)
        sock.bind((link.name, 0))
        return sock.fileno()

    def udp_sockets(self) -> int:
        """One that nobody reads, on port 9 (what is sent there takes the way of a datagram and is dropped at its
        end); and one that echoes: its descriptor."""
        sink, answering = (self.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        for sock, port in ((sink, _SINK_PORT), (answering, ECHO_PORT)):
            self._files.enter_context(sock)
            sock.bind(("", port))
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        return answering.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _unshared() -> int:
    """A descriptor of a new namespace, made in a thread that ends."""
    made: list[int] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            _unshare()
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as exc:
            failed.append(exc)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failed:
        raise HostError(f"net: no network namespace: {failed[0].strerror} (it takes root)")
    return made[0]


def _unshare() -> None:
    # os.unshare() is new in Python 3.12
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _no_ipv6() -> None:
    """Nothing that the kernel sends by itself."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
