# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""The slots of a netif receive ring, from the back: pages that a guest has posted, taken ahead, and their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.words import Area, Mem
from evtchnd.errors import GuestError

if not cython.compiled:
    from evtchnd._core.words import copy, fence, get16, get32, get64, ld32, put8, put16, put32, put64, st32, u32

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
        self.answers = answers
        self.area = Area([page.view])
        self.pages = Mem(bytearray(16 * 256))
        self.entry = Mem(bytearray(8))
        self.closed = False
        self.reason = ""
        self.used = self.bad_grants = self.bad_ahead = 0
        self.req_cons = self.rsp_prod = self.published = self.seen = self.area.load(8)
        if again:
            try:
                self.inherit()
            except GuestError:
                self.area.close()  # a view that an error's traceback keeps would keep its page
                raise
        else:
            st32(self.answers.p, 0, self.published)

    def inherit(self) -> None:
        """Take the ring over from a worker that may have died at it.

        What it had answered is published. The pages that it had pinned ahead are the guest's own again: its marks in
        their entries nobody else can clear. GuestError as `free`, or the guest wrote to rsp_prod.
        """
        target = ld32(self.answers.p, 0)
        if u32(target - self.published) > 256:
            raise GuestError(f"rx ring: rsp_prod is {self.published:#x}, this end left it at {target:#x}")
        self.put(self.published, target)
        st32(self.area.p, 8, target)
        self.req_cons = self.rsp_prod = self.published = self.seen = target
        waiting = self.free()
        for i in range(waiting):
            copy(self.entry.p, 0, self.area.p, 64 + (u32(self.rsp_prod + i) & 255) * 8, 8)
            try:
                self.grants.pin_page(get32(self.entry.p, 4), True)
            except GuestError:
                continue
            self.grants.unpin_page(get32(self.entry.p, 4), True)

    def put(self, old: int, new: int) -> int:
        """The answers to slots `old` up to `new` into the ring."""
        start = (old & 255) * 8 + 64
        n = u32(new - old) * 8
        part = 64 + 8 * 256 - start
        if part > n:
            part = n
        self.area.give(start, self.answers.p, start, part)
        self.area.give(64, self.answers.p, 64, n - part)
        return 0

    def free(self) -> int:
        """Slots that the guest has posted and that are not used. GuestError: the index jumped."""
        prod = ld32(self.area.p, 0)
        waiting = u32(prod - self.rsp_prod)
        if u32(prod - self.req_cons) > 256 or waiting > 256 or u32(prod - self.published) > 256:
            raise GuestError(
                f"rx ring: request index jumped: req_prod {prod:#x}, taken up to {self.req_cons:#x}, "
                f"answered up to {self.published:#x}, 256 entries"
            )
        self.seen = prod
        return waiting

    def fill(self) -> int:
        """Take pages ahead, 64 at most; -> how many usable ones follow one another from the first."""
        waiting = self.free()
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
        """Publish the answers, in the order of answers.py; True: the guest wants to be notified."""
        if self.closed:
            raise ValueError("the ring is closed")
        new = self.rsp_prod
        old = self.published
        if new == old:
            return False
        st32(self.answers.p, 0, new)
        self.put(old, new)
        st32(self.area.p, 8, new)
        fence()
        event = ld32(self.area.p, 12)
        self.published = new
        return u32(new - event) < u32(new - old)

    def arm(self) -> bool:
        """Ask for a kick at the next page; True: there is one that was not seen."""
        if self.closed:
            raise ValueError("the ring is closed")
        if ld32(self.area.p, 0) != self.seen:
            return True
        st32(self.area.p, 4, u32(self.seen + 1))
        fence()
        return ld32(self.area.p, 0) != self.seen

    def pending(self) -> bool:
        """A cheap look: pages were posted since the last `run` (or the index jumped, which `run` tells)."""
        if self.closed:
            return False
        return ld32(self.area.p, 0) != self.seen

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
