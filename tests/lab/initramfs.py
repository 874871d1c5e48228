"""An initramfs: busybox, a few kernel modules in the order they need, and init. Written without cpio or depmod.

A newc archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst) is a row of entries:
"070701", 13 fields of 8 hexadecimal digits, the name with its NUL, the data; name and data each padded to 4 bytes.
"""

from __future__ import annotations

import gzip
import lzma
import os
import stat
from pathlib import Path, PurePosixPath

FOLDERS = ("bin", "dev", "guest", "mods", "newroot", "proc", "ro", "rw", "sys")


class Archive:
    """A newc archive that grows in `data`."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._inode = 0

    def folder(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def device(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def end(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return bytes(self.data)

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        self.data += b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        self._pad()
        self.data += data
        self._pad()

    def _pad(self) -> None:
        self.data += bytes(-len(self.data) % 4)


def module_files(modules: Path, names: list[str]) -> list[Path]:
    """Files of the named modules and of what they need, first what is needed. KeyError for one that is not there."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, after = line.partition(":")
        needs[path] = after.split()
    by_name = {_name(path): path for path in needs}
    builtin = {_name(path) for path in (modules / "modules.builtin").read_text().split()}
    order: list[str] = []
    for name in names:
        if name in builtin:
            continue
        path = by_name[name]
        order += [other for other in (*reversed(needs[path]), path) if other not in order]
    return [modules / path for path in order]


def _name(path: str) -> str:
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def build(busybox: Path, modules: Path, names: list[str], files: dict[str, bytes]) -> bytes:
    """The compressed archive. `files` are scripts at its root (one of them `init`)."""
    archive = Archive()
    for folder in FOLDERS:
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for number, path in enumerate(module_files(modules, names)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix == ".gz":
            data = gzip.decompress(data)
        archive.file(f"mods/{number:02}-{_name(os.fspath(path))}.ko", data)
    for name, data in files.items():
        archive.file(name, data, 0o755)
    return gzip.compress(archive.end(), 1)
