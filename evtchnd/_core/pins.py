# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Grants, version 1: validated and pinned by one compare-and-swap of the 32-bit word flags + domid, as Xen does.

    struct grant_entry_v1 { u16 flags; u16 domid; u32 frame; }      8 bytes, 512 in a frame of the table

The word is shared with the guest: it may change between any two looks, so what was checked is what is swapped. After
the swap GTF_reading or GTF_writing tells the guest to leave the entry alone; the frame is read then, once, and
remembered: while pins are left nothing in the entry is believed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.words import need_atomics
from evtchnd.errors import GuestError

if TYPE_CHECKING:
    from evtchnd._core.frames import Frames

if not cython.compiled:
    from evtchnd._core.words import Mem, and16, cas32, get32, get64, ld32, put32, put64

COMPILED: bool = bool(cython.compiled)

# grant_table.h; numbers here, not imported: compiled they are C constants
# type: permit_access 1 in bits 0-1, and no sub-page grant (bit 8)
# GTF_readonly 4, GTF_reading 8, GTF_writing 16
TRIES = 5  # xen/common/grant_table.c: a guest that flips the entry longer than that is misbehaving (XSA-295)

# What is remembered of one grant: u32 readers | u32 writers | u32 row | u32 gfn | u64 address
ACT = 24


class Pins:
    """The grant table's frames and what is pinned through them. Not for several threads."""

    def __init__(self, memory: Frames, domid: int, backend_domid: int, max_frames: int) -> None:
        need_atomics()
        self.memory = memory
        self.domid = domid
        self.backend_domid = backend_domid
        self.max_frames = max_frames
        self.pinned = 0
        self.row = 0
        self.frames: list[Mem | None] = [None] * max_frames
        self.act = Mem(bytearray(ACT * 512 * max_frames))

    def set_frame(self, index: int, frame: Mem | None) -> None:
        """Put a page of the table in its place, or take it away."""
        self.frames[index] = frame

    def frame_at(self, index: int) -> Mem | None:
        """The page of the table at `index`."""
        return self.frames[index]

    def pin_page(self, gref: int, write: bool) -> int:
        """-> the page's address here; `row` then names the memory slot's row. GuestError says why not."""
        if gref >= self.max_frames << 9:
            raise GuestError(f"grant {gref}: is outside the table of at most {self.max_frames << 9} entries")
        frame = self.frames[gref >> 9]
        if frame is None:
            raise GuestError(f"grant {gref}: frame {gref >> 9} of the grant table is not there")
        at = gref * 24
        readers = get32(self.act.p, at)
        writers = get32(self.act.p, at + 4)
        if readers == 0xFFFFFFFF or writers == 0xFFFFFFFF:
            raise GuestError(f"grant {gref}: is pinned too often")
        if readers + writers != 0:
            if write and writers == 0:
                self.mark(frame, gref, write, True)
            self.row = get32(self.act.p, at + 8)
            address = get64(self.act.p, at + 16)
        else:
            self.mark(frame, gref, write, False)
            gfn = ld32(frame.p, ((gref & 511) << 3) + 4)
            memory = self.memory
            first = memory.last_first
            # one slot holds nearly all of a guest: no call for it
            if gfn < first or gfn - first >= memory.last_pages:
                if memory.find(gfn) < 0:
                    and16(frame.p, (gref & 511) << 3, 0xFFE7)
                    raise GuestError(f"grant {gref}: frame {gfn:#x} is in no memory slot")
                first = memory.last_first
            row = memory.last
            address = memory.last_address + ((gfn - first) << 12)
            put32(self.act.p, at + 8, row)
            put32(self.act.p, at + 12, gfn)
            put64(self.act.p, at + 16, address)
            self.row = row
        self.hold(self.row)
        if write:
            put32(self.act.p, at + 4, writers + 1)
        else:
            put32(self.act.p, at, readers + 1)
        self.pinned += 1
        return address

    def unpin_page(self, gref: int, write: bool) -> int:
        """Drop one pin; the last one gives the entry back to the guest. ValueError for one that was not there."""
        if gref >= self.max_frames << 9:
            raise ValueError(f"grant {gref} is not pinned")
        at = gref * 24
        readers = get32(self.act.p, at)
        writers = get32(self.act.p, at + 4)
        clear = 0
        if write:
            if writers == 0:
                raise ValueError(f"grant {gref} is not pinned for writing")
            writers -= 1
            put32(self.act.p, at + 4, writers)
            if writers == 0:
                clear = 16
        else:
            if readers == 0:
                raise ValueError(f"grant {gref} is not pinned for reading")
            readers -= 1
            put32(self.act.p, at, readers)
        if readers == 0 and writers == 0:
            clear |= 8
        self.pinned -= 1
        if clear != 0:
            frame = self.frames[gref >> 9]
            if frame is not None:  # the VMM may have taken the table away meanwhile
                and16(frame.p, (gref & 511) << 3, 0xFFFF ^ clear)
        return self.unhold(get32(self.act.p, at + 8))

    def hold(self, row: int) -> int:
        base = row * 32 + 24  # frames.ROW, HOLDS
        rows = self.memory.rows
        put64(rows.p, base, get64(rows.p, base) + 1)
        self.memory.held += 1
        return 0

    def unhold(self, row: int) -> int:
        base = row * 32 + 24
        rows = self.memory.rows
        left = get64(rows.p, base) - 1
        put64(rows.p, base, left)
        self.memory.held -= 1
        if left == 0:
            self.memory.unheld(row)
        return 0

    def mark(self, frame: Mem, gref: int, write: bool, checked: bool) -> int:
        """Set GTF_reading (and GTF_writing) while the entry permits it; `checked`: it is pinned, its type known."""
        word = ld32(frame.p, (gref & 511) << 3)
        for tries in range(5):  # noqa: B007  (TRIES)
            if not checked:
                if word & 3 == 0:
                    raise GuestError(f"grant {gref}: is not granted (flags {word & 0xFFFF:#x})")
                if word & 0x103 != 1:
                    raise GuestError(f"grant {gref}: flags {word & 0xFFFF:#x} are no plain access grant")
                if word >> 16 != self.backend_domid:
                    raise GuestError(f"grant {gref}: is granted to domain {word >> 16}, not to {self.backend_domid}")
            new = word | 8
            if write:
                if word & 4:
                    raise GuestError(f"grant {gref}: is read-only, and this request writes to it")
                new |= 16
            was = cas32(frame.p, (gref & 511) << 3, word, new)
            if was == word:
                return 0
            word = was
        raise GuestError(f"grant {gref}: its entry keeps changing (5 tries)")

    def address_of(self, gref: int) -> int:
        """The address of a pinned grant's page."""
        return get64(self.act.p, gref * 24 + 16)

    def gfn_of(self, gref: int) -> int:
        """The frame of a pinned grant."""
        return get32(self.act.p, gref * 24 + 12)

    def pins_of(self, gref: int) -> tuple[int, int]:
        """(readers, writers) of a grant."""
        return get32(self.act.p, gref * 24), get32(self.act.p, gref * 24 + 4)

    def pin_frame(self, gref: int, write: bool) -> int:
        """`pin_page` for callers in Python; -> gfn."""
        if not 0 <= gref < 1 << 32:
            raise GuestError(f"grant {gref}: is no 32-bit reference")
        self.pin_page(gref, write)
        return self.gfn_of(gref)

    def unpin_frame(self, gref: int, write: bool) -> None:
        """`unpin_page` for callers in Python."""
        if not 0 <= gref < 1 << 32:
            raise ValueError(f"grant {gref} is not pinned")
        self.unpin_page(gref, write)
