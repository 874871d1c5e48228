# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""A netif ring's page from the back, its responses by way of answers.py's memfd: what both rings have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.words import Area, Mem
from evtchnd.errors import GuestError

if not cython.compiled:
    from evtchnd._core.words import copy, fence, get32, ld32, st32, u32

if TYPE_CHECKING:
    from evtchnd._core.pins import Pins

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants: req_prod at 0, rsp_prod 8, rsp_event 12, 256 entries from byte 64 on.


class Answered:
    """One ring of `size` bytes an entry, with its grant at byte `gref_at`; `name` is for errors.

    again: an earlier worker served this ring, and may have died at it | write: how its pages were pinned
    area: the page | answers: the page of the memfd
    published: up to where the guest has its responses: 0 in a new ring, where a dead worker was in an old one
    seen: up to where `posted` has looked
    """

    if TYPE_CHECKING:
        area: Area
        answers: Mem
        published: int
        seen: int

    def __init__(
        self, name: str, size: int, page: Any, answers: Mem, grants: Pins, *, gref_at: int, write: bool, again: bool
    ) -> None:
        self.name = name
        self.size = size
        self.area = Area([page.view])
        self.answers = answers
        self.entry = Mem(bytearray(16))
        self.published = self.seen = self.area.load(8)
        if again:
            try:
                self.take_over(grants, gref_at, write)
            except GuestError:
                self.area.close()  # a view that an error's traceback keeps would keep its page
                raise
        else:
            st32(self.answers.p, 0, self.published)

    def take_over(self, grants: Pins, gref_at: int, write: bool) -> None:
        """What the earlier worker had answered is published; what it had taken besides can be taken again.

        The pages that it had pinned are the guest's own again: its marks in their entries nobody else can clear. An
        extra's word passes for a grant here; whatever that names is pinned and unpinned. GuestError as `posted`, or the
        guest wrote to rsp_prod.
        """
        target = ld32(self.answers.p, 0)
        if u32(target - self.published) > 256:
            raise GuestError(f"{self.name} ring: rsp_prod is {self.published:#x}, this end left it at {target:#x}")
        self.put(self.published, target)
        st32(self.area.p, 8, target)
        self.published = target
        waiting = u32(self.posted(target, target) - target)
        for i in range(waiting):
            copy(self.entry.p, 0, self.area.p, 64 + (u32(target + i) & 255) * self.size, self.size)
            try:
                grants.pin_page(get32(self.entry.p, gref_at), write)
            except GuestError:
                continue
            grants.unpin_page(get32(self.entry.p, gref_at), write)

    def put(self, old: int, new: int) -> int:
        """The answers to slots `old` up to `new` into the ring."""
        start = (old & 255) * self.size + 64
        n = u32(new - old) * self.size
        part = 64 + self.size * 256 - start
        if part > n:
            part = n
        self.area.give(start, self.answers.p, start, part)
        self.area.give(64, self.answers.p, 64, n - part)
        return 0

    def posted(self, taken: int, answered: int) -> int:
        """How far the guest has posted. GuestError: the index jumped."""
        prod = ld32(self.area.p, 0)
        if u32(prod - taken) > 256 or u32(prod - answered) > 256 or u32(prod - self.published) > 256:
            raise GuestError(
                f"{self.name} ring: request index jumped: req_prod {prod:#x}, taken up to {taken:#x}, "
                f"answered up to {self.published:#x}, 256 entries"
            )
        self.seen = prod
        return prod

    def publish(self, new: int) -> bool:
        """The answers up to `new`, in the order of answers.py; True: the guest wants to be notified."""
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
