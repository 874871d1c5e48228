# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Frames that cross a vif as a capture wants them: pcapng's blocks (draft-ietf-opsawg-pcapng) in a bounded buffer.

    Enhanced Packet Block   u32 6 | u32 length | u32 interface | u32 time >> 32, time | u32 captured, original
                            data, filled up to 4 bytes | options | u32 length
    option                  u16 code, length | value, filled up to 4 bytes; epb_flags 2, epb_dropcount 4, epb_queue 6

A frame is copied when it has crossed, from pages that are pinned still, and nothing of it is held. What finds no room
is counted: the ring that writes here never waits.
"""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

if not cython.compiled:
    from evtchnd._core.words import Mem, copy, put16, put32, put64, u32

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants. `mark` is an epb_flags word: bits 0 and 1 say inbound (1) or outbound (2), 0x200
# that a checksum is not there yet, 0x400 that it has been looked at, 0x800 that segmentation is still to be done.
INBOUND, OUTBOUND, NO_CHECKSUM, CHECKED, SEGMENTED = 1, 2, 0x200, 0x400, 0x800

# Kept free of frames, for the block that ends a capture
LAST = 256


class FrameLog:
    """A buffer of `size` bytes (a power of two, 4096 at least) of one interface's blocks.

    snap      bytes that are kept of a frame | most: frames that are taken, then it is `full`; 0: any number
    frames    count of those that are in the buffer or were; dropped: of those that found no room
    """

    if TYPE_CHECKING:
        snap: int
        most: int
        frames: int
        dropped: int
        full: bool
        waiting: int

    def __init__(self, memory: Any, size: int, snap: int, most: int = 0) -> None:
        if size < 4096 or size & (size - 1):
            raise ValueError("the buffer's size is a power of two")
        self.memory = memory
        self.snap = snap
        self.most = most
        self.frames = self.dropped = 0
        self.full = False
        # bytes that wait for the reader, and where the next ones go
        self.waiting = 0
        self.at = 0
        self.size = size
        self.buffer = Mem(bytearray(size))
        self.small = Mem(bytearray(32))
        self.length = self.rest = self.gap = 0

    def begin(self, mark: int, queue: int, length: int) -> int:
        """A frame of `length` bytes; its `guest` and `private` parts follow, then `end`. 0: it is not taken."""
        if self.full:
            return 0
        captured = length if length < self.snap else self.snap
        self.length = 52 + ((captured + 3) & ~3) + (12 if self.gap else 0)
        if self.waiting + self.length + 256 > self.size:
            self.dropped += 1
            self.gap += 1
            return 0
        self.rest = captured
        self.mark = mark
        self.queue = queue
        now = time_ns()
        self.word(6)
        self.word(self.length)
        self.word(0)
        self.word(now >> 32)
        self.word(u32(now))
        self.word(captured)
        self.word(length)
        self.frames += 1
        if self.frames == self.most:
            self.full = True
        return 1

    def word(self, value: int) -> int:
        put32(self.buffer.p, self.at, value)
        self.at = (self.at + 4) & (self.size - 1)
        self.waiting += 4
        return 0

    def private(self, p: Any, at: int, n: int) -> int:
        """The frame goes on with `n` bytes of memory of ours."""
        if n > self.rest:
            n = self.rest
        self.rest -= n
        while n > 0:
            part = self.size - self.at
            if part > n:
                part = n
            copy(self.buffer.p, self.at, p, at, part)
            self.at = (self.at + part) & (self.size - 1)
            self.waiting += part
            at += part
            n -= part
        return 0

    def guest(self, address: int, n: int) -> int:
        """The same, out of a page of the guest's that is pinned."""
        if n > self.rest:
            n = self.rest
        if n <= 0:
            return 0
        if cython.compiled:
            return self.private(cython.cast("const char *", address), 0, n)
        with self.memory.view_at(address, n) as view:
            return self.private(Mem(bytearray(view) + bytes(-n & 7)), 0, n)

    def end(self) -> int:
        """The frame is over."""
        fill = -self.at & 3
        self.at = (self.at + fill) & (self.size - 1)
        self.waiting += fill
        self.word(2 | 4 << 16)
        self.word(self.mark)
        self.word(6 | 4 << 16)
        self.word(self.queue)
        if self.gap:
            put16(self.small.p, 0, 4)
            put16(self.small.p, 2, 8)
            put64(self.small.p, 8, self.gap)
            self.rest = 12
            self.private(self.small.p, 0, 4)
            self.private(self.small.p, 8, 8)
            self.gap = 0
        self.word(0)
        self.word(self.length)
        return 0

    def put(self, block: bytes) -> None:
        """A whole block of another type, a multiple of 4 bytes. ValueError: there is no room."""
        if len(block) % 4 or self.waiting + len(block) > self.size:
            raise ValueError(f"{len(block)} bytes of a block, {self.size - self.waiting} are free")
        copied = Mem(bytearray(block) + bytes(-len(block) & 7))
        self.rest = len(block)
        self.private(copied.p, 0, len(block))

    def views(self) -> list[memoryview]:
        """What waits, in one piece or two. They are the buffer itself: send it, then say `taken`."""
        start = (self.at - self.waiting) & (self.size - 1)
        end = start + self.waiting
        view = self.buffer.view
        if end <= self.size:
            return [view[start:end]] if self.waiting else []
        return [view[start:], view[: end - self.size]]

    def taken(self, n: int) -> None:
        """So many bytes of what waits are the reader's."""
        if not 0 <= n <= self.waiting:
            raise ValueError(n)
        self.waiting -= n
