"""Guest memory: memfds that a VMM passes, mapped here; a table of slots that changes while the guest runs.

What is mapped must stay there: a memfd that shrinks under a mapping is a SIGBUS, which Python cannot survive (the
instruction faults again, for ever). So every memfd carries F_SEAL_SHRINK, or it gets it here, or it is refused.

Closing order, always: requests and rings, then grants, then memory. A view or a pin that is left makes `close()` fail.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from evtchnd._core.frames import Frames
from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE
from evtchnd.errors import GuestError, HostError, VmmError

# KVM's own limit is 509 to 32764 slots; a machine has a handful, one of ours may be split by PCI holes and hotplug.
MAX_SLOTS = 512
# x86 has 52 physical address bits at most
MAX_GFN = 1 << (52 - PAGE_SHIFT)

HUGETLBFS_MAGIC = 0x958458F6
MADV_DONTDUMP = 16
MAP_NORESERVE = 0x4000
MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class Slot(NamedTuple):
    """One slot: `pages` frames from `gfn`, at `offset` of the memfd it came from."""

    slot: int
    gfn: int
    pages: int
    offset: int


def is_hugetlb(fd: int) -> bool:
    """Whether this memfd is made of huge pages, of which a hole may have none left to fault in (SIGBUS)."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:4], "little") == HUGETLBFS_MAGIC


def _check(fd: int, offset: int, length: int, what: str, *, hugetlb: bool, foreign: bool) -> os.stat_result:
    if offset < 0 or length <= 0 or offset % PAGE_SIZE or length % PAGE_SIZE:
        raise VmmError(f"{what}: offset {offset:#x} and length {length:#x} must be multiples of {PAGE_SIZE}, not empty")
    if offset + length >= 1 << 63:
        raise VmmError(f"{what}: offset {offset:#x} + length {length:#x} wraps")
    if not foreign:
        # before anything else: fstat asks the file system, and that of a file on a share, or of the VMM's own making
        # (FUSE), may never answer; a memfd's does
        _seal(fd, what)
    # after the seal: what is checked now cannot shrink any more
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise VmmError(f"{what}: the descriptor is no memfd")
    size = info.st_size
    if offset + length > size:
        raise VmmError(f"{what}: {offset:#x} + {length:#x} is past the end of the memfd ({size:#x})")
    if not hugetlb and is_hugetlb(fd):
        raise VmmError(f"{what}: huge pages (hugetlb) are refused here, a hole in them is a SIGBUS: use a plain memfd")
    return info


def _seal(fd: int, what: str) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise VmmError(f"{what}: descriptor {fd}: {error.strerror}", errno.EBADF) from None
        raise VmmError(f"{what}: the descriptor is no memfd (it cannot be sealed)") from None
    if seals & fcntl.F_SEAL_SHRINK:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        raise VmmError(
            f"{what}: the memfd is not sealed against shrinking and cannot be ({error.strerror}): "
            "make it with MFD_ALLOW_SEALING and add F_SEAL_SHRINK"
        ) from None


def check_memfd(fd: int, offset: int, length: int, what: str, *, hugetlb: bool = False) -> None:
    """VmmError unless `length` bytes at `offset` of `fd` can be mapped and will stay; sets F_SEAL_SHRINK if need be.

    hugetlb: huge pages are fine (a worker's guest memory); a page that the control plane maps refuses them. `what`
    begins the error's text.
    """
    _check(fd, offset, length, what, hugetlb=hugetlb, foreign=False)


def sealed_memfd(name: str, size: int, what: str) -> int:
    """A new memfd of `size` zeros, which nobody can make shorter or longer; the caller's. HostError: there is none."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}") from None
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise HostError(f"{what}: {error.strerror}") from None
    return fd


class Region(NamedTuple):
    """A mapping: `area` owns the address range, `view` is the memory in it."""

    area: mmap.mmap
    view: memoryview
    address: int


def map_range(fd: int, offset: int, length: int, what: str) -> Region:
    """Map `length` bytes of `fd` shared and writable, kept out of core dumps. The descriptor is not kept.

    mmap.mmap would dup the descriptor for as long as it lives; so it reserves the range, and the memfd goes over it.
    VmmError where the kernel refuses (a memfd that is read-only or sealed against writing).
    """
    align = os.fstat(fd).st_blksize if is_hugetlb(fd) else PAGE_SIZE
    if offset % align or length % align:
        raise VmmError(f"{what}: {offset:#x} and {length:#x} must be multiples of its huge page ({align:#x})")
    slack = align - PAGE_SIZE
    try:
        area = mmap.mmap(-1, length + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise HostError(f"{what}: {length >> 20} MiB of address space: {error.strerror}") from None
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    address = (start + align - 1) & ~(align - 1)
    got = _libc.mmap(
        address, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, fd, offset
    )  # fmt: skip
    if got != address:
        code = ctypes.get_errno()
        area.close()
        raise VmmError(f"{what}: cannot be mapped: {os.strerror(code)}", code)
    area.madvise(MADV_DONTDUMP)
    return Region(area, memoryview(area)[address - start : address - start + length], address)


def map_page(fd: int, offset: int, what: str = "page") -> mmap.mmap:
    """One page of a memfd, shared and writable, that keeps no descriptor. VmmError where it cannot be mapped.

    Check it first (`check_memfd`).
    """
    mapping = map_range(fd, offset, PAGE_SIZE, what)
    mapping.view.release()
    return mapping.area


class GuestMemory(Frames):
    """The guest's memory slots, gfn -> host address.

    foreign_ok: also regions that are no memfds and not sealed (a file in a test).
    """

    def __init__(self, *, max_slots: int = MAX_SLOTS, foreign_ok: bool = False) -> None:
        super().__init__(max_slots)
        self._foreign_ok = foreign_ok
        self._slots: dict[int, Slot] = {}
        self._rows: dict[int, int] = {}  # slot -> row
        self._mapped: dict[int, Region] = {}  # row -> its mapping, also while only holds keep it
        self._unused: list[Region] = []  # retired, but a view was alive when it should have gone
        self.slots: Mapping[int, Slot] = MappingProxyType(self._slots)

    def add(self, slot: int, gfn: int, pages: int, fd: int, offset: int) -> None:
        """Map `pages` frames from `gfn`, from `offset` of `fd`, as `slot`. The caller closes `fd`.

        VmmError, with nothing changed: slot in use, overlap (both slots named), zero, unaligned, wrapping, past the
        end of the memfd, no memfd, not sealable, too many slots.
        """
        what = f"memory slot {slot}"
        if slot in self._slots:
            raise VmmError(f"{what} is there already", errno.EEXIST)
        if len(self._slots) >= self.max_slots:
            raise VmmError(f"{what}: at most {self.max_slots} slots", errno.ENOSPC)
        if self.full():
            raise VmmError(f"{what}: removed slots are still in use", errno.EBUSY)
        if pages <= 0 or gfn < 0 or gfn + pages > MAX_GFN:
            raise VmmError(f"{what}: {pages} pages at frame {gfn:#x}: empty or past 52 address bits")
        for other in self._slots.values():
            if gfn < other.gfn + other.pages and other.gfn < gfn + pages:
                raise VmmError(
                    f"{what} (frames {gfn:#x}-{gfn + pages - 1:#x}) overlaps "
                    f"slot {other.slot} (frames {other.gfn:#x}-{other.gfn + other.pages - 1:#x})",
                    errno.EEXIST,
                )
        length = pages << PAGE_SHIFT
        _check(fd, offset, length, what, hugetlb=True, foreign=self._foreign_ok)
        mapping = map_range(fd, offset, length, what)
        row = self.insert(gfn, pages, mapping.address)
        self._mapped[row] = mapping
        self._rows[slot] = row
        self._slots[slot] = Slot(slot, gfn, pages, offset)

    def remove(self, slot: int) -> None:
        """No look-up finds the slot any more; it is unmapped once no pin holds it. VmmError for an unknown one."""
        if slot not in self._slots:
            raise VmmError(f"memory slot {slot} is not there", errno.ENOENT)
        del self._slots[slot]
        row = self._rows.pop(slot)
        if self.retire(row):
            self.idle(row)

    def idle(self, row: int) -> None:
        """A retired row that nothing holds: unmap it."""
        self._unused.append(self._mapped.pop(row))
        self._sweep()

    def _sweep(self) -> None:
        self._unused = [mapping for mapping in self._unused if not _unmap(mapping)]

    def view(self, gfn: int) -> memoryview:
        """The 4096 bytes of a frame, writable. GuestError if it is in no slot. Release it before `close()`."""
        row = self.row_of(gfn)
        if row < 0:
            raise GuestError(f"frame {gfn:#x} is in no memory slot")
        start = (gfn - self.first_of(row)) << PAGE_SHIFT
        return self._mapped[row].view[start : start + PAGE_SIZE]

    def view_at(self, address: int, n: int) -> memoryview:
        """`n` bytes at an address of this process that a pin found (also in a slot that was removed since)."""
        for mapping in self._mapped.values():
            start = address - mapping.address
            if start >= 0 and start + n <= len(mapping.view):
                return mapping.view[start : start + n]
        raise ValueError(f"{n} bytes at {address:#x} are no guest memory")

    def read(self, gpa: int, n: int) -> bytes:
        """A copy of `n` bytes at a guest physical address. GuestError if a frame is in no slot."""
        data = bytearray()
        while len(data) < n:
            at = gpa + len(data)
            start = at & (PAGE_SIZE - 1)
            with self.view(at >> PAGE_SHIFT) as page:
                data += page[start : start + n - len(data)]
        return bytes(data)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy `data` to a guest physical address. GuestError if a frame is in no slot (what is before it is done)."""
        done = 0
        while done < len(data):
            at = gpa + done
            start = at & (PAGE_SIZE - 1)
            part = data[done : done + PAGE_SIZE - start]
            with self.view(at >> PAGE_SHIFT) as page:
                page[start : start + len(part)] = part
            done += len(part)

    def close(self) -> None:
        """Unmap everything; idempotent. RuntimeError (a defect of the closing order) if pins or views are left."""
        if self.held:
            raise RuntimeError(f"{self.held} pins hold guest memory: close rings and grants first")
        for slot in list(self._slots):
            self.remove(slot)
        self._sweep()
        if self._unused:
            raise RuntimeError(f"views of {len(self._unused)} memory slots are alive: release them first")

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _unmap(mapping: Region) -> bool:
    mapping.view.release()
    try:
        mapping.area.close()
    except BufferError:
        return False
    return True
