"""A guest's own book-keeping: which of its pages and grant references are free.

`Machine` is what the guest's ends ask of the machine they run on; `evtchnd.vmm.soft.SoftVmm` is one.
Blocking, usable from several threads, no asyncio.
"""

from __future__ import annotations

import threading
from typing import Protocol

from evtchnd.abi import (
    GNTTAB_NR_RESERVED_ENTRIES,
    GRANT_ENTRY_SIZE,
    GTF_PERMIT_ACCESS,
    GTF_READING,
    GTF_READONLY,
    GTF_WRITING,
)

# Below 1 MiB a real guest has its firmware and boot structures, and the first pages beyond are those a VMM takes for
# shared_info, XenStore and console.
FIRST_FREE_GFN = 512


class GuestFault(Exception):
    """The other end broke the protocol, or did not answer: what a guest's kernel would print and give up on."""


class Ram(Protocol):
    """Guest memory by page."""

    def view(self, gfn: int) -> memoryview: ...


class Machine(Protocol):
    """RAM, grant table and event channels of one guest."""

    domid: int

    @property
    def ram(self) -> Ram: ...
    @property
    def ram_pages(self) -> int: ...
    @property
    def grants(self) -> memoryview: ...
    @property
    def store_gfn(self) -> int: ...
    @property
    def store_port(self) -> int: ...
    def alloc_unbound(self, remote: int) -> int: ...
    def send(self, port: int) -> None: ...
    def wait(self, port: int, timeout: float) -> bool: ...
    def close_port(self, port: int) -> None: ...


class Domain:
    """Allocators over a machine. Pages are handed out lowest first and next to each other."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm
        self.domid = vm.domid
        self._lock = threading.Lock()
        self._free_pages: list[tuple[int, int]] = [(FIRST_FREE_GFN, vm.ram_pages - FIRST_FREE_GFN)]
        self._words = vm.grants.cast("I")
        count = len(self._words) * 4 // GRANT_ENTRY_SIZE
        self._free_grefs = list(range(count - 1, GNTTAB_NR_RESERVED_ENTRIES - 1, -1))

    def alloc(self, pages: int) -> int:
        """First gfn of `pages` neighbouring pages. GuestFault when there are none."""
        with self._lock:
            for index, (gfn, length) in enumerate(self._free_pages):
                if length >= pages:
                    if length == pages:
                        del self._free_pages[index]
                    else:
                        self._free_pages[index] = (gfn + pages, length - pages)
                    return gfn
        raise GuestFault(f"domain {self.domid}: no {pages} free pages next to each other")

    def free(self, gfn: int, pages: int) -> None:
        """Gives back what `alloc` gave."""
        with self._lock:
            ranges = sorted([*self._free_pages, (gfn, pages)])
            merged = [ranges[0]]
            for start, length in ranges[1:]:
                last, size = merged[-1]
                if last + size == start:
                    merged[-1] = (last, size + length)
                else:
                    merged.append((start, length))
            self._free_pages = merged

    def grant(self, gfn: int, *, domid: int = 0, readonly: bool = False) -> int:
        """A reference that lets `domid` use page `gfn`. GuestFault when the table is full."""
        with self._lock:
            if not self._free_grefs:
                raise GuestFault(f"domain {self.domid}: no free grant reference")
            gref = self._free_grefs.pop()
        # frame first, then flags and domid in one word: the entry is valid from that store on
        self._words[2 * gref + 1] = gfn
        self._words[2 * gref] = GTF_PERMIT_ACCESS | (GTF_READONLY if readonly else 0) | domid << 16
        return gref

    def in_use(self, gref: int) -> bool:
        """Whether the other domain has this page pinned."""
        return bool(self._words[2 * gref] & (GTF_READING | GTF_WRITING))

    def end_grant(self, gref: int) -> None:
        """Takes the reference back. GuestFault ("g.e. still in use!" in a Linux log) if it is pinned."""
        if self.in_use(gref):
            raise GuestFault(f"domain {self.domid}: grant {gref} is still in use")
        self._words[2 * gref] = 0
        with self._lock:
            self._free_grefs.append(gref)

    @property
    def free_grefs(self) -> int:
        """How many references are left."""
        return len(self._free_grefs)

    def close(self) -> None:
        """Lets go of the table's view, so that the machine can unmap it."""
        self._words.release()
