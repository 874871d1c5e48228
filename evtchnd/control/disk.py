"""A disk of a domain as the control plane holds it: its descriptors, and what survives its worker and this process.

Its journal is locked (flock, shared) by each worker that has it, through an open file of the worker's own that the
worker's io_uring holds, too: as long as the process, a thread of it, or a request that it has left to the kernel may
still write to the image. A control plane that was given a journal by the one before it can lock it alone only after all
that has ended (`Disk.free`), and lets nothing be replayed before.
"""

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
from evtchnd._core.uring import inflight_of
from evtchnd.control.config import Vbd
from evtchnd.control.state import DiskState
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
    passed      the image came from the domain's VMM, which passes it again to the next control plane
    resumed     a control plane before this one has served it: its nodes are there
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
        passed: bool = False,
        kept: int = -1,
    ) -> None:
        """Takes the image over. HostError where no journal can be made; it is closed then. kept: its journal, if there
        is one already; taken.
        """
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
        self.passed = passed
        self.vbd = vbd
        self.resumed = kept >= 0
        if kept >= 0:
            self.journal = kept
            return
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

    @classmethod
    def again(cls, domid: int, said: DiskState, fd: int, kept: int) -> Disk:
        """As a control plane before this one had it. Takes the journal `kept`, and the image (-1: it is passed later).

        HostError: they are none; both stay the caller's then.
        """
        journal.Journal(kept).close()
        if fd >= 0 and not _is_disk(fd):
            raise HostError("its image is neither a file nor a block device")
        image = Image(fd, said.sectors * SECTOR, said.sector_size, said.direct)
        disk = cls(
            domid,
            said.devid,
            said.vdev,
            image,
            target=said.target,
            readonly=said.readonly,
            cdrom=said.cdrom,
            discard=said.discard,
            vbd=said.vbd,
            passed=said.passed,
            kept=kept,
        )
        disk.connected = said.connected
        return disk

    def said(self) -> DiskState:
        """What `again` needs."""
        return DiskState(
            devid=self.devid,
            vdev=self.vdev,
            target=self.target,
            sectors=self.sectors,
            sector_size=self.sector_size,
            readonly=self.readonly,
            cdrom=self.cdrom,
            direct=self.direct,
            discard=self.discard,
            passed=self.passed,
            connected=self.connected,
            vbd=self.vbd,
        )

    def kept(self) -> dict[str, int]:
        """The descriptors that `again` needs, by name."""
        image = {} if self.passed else {f"vbd-{self.devid}/image": self.fd}
        return {f"vbd-{self.devid}/journal": self.journal, **image}

    def unpass(self) -> list[int]:
        """Lets go of an image that was passed, which is returned: it comes once more."""
        fd = -1
        if self.passed:
            fd, self.fd = self.fd, -1
        return [fd] if fd >= 0 else []

    def lend(self) -> int:
        """The journal for a worker, locked as long as that, or a request of its, may write to the image."""
        return lent(self.journal)

    def free(self) -> bool:
        """Whether no worker that had the journal can write any more, nor the kernel for it."""
        return self.journal < 0 or is_free(self.journal)

    def unlock(self) -> None:
        """The image may be another's at once: whoever keeps a copy over a restart closes it some time later.

        Only where nothing writes to it any more; of one that was passed the lock is not ours.
        """
        if self.fd >= 0 and not self.passed and ((self.uring >= 0 and not inflight_of(self.uring)) or self.free()):
            with suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)

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


def lent(memfd: int) -> int:
    """The same memfd by another open file, locked by it: for a worker. The caller's."""
    fd = _reopened(memfd)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def is_free(memfd: int) -> bool:
    """Whether nobody has it locked who was lent it."""
    fd = _reopened(memfd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _reopened(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _is_disk(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


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
        if not _is_disk(fd):
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
    if not _is_disk(fd):
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
