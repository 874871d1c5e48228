"""Memory for requests whose pages O_DIRECT does not take as they lie: their data goes through it, page-aligned.

A guest's segments begin and end at multiples of 512 bytes; a device with larger sectors may want whole ones of each
vector. That is rare and slow (a copy, one request at a time), so the memory is small.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING

from evtchnd._core.words import Mem
from evtchnd.blkif import Op

if TYPE_CHECKING:
    from evtchnd._core.req import Req

BYTES = 256 << 10


class Bounce:
    """One a disk. Stands for the request that it carries: `op`, `iov_addr`, `iov_count` and `advance` are as Req's.

    A piece of at most BYTES is at the disk at a time; the caller begins `piece()` after a `take` that says so and, as
    long as it is `busy`, after each `done()` or `give()`.
    """

    iov_count = 1

    def __init__(self) -> None:
        self._mem = Mem(mmap.mmap(-1, BYTES))
        self._iov = Mem(bytearray(16))
        self._waiting: deque[tuple[Req, int, int]] = deque()
        self._size = 0  # of the piece that is at the disk
        self._gone = 0  # of it, after a short result

    @property
    def busy(self) -> bool:
        """Some request is to be carried."""
        return bool(self._waiting)

    @property
    def op(self) -> int:
        return self._waiting[0][0].op

    @property
    def iov_addr(self) -> int:
        return self._iov.address

    def take(self, req: Req, offset: int, left: int) -> bool:
        """`left` bytes of `req`, at byte `offset` of the disk. True: nothing else is on its way, begin."""
        self._waiting.append((req, offset, left))
        return len(self._waiting) == 1

    def piece(self) -> tuple[int, int]:
        """The next piece: its offset on the disk and its size; filled, if it is a write's."""
        req, offset, left = self._waiting[0]
        self._size, self._gone = min(left, BYTES), 0
        if req.op == Op.WRITE:
            self._copy(req, to_guest=False)
        self._point()
        return offset, self._size

    def advance(self, n: int) -> None:
        self._gone += n
        self._point()

    def done(self) -> bool:
        """The piece is read or written; True: the request with it."""
        req, offset, left = self._waiting[0]
        if req.op == Op.READ:
            self._copy(req, to_guest=True)
        if left == self._size:
            return True
        req.advance(self._size)
        self._waiting[0] = (req, offset + self._size, left - self._size)
        return False

    def give(self) -> Req:
        """The request, done or failed; the next one is due if it is `busy` still."""
        return self._waiting.popleft()[0]

    def _point(self) -> None:
        for at, word in ((0, self._mem.address + self._gone), (8, self._size - self._gone)):
            self._iov.store(at, word & 0xFFFF_FFFF)
            self._iov.store(at + 4, word >> 32)

    def _copy(self, req: Req, *, to_guest: bool) -> None:
        at = 0
        for view in req.iov():
            with view:
                part = min(len(view), self._size - at)
                if to_guest:
                    view[:part] = self._mem.view[at : at + part]
                else:
                    self._mem.view[at : at + part] = view[:part]
                at += part
