"""A worker without a pump: a `BlkRing` over a guest's memory, I/O by plain calls, answers in any order that is asked.

What a worker does around its ring (the poller, the io_uring) is crashpump.py's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from evtchnd._core import BlkRing, Req
from evtchnd._core.blk import passed
from evtchnd._core.points import AT_COMPLETE, AT_NOTIFY, AT_OVER, AT_SUBMIT
from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.crashguest import BLOCKS, Guest
from evtchnd.blkif import SECTOR_SIZE, SECTORS_PER_PAGE, Op, Status
from evtchnd.grants import GrantTable
from evtchnd.journal import Journal
from evtchnd.memory import GuestMemory


class Mapped:
    """A guest's memory and grants, as a worker maps them."""

    def __init__(self, guest: Guest) -> None:
        self.memory = GuestMemory()
        self.memory.add(0, 0, guest.ram_pages, guest.ram_fd, 0)
        frames = len(guest.grants) // PAGE_SIZE
        self.grants = GrantTable(self.memory, guest.domid, max_frames=frames)  # fewer than there may be: less to clear
        for index in range(frames):
            self.grants.add_frame(index, guest.grant_fd, index * PAGE_SIZE)

    def close(self) -> None:
        """After what was made from it."""
        self.grants.close()
        self.memory.close()


class Worker:
    """A new life over the rings as they are."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._mapped = mapped = Mapped(guest)
        self._pages = [mapped.grants.map(gref, write=True) for gref in guest.queue.ring_grefs]
        self._journal = Journal(guest.journal_fd)
        self.ring = BlkRing(
            mapped.grants,
            self._pages,
            abi=guest.layout.abi,
            journal=self._journal,
            sectors=BLOCKS * SECTORS_PER_PAGE,
            max_indirect=256,
        )

    def serve(self, order: Sequence[int], *, take: int, push_each: bool, early: bool) -> None:
        """Everything that is due and in the ring, `take` at a time, each lot answered in `order` as far as it goes.

        push_each: answers are published one by one. early: all I/O of a lot is done before its first answer.
        """
        lot = self.ring.attach()
        if lot:
            self._answer(lot, order, push_each=push_each, early=early)
        self._push(again=True)  # an earlier worker may have died between its push and its notification
        while True:
            while lot := self.ring.take(take):
                self._answer(lot, order, push_each=push_each, early=early)
            if not self.ring.arm():
                break
        passed(AT_OVER)

    def _answer(self, lot: Sequence[Req], order: Sequence[int], *, push_each: bool, early: bool) -> None:
        status: dict[int, int] = {}
        if early:
            for index, req in enumerate(lot):
                status[index] = self._do(req)
        for index in [*(n for n in order if n < len(lot)), *range(len(order), len(lot))]:
            if not early:
                status[index] = self._do(lot[index])
            passed(AT_COMPLETE)
            self.ring.done(lot[index], status[index])
            if push_each:
                self._push()
        self._push()

    def _do(self, req: Req) -> int:
        passed(AT_SUBMIT)
        at, image = req.sector * SECTOR_SIZE, self._guest.image
        if req.status:
            return req.status
        if req.op == Op.READ:
            return Status.OKAY if req.preadv(image, at) == req.want else Status.ERROR
        if req.op == Op.WRITE:
            return Status.OKAY if req.pwritev(image, at) == req.want else Status.ERROR
        if req.op == Op.DISCARD:
            os.pwrite(image, bytes(req.nr_sectors * SECTOR_SIZE), at)
        return Status.OKAY

    def _push(self, *, again: bool = False) -> None:
        if self.ring.push() or again:
            passed(AT_NOTIFY)
            os.eventfd_write(self._guest.notify_fd, 1)

    def close(self) -> None:
        """A life that ends in order."""
        self.ring.close()
        for page in self._pages:
            page.close()
        self._journal.close()
        self._mapped.close()
