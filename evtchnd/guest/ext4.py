"""Reads files of an ext4 image through a guest's disk: enough of ext4 to find a file's blocks, read-only.

Source: Documentation/filesystems/ext4 of Linux (super.rst, group_descr.rst, inodes.rst, ifork.rst, directory.rst).
Extents only (what mkfs.ext4 makes); no journal replay, no encryption, no inline data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAGIC = 0xEF53
EXTENT_MAGIC = 0xF30A
INCOMPAT_64BIT = 0x80
FLAG_EXTENTS = 0x80000
ROOT_INODE = 2
TYPE_MASK, TYPE_DIRECTORY, TYPE_FILE = 0xF000, 0x4000, 0x8000
# ext4 needs five levels at the most for 2^32 blocks; a deeper tree is a corrupt one.
MAX_DEPTH = 5


class Ext4Error(Exception):
    """The image is no ext4, or uses a feature that this reader does not know."""


@dataclass(frozen=True)
class Extent:
    """`length` bytes of a file, from `file_offset`, lie at `disk_offset` of the disk (bytes, block-aligned)."""

    file_offset: int
    disk_offset: int
    length: int


@dataclass(frozen=True)
class Inode:
    """What stat would say, and the 60 bytes where the block map begins."""

    number: int
    mode: int
    size: int
    flags: int
    block: bytes

    @property
    def is_directory(self) -> bool:
        return self.mode & TYPE_MASK == TYPE_DIRECTORY

    @property
    def is_file(self) -> bool:
        return self.mode & TYPE_MASK == TYPE_FILE


class Ext4:
    """An ext4 file system behind `read(offset, length) -> bytes` (bytes of the disk)."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        sb = read(1024, 1024)
        if struct.unpack_from("<H", sb, 0x38)[0] != MAGIC:
            raise Ext4Error("no ext4: magic number missing in the superblock")
        self.block_size = 1024 << struct.unpack_from("<I", sb, 0x18)[0]
        self._first_block = struct.unpack_from("<I", sb, 0x14)[0]
        self._inodes_per_group = struct.unpack_from("<I", sb, 0x28)[0]
        self._inode_size = struct.unpack_from("<H", sb, 0x58)[0]
        wide = struct.unpack_from("<I", sb, 0x60)[0] & INCOMPAT_64BIT
        self._descriptor_size = struct.unpack_from("<H", sb, 0xFE)[0] if wide else 32

    def inode(self, number: int) -> Inode:
        group, index = divmod(number - 1, self._inodes_per_group)
        table_of_groups = (self._first_block + 1) * self.block_size
        descriptor = self._read(table_of_groups + group * self._descriptor_size, self._descriptor_size)
        table = struct.unpack_from("<I", descriptor, 8)[0]
        if self._descriptor_size >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        raw = self._read(table * self.block_size + index * self._inode_size, self._inode_size)
        mode, low, high = *struct.unpack_from("<H", raw, 0), *struct.unpack_from("<I", raw, 4), *_u32(raw, 0x6C)
        return Inode(number, mode, low | high << 32, *_u32(raw, 0x20), raw[0x28:0x64])

    def extents(self, inode: Inode) -> list[Extent]:
        """Where the inode's data is, in the file's order. Holes have no extent."""
        if not inode.flags & FLAG_EXTENTS:
            raise Ext4Error(f"inode {inode.number} has no extents")
        return sorted(self._walk(inode.block, MAX_DEPTH), key=lambda extent: extent.file_offset)

    def _walk(self, node: bytes, depth: int) -> Iterator[Extent]:
        magic, entries, _most, level = struct.unpack_from("<HHHH", node)
        if magic != EXTENT_MAGIC or depth < 0 or 12 + entries * 12 > len(node):
            raise Ext4Error("corrupt extent tree")
        for i in range(entries):
            at = 12 + i * 12
            if level:
                low, high = struct.unpack_from("<IH", node, at + 4)
                yield from self._walk(self._read((low | high << 32) * self.block_size, self.block_size), depth - 1)
                continue
            first, length, high, low = struct.unpack_from("<IHHI", node, at)
            if length <= 32768:  # more: allocated but not written, reads as zeroes
                start = low | high << 32
                yield Extent(first * self.block_size, start * self.block_size, length * self.block_size)

    def contents(self, inode: Inode) -> bytes:
        """The whole of a small file or directory."""
        data = bytearray(inode.size)
        for extent in self.extents(inode):
            part = self._read(extent.disk_offset, extent.length)[: max(0, inode.size - extent.file_offset)]
            data[extent.file_offset : extent.file_offset + len(part)] = part
        return bytes(data)

    def listdir(self, inode: Inode) -> Iterator[tuple[str, int]]:
        """(name, inode number) of a directory's entries but `.` and `..`; hashed directories read as linear ones."""
        data = self.contents(inode)
        at = 0
        while at + 8 <= len(data):
            number, length, name_length, _type = struct.unpack_from("<IHBB", data, at)
            if length < 8:
                raise Ext4Error(f"corrupt directory: inode {inode.number}")
            name = data[at + 8 : at + 8 + name_length].decode("utf-8", "surrogateescape")
            if number and name not in (".", ".."):
                yield name, number
            at += length

    def walk(self) -> Iterator[tuple[str, Inode]]:
        """(path, inode) of every regular file, depth first."""
        todo = [("", ROOT_INODE)]
        while todo:
            folder, number = todo.pop()
            for name, child in self.listdir(self.inode(number)):
                inode = self.inode(child)
                if inode.is_directory:
                    todo.append((f"{folder}/{name}", child))
                elif inode.is_file:
                    yield f"{folder}/{name}", inode


def _u32(raw: bytes, at: int) -> tuple[int]:
    value: int = struct.unpack_from("<I", raw, at)[0]
    return (value,)
