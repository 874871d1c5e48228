"""A guest's physical memory as its VMM has it: slots of memfds, which come and go while the guest runs.

A guest address is found by the table of slots, never by arithmetic: the guest puts grant frames where it likes, above
its RAM too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE
from evtchnd.errors import GuestError
from evtchnd.memory import Region, map_range

MADV_POPULATE_WRITE = 23
POPULATED = 1 << 20

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# (slot, guest address, bytes, address here): KVM_SET_USER_MEMORY_REGION; 0 bytes: gone
SetSlot = Callable[[int, int, int, int], None]


def memfd(name: str, size: int, undo: contextlib.ExitStack) -> int:
    """Sealed: nobody can take pages away from under a mapping."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    undo.callback(os.close, fd)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class Memory:
    """A memfd and its mapping in this process."""

    def __init__(self, name: str, size: int, undo: contextlib.ExitStack) -> None:
        self.fd = memfd(name, size, undo)
        self.size = size
        self._region: Region = map_range(self.fd, 0, size, name)
        undo.callback(self._unmap)
        self.view, self.address = self._region.view, self._region.address

    def populate(self, offset: int, size: int) -> None:
        """The pages of that range are there, and mapped here, from now on; a hint (Linux 5.14)."""
        before = offset % PAGE_SIZE
        address, length = self.address + offset - before, size + before
        _libc.madvise(address, length, MADV_POPULATE_WRITE)

    def _unmap(self) -> None:
        self.view.release()
        self._region.area.close()


class Slot(NamedTuple):
    """`pages` frames from `gfn` are `memory` from byte `offset` on."""

    number: int
    gfn: int
    pages: int
    memory: Memory
    offset: int


class Physmap:
    """The slots. Look-ups may come from any thread; `set_slot` makes KVM have a slot."""

    def __init__(self, set_slot: SetSlot) -> None:
        self._set_slot = set_slot
        self._lock = threading.Lock()
        self.slots: tuple[Slot, ...] = ()

    def add(self, gfn: int, pages: int, memory: Memory, offset: int = 0) -> Slot:
        """OSError where KVM refuses (EEXIST: it overlaps another)."""
        with self._lock:
            used = {slot.number for slot in self.slots}
            number = next(n for n in range(len(used) + 1) if n not in used)
            self._set_slot(number, gfn << PAGE_SHIFT, pages << PAGE_SHIFT, memory.address + offset)
            slot = Slot(number, gfn, pages, memory, offset)
            self.slots = (*self.slots, slot)
            return slot

    def remove(self, slot: Slot) -> None:
        with self._lock:
            self._set_slot(slot.number, slot.gfn << PAGE_SHIFT, 0, slot.memory.address + slot.offset)
            self.slots = tuple(other for other in self.slots if other is not slot)

    def find(self, gfn: int) -> tuple[Memory, int] | None:
        """The memory that a frame is in, and the byte in it."""
        for slot in self.slots:
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                return slot.memory, slot.offset + (gfn - slot.gfn << PAGE_SHIFT)
        return None

    def read(self, gpa: int, size: int) -> bytes:
        """GuestError where a frame is in no slot."""
        data = bytearray()
        while len(data) < size:
            memory, at, most = self._extent(gpa + len(data))
            data += memory.view[at : at + min(most, size - len(data))]
        return bytes(data)

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """GuestError where a frame is in no slot; what is before it is done."""
        self._populate(gpa, len(data))
        done = 0
        while done < len(data):
            memory, at, most = self._extent(gpa + done)
            count = min(most, len(data) - done)
            memory.view[at : at + count] = data[done : done + count]
            done += count

    def _populate(self, gpa: int, size: int) -> None:
        """Pages for much data are made in one go: a fault for each of them costs more than the copy."""
        if size >= POPULATED:
            memory, at, most = self._extent(gpa)
            memory.populate(at, min(size, most))

    def _extent(self, gpa: int) -> tuple[Memory, int, int]:
        """The memory that an address is in, the byte in it, and how many there are up to the end of its slot."""
        gfn = gpa >> PAGE_SHIFT
        for slot in self.slots:
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                start = gpa - (slot.gfn << PAGE_SHIFT)
                return slot.memory, slot.offset + start, (slot.pages << PAGE_SHIFT) - start
        raise GuestError(f"address {gpa:#x} is in no memory slot")
