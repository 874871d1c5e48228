"""The generic shared ring, both ends, for every size of request and response (io/ring.h) and 1 to 16 pages.

    0   u32 req_prod | u32 req_event | u32 rsp_prod | u32 rsp_event | 48 bytes private and padding
    64  entries, each a union of request and response; as many as fit, rounded *down* to a power of two

Indices run free over 2^32 and are masked at every subtraction. An entry is copied once and only the copy is believed.
`push` answers "notify?"; whoever owns the event channel notifies, once a batch. Neither end touches a channel here.
blkif's back end is the compiled BlkRing (evtchnd/_core/blk.py), by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evtchnd._core.words import Area, full_fence
from evtchnd.abi import PAGE_SIZE
from evtchnd.errors import GuestError

REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = 0, 4, 8, 12
HEADER = 64
# blkback's own limit is 16 pages (max_ring_page_order 4); no ring of Xen's has more
MAX_PAGES = 16
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class RingLayout:
    """Sizes of one ring in bytes: requests, responses; its pages.

    entry_size: the larger of both; entries: a power of two.
    """

    req_size: int
    rsp_size: int
    pages: int

    def __post_init__(self) -> None:
        if not 1 <= self.pages <= MAX_PAGES or min(self.req_size, self.rsp_size) < 1 or self.entry_size > PAGE_SIZE / 2:
            raise ValueError(f"no ring has entries of {self.req_size} and {self.rsp_size} bytes, {self.pages} pages")

    @property
    def entry_size(self) -> int:
        return max(self.req_size, self.rsp_size)

    @property
    def entries(self) -> int:
        return 1 << (((self.pages * PAGE_SIZE - HEADER) // self.entry_size).bit_length() - 1)


class _Ring:
    """What both ends share: the pages, and where entry `index` lies."""

    def __init__(self, pages: Sequence[Any], layout: RingLayout) -> None:
        if len(pages) != layout.pages:
            raise ValueError(f"{len(pages)} pages for a ring of {layout.pages}")
        self.layout = layout
        self.entries = layout.entries
        self._size = layout.entry_size
        self._area = Area(pages)

    def _offset(self, index: int) -> int:
        return HEADER + (index & (self.entries - 1)) * self._size

    def close(self) -> None:
        """Let go of the pages' buffers; idempotent."""
        self._area.close()


class BackRing(_Ring):
    """The back end: takes requests, gives responses. `pages`: writable buffers of 4096 bytes.

    It begins where the shared rsp_prod is: 0 on a ring that the frontend just made.
    req_cons: next request to take | rsp_prod: next response, private until `push`
    """

    def __init__(self, pages: Sequence[Any], layout: RingLayout) -> None:
        super().__init__(pages, layout)
        self.attach(self._area.load(RSP_PROD))

    def attach(self, index: int, responses: int | None = None) -> None:
        """Take the next request at `index` and give the next response at `responses` (the same, unless told)."""
        self.req_cons = index & MASK
        self.rsp_prod = self._published = self.req_cons if responses is None else responses & MASK

    def take(self, most: int) -> list[bytes]:
        """Private copies of at most `most` requests. GuestError: the index jumped, stop this ring for good."""
        prod = self._area.load(REQ_PROD)
        waiting = (prod - self.req_cons) & MASK
        if waiting > self.entries or (prod - self._published) & MASK > self.entries:
            raise GuestError(
                f"ring: request index jumped: req_prod {prod:#x}, taken up to {self.req_cons:#x}, "
                f"answered up to {self._published:#x}, {self.entries} entries"
            )
        requests = []
        for _ in range(min(waiting, most)):
            requests.append(self._area.read(self._offset(self.req_cons), self.layout.req_size))
            self.req_cons = (self.req_cons + 1) & MASK
        return requests

    def respond(self, response: bytes) -> None:
        """Write one response, not visible yet; the rest of its entry becomes zero. ValueError: nothing is due."""
        if self.rsp_prod == self.req_cons:
            raise ValueError("every request that was taken is answered")
        self._area.write(self._offset(self.rsp_prod), response.ljust(self._size, b"\0"))
        self.rsp_prod = (self.rsp_prod + 1) & MASK

    def push(self) -> bool:
        """Publish the responses; True: the frontend asked to be notified at one of them."""
        old, self._published = self._published, self.rsp_prod
        if old == self.rsp_prod:
            return False
        self._area.store(RSP_PROD, self.rsp_prod)
        full_fence()  # the index before the look at rsp_event
        return (self.rsp_prod - self._area.load(RSP_EVENT)) & MASK < (self.rsp_prod - old) & MASK

    def arm(self) -> bool:
        """Ask for a kick at the next request; True: there is one already. From the consumed index, never req_prod."""
        return self._area.arm(REQ_PROD, self.req_cons)

    def pending(self) -> bool:
        """A cheap look: there are requests (or a jump, which `take` tells)."""
        return self._area.pending(REQ_PROD, self.req_cons)


class FrontRing(_Ring):
    """The front end: gives requests, takes responses. init: make a new ring (all zero, events at 1).

    Without `init` it continues at the shared indices: nothing may be in flight.
    """

    def __init__(self, pages: Sequence[Any], layout: RingLayout, init: bool = True) -> None:
        super().__init__(pages, layout)
        if init:
            for off in range(0, HEADER, 4):
                self._area.store(off, 0)
            self.preset(0)
        else:
            self.attach(self._area.load(REQ_PROD), self._area.load(RSP_PROD))

    def preset(self, index: int) -> None:
        """A test's hook, before the back end attaches: the whole ring at `index`, such as one near 2^32."""
        for off, value in ((REQ_PROD, index), (REQ_EVENT, index + 1), (RSP_PROD, index), (RSP_EVENT, index + 1)):
            self._area.store(off, value & MASK)
        self.attach(index, index)

    def attach(self, requests: int, responses: int) -> None:
        """The next request at `requests`, the next response taken at `responses`."""
        self.req_prod = self._published = requests & MASK
        self.rsp_cons = responses & MASK

    @property
    def free(self) -> int:
        """Requests that fit now."""
        return self.entries - ((self.req_prod - self.rsp_cons) & MASK)

    def request(self, request: bytes) -> int:
        """Write one request, not visible yet; -> its slot. ValueError: the ring is full."""
        if not self.free:
            raise ValueError("the ring is full")
        slot = self.req_prod & (self.entries - 1)
        self._area.write(self._offset(slot), request)
        self.req_prod = (self.req_prod + 1) & MASK
        return slot

    def push(self) -> bool:
        """Publish the requests; True: the backend asked to be notified."""
        old, self._published = self._published, self.req_prod
        if old == self.req_prod:
            return False
        self._area.store(REQ_PROD, self.req_prod)
        full_fence()
        return (self.req_prod - self._area.load(REQ_EVENT)) & MASK < (self.req_prod - old) & MASK

    def responses(self, most: int) -> list[bytes]:
        """Private copies of at most `most` responses. GuestError: the back end's index jumped."""
        prod = self._area.load(RSP_PROD)
        waiting = (prod - self.rsp_cons) & MASK
        if waiting > (self._published - self.rsp_cons) & MASK:
            raise GuestError(f"ring: response index jumped: rsp_prod {prod:#x}, taken up to {self.rsp_cons:#x}")
        responses = []
        for _ in range(min(waiting, most)):
            responses.append(self._area.read(self._offset(self.rsp_cons), self.layout.rsp_size))
            self.rsp_cons = (self.rsp_cons + 1) & MASK
        return responses

    def arm(self) -> bool:
        """Ask for an event at the next response; True: there is one already."""
        return self._area.arm(RSP_PROD, self.rsp_cons)

    def pending(self) -> bool:
        """A cheap look: there are responses."""
        return self._area.pending(RSP_PROD, self.rsp_cons)
