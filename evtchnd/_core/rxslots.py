# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""The slots of a netif receive ring, from the back: pages that a guest has posted, taken ahead, and their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.answered import Answered
from evtchnd._core.words import Mem
from evtchnd.errors import GuestError

if not cython.compiled:
    from evtchnd._core.words import copy, get16, get32, get64, put8, put16, put32, put64, u32

if TYPE_CHECKING:
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants: 256 entries of 8 bytes in the ring's page.
# A page that was taken, 16 bytes: u64 address | u32 gref | u16 id | u16 bad (its grant was refused)


class RxSlots:
    """`fill` pins pages, `answer` and `extra` use them up, in order; `push` publishes (True: notify).

    answers: a page of answers.py's memfd | again: an earlier worker served this ring, and may have died at it
    req_cons, rsp_prod: the next slot to take, the next to answer | reason: why a grant was refused, of the last one
    Counters: used (slots answered), bad_grants (with an error)
    """

    if TYPE_CHECKING:
        closed: bool
        req_cons: int
        rsp_prod: int
        used: int
        bad_grants: int
        reason: str

    def __init__(self, grants: Pins, page: Any, answers: Mem, *, again: bool) -> None:
        self.grants = grants
        self.ring = Answered("rx", 8, page, answers, grants, gref_at=4, write=True, again=again)
        self.area, self.answers = self.ring.area, self.ring.answers
        self.pages = Mem(bytearray(16 * 256))
        self.entry = Mem(bytearray(8))
        self.closed = False
        self.reason = ""
        self.used = self.bad_grants = self.bad_ahead = 0
        self.req_cons = self.rsp_prod = self.ring.published

    def fill(self) -> int:
        """Take pages ahead, 64 at most; -> how many usable ones follow one another from the first. GuestError."""
        waiting = u32(self.ring.posted(self.req_cons, self.rsp_prod) - self.rsp_prod)
        if waiting > 64:
            waiting = 64
        while u32(self.req_cons - self.rsp_prod) < waiting:
            at = (self.req_cons & 255) * 16
            copy(self.entry.p, 0, self.area.p, 64 + (self.req_cons & 255) * 8, 8)
            put32(self.pages.p, at + 8, get32(self.entry.p, 4))
            put16(self.pages.p, at + 12, get16(self.entry.p, 0))
            put16(self.pages.p, at + 14, 0)
            try:
                put64(self.pages.p, at, self.grants.pin_page(get32(self.entry.p, 4), True))
            except GuestError as error:
                put16(self.pages.p, at + 14, 1)
                self.bad_ahead += 1
                self.reason = str(error)
            self.req_cons = u32(self.req_cons + 1)
        if self.bad_ahead == 0:
            return u32(self.req_cons - self.rsp_prod)
        usable = 0
        while u32(self.rsp_prod + usable) != self.req_cons:
            at = (u32(self.rsp_prod + usable) & 255) * 16
            if get16(self.pages.p, at + 14):
                if usable:
                    break
                self.bad_grants += 1
                self.bad_ahead -= 1
                self.answer(0, 0, -1)
            else:
                usable += 1
        return usable

    def address(self, index: int) -> int:
        """Of a slot's page; it was taken, and is good."""
        return get64(self.pages.p, (index & 255) * 16)

    def extra(self, kind: int, flags: int, value: int, type: int) -> int:
        """An extra over the response of the next slot."""
        p = self.answers.p
        at = (self.rsp_prod & 255) * 8 + 64
        put8(p, at, kind)
        put8(p, at + 1, flags)
        put16(p, at + 2, value)
        put32(p, at + 4, type)
        return self.give()

    def answer(self, flags: int, offset: int, status: int) -> int:
        """To the next slot: `status` bytes at `offset` of its page, or -1."""
        p = self.answers.p
        at = (self.rsp_prod & 255) * 8 + 64
        put16(p, at, get16(self.pages.p, (self.rsp_prod & 255) * 16 + 12))
        put16(p, at + 2, offset)
        put16(p, at + 4, flags)
        put16(p, at + 6, status)
        return self.give()

    def give(self) -> int:
        """The next slot has its answer, and its page is the guest's again."""
        at = (self.rsp_prod & 255) * 16
        if not get16(self.pages.p, at + 14):
            self.grants.unpin_page(get32(self.pages.p, at + 8), True)
        self.rsp_prod = u32(self.rsp_prod + 1)
        self.used += 1
        return 0

    def push(self) -> bool:
        """Publish the answers; True: the guest wants to be notified."""
        if self.closed:
            raise ValueError("the ring is closed")
        return self.ring.publish(self.rsp_prod)

    def arm(self) -> bool:
        """Ask for a kick at the next page; True: there is one that was not seen."""
        if self.closed:
            raise ValueError("the ring is closed")
        return self.area.arm(0, self.ring.seen)

    def pending(self) -> bool:
        """A cheap look: pages were posted since the last `run` (or the index jumped, which `run` tells)."""
        return not self.closed and self.area.pending(0, self.ring.seen)

    def close(self) -> None:
        """Unpin the pages that were taken ahead, without answers, and let go of the ring; idempotent."""
        if self.closed:
            return
        self.closed = True
        while self.rsp_prod != self.req_cons:
            at = (self.rsp_prod & 255) * 16
            if not get16(self.pages.p, at + 14):
                self.grants.unpin_page(get32(self.pages.p, at + 8), True)
            self.rsp_prod = u32(self.rsp_prod + 1)
        self.area.close()
