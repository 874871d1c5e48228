"""HYPERVISOR_grant_table_op, version 1, and the pages that the grant table lies in.

A frame is a page of a memfd of the VMM's. Where the guest maps it above its RAM it gets a memory slot of its own;
where the guest puts it over a page of RAM, that page becomes the frame: its entries move there, and the daemon is told.
Source: xen/include/public/grant_table.h; xen/common/grant_table.c.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from evtchnd.abi import (
    DOMID_SELF,
    GNTTAB_RESERVED_CONSOLE,
    GNTTAB_RESERVED_XENSTORE,
    GRANT_ENTRY_SIZE,
    GRANTS_PER_FRAME,
    GTF_PERMIT_ACCESS,
    GTF_READONLY,
    GTF_TYPE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from evtchnd.errors import EvtchndError
from evtchnd.vmm.guest_pointer import Layout, Pointers
from evtchnd.vmm.physmap import Memory, Physmap, Slot


class Gnttabop(IntEnum):
    MAP_GRANT_REF = 0
    UNMAP_GRANT_REF = 1
    SETUP_TABLE = 2
    DUMP_TABLE = 3
    TRANSFER = 4
    COPY = 5
    QUERY_SIZE = 6
    UNMAP_AND_REPLACE = 7
    SET_VERSION = 8
    GET_STATUS_FRAMES = 9
    GET_VERSION = 10
    SWAP_GRANT_REF = 11
    CACHE_FLUSH = 12


_OKAY, _GENERAL_ERROR, _BAD_DOMAIN, _BAD_GNTREF = 0, -1, -2, -3  # GNTST_*
_PERMISSION_DENIED, _BAD_PAGE, _BAD_COPY_ARG = -8, -9, -10
_SOURCE_GREF, _DEST_GREF = 1, 2  # GNTCOPY_*
# Each element costs page walks; Xen itself interrupts a long list, so a guest's lists are short.
_MAX_COUNT = 1024

_SETUP_TABLE = Layout("H2xIh6xQ", "H2xIh2xI")  # dom, nr_frames, status, frame_list
_SETUP_STATUS = 8
_QUERY_SIZE = Layout("H2xIIh2x")  # dom, nr_frames, max_nr_frames, status
_SET_VERSION = Layout("I")
_GET_STATUS_FRAMES = Layout("IHhQ", "IHhI")  # nr_frames, dom, status, frame_list
_GET_VERSION = Layout("HHI")  # dom, pad, version
# source and dest {union of ref u32 and gmfn, domid, offset}, len, flags, status
_COPY = Layout("QHH4xQHH4xHHh2x", "IHHIHHHHh2x")
_COPY_STATUS = {True: 36, False: 20}


@dataclass(slots=True)
class _Frame:
    memory: Memory
    offset: int
    gfn: int | None = None  # where the guest has it
    slot: Slot | None = None  # None: it is a page of RAM, or nowhere


class GrantFrames:
    """The table's pages: `count` from the start, as a guest with Xen's default limit may grow to.

    `moved(index)`: the daemon has to know where a frame is now; called without a lock. Where it raises, the frame is
    back where it was, and the guest's call fails.
    """

    def __init__(self, memory: Memory, ram: Memory, physmap: Physmap, moved: Callable[[int], None]) -> None:
        self._memory, self._ram, self._physmap, self._moved = memory, ram, physmap, moved
        self._lock = threading.Lock()
        self._frames = [_Frame(memory, i * PAGE_SIZE) for i in range(memory.size // PAGE_SIZE)]
        self.used = 1  # frames that the guest has mapped or asked for

    @property
    def count(self) -> int:
        return len(self._frames)

    def reserve(self, console_gfn: int, store_gfn: int) -> None:
        """The two entries that a toolstack fills: both pages are granted to domain 0."""
        with self._memory.view[:PAGE_SIZE].cast("I") as words:
            for gref, gfn in ((GNTTAB_RESERVED_CONSOLE, console_gfn), (GNTTAB_RESERVED_XENSTORE, store_gfn)):
                words[2 * gref + 1] = gfn
                words[2 * gref] = GTF_PERMIT_ACCESS  # domid 0 in the upper half

    def reset(self) -> None:
        """As before the guest's first call: every frame is in the VMM's memory again, mapped nowhere, and empty."""
        with self._lock:
            for index, frame in enumerate(self._frames):
                self._unmap(frame)
                frame.memory, frame.offset = self._memory, index * PAGE_SIZE
            self._memory.view[:] = bytes(self._memory.size)
            self.used = 1

    def place(self, index: int) -> tuple[int, int]:
        """(memfd, offset) of a frame."""
        with self._lock:
            frame = self._frames[index]
            return frame.memory.fd, frame.offset

    def gfn(self, index: int) -> int | None:
        return self._frames[index].gfn

    def map(self, index: int, gfn: int) -> int:
        """XENMAPSPACE_grant_table: the guest wants frame `index` at `gfn`; 0 or a negated error number."""
        if not 0 <= index < self.count:
            return -errno.EINVAL
        with self._lock:
            frame = self._frames[index]
            before = frame.gfn, frame.memory, frame.offset
            if frame.gfn == gfn:
                return 0
            over = self._physmap.find(gfn)
            if any(other.gfn == gfn for other in self._frames):
                return -errno.EBUSY
            if over is not None and over[0] is not self._ram:
                return -errno.EINVAL
            self._unmap(frame)
            try:
                self._put(frame, gfn, *(over or (self._memory, index * PAGE_SIZE)))
            except OSError as error:
                self._put(frame, *before)
                return -(error.errno or errno.EINVAL)
            self.used = max(self.used, index + 1)
        self._tell(index, *before)
        return 0

    def unmap(self, gfn: int) -> bool:
        """XENMEM_remove_from_physmap; False: no frame is there."""
        with self._lock:
            index = next((i for i, frame in enumerate(self._frames) if frame.gfn == gfn), None)
            if index is None:
                return False
            frame = self._frames[index]
            before = frame.gfn, frame.memory, frame.offset
            self._unmap(frame)
            self._put(frame, None, self._memory, index * PAGE_SIZE)
        self._tell(index, *before)
        return True

    def _unmap(self, frame: _Frame) -> None:
        if frame.slot is not None:
            self._physmap.remove(frame.slot)
        frame.slot = frame.gfn = None

    def _put(self, frame: _Frame, gfn: int | None, memory: Memory, offset: int) -> None:
        """The frame's entries to that page, and the page to `gfn`. OSError where KVM refuses its slot."""
        if (memory, offset) != (frame.memory, frame.offset):
            memory.view[offset : offset + PAGE_SIZE] = frame.memory.view[frame.offset : frame.offset + PAGE_SIZE]
            frame.memory, frame.offset = memory, offset
        if gfn is not None and memory is self._memory:
            frame.slot = self._physmap.add(gfn, 1, memory, offset)
        frame.gfn = gfn

    def _tell(self, index: int, gfn: int | None, memory: Memory, offset: int) -> None:
        """Of a frame that was at `gfn`, in `memory` at `offset`; there again where the daemon refuses it."""
        frame = self._frames[index]
        if (frame.memory, frame.offset) == (memory, offset):
            return
        try:
            self._moved(index)
        except EvtchndError:
            with self._lock:
                self._unmap(frame)
                self._put(frame, gfn, memory, offset)
            self._moved(index)
            raise

    def entry(self, gref: int) -> tuple[int, int, int] | None:
        """(flags, domid, frame); None: past the table."""
        index, n = divmod(gref, GRANTS_PER_FRAME)
        if index >= self.count:
            return None
        frame = self._frames[index]
        at = frame.offset + n * GRANT_ENTRY_SIZE
        raw = bytes(frame.memory.view[at : at + GRANT_ENTRY_SIZE])
        return int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:4], "little"), int.from_bytes(raw[4:], "little")


class GrantTableOp:
    """The calls of one domain. `call` raises GuestError for bad pointers."""

    def __init__(self, domid: int, frames: GrantFrames) -> None:
        self._domid, self._frames = domid, frames

    def call(self, guest: Pointers, op: int, arg: int, count: int) -> int:
        """0 or a negated error number. Version 2 is refused with ENOSYS, at which guests use version 1."""
        if count > _MAX_COUNT:
            return -errno.EINVAL
        match op:
            case Gnttabop.SET_VERSION:
                (version,) = guest.take(_SET_VERSION, arg)
                if version == 2:
                    return -errno.ENOSYS
                return 0 if version == 1 else -errno.EINVAL
            case Gnttabop.GET_VERSION:
                for at in self._each(guest, _GET_VERSION, arg, count):
                    dom, pad, _ = guest.take(_GET_VERSION, at)
                    if not self._own(dom):
                        return -errno.ESRCH
                    guest.put(_GET_VERSION, at, dom, pad, 1)
                return 0
            case Gnttabop.QUERY_SIZE if count == 1:
                dom, *_ = guest.take(_QUERY_SIZE, arg)
                status = _OKAY if self._own(dom) else _BAD_DOMAIN
                guest.put(_QUERY_SIZE, arg, dom, self._frames.used, self._frames.count, status)
                return 0
            case Gnttabop.SETUP_TABLE if count == 1:
                status = self._setup(guest, *guest.take(_SETUP_TABLE, arg))
                guest.write(arg + _SETUP_STATUS, status.to_bytes(2, "little", signed=True))
                return 0
            case Gnttabop.GET_STATUS_FRAMES if count == 1:
                nr_frames, dom, _, frames = guest.take(_GET_STATUS_FRAMES, arg)
                # only version 2 has any
                status = _BAD_DOMAIN if not self._own(dom) else _GENERAL_ERROR if nr_frames else _OKAY
                guest.put(_GET_STATUS_FRAMES, arg, nr_frames, dom, status, frames)
                return 0
            case Gnttabop.COPY:
                for at in self._each(guest, _COPY, arg, count):
                    status = self._copy(guest, *guest.take(_COPY, at))
                    guest.write(at + _COPY_STATUS[guest.long_mode], status.to_bytes(2, "little", signed=True))
                return 0
            case Gnttabop.QUERY_SIZE | Gnttabop.SETUP_TABLE | Gnttabop.GET_STATUS_FRAMES:
                return -errno.EINVAL
        return -errno.ENOSYS

    def _own(self, dom: int) -> bool:
        return dom in (DOMID_SELF, self._domid)

    @staticmethod
    def _each(guest: Pointers, layout: Layout, arg: int, count: int) -> range:
        size = layout.of(guest.long_mode).size
        return range(arg, arg + count * size, size)

    def _setup(self, guest: Pointers, dom: int, nr_frames: int, _status: int, frame_list: int) -> int:
        if not self._own(dom):
            return _BAD_DOMAIN
        if nr_frames > self._frames.count:
            return _GENERAL_ERROR
        self._frames.used = max(self._frames.used, nr_frames)
        for i in range(nr_frames):
            gfn = self._frames.gfn(i)
            guest.put_word(frame_list, i, -1 if gfn is None else gfn)
        return _OKAY

    def _copy(
        self,
        guest: Pointers,
        source: int,
        source_dom: int,
        source_offset: int,
        dest: int,
        dest_dom: int,
        dest_offset: int,
        size: int,
        flags: int,
        _status: int,
    ) -> int:
        """Between pages of the guest's own, or that it has granted to itself: there is no other guest here."""
        if not (self._own(source_dom) and self._own(dest_dom)):
            return _BAD_DOMAIN
        if max(source_offset, dest_offset) + size > PAGE_SIZE:
            return _BAD_COPY_ARG
        gfns: list[int] = []
        for number, by_gref, write in (
            (source, flags & _SOURCE_GREF, False),
            (dest, flags & _DEST_GREF, True),
        ):
            if not by_gref:
                gfns.append(number)
                continue
            entry = self._frames.entry(number & 0xFFFFFFFF)
            if entry is None or entry[0] & GTF_TYPE_MASK != GTF_PERMIT_ACCESS or entry[1] != self._domid:
                return _BAD_GNTREF
            if write and entry[0] & GTF_READONLY:
                return _PERMISSION_DENIED
            gfns.append(entry[2])
        found = [guest.memory.find(gfn) for gfn in gfns]
        if found[0] is None or found[1] is None:
            return _BAD_PAGE
        data = guest.memory.read((gfns[0] << PAGE_SHIFT) + source_offset, size)
        guest.memory.write((gfns[1] << PAGE_SHIFT) + dest_offset, data)
        return _OKAY
