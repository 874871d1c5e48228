"""What a raw image or block device is: its size, its sectors, what it does without waiting, whether it can punch."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from typing import NamedTuple, Self

from evtchnd.blkif import SECTOR_SIZE
from evtchnd.errors import HostError

from .threads import fallocate

# linux/fs.h: _IO(0x12, 104), _IOR(0x12, 114, size_t), _IO(0x12, 123)
_BLKSSZGET, _BLKGETSIZE64, _BLKPBSZGET = 0x1268, 0x8008_1272, 0x127B
# linux/falloc.h
KEEP_SIZE, PUNCH_HOLE = 1, 2
_PAGE = 4096
# linux/magic.h: ext, XFS, Btrfs, F2FS, tmpfs, ramfs, overlay; and ZFS, bcachefs
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994, 0x858458F6, 0x794C7630, 0x2FC12FC1, 0xCA451A4E}
# linux/fcntl.h, linux/stat.h
_EMPTY_PATH, _DONT_SYNC, _STATX_NLINK, _STATX_SIZE = 0x1000, 0x4000, 0x4, 0x200

_libc = ctypes.CDLL(None, use_errno=True)


class Geometry(NamedTuple):
    """size: bytes; sector_size, physical_sector_size: bytes, of a file what its file system writes at once."""

    is_block: bool
    size: int
    sector_size: int
    physical_sector_size: int

    @classmethod
    def of(cls, fd: int, name: str) -> Self:
        """HostError: neither a file nor a block device, or smaller than a sector of 512 bytes."""
        info = os.fstat(fd)
        if stat.S_ISBLK(info.st_mode):
            found = cls(
                is_block=True,
                size=_ioctl(fd, _BLKGETSIZE64, "Q"),
                sector_size=_ioctl(fd, _BLKSSZGET, "i"),
                physical_sector_size=_ioctl(fd, _BLKPBSZGET, "I"),
            )
        elif stat.S_ISREG(info.st_mode):
            physical = min(max(info.st_blksize, SECTOR_SIZE), _PAGE)
            found = cls(is_block=False, size=info.st_size, sector_size=SECTOR_SIZE, physical_sector_size=physical)
        else:
            raise HostError(f"{name}: neither a file nor a block device")
        if found.size < SECTOR_SIZE:
            raise HostError(f"{name}: {found.size} bytes: smaller than one sector of {SECTOR_SIZE}")
        return found

    def sectors(self, sector_size: int) -> int:
        """How many sectors of 512 bytes it has, in whole sectors of `sector_size`."""
        return self.size // sector_size * (sector_size // SECTOR_SIZE)


def punches(fd: int, found: Geometry) -> tuple[int, int] | None:
    """Granularity and alignment of holes in a file, in bytes, None where none can be punched.

    Nothing is lost by asking: it is asked behind its end.
    """
    offset = (found.size + (1 << 20)) & ~(_PAGE - 1)
    if fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, _PAGE) < 0:
        return None
    return found.physical_sector_size, 0


def is_local(fd: int) -> bool:
    """Whether its file system answers from this host's own memory and disks: no server may keep a call waiting."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return True
    buffer = ctypes.create_string_buffer(256)
    return _libc.fstatfs(fd, buffer) == 0 and int.from_bytes(buffer.raw[:4], "little") in _LOCAL


def length(fd: int) -> tuple[int, int]:
    """Bytes and names of a file, as this host knows them now: no server is asked. Where that is not to be had: (-1, 1).

    struct statx: stx_nlink at 16, stx_size at 40.
    """
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", _EMPTY_PATH | _DONT_SYNC, _STATX_SIZE | _STATX_NLINK, buffer):
        return -1, 1
    return int.from_bytes(buffer.raw[40:48], "little"), int.from_bytes(buffer.raw[16:20], "little")


def takes_nowait(fd: int) -> bool:
    """tmpfs and some others refuse RWF_NOWAIT for every read."""
    try:
        os.preadv(fd, [bytearray(SECTOR_SIZE)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _ioctl(fd: int, request: int, form: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(form)))
    return int(struct.unpack(form, answer)[0])
