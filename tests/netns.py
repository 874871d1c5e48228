"""A network namespace of a test's own: without a name, so that it is gone with its thread and its descriptors."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from evtchnd_backends.tap import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
TUNSETVNETHDRSZ = 0x400454D8


def _unshare() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


def possible() -> bool:
    """Whether this process may make namespaces and TAPs."""
    try:
        with Netns() as netns:
            for fd in netns.tap("t0"):
                os.close(fd)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Netns:
    """One namespace and the thread that is in it: `run` does something there."""

    def __enter__(self) -> Netns:
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(_unshare).result()
        self.ip("link", "set", "lo", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()

    def run(self, body: Callable[[], T]) -> T:
        return self._thread.submit(body).result()

    def ip(self, *args: str) -> str:
        """iproute2's `ip` there."""
        done = self.run(lambda: subprocess.run(["ip", *args], capture_output=True, text=True))
        if done.returncode:
            raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def sysctl(self, name: str, value: object) -> None:
        def write() -> None:
            with open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
                file.write(str(value))

        self.run(write)

    def tap(self, name: str, queues: int = 1) -> list[int]:
        """Makes a TAP; its descriptors, as the control plane hands them to a worker."""

        def make() -> list[int]:
            fds = []
            for _ in range(queues):
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
                fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))
                fds.append(fd)
            return fds

        return self.run(make)

    def up(self, name: str, *addresses: str) -> None:
        """The interface gets addresses and is up; no router solicitations, no duplicate address detection."""
        for address in addresses:
            self.ip("addr", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
        self.ip("link", "set", name, "up")

    def mac(self, name: str) -> bytes:
        text = self.ip("-br", "link", "show", name).split()[2]
        return bytes.fromhex(text.replace(":", ""))

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, proto: int = 0) -> socket.socket:
        return self.run(lambda: socket.socket(family, kind, proto))

    def statistics(self, name: str) -> dict[str, int]:
        """/sys' counters of an interface, from its `ip -s` line."""
        import json

        (link,) = json.loads(self.ip("-s", "-j", "link", "show", name))
        stats = link["stats64"]
        return {f"{way}_{key}": value for way in ("rx", "tx") for key, value in stats[way].items()}

    def flags(self, name: str) -> list[str]:
        import json

        (link,) = json.loads(self.ip("-j", "link", "show", name))
        return list(link["flags"])
