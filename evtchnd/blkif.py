"""The block ring's entries on the wire: xen/include/public/io/blkif.h, written once for both ends.

```c
struct blkif_request_segment { u32 gref; u8 first_sect, last_sect; };            // 8 bytes with padding
struct blkif_request   { u8 operation; u8 nr_segments; u16 handle; u64 id; u64 sector_number; segment seg[11]; };
struct .._discard      { u8 operation; u8 flag; u16 handle; u64 id; u64 sector_number; u64 nr_sectors; };
struct .._indirect     { u8 operation; u8 indirect_op; u16 nr_segments; u64 id; u64 sector_number; u16 handle;
                         u32 gref[8]; };
struct blkif_response  { u64 id; u8 operation; s16 status; };
```
The two layouts differ by alignment: an x86_64 compiler puts a u64 on 8 bytes, an i386 one on 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

SECTOR_SIZE = 512
"""Unit of sector_number, first_sect, last_sect and the `sectors` node, whatever `sector-size` says."""
SECTORS_PER_PAGE = 8
MAX_SEGMENTS = 11
MAX_INDIRECT_PAGES = 8
SEGMENTS_PER_INDIRECT_PAGE = 512

VDISK_CDROM = 1
VDISK_REMOVABLE = 2
VDISK_READONLY = 4


class Op(IntEnum):
    """BLKIF_OP_*."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH_DISKCACHE = 3
    DISCARD = 5
    INDIRECT = 6


class Status(IntEnum):
    """BLKIF_RSP_*."""

    OKAY = 0
    ERROR = -1
    EOPNOTSUPP = -2


SEGMENT = Struct("<IBB2x")

# A segment as a guest names it: grant reference, first and last sector in that page (0..7, both included).
Segment = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """One ABI's entries. `name` is the value of the frontend's `protocol` node."""

    abi: int
    name: str
    request_head: Struct
    discard: Struct
    indirect: Struct
    response: Struct

    @property
    def request_size(self) -> int:
        """Bytes of struct blkif_request: 112 or 108."""
        return self.request_head.size + MAX_SEGMENTS * SEGMENT.size

    @property
    def response_size(self) -> int:
        """Bytes of struct blkif_response: 16 or 12."""
        return self.response.size

    def request(self, op: int, ident: int, sector: int, segments: Sequence[Segment], *, handle: int = 0) -> bytes:
        """A READ, WRITE or FLUSH_DISKCACHE with at most 11 segments."""
        head = self.request_head.pack(op, len(segments), handle, ident, sector)
        return head + b"".join(SEGMENT.pack(*segment) for segment in segments)

    def indirect_request(
        self, op: int, ident: int, sector: int, count: int, grefs: Sequence[int], *, handle: int = 0
    ) -> bytes:
        """A READ or WRITE of `count` segments that lie in the pages granted by `grefs` (at most 8)."""
        padded = [*grefs, *[0] * (MAX_INDIRECT_PAGES - len(grefs))]
        return self.indirect.pack(Op.INDIRECT, op, count, ident, sector, handle, *padded)

    def discard_request(self, ident: int, sector: int, count: int, *, flag: int = 0, handle: int = 0) -> bytes:
        """A DISCARD of `count` sectors."""
        return self.discard.pack(Op.DISCARD, flag, handle, ident, sector, count)


X86_64 = Layout(64, "x86_64-abi", Struct("<BBH4xQQ"), Struct("<BBH4xQQQ"), Struct("<BBH4xQQH2x8I4x"), Struct("<QBxh4x"))
X86_32 = Layout(32, "x86_32-abi", Struct("<BBHQQ"), Struct("<BBHQQQ"), Struct("<BBHQQH2x8I8x"), Struct("<QBxh"))
LAYOUTS = {layout.name: layout for layout in (X86_64, X86_32)}
