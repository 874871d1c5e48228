"""Tables of the VMM's socket: guest memory, grant frames, bound ports; whole (begin, chunks, commit) or one by one."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from evtchnd.abi import PAGE_SIZE
from evtchnd.messages import (
    MAX_GFN,
    MAX_GRANT_FRAMES,
    MAX_OFFSET,
    MAX_PORTS,
    MAX_SLOTS,
    Kind,
    Message,
    Type,
    check,
    check_indices,
    check_port,
    values_of,
)


@dataclass(frozen=True, slots=True)
class MemoryEntry(Message):
    """A slot of guest memory: struct { uint32_t slot, fd_index; uint64_t gfn, pages, offset; }.

    `pages` of 4096 bytes from guest frame `gfn` on; `offset` bytes into the descriptor (a multiple of 4096).
    Alone it is the body of SLOT_ADD, with one descriptor (fd_index 0).
    """

    slot: int
    fd_index: int
    gfn: int
    pages: int
    offset: int
    type: ClassVar[Type] = Type.SLOT_ADD
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<IIQQQ")

    def __post_init__(self) -> None:
        what = f"memory slot {self.slot}"
        check(0 <= self.slot < MAX_SLOTS, f"{what}: not in 0..{MAX_SLOTS - 1}", errno.ERANGE)
        check(self.pages > 0, f"{what}: no pages")
        # Python's integers do not wrap; a C reader compares pages > MAX_GFN - gfn instead
        check(0 <= self.gfn <= MAX_GFN - self.pages, f"{what}: gfn {self.gfn:#x} + {self.pages:#x} pages wraps")
        check(self.offset % PAGE_SIZE == 0, f"{what}: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        check(0 <= self.offset <= MAX_OFFSET - self.pages * PAGE_SIZE, f"{what}: offset {self.offset:#x} wraps")


@dataclass(frozen=True, slots=True)
class GrantEntry(Message):
    """A frame of the grant table: struct { uint32_t index, fd_index; uint64_t offset; }.

    Alone it is the body of GRANT_FRAME_ADD, with one descriptor (fd_index 0).
    """

    index: int
    fd_index: int
    offset: int
    type: ClassVar[Type] = Type.GRANT_FRAME_ADD
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<IIQ")

    def __post_init__(self) -> None:
        what = f"grant frame {self.index}"
        check(0 <= self.index < MAX_GRANT_FRAMES, f"{what}: not in 0..{MAX_GRANT_FRAMES - 1}", errno.ERANGE)
        check(self.offset % PAGE_SIZE == 0, f"{what}: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        check(0 <= self.offset <= MAX_OFFSET - PAGE_SIZE, f"{what}: offset {self.offset:#x} wraps")


@dataclass(frozen=True, slots=True)
class PortEntry(Message):
    """A bound port: struct { uint32_t port, kick_fd_index, notify_fd_index, flags; }; flags is 0."""

    port: int
    kick_fd_index: int
    notify_fd_index: int
    flags: int = 0
    layout: ClassVar[struct.Struct] = struct.Struct("<IIII")

    def __post_init__(self) -> None:
        check_port(self.port)
        check(self.flags == 0, f"port {self.port}: unknown flags {self.flags:#x}")


TableEntry = MemoryEntry | GrantEntry | PortEntry


@dataclass(frozen=True, slots=True)
class TableBegin(Message):
    """struct { uint32_t kind, entries; }: `entries` of `kind` come in chunks. Drops a table that is not committed."""

    kind: int
    entries: int
    type: ClassVar[Type] = Type.TABLE_BEGIN
    layout: ClassVar[struct.Struct] = struct.Struct("<II")

    def __post_init__(self) -> None:
        most = _capacity(self.kind)
        check(0 <= self.entries <= most, f"table of {self.entries} entries, {most} at most", errno.E2BIG)


@dataclass(frozen=True, slots=True)
class TableChunk(Message):
    """struct { uint32_t kind, n; } and n entries, with the descriptors that they name (253 at most)."""

    kind: int
    entries: tuple[TableEntry, ...]
    type: ClassVar[Type] = Type.TABLE_CHUNK
    layout: ClassVar[struct.Struct] = struct.Struct("<II")

    def __post_init__(self) -> None:
        of = _entry_class(self.kind)
        check(all(type(entry) is of for entry in self.entries), f"table kind {self.kind}: entries of another kind")
        check(len(self.entries) > 0, "table chunk without an entry")
        check_indices(self._indices(), shared=self.kind != Kind.PORTS)

    def _indices(self) -> list[int]:
        indices: list[int] = []
        for entry in self.entries:
            if isinstance(entry, PortEntry):
                indices += (entry.kick_fd_index, entry.notify_fd_index)
            else:
                indices.append(entry.fd_index)
        return indices

    @property
    def nfds(self) -> int:
        return len(set(self._indices()))

    def body(self) -> bytes:
        entry = _entry_class(self.kind).layout
        return self.layout.pack(self.kind, len(self.entries)) + b"".join(
            entry.pack(*values_of(each)) for each in self.entries
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        kind, count, rest = _counted(cls.layout, body, "table chunk")
        of = _entry_class(kind)
        check(len(rest) == count * of.layout.size, f"table chunk: {count} entries do not fill its {len(rest)} bytes")
        return cls(kind, tuple(of(*values) for values in of.layout.iter_unpack(rest)))


def _counted(layout: struct.Struct, body: bytes, what: str) -> tuple[int, int, bytes]:
    check(len(body) >= layout.size, f"{what}: cut off")
    first, second = layout.unpack_from(body)
    return first, second, body[layout.size :]


def _entry_class(kind: int) -> type[MemoryEntry] | type[GrantEntry] | type[PortEntry]:
    classes: dict[int, type[MemoryEntry] | type[GrantEntry] | type[PortEntry]] = {
        Kind.MEMORY: MemoryEntry,
        Kind.GRANTS: GrantEntry,
        Kind.PORTS: PortEntry,
    }
    check(kind in classes, f"table kind {kind} is unknown")
    return classes[kind]


def _capacity(kind: int) -> int:
    _entry_class(kind)
    return {Kind.MEMORY: MAX_SLOTS, Kind.GRANTS: MAX_GRANT_FRAMES, Kind.PORTS: MAX_PORTS - 1}[Kind(kind)]


@dataclass(frozen=True, slots=True)
class TableCommit(Message):
    """struct { uint32_t kind, pad; }: the whole table is replaced, or refused and nothing has changed."""

    kind: int
    type: ClassVar[Type] = Type.TABLE_COMMIT
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")

    def __post_init__(self) -> None:
        _entry_class(self.kind)


# SLOT_ADD and GRANT_FRAME_ADD are one entry and its descriptor
SlotAdd = MemoryEntry
GrantFrameAdd = GrantEntry


def check_table(entries: Sequence[TableEntry]) -> None:
    """A whole table: no slot, frame or port twice; no guest frame in two slots. VmmError names the pair."""
    seen: set[int] = set()
    for entry in entries:
        if isinstance(entry, MemoryEntry):
            what, number = "memory slot", entry.slot
        elif isinstance(entry, GrantEntry):
            what, number = "grant frame", entry.index
        else:
            what, number = "port", entry.port
        check(number not in seen, f"{what} {number} is there twice", errno.EEXIST)
        seen.add(number)
    slots = sorted((entry for entry in entries if isinstance(entry, MemoryEntry)), key=lambda entry: entry.gfn)
    for low, high in itertools.pairwise(slots):
        check(
            low.gfn + low.pages <= high.gfn,
            f"memory slots {low.slot} ({low.gfn:#x} + {low.pages:#x} pages) and {high.slot} ({high.gfn:#x}) overlap",
            errno.EEXIST,
        )
