"""A storage whose writes end when a test says so, whoever has died meanwhile: a file system of one file, by FUSE.

linux/fuse.h. A write that was begun cannot be taken back: it is at the device, as far as the kernel knows.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = 18, 20, 25, 26, 36, 42
_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ASYNC_DIO = 1 << 15
_MOST = 1 << 17
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why there is none here, "" if there is."""
    if os.geteuid():
        return "needs root, to mount"
    return "" if Path("/dev/fuse").exists() else "no /dev/fuse"


class SlowDisk:
    """`path` is a file of `size` bytes, in `content`. While it is `stopped` writes are begun and do not end."""

    def __init__(self, folder: Path, size: int) -> None:
        self.path = folder / "image"
        self.content = bytearray(size)
        self.waiting: list[tuple[int, int, bytes]] = []
        self._go = threading.Event()
        self._go.set()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"evtchnd-test", os.fsencode(folder), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        """Writes from now on wait."""
        self._go.clear()

    def go_on(self) -> None:
        """Those that wait end, in their order; so do later ones, at once."""
        self._go.set()
        waiting, self.waiting = self.waiting, []
        for unique, offset, data in waiting:
            self._write(unique, offset, data)

    def _write(self, unique: int, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self._answer(unique, struct.pack("<II", len(data), 0))

    def _serve(self) -> None:
        while True:
            try:
                message = os.read(self._fd, _MOST + 4096)
            except OSError:
                return
            _, opcode, unique, node, *_ = _IN.unpack_from(message)
            body = message[_IN.size :]
            match opcode:
                case 26:  # INIT
                    self._answer(
                        unique, struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, _ASYNC_DIO, 64, 48, _MOST, 1, 0, 0, 0)
                    )
                case 1:  # LOOKUP
                    known = node == 1 and body.rstrip(b"\0") == b"image"
                    entry = struct.pack("<QQQQII", 2, 0, 1, 1, 0, 0) + self._attributes(2)
                    self._answer(unique, entry) if known else self._answer(unique, b"", errno.ENOENT)
                case 3 | 4:  # GETATTR, SETATTR
                    self._answer(unique, struct.pack("<QII", 1, 0, 0) + self._attributes(node))
                case 14:  # OPEN
                    self._answer(unique, struct.pack("<QII", 0, 0, 0))
                case 15:  # READ
                    _, offset, size = struct.unpack_from("<QQI", body)
                    self._answer(unique, bytes(self.content[offset : offset + size]))
                case 16:  # WRITE
                    _, offset, size = struct.unpack_from("<QQI", body)
                    data = bytes(body[40 : 40 + size])
                    if self._go.is_set():
                        self._write(unique, offset, data)
                    else:
                        self.waiting.append((unique, offset, data))
                case 18 | 20 | 25:  # RELEASE, FSYNC, FLUSH
                    self._answer(unique, b"")
                case 2 | 36 | 42:  # FORGET, INTERRUPT, BATCH_FORGET: not answered
                    pass
                case _:
                    self._answer(unique, b"", errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
        size = 0 if node == 1 else len(self.content)
        return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, body: bytes, error: int = 0) -> None:
        os.write(self._fd, _OUT.pack(_OUT.size + len(body), -error, unique) + body)

    def close(self, folder: Path) -> None:
        _libc.umount2(os.fsencode(folder), _MNT_DETACH)
        os.close(self._fd)


@contextmanager
def slow_disk(folder: Path, size: int) -> Iterator[SlowDisk]:
    """Mounted at `folder`, until the end."""
    folder.mkdir()
    made = SlowDisk(folder, size)
    try:
        yield made
    finally:
        made.go_on()
        made.close(folder)
