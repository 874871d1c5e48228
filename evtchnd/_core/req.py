# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""One blkif request, taken out of a ring: a private copy, validated, its pages pinned, ready for preadv and pwritev."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

if not cython.compiled:
    from evtchnd._core.words import Mem, get64, put64, sys_preadv, sys_pwritev

COMPILED: bool = bool(cython.compiled)


class Req:
    """A request between `BlkRing.take` and `BlkRing.done`; after `done` every use raises ValueError.

    op: 0 READ, 1 WRITE (indirect ones too), 3 FLUSH, 5 DISCARD, or what the guest wrote
    id: the guest's number | sector: in 512-byte units | want: bytes of data | segments: how many
    status: 0, or the blkif status that `done` must get, with `reason`
    iov_addr, iov_count: struct iovec[] over the guest's pages, neighbours merged; may be more than IOV_MAX
    owner: its ring, None after `done`
    nr_sectors, flag: of a DISCARD
    """

    if TYPE_CHECKING:
        op: int
        id: int
        sector: int
        want: int
        segments: int
        status: int
        reason: str
        nr_sectors: int
        flag: int
        iov_addr: int
        iov_count: int
        owner: Any
        memory: Any
        scratch: Mem  # iovecs, then grefs
        entry: int  # of the journal
        grefs: int  # where in scratch they begin
        end: int  # address behind the last segment, and its row: to merge the next
        row: int
        held: int  # pins

    def alive(self) -> int:
        if self.owner is None:
            raise ValueError("this request is done")
        return 0

    def preadv(self, fd: int, offset: int, flags: int = 0) -> int:
        """File -> guest pages, from byte `offset`; bytes or -errno. RWF_NOWAIT (8) keeps the GIL: it is short."""
        self.alive()
        if not cython.compiled:
            return sys_preadv(fd, self.iov(), self.iov_count, offset, flags)
        if flags & 8:
            return sys_preadv(fd, self.iov_addr, self.iov_count, offset, flags)  # type: ignore[arg-type]
        with cython.nogil:
            n = sys_preadv(fd, self.iov_addr, self.iov_count, offset, flags)  # type: ignore[arg-type]
        return n  # noqa: RET504  (the GIL is back here)

    def pwritev(self, fd: int, offset: int, flags: int = 0) -> int:
        """Guest pages -> file, at byte `offset`; bytes or -errno."""
        self.alive()
        if not cython.compiled:
            return sys_pwritev(fd, self.iov(), self.iov_count, offset, flags)
        if flags & 8:
            return sys_pwritev(fd, self.iov_addr, self.iov_count, offset, flags)  # type: ignore[arg-type]
        with cython.nogil:
            n = sys_pwritev(fd, self.iov_addr, self.iov_count, offset, flags)  # type: ignore[arg-type]
        return n  # noqa: RET504  (the GIL is back here)

    def advance(self, n: int) -> None:
        """After a short result of `n` bytes: iov_addr and iov_count then say what is left. ValueError past the end."""
        self.alive()
        while n:
            if self.iov_count == 0:
                raise ValueError("advanced past the end of the request")
            at = self.iov_addr - self.scratch.address
            length = get64(self.scratch.p, at + 8)
            if n < length:
                put64(self.scratch.p, at, get64(self.scratch.p, at) + n)
                put64(self.scratch.p, at + 8, length - n)
                return
            n -= length
            self.iov_addr += 16
            self.iov_count -= 1

    def iov(self) -> list[memoryview]:
        """What is left, as writable views of the guest's pages. Release them (or drop them) before `done`."""
        self.alive()
        at = self.iov_addr - self.scratch.address if self.iov_count else 0
        p = self.scratch.p
        return [
            self.memory.view_at(get64(p, at + 16 * i), get64(p, at + 16 * i + 8))  # an iovec: base, length
            for i in range(self.iov_count)
        ]

    def __repr__(self) -> str:
        if self.owner is None:
            return "<Req: done>"
        return f"<Req op {self.op} id {self.id} sector {self.sector} want {self.want} status {self.status}>"
