"""A worker's side of a TAP that others made and handed over: linux/if_tun.h's ioctls on a queue's descriptor.

None of them needs a capability: the descriptor is the right. Whoever made the TAP holds copies of the descriptors, so
that a worker which dies takes nothing with it, and what is set here is set for them, too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from evtchnd.errors import HostError

# asm-generic/ioctl.h: _IOR and _IOW of 'T' and 4 bytes
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
TUNSETVNETLE = 0x400454DC
TUNSETCARRIER = 0x400454E2

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

VNET_HEADER = 12
"""struct virtio_net_hdr_v1 of linux/virtio_net.h."""

GONE = frozenset({errno.EBADFD, errno.EBADF, errno.EFAULT})
"""What a read or write says of a TAP that was deleted (EFAULT: its queue was shut down)."""

_IFREQ = struct.Struct("16sH22x")


class Tap:
    """A TAP by its descriptors, one a queue; they stay their owner's."""

    def __init__(self, fds: Sequence[int], name: str) -> None:
        """HostError: this is no TAP, or not of the kind that is needed."""
        self.fds = list(fds)
        self.name = name
        self.attached = len(self.fds)
        for fd in self.fds:
            os.set_blocking(fd, False)
            self._check(fd)
            self._set(fd, TUNSETVNETHDRSZ, VNET_HEADER, "vnet header of 12 bytes")
            self._set(fd, TUNSETVNETLE, 1, "little-endian vnet header")

    def _check(self, fd: int) -> None:
        request = bytearray(_IFREQ.size)
        try:
            fcntl.ioctl(fd, TUNGETIFF, request)
        except OSError as exc:
            raise HostError(f"{self.name}: descriptor {fd} is no TAP: {exc.strerror}") from None
        _, flags = _IFREQ.unpack(request)
        for flag, what in ((IFF_TAP, "IFF_TAP"), (IFF_NO_PI, "IFF_NO_PI"), (IFF_VNET_HDR, "IFF_VNET_HDR")):
            if not flags & flag:
                raise HostError(f"{self.name}: descriptor {fd}: the TAP was made without {what}")
        if len(self.fds) > 1 and not flags & IFF_MULTI_QUEUE:
            raise HostError(f"{self.name}: {len(self.fds)} queues, and the TAP was made without IFF_MULTI_QUEUE")

    def _set(self, fd: int, request: int, value: int, what: str) -> None:
        try:
            fcntl.ioctl(fd, request, struct.pack("i", value))
        except OSError as exc:
            raise HostError(f"{self.name}: {what}: {exc.strerror}") from None

    def use(self, queues: int) -> None:
        """The kernel gives packets to the first `queues` only: others have no reader."""
        for number, fd in enumerate(self.fds):
            if (number < queues) != (number < self.attached):
                self._queue(fd, attach=number < queues)
        self.attached = queues

    def _queue(self, fd: int, *, attach: bool) -> None:
        request = _IFREQ.pack(b"", IFF_ATTACH_QUEUE if attach else IFF_DETACH_QUEUE)
        try:
            fcntl.ioctl(fd, TUNSETQUEUE, request)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # else it was so already: an earlier worker did it
                raise HostError(f"{self.name}: TUNSETQUEUE: {exc.strerror}") from None

    def offload(self, *, csum4: bool, csum6: bool, gso4: bool, gso6: bool) -> None:
        """What packets from the TAP may leave to the guest. The kernel does the rest before it hands them over.

        The TAP knows one flag for both checksums, and segmentation needs it: without one of the two there is neither.
        """
        flags = 0
        if csum4 and csum6:
            flags = TUN_F_CSUM | (TUN_F_TSO4 if gso4 else 0) | (TUN_F_TSO6 if gso6 else 0)
            if gso4 or gso6:
                flags |= TUN_F_TSO_ECN
        try:
            fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, flags)  # by value, not by address
        except OSError as exc:
            raise HostError(f"{self.name}: TUNSETOFFLOAD {flags:#x}: {exc.strerror}") from None

    def carrier(self, *, on: bool) -> None:
        """The link as the host sees it. A TAP that is gone has none anyway."""
        try:
            fcntl.ioctl(self.fds[0], TUNSETCARRIER, struct.pack("i", int(on)))
        except OSError as exc:
            if exc.errno not in (errno.EBADFD, errno.EPERM, errno.ENOTTY):
                raise HostError(f"{self.name}: TUNSETCARRIER: {exc.strerror}") from None

    def flush(self, queue: int, most: int = 4096) -> int:
        """Drops what waits in a queue of the TAP, `most` packets at most; how many those were."""
        for count in range(most):
            try:
                os.read(self.fds[queue], VNET_HEADER)
            except OSError:
                return count
        return most
