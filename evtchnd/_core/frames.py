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
        self.last = 0
        self.held = 0

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
        base = self.last * ROW
        first = get64(self.rows.p, base)
        if gfn >= first and gfn - first < get64(self.rows.p, base + PAGES):
            return self.last
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
                return row
            else:
                low = middle + 1
        return -1

    def address_in(self, row: int, gfn: int) -> int:
        return get64(self.rows.p, row * ROW + ADDRESS) + ((gfn - get64(self.rows.p, row * ROW)) << 12)

    def hold(self, row: int) -> int:
        base = row * ROW + HOLDS
        put64(self.rows.p, base, get64(self.rows.p, base) + 1)
        self.held += 1
        return 0

    def unhold(self, row: int) -> int:
        base = row * ROW
        left = get64(self.rows.p, base + HOLDS) - 1
        put64(self.rows.p, base + HOLDS, left)
        self.held -= 1
        if left == 0 and get64(self.rows.p, base + PAGES) == 0:
            self.free.append(row)
            self.idle(row)
        return 0
