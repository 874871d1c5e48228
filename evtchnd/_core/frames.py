# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Guest frame number -> address in this process: the look-up under every grant.

A *row* is one mapped slot. Its number stays the same while the slot is there and until its last hold is gone, so that a
request that began before a slot was removed ends on the memory it began on.
"""

from __future__ import annotations

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

if not cython.compiled:
    from evtchnd._core.words import Mem, get64, put64

COMPILED: bool = bool(cython.compiled)

# One row: u64 first gfn | u64 pages (0: not in use or removed) | u64 address | u64 holds
ROW = 32
PAGES = 8
ADDRESS = 16
HOLDS = 24


class Frames:
    """A table of at most `max_slots` rows that are live, and as many again that are removed but still held."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.rows = Mem(bytearray(ROW * 2 * max_slots))
        self.order: list[int] = []  # live rows by gfn
        self.free = list(range(2 * max_slots - 1, -1, -1))
        self.held = 0
        self.forget()

    def forget(self) -> None:
        """No row was looked up last."""
        self.last = -1
        self.last_first = self.last_pages = self.last_address = 0

    def full(self) -> bool:
        """No row is free: too many removed slots are still held."""
        return not self.free

    def insert(self, gfn: int, pages: int, address: int) -> int:
        """Add a row for `pages` frames from `gfn` at `address`; its number. The caller has checked for overlaps."""
        row = self.free.pop()
        base = row * ROW
        put64(self.rows.p, base, gfn)
        put64(self.rows.p, base + PAGES, pages)
        put64(self.rows.p, base + ADDRESS, address)
        put64(self.rows.p, base + HOLDS, 0)
        self.order = sorted([*self.order, row], key=self.first_of)
        return row

    def first_of(self, row: int) -> int:
        """The first frame of a row."""
        return get64(self.rows.p, row * ROW)

    def retire(self, row: int) -> bool:
        """Take a row out of every later look-up. True: nothing holds it; else `idle(row)` is called when that is so."""
        self.order = [other for other in self.order if other != row]
        self.forget()
        put64(self.rows.p, row * ROW + PAGES, 0)
        if get64(self.rows.p, row * ROW + HOLDS):
            return False
        self.free.append(row)
        return True

    def idle(self, row: int) -> None:
        """The last hold of a retired row is gone. Overridden by who has to unmap it."""

    def holds_of(self, row: int) -> int:
        """How many pins hold this row's memory."""
        return get64(self.rows.p, row * ROW + HOLDS)

    def row_of(self, gfn: int) -> int:
        """The live row that has this frame, or -1."""
        return self.find(gfn) if 0 <= gfn < 1 << 52 else -1

    def find(self, gfn: int) -> int:
        """The live row that has this frame, or -1. What it finds is what `last...` says next."""
        low = 0
        high = len(self.order)
        while low < high:
            middle = (low + high) >> 1
            row = self.order[middle]
            base = row * ROW
            first = get64(self.rows.p, base)
            if gfn < first:
                high = middle
            elif gfn - first < get64(self.rows.p, base + PAGES):
                self.last = row
                self.last_first = first
                self.last_pages = get64(self.rows.p, base + PAGES)
                self.last_address = get64(self.rows.p, base + ADDRESS)
                return row
            else:
                low = middle + 1
        return -1

    def unheld(self, row: int) -> int:
        """The last hold of `row` is gone."""
        if get64(self.rows.p, row * ROW + PAGES) == 0:
            self.free.append(row)
            self.idle(row)
        return 0
