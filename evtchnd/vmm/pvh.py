"""What a PVH guest finds in its memory at its first instruction: kernel, modules, start_info, memory map, ACPI tables.

    0x6000     hvm_start_info, module list         0x7000   memory map         0x8000   command lines
    0xf0000    ACPI tables                         1 MiB    the kernel, where its ELF image says
               modules, from the top of the RAM below 4 GiB downwards
    0xfeff8000 Xen's special pages; RAM ends at 3 GiB and goes on at 4 GiB

Source: xen/include/public/arch-x86/hvm/start_info.h; docs/misc/pvh.pandoc.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from evtchnd.errors import OperatorError
from evtchnd.vmm import acpi
from evtchnd.vmm.elf import Image

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
START_INFO, MODULE_LIST, MEMORY_MAP, COMMAND_LINES, COMMAND_LINES_END = 0x6000, 0x6040, 0x7000, 0x8000, 0x9F000
ACPI_TABLES = 0xF0000
LOW_RAM_END = 3 * GiB  # below are the local APIC, the special pages and what a guest takes for devices
HIGH_RAM = 4 * GiB
SPECIAL, SPECIAL_SIZE = 0xFEFF8000, 0x8000
RAM, RESERVED = 1, 2  # E820 types

_MAGIC = 0x336EC578  # XEN_HVM_START_MAGIC_VALUE
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MAP_ENTRY = struct.Struct("<QQII")
_ZEROS = bytes(MiB)
_MAX_MODULES = (MEMORY_MAP - MODULE_LIST) // _MODULE.size

Write = Callable[[int, bytes | memoryview], None]


class Module(NamedTuple):
    """A file for the guest (an initrd, a guest kernel for a shim) with its command line."""

    data: bytes
    command_line: str = ""


def low_ram(memory: int) -> int:
    """How much of `memory` bytes lies below 4 GiB; the rest is at HIGH_RAM."""
    return min(memory, LOW_RAM_END)


def memory_map(memory: int) -> list[tuple[int, int, int]]:
    """(address, size, E820 type)."""
    entries = [
        (0, 0x9FC00, RAM),
        (0x9FC00, 0x400, RESERVED),
        (ACPI_TABLES, 0x10000, RESERVED),
        (MiB, low_ram(memory) - MiB, RAM),
        (SPECIAL, SPECIAL_SIZE, RESERVED),
    ]
    if memory > LOW_RAM_END:
        entries.append((HIGH_RAM, memory - LOW_RAM_END, RAM))
    return entries


def load(write: Write, memory: int, vcpus: int, image: Image, command_line: str, modules: Sequence[Module]) -> int:
    """Puts it all into RAM, which is zeros, by `write`(physical address, data); where hvm_start_info is.

    OperatorError where it does not fit.
    """
    top = low_ram(memory)
    if image.start < MiB or image.end > top:
        raise OperatorError(
            f"the kernel wants {image.start:#x} to {image.end:#x}, RAM is {MiB:#x} to {top:#x}: give it more memory"
        )
    for segment in image.segments:
        for at in range(0, len(segment.data), len(_ZEROS)):
            part = segment.data[at : at + len(_ZEROS)]
            if not _ZEROS.startswith(part):
                write(segment.address + at, part)
    if len(modules) > _MAX_MODULES:
        raise OperatorError(f"{len(modules)} modules: at most {_MAX_MODULES}")
    lines = _CommandLines(write)
    where = lines.add(command_line)
    for i, module in enumerate(modules):
        top = top - len(module.data) & ~0xFFF
        if top < image.end:
            raise OperatorError(f"the modules do not fit beside the kernel in {memory >> 20} MiB: give it more memory")
        write(top, module.data)
        line = lines.add(module.command_line) if module.command_line else 0
        write(MODULE_LIST + i * _MODULE.size, _MODULE.pack(top, len(module.data), line, 0))
    entries = memory_map(memory)
    write(MEMORY_MAP, b"".join(_MAP_ENTRY.pack(*entry, 0) for entry in entries))
    rsdp, tables = acpi.tables(ACPI_TABLES, vcpus)
    write(ACPI_TABLES, tables)
    info = _START_INFO.pack(
        _MAGIC, 1, 0, len(modules), MODULE_LIST if modules else 0, where, rsdp, MEMORY_MAP, len(entries), 0
    )
    write(START_INFO, info)
    return START_INFO


class _CommandLines:
    def __init__(self, write: Write) -> None:
        self._write, self._at = write, COMMAND_LINES

    def add(self, line: str) -> int:
        """Where it is, with its NUL."""
        data = line.encode(errors="surrogateescape") + b"\0"
        if b"\0" in data[:-1] or self._at + len(data) > COMMAND_LINES_END:
            raise OperatorError(f"a command line of {len(data) - 1} bytes is too long, or has a NUL")
        at, self._at = self._at, self._at + len(data)
        self._write(at, data)
        return at
