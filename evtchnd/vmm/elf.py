"""A guest kernel's ELF image: what is loaded where, and Xen's note with its PVH entry.

Source: ELF specification (System V ABI, chapters 4 and 5); xen/include/public/elfnote.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from evtchnd.errors import OperatorError

PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY

_PT_LOAD, _PT_NOTE, _SHT_NOTE = 1, 4, 7
_MACHINES = {2: "sparc", 3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390", 40: "arm", 62: "x86_64"}
_MACHINES |= {183: "arm64", 243: "riscv", 258: "loongarch"}
_X86 = (3, 62)

# by EI_CLASS: header after e_ident {type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum,
# shentsize, shnum, shstrndx}, then program header and section header, each as (name, where it is) of what is read
_HEADER = {1: struct.Struct("<HHIIIIIHHHHHH"), 2: struct.Struct("<HHIQQQIHHHHHH")}
_PROGRAM = {1: struct.Struct("<IIIIIIII"), 2: struct.Struct("<IIQQQQQQ")}
_SECTION = {1: struct.Struct("<IIIIIIIIII"), 2: struct.Struct("<IIQQQQIIQQ")}
_NOTE = struct.Struct("<III")  # namesz, descsz, type


class Segment(NamedTuple):
    """`data` goes to physical `address`, then zeros up to `size` bytes."""

    address: int
    data: memoryview
    size: int


class Image(NamedTuple):
    """`entry`: physical, in 32-bit protected mode (PVH)."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """The first address after it."""
        return max(segment.address + segment.size for segment in self.segments)

    @property
    def start(self) -> int:
        return min(segment.address for segment in self.segments)


def parse(image: bytes | memoryview) -> Image:
    """OperatorError says in one line why this cannot be started."""
    try:
        return _parse(memoryview(image))
    except (struct.error, IndexError, OverflowError):
        raise OperatorError("the ELF image ends too early") from None


def _parse(image: memoryview) -> Image:
    if bytes(image[:4]) != b"\x7fELF":
        raise OperatorError("no ELF image")
    kind = image[4]
    if kind not in _HEADER or image[5] != 1:
        raise OperatorError("an ELF image that is not little-endian, or neither 32 nor 64 bits")
    _, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = _HEADER[kind].unpack_from(image, 16)
    if machine not in _X86:
        raise OperatorError(f"for another machine ({_MACHINES.get(machine, machine)}): an x86 kernel is wanted")
    segments: list[Segment] = []
    notes: list[memoryview] = []
    for i in range(phnum):
        fields = _PROGRAM[kind].unpack_from(image, phoff + i * phentsize)
        if kind == 2:
            type_, _, offset, _, paddr, filesz, memsz, _ = fields
        else:
            type_, offset, _, paddr, filesz, memsz, _, _ = fields
        data = image[offset : offset + filesz]
        if len(data) < filesz:
            raise OperatorError("the ELF image ends too early")
        if type_ == _PT_LOAD and memsz:
            if filesz > memsz or paddr + memsz > 1 << 52:
                raise OperatorError(f"the ELF image's segment {i} makes no sense")
            segments.append(Segment(paddr, data, memsz))
        elif type_ == _PT_NOTE:
            notes.append(data)
    if not segments:
        raise OperatorError("an ELF file without anything to load: no kernel")
    for i in range(shnum):
        # a unikernel's linker script may leave the note out of the program headers
        _, type_, _, _, offset, size, *_ = _SECTION[kind].unpack_from(image, shoff + i * shentsize)
        if type_ == _SHT_NOTE:
            notes.append(image[offset : offset + size])
    for note in notes:
        for name, type_, desc in _notes(note):
            if name == b"Xen\0" and type_ == PHYS32_ENTRY and len(desc) in (4, 8):
                return Image(int.from_bytes(desc, "little"), tuple(segments))
    raise OperatorError("no PVH entry (Xen's ELF note 18): Linux has one with CONFIG_PVH")


def _notes(data: memoryview) -> Iterator[tuple[bytes, int, memoryview]]:
    """(owner, type, description) of each; what does not fit ends it."""
    at = 0
    while at + _NOTE.size <= len(data):
        namesz, descsz, type_ = _NOTE.unpack_from(data, at)
        name = at + _NOTE.size
        desc = name + (namesz + 3 & ~3)
        yield bytes(data[name : name + namesz]), type_, data[desc : desc + descsz]
        at = desc + (descsz + 3 & ~3)
