"""A disk of a domain as the control plane holds it: its descriptors, and what survives its worker."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from evtchnd import journal
from evtchnd.control.config import Vbd
from evtchnd.errors import HostError, OperatorError, VmmError
from evtchnd.worker.device import Params

SECTOR = 512
# A ring page holds 32 requests; the count for more pages rounds down to a power of two and never exceeds this.
_ENTRIES_PER_PAGE = 32
_BLKGETSIZE64 = 0x80081272  # linux/fs.h: _IOR(0x12, 114, size_t)


class Image(NamedTuple):
    """An image that is open, and its size in bytes."""

    fd: int
    size: int


class Disk:
    """One vbd. Owns `fd`, the journal, and its copy of the io_uring of the worker that serves it.

    connected   what the live ring is (the worker's words), None while there is none
    reason      why it is off; "" while it is served
    leaving     a detach has given up waiting for the guest: it is removed when the guest lets it go
    """

    kind = "vbd"

    def __init__(
        self, domid: int, devid: int, vdev: str, image: Image, *, target: str, readonly: bool, cdrom: bool, vbd: Vbd
    ) -> None:
        """Takes the image over. HostError where no journal can be made; it is closed then."""
        self.domid = domid
        self.devid = devid
        self.vdev = vdev
        self.fd = image.fd
        self.sectors = image.size // SECTOR
        self.target = target
        self.readonly = readonly
        self.cdrom = cdrom
        self.uring = -1
        self.connected: Params | None = None
        self.reason = ""
        self.leaving = False
        try:
            entries = _ENTRIES_PER_PAGE << vbd.max_ring_page_order
            self.journal = journal.create(entries, name=f"evtchnd-{domid}-{devid}")
        except BaseException:
            os.close(image.fd)
            raise

    @property
    def name(self) -> str:
        """As every line about it begins."""
        return f"domain {self.domid}: {self.kind} {self.devid}"

    def keep_uring(self, fd: int) -> None:
        """The io_uring of the worker that serves the disk now (-1: none)."""
        old, self.uring = self.uring, fd
        if old >= 0:
            os.close(old)

    def close(self) -> list[int]:
        """Closes its descriptors but for the image's, which is returned: closing that may block. Idempotent."""
        self.keep_uring(-1)
        fd, journal = self.fd, self.journal
        self.fd = self.journal = -1
        if journal >= 0:
            os.close(journal)
        return [fd] if fd >= 0 else []


def open_image(target: Path, *, readonly: bool) -> Image:
    """Opens what an operator named. Blocks as long as the file system does. OperatorError says why it cannot be.

    The image is locked (flock: shared for readers, exclusive for a writer) as long as any copy of the descriptor is
    open, so that two guests cannot write to it; what else is open on it is not looked for.
    """
    access = os.O_RDONLY if readonly else os.O_RDWR
    try:
        # O_NONBLOCK: the open of a FIFO would wait for its writer
        fd = os.open(target, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        hint = " (attach it read-only?)" if exc.errno in (errno.EROFS, errno.EACCES) and not readonly else ""
        raise OperatorError(f"{target}: {exc.strerror}{hint}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OperatorError(f"{target}: neither a file nor a block device", errno.ENOTBLK)
        os.set_blocking(fd, True)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = f"{target}: in use by another disk: attach it read-only, everywhere"
            raise OperatorError(reason, errno.EBUSY) from None
        except OSError:
            pass  # a file system without locks
        size = _size(fd)
        if size < SECTOR:
            raise OperatorError(f"{target}: no sector fits into {size} bytes")
    except HostError as exc:
        os.close(fd)
        raise OperatorError(f"{target}: {exc}") from None
    except BaseException:
        os.close(fd)
        raise
    return Image(fd, size)


def check_passed(fd: int, *, readonly: bool) -> Image:
    """The same of a descriptor that a VMM passed. VmmError says what is wrong with it."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise VmmError("the descriptor is neither a file nor a block device", errno.ENOTBLK)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise VmmError("an O_PATH descriptor cannot be read")
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY or (access == os.O_RDONLY and not readonly):
        raise VmmError("the descriptor is not open for reading" + ("" if readonly else " and writing"))
    if flags & os.O_APPEND:
        raise VmmError("an O_APPEND descriptor writes where it likes")
    return Image(fd, _size(fd))


def _size(fd: int) -> int:
    """Bytes. HostError where a device does not tell."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    try:
        answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    except OSError as exc:
        raise HostError(f"the size of the block device cannot be read: {exc.strerror}") from None
    return int(struct.unpack("=Q", answer)[0])
