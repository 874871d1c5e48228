"""TAP interfaces: opened one descriptor a queue (linux/if_tun.h), in the network namespace where they belong.

Everything here blocks (a network namespace is a thread's, and the kernel's lock for interfaces may be held): called in
threads, see network.py. The ioctls of a queue that is open (offloads, detaching it, carrier) take no capability and are
its worker's; opening one does, unless the interface is there already, persistent, and belongs to this user.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evtchnd import transport
from evtchnd.errors import OperatorError

TUN = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF, _TUNSETVNETHDRSZ = 0x400454CA, 0x800454D2, 0x400454D8
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_PERSIST, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x0800, 0x1000, 0x4000
# struct ifreq: 16 bytes of name, then the flags in a union of 24
_IFREQ = struct.Struct("16sH22x")
# What a TAP that is passed must have; the last one where it has several queues.
_NEEDED = {
    _IFF_TAP: "IFF_TAP",
    _IFF_NO_PI: "IFF_NO_PI",
    _IFF_VNET_HDR: "IFF_VNET_HDR",
    _IFF_MULTI_QUEUE: "IFF_MULTI_QUEUE",
}
_SIOCGIFHWADDR = 0x8927
# struct virtio_net_hdr_mrg_rxbuf, as virtio 1 has it everywhere
VNET_HEADER_BYTES = 12
_CLONE_NEWNET = 0x40000000
_NAMED = Path("/run/netns")
_DROP_IN = "systemd/evtchnd.service.d/tap.conf"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Tap:
    """A TAP that is open. made: it came into being by this, and goes with its last descriptor; else it was there."""

    name: str
    index: int
    fds: list[int]
    made: bool


def open_tap(name: str, queues: int, place: int = -1) -> Tap:
    """Opens `queues` queues of the TAP `name`, which is made unless it is there. OperatorError says what to do."""
    with entered(place):
        there = _is_there(name)
        fds: list[int] = []
        try:
            while len(fds) < queues:
                fds.append(_open_queue(name))
            made = not _is_persistent(fds[0])
            if there and made:
                raise OperatorError(f"{name}: {os.strerror(errno.EBUSY)}{_hint(name, errno.EBUSY)}", errno.EBUSY)
            return Tap(name, socket.if_nametoindex(name), fds, made)
        except OSError as exc:  # somebody has renamed or deleted it meanwhile
            transport.close_all(fds)
            raise OperatorError(f"{name}: {exc.strerror}", exc.errno or errno.EIO) from None
        except OperatorError:
            transport.close_all(fds)
            raise


def check_passed(fds: Sequence[int]) -> str:
    """The name of the TAP whose queues these are. OperatorError: they are not, or not of the kind that is needed."""
    names: set[str] = set()
    for number, fd in enumerate(fds):
        request = bytearray(_IFREQ.size)
        try:
            fcntl.ioctl(fd, _TUNGETIFF, request)
        except OSError:
            raise OperatorError(f"descriptor {number} is no TAP's queue (/dev/net/tun after TUNSETIFF)") from None
        name, flags = _IFREQ.unpack(request)
        names.add(name.rstrip(b"\0").decode(errors="replace"))
        for flag, what in _NEEDED.items():
            if not flags & flag and (flag != _IFF_MULTI_QUEUE or len(fds) > 1):
                raise OperatorError(f"descriptor {number}: the TAP was made without {what}")
        try:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
        except OSError as exc:
            raise OperatorError(f"descriptor {number}: vnet header of 12 bytes: {exc.strerror}") from None
    if len(names) != 1:
        raise OperatorError(f"the descriptors are queues of several TAPs: {', '.join(sorted(names))}")
    return names.pop()


def index_of(fd: int, name: str, place: int = -1) -> int:
    """The interface in that namespace which `fd`, a TAP's queue, belongs to; 0: it is in none of that name."""
    with entered(place), socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            index = socket.if_nametoindex(name)
            # the TAP tells its own address, whatever namespace it is in; the socket that of the one here
            request = _IFREQ.pack(name.encode(), 0)
            same = fcntl.ioctl(fd, _SIOCGIFHWADDR, request)[16:24] == fcntl.ioctl(sock, _SIOCGIFHWADDR, request)[16:24]
        except OSError:
            return 0
        return index if same else 0


def netlink_socket(place: int, groups: int) -> socket.socket:
    """A route netlink socket of a namespace, in the multicast `groups` (a mask of RTMGRP_*). OperatorError."""
    with entered(place):
        sock = None
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
            sock.bind((0, groups))
        except OSError as exc:
            if sock is not None:
                sock.close()
            hint = f" ({_DROP_IN} allows it)" if exc.errno == errno.EAFNOSUPPORT else ""
            raise OperatorError(f"netlink: {exc.strerror}{hint}", exc.errno or errno.EIO) from None
        return sock


def open_namespace(netns: str) -> int:
    """A descriptor of a network namespace by its name or path; -1 of "", this process' own. OperatorError."""
    if not netns:
        return -1
    try:
        return os.open(_NAMED / netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise OperatorError(f"netns {netns}: {exc.strerror} (ip netns list)", exc.errno or errno.EIO) from None


@contextmanager
def entered(place: int) -> Iterator[None]:
    """This thread in another network namespace, -1: where it is. OperatorError where that cannot be."""
    if place < 0:
        yield
        return
    try:
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise OperatorError(f"netns: the own one: {exc.strerror}", exc.errno or errno.EIO) from None
    try:
        try:
            _setns(place)
        except OSError as exc:
            hint = " (it takes CAP_SYS_ADMIN)" if exc.errno == errno.EPERM else ""
            raise OperatorError(f"netns: it cannot be entered: {exc.strerror}{hint}", exc.errno or errno.EIO) from None
        try:
            yield
        finally:
            _setns(own)
    finally:
        os.close(own)


def _setns(fd: int) -> None:
    # os.setns() is new in Python 3.12
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _is_there(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _is_persistent(fd: int) -> bool:
    """One that is not goes with whoever has it open."""
    answer = fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size))
    return bool(_IFREQ.unpack(answer)[1] & _IFF_PERSIST)


def _open_queue(name: str) -> int:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        hint = {
            errno.ENOENT: " (modprobe tun)",
            errno.ENODEV: " (modprobe tun)",
            errno.EACCES: f" (its mode is not 0666, as udev makes it, for user {os.geteuid()})",
            errno.EPERM: f" ({_DROP_IN} allows it)",
        }.get(exc.errno or 0, "")
        raise OperatorError(f"{TUN}: {exc.strerror}{hint}", exc.errno or errno.EIO) from None
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
    except OSError as exc:
        os.close(fd)
        raise OperatorError(f"{name}: {exc.strerror}{_hint(name, exc.errno or 0)}", exc.errno or errno.EIO) from None
    return fd


def _hint(name: str, number: int) -> str:
    """What to do about a TAP that cannot be opened."""
    if number == errno.EPERM:
        command = f"ip tuntap add dev {name} mode tap user {os.getuid()} multi_queue vnet_hdr"
        return f" (a TAP is made with CAP_NET_ADMIN, which {_DROP_IN} gives; without it: {command})"
    if number == errno.EBUSY:
        return " (somebody else serves it)"
    if number == errno.EINVAL:
        return " (it is there and is no TAP with multi_queue)"
    if number == errno.E2BIG:
        return " (it has no more queues: limit them with queues=)"
    return ""
