"""A disk of a domain as the control plane holds it: its descriptors, and what survives its worker."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from evtchnd import journal
from evtchnd.control.config import Vbd
from evtchnd.errors import HostError, OperatorError, VmmError
from evtchnd.worker.device import Params

SECTOR = 512
# A ring page holds 32 requests; the count for more pages rounds down to a power of two and never exceeds this.
_ENTRIES_PER_PAGE = 32
# linux/fs.h: _IO(0x12, 104), _IOR(0x12, 114, size_t)
_BLKSSZGET, _BLKGETSIZE64 = 0x1268, 0x80081272


class Image(NamedTuple):
    """An image that is open. size, sector_size: bytes; direct: with O_DIRECT.

    holes: of a block device that can discard, granularity and alignment in bytes (a worker has no sysfs).
    """

    fd: int
    size: int
    sector_size: int = SECTOR
    direct: bool = False
    holes: tuple[int, int] | None = None

    @property
    def sectors(self) -> int:
        """Of 512 bytes, in whole sectors of its own size."""
        return self.size // self.sector_size * (self.sector_size // SECTOR)


class Disk:
    """One vbd. Owns `fd`, the journal, and its copy of the io_uring of the worker that serves it.

    connected   what the live ring is (the worker's words), None while there is none
    failed      why a flush of it has failed, and so every further one fails: a lost write is told once
    reason      why it is off; "" while it is served
    leaving     a detach has given up waiting for the guest: it is removed when the guest lets it go
    """

    kind = "vbd"

    def __init__(
        self,
        domid: int,
        devid: int,
        vdev: str,
        image: Image,
        *,
        target: str,
        readonly: bool,
        cdrom: bool,
        discard: bool = True,
        vbd: Vbd,
    ) -> None:
        """Takes the image over. HostError where no journal can be made; it is closed then."""
        self.domid = domid
        self.devid = devid
        self.vdev = vdev
        self.fd = image.fd
        self.sectors = image.sectors
        self.sector_size = image.sector_size
        self.direct = image.direct
        self.holes = image.holes
        self.discard = discard and not readonly
        self.target = target
        self.readonly = readonly
        self.cdrom = cdrom
        self.uring = -1
        self.connected: Params | None = None
        self.reason = ""
        self.failed = ""
        self.leaving = False
        try:
            entries = _ENTRIES_PER_PAGE << vbd.max_ring_page_order
            self.journal = journal.create(entries, queues=vbd.max_queues, name=f"evtchnd-{domid}-{devid}")
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


def open_image(target: Path, *, readonly: bool, sector_size: int = 0, direct: bool = False) -> Image:
    """Opens what an operator named. Blocks as long as the file system does. OperatorError says why it cannot be.

    sector_size: in bytes, 0: as the target has them.

    The image is locked (flock: shared for readers, exclusive for a writer) as long as any copy of the descriptor is
    open, so that two guests cannot write to it; what else is open on it is not looked for.
    """
    access = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    try:
        # O_NONBLOCK: the open of a FIFO would wait for its writer
        fd = os.open(target, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        hint = " (attach it read-only?)" if exc.errno in (errno.EROFS, errno.EACCES) and not readonly else ""
        if exc.errno == errno.EINVAL and direct:
            hint = " (its file system has no O_DIRECT: leave cache=none out)"
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
        image = _image(fd, sector_size)
        if not image.sectors:
            raise OperatorError(f"{target}: no sector fits into {image.size} bytes")
    except HostError as exc:
        os.close(fd)
        raise OperatorError(f"{target}: {exc}") from None
    except BaseException:
        os.close(fd)
        raise
    return image


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
    return _image(fd, 0)


def resize_image(fd: int, size: int | None) -> int:
    """The size that an image has now, in bytes; a file is made `size` bytes long first, never shorter.

    OperatorError. Blocks as long as the file system does.
    """
    try:
        if size is not None:
            status = os.fstat(fd)
            if stat.S_ISBLK(status.st_mode):
                raise OperatorError("a block device has the size that its own tools give it: leave the size out")
            if size < status.st_size:
                raise OperatorError(f"{size} bytes are less than the image has ({status.st_size}): it is not cut short")
            os.ftruncate(fd, size)
        return _size(fd)
    except OSError as exc:
        raise OperatorError(f"the image cannot be resized: {exc.strerror}") from None
    except HostError as exc:
        raise OperatorError(str(exc)) from None


def _image(fd: int, sector_size: int) -> Image:
    """HostError where its sectors cannot be so large, or a device does not tell."""
    own, holes = SECTOR, None
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        own = _ioctl(fd, _BLKSSZGET, "=i", "sector size")
        holes = _holes(fd)
    direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
    image = Image(fd, _size(fd), sector_size or own, direct, holes)
    if image.sector_size < own:
        raise HostError(f"its sectors have {own} bytes, the guest's cannot have {image.sector_size}")
    if direct and image.sectors and not _takes(fd, image.sector_size):
        hint = "give it sector-size=4096, or no" if image.sector_size < 4096 else "no"
        raise HostError(f"O_DIRECT does not read sectors of {image.sector_size} bytes there: {hint} O_DIRECT")
    return image


def _takes(fd: int, size: int) -> bool:
    """Whether O_DIRECT reads so little; only the file system knows, and not every kernel's statx() tells."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view, view[:size] as sector:
        try:
            os.preadv(fd, [sector], 0)
        except OSError as exc:
            return exc.errno != errno.EINVAL
    return True


def _size(fd: int) -> int:
    """Bytes. HostError where a device does not tell."""
    status = os.fstat(fd)
    return _ioctl(fd, _BLKGETSIZE64, "=Q", "size") if stat.S_ISBLK(status.st_mode) else status.st_size


def _holes(fd: int) -> tuple[int, int] | None:
    """A hole in a device is "write zeroes, unmap"; the kernel refuses it where the device cannot."""
    granularity, most = _queue_limit(fd, "discard_granularity"), _queue_limit(fd, "write_zeroes_max_bytes")
    return (granularity, _queue_limit(fd, "../discard_alignment")) if granularity and most else None


def _queue_limit(fd: int, name: str) -> int:
    device = os.fstat(fd).st_rdev
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has its disk's queue.
    for path in (base / "queue" / name, base / ".." / "queue" / name):
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return 0


def _ioctl(fd: int, request: int, form: str, what: str) -> int:
    try:
        answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(form)))
    except OSError as exc:
        raise HostError(f"the {what} of the block device cannot be read: {exc.strerror}") from None
    return int(struct.unpack(form, answer)[0])
