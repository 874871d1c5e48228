"""HYPERVISOR_memory_op: where Xen's pages appear in the guest's physical memory, and RAM that a guest gives back.

Source: xen/include/public/memory.h; xen/common/memory.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum

from evtchnd.abi import DOMID_SELF, PAGE_SHIFT
from evtchnd.errors import GuestError
from evtchnd.vmm.grant_table_op import GrantFrames
from evtchnd.vmm.guest_pointer import Layout, Pointers
from evtchnd.vmm.physmap import Memory, Physmap


class Xenmem(IntEnum):
    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    MACHPHYS_MFN_LIST = 5
    POPULATE_PHYSMAP = 6
    ADD_TO_PHYSMAP = 7
    MEMORY_MAP = 9
    MACHINE_MEMORY_MAP = 10
    EXCHANGE = 11
    MACHPHYS_MAPPING = 12
    SET_MEMORY_MAP = 13
    MAXIMUM_GPFN = 14
    REMOVE_FROM_PHYSMAP = 15
    ADD_TO_PHYSMAP_BATCH = 23
    GET_VNUMAINFO = 26
    RESERVED_DEVICE_MEMORY_MAP = 27
    ACQUIRE_RESOURCE = 28


# A long list comes back with the number of its first element that is left in the upper bits of the operation.
OPERATION_MASK = 63  # MEMOP_CMD_MASK
_START_SHIFT = 6  # MEMOP_EXTENT_SHIFT
# Xen lets a guest without devices have extents of 2 MiB (CONFIG_DOMU_MAX_ORDER).
_MAX_ORDER = 9
# In one call: a vCPU that is in the VMM hears nothing of the VM's end. Linux and FreeBSD hand over a page of frame
# numbers (512) at most, and cannot do with less.
_MAX_EXTENTS = 4096
_GFNS = 1 << 40  # as far as a frame may be put
_SPACE_SHARED_INFO, _SPACE_GRANT_TABLE = 0, 1  # XENMAPSPACE_*

_DOMID = Layout("H")
_MEMORY_MAP = Layout("I4xQ", "II")  # nr_entries, buffer
_E820 = struct.Struct("<QQI")
_ADD = Layout("HHIQQ", "HHIII")  # domid, size, space, idx, gpfn
_BATCH = Layout("HHHHQQQ", "HHHHIII")  # domid, space, size, foreign_domid, idxs, gpfns, errs
_REMOVE = Layout("H6xQ", "H2xI")  # domid, gpfn
_RESERVATION = Layout("QQIIH6x", "IIIIH2x")  # extent_start, nr_extents, extent_order, mem_flags, domid

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class MemoryOp:
    """The calls of one domain. `call` raises GuestError for bad pointers.

    `shared_info(gfn)` puts that page there, None: nowhere (0 or a negated error number). Frames of `ram` are the
    guest's to give back.
    """

    def __init__(
        self,
        domid: int,
        physmap: Physmap,
        ram: Memory,
        frames: GrantFrames,
        memory_map: Sequence[tuple[int, int, int]],
        shared_info: Callable[[int | None], int],
    ) -> None:
        self._domid, self._physmap, self._ram, self._frames = domid, physmap, ram, frames
        self._map, self._place_shared_info = list(memory_map), shared_info
        self._shared_info: int | None = None

    def call(self, guest: Pointers, command: int, arg: int) -> int:
        op, start = command & OPERATION_MASK, command >> _START_SHIFT
        match op:
            case Xenmem.MEMORY_MAP:
                return self._memory_map(guest, arg)
            case Xenmem.ADD_TO_PHYSMAP:
                dom, _, space, index, gfn = guest.take(_ADD, arg)
                return self._add(space, index, gfn) if self._own(dom) else -errno.ESRCH
            case Xenmem.ADD_TO_PHYSMAP_BATCH:
                return self._add_batch(guest, *guest.take(_BATCH, arg))
            case Xenmem.REMOVE_FROM_PHYSMAP:
                dom, gfn = guest.take(_REMOVE, arg)
                return self._remove(gfn) if self._own(dom) else -errno.ESRCH
            case Xenmem.DECREASE_RESERVATION | Xenmem.POPULATE_PHYSMAP | Xenmem.INCREASE_RESERVATION:
                return self._reservation(guest, op, start, *guest.take(_RESERVATION, arg))
            case Xenmem.CURRENT_RESERVATION | Xenmem.MAXIMUM_RESERVATION | Xenmem.MAXIMUM_GPFN:
                (dom,) = guest.take(_DOMID, arg)
                if not self._own(dom):
                    return -errno.ESRCH
                return self._last_gfn() if op == Xenmem.MAXIMUM_GPFN else self._ram.size >> PAGE_SHIFT
            case Xenmem.MAXIMUM_RAM_PAGE:
                return self._last_gfn()
        return -errno.ENOSYS

    def reset(self) -> None:
        """As before the guest's first call."""
        self._shared_info = None

    def _own(self, dom: int) -> bool:
        return dom in (DOMID_SELF, self._domid)

    def _last_gfn(self) -> int:
        return max(slot.gfn + slot.pages - 1 for slot in self._physmap.slots)

    def _memory_map(self, guest: Pointers, arg: int) -> int:
        room, buffer = guest.take(_MEMORY_MAP, arg)
        entries = self._map[:room]
        guest.write(buffer, b"".join(_E820.pack(*entry) for entry in entries))
        guest.put(_MEMORY_MAP, arg, len(entries), buffer)
        return 0

    def _add(self, space: int, index: int, gfn: int) -> int:
        match space:
            case 0 | 1 if gfn >= _GFNS:
                return -errno.EINVAL
            case 0 if index == 0:
                result = self._place_shared_info(gfn)
                if not result:
                    self._shared_info = gfn
                return result
            case 1:
                # bit 31: the status frames of version 2
                return self._frames.map(index, gfn)
        return -errno.EINVAL if space in (_SPACE_SHARED_INFO, 2, 3) else -errno.EPERM

    def _add_batch(
        self, guest: Pointers, dom: int, space: int, size: int, _foreign: int, idxs: int, gpfns: int, errs: int
    ) -> int:
        if not self._own(dom):
            return -errno.ESRCH
        if size > _MAX_EXTENTS:
            return -errno.E2BIG
        for i in range(size):
            result = self._add(space, guest.word_at(idxs, i), guest.word_at(gpfns, i))
            guest.write(errs + 4 * i, result.to_bytes(4, "little", signed=True))
        return 0

    def _remove(self, gfn: int) -> int:
        if gfn == self._shared_info:
            self._shared_info = None
            return self._place_shared_info(None)
        if self._frames.unmap(gfn):
            return 0
        return 0 if self._give_back(gfn, 1) else -errno.ENOENT

    def _reservation(
        self, guest: Pointers, op: int, start: int, extents: int, count: int, order: int, _flags: int, dom: int
    ) -> int:
        """How many extents are done, of a long list not all. RAM that was given back and is populated again is zeros,
        where it was."""
        if not self._own(dom):
            return -errno.ESRCH
        if start > count or order > _MAX_ORDER:
            return -errno.EINVAL
        end = min(count, start + _MAX_EXTENTS)
        for i in range(start, end):
            try:
                gfn = guest.word_at(extents, i)
            except GuestError:
                return i
            pages = 1 << order
            give = op == Xenmem.DECREASE_RESERVATION
            if not (self._give_back(gfn, pages) if give else self._in_ram(gfn, pages) is not None):
                return i
        return end

    def _in_ram(self, gfn: int, pages: int) -> int | None:
        """The byte of RAM that the pages begin at; None: not all of them are RAM."""
        first, last = self._physmap.find(gfn), self._physmap.find(gfn + pages - 1)
        if first is None or last is None or first[0] is not self._ram or last[0] is not self._ram:
            return None
        return first[1] if last[1] - first[1] == pages - 1 << PAGE_SHIFT else None

    def _give_back(self, gfn: int, pages: int) -> bool:
        """The host gets the pages; the guest finds zeros there if it looks all the same. False: they are no RAM."""
        at = self._in_ram(gfn, pages)
        if at is None or (self._shared_info is not None and gfn <= self._shared_info < gfn + pages):
            return False
        mode = _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE
        if _libc.fallocate(self._ram.fd, mode, at, pages << PAGE_SHIFT):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return True
