"""A file whose storage takes as long as a test likes: a FUSE file system of one file, served by a thread.

ABI: linux/fuse.h. Writes are answered, and done, at once or when they are let go; what the kernel has handed over it
waits for, whatever happens to the process that wrote.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _RELEASE, _FSYNC, _FLUSH, _INIT = (
    *(1, 2, 3, 4, 14, 15, 16, 18, 20, 25, 26),
)
_INTERRUPT, _DESTROY, _BATCH_FORGET = 36, 38, 42
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO = 1 << 0, 1 << 5, 1 << 15
_IN, _OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_VALID = 3600
_ENOSYS, _ENOENT = 38, 2
_MNT_DETACH = 2
NAME = "disk.img"

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why there is none here, "" if there is."""
    if os.geteuid():
        return "needs root, to mount"
    return "" if Path("/dev/fuse").exists() else "no /dev/fuse"


class SlowDisk:
    """A context manager: `path` is the file, `size` bytes of zeros. OSError where FUSE cannot be mounted.

    hold(): from now on a write waits, `waiting` of them do, until let_go(). Writes that come after let_go() do not.
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.path = folder / NAME
        self.content = bytearray(size)
        self.writes = 0  # that have come
        self._holds = False
        self._held: list[tuple[int, int, bytes]] = []
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        if _libc.mount(b"slow", bytes(folder), b"fuse", 0, options.encode()) < 0:
            error = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(error, os.strerror(error))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Writes that are held."""
        return len(self._held)

    def hold(self) -> None:
        """Writes wait from now on."""
        with self._lock:
            self._holds = True

    def pass_others(self) -> None:
        """Those that are held wait on; others do not."""
        with self._lock:
            self._holds = False

    def let_go(self) -> None:
        """Does what waits, in the order in which it came."""
        with self._lock:
            self._holds = False
            held, self._held = self._held, []
            for write in held:
                self._write(*write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        _libc.umount2(bytes(self.folder), _MNT_DETACH)
        self._thread.join(20)
        os.close(self._fd)

    # ---- the protocol

    def _run(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 21)
            except OSError:  # ENODEV: unmounted
                return
            _, op, unique, node, *_ = _IN.unpack_from(request)
            if op == _DESTROY:
                return
            if op not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                self._request(op, unique, node, request[_IN.size :])

    def _request(self, op: int, unique: int, node: int, body: bytes) -> None:
        if op == _INIT:
            _, _, readahead, flags = struct.unpack_from("<4I", body)
            flags &= _ASYNC_READ | _BIG_WRITES | _ASYNC_DIO
            self._answer(unique, struct.pack("<4I2HII32x", 7, 31, readahead, flags, 64, 48, 1 << 20, 1))
        elif op == _LOOKUP:
            if body.rstrip(b"\0").decode() == NAME:
                self._answer(unique, struct.pack("<4Q2I", 2, 0, _VALID, _VALID, 0, 0) + self._attributes(2))
            else:
                self._answer(unique, error=_ENOENT)
        elif op in (_GETATTR, _SETATTR):
            self._answer(unique, struct.pack("<QII", _VALID, 0, 0) + self._attributes(node))
        elif op == _OPEN:
            self._answer(unique, struct.pack("<QIi", 1, 0, 0))
        elif op == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            self._answer(unique, bytes(self.content[offset : offset + size]))
        elif op == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.writes += 1
            with self._lock:
                if self._holds:
                    self._held.append((unique, offset, body[40 : 40 + size]))
                else:
                    self._write(unique, offset, body[40 : 40 + size])
        elif op in (_RELEASE, _FLUSH, _FSYNC):
            self._answer(unique)
        else:
            self._answer(unique, error=_ENOSYS)

    def _attributes(self, node: int) -> bytes:
        kind, size = (stat.S_IFDIR | 0o755, 0) if node == 1 else (stat.S_IFREG | 0o666, len(self.content))
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, kind, 1, 0, 0, 0, 4096, 0)

    def _write(self, unique: int, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self._answer(unique, struct.pack("<II", len(data), 0))

    def _answer(self, unique: int, body: bytes = b"", *, error: int = 0) -> None:
        with suppress(FileNotFoundError):  # it was interrupted before it came here
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), -error, unique) + body)
