"""A file system whose one file fails as a test says: linux/fuse.h spoken over /dev/fuse, by a thread of this process.

It is a real storage to whoever opens `image`: the kernel's page cache, its error numbers and its waits are between.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_libc = ctypes.CDLL(None, use_errno=True)
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_READ = struct.Struct("=QQIIQII")
_ROOT, _FILE = 1, 2
_ASYNC_DIO = 1 << 15
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR, BATCH_FORGET = 18, 20, 25, 26, 27, 29, 42
INTERRUPT, DESTROY = 36, 38


def why_not() -> str:
    """Why there is none here, "" if there is."""
    if os.geteuid():
        return "needs root"
    return "" if Path("/dev/fuse").exists() else "no /dev/fuse"


class FaultyFs:
    """Mounted at `folder`. A context manager.

    data     the file's content: what its storage has
    fail     opcode -> error number that it is answered with
    most     bytes that a WRITE takes at most
    held     opcodes that are neither done nor answered before `release()`; taken out of it, later ones are
    seen     how many of each opcode have come
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(exist_ok=True)
        self.image = folder / "disk.img"
        self.data = bytearray(size)
        self.fail: dict[int, int] = {}
        self.held: set[int] = set()
        self.most = 1 << 30
        self.seen: dict[int, int] = {}
        self._folder = folder
        self._waiting: list[tuple[int, int, int, bytes]] = []
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"faulty", os.fsencode(folder), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._run, name="faultyfs", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that are held."""
        return len(self._waiting)

    def release(self) -> None:
        """Answers what was held, and holds nothing any more."""
        with self._lock:
            self.held.clear()
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            self._answer(*each)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        subprocess.run(["umount", "--lazy", self._folder], check=True, timeout=20)
        self._thread.join(20)
        os.close(self._fd)

    def _run(self) -> None:
        while True:
            try:
                raw = os.read(self._fd, 1 << 18)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # unmounted
            _, op, unique, node, *_ = _IN.unpack_from(raw)
            self.seen[op] = self.seen.get(op, 0) + 1
            with self._lock:
                if op in self.held:
                    self._waiting.append((op, unique, node, raw[_IN.size :]))
                    continue
            self._answer(op, unique, node, raw[_IN.size :])

    def _answer(self, op: int, unique: int, node: int, body: bytes) -> None:
        if op in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        answer = self.fail.get(op) or self._do(op, node, body)
        error, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
        with suppress(OSError):  # who asked has gone
            os.write(self._fd, _OUT.pack(_OUT.size + len(data), error, unique) + data)

    def _do(self, op: int, node: int, body: bytes) -> bytes | int:
        """The answer, or an error number."""
        if op == INIT:
            # a write past the page cache ends when it is answered, and its caller need not wait for that
            return struct.pack("=IIIIHHIIHHII24x", 7, 31, 0, _ASYNC_DIO, 12, 9, 1 << 17, 1, 0, 0, 0, 0)
        if op == LOOKUP:
            if body.rstrip(b"\0") != b"disk.img":
                return errno.ENOENT
            return struct.pack("=QQQQII", _FILE, 0, 0, 0, 0, 0) + self._attributes(_FILE)
        if op in (GETATTR, SETATTR):
            return struct.pack("=QII", 0, 0, 0) + self._attributes(node)
        if op in (OPEN, OPENDIR):
            return struct.pack("=QII", 0, 0, 0)
        if op == READ:
            _, offset, size, *_ = _READ.unpack_from(body)
            return bytes(self.data[offset : offset + size])
        if op == WRITE:
            _, offset, size, *_ = _READ.unpack_from(body)
            count = min(size, self.most)
            self.data[offset : offset + count] = body[_READ.size : _READ.size + count]
            return struct.pack("=II", count, 0)
        if op == STATFS:
            return struct.pack("=QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
        return b"" if op in (RELEASE, RELEASEDIR, FSYNC, FLUSH, DESTROY) else errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        is_file = node == _FILE
        mode = (stat.S_IFREG if is_file else stat.S_IFDIR) | 0o777
        size = len(self.data) if is_file else 0
        return struct.pack("=QQQQQQIIIIIIIIII", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
