# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Raw words in shared memory: loads, stores, a fence, a compare-and-swap; `Mem` and `Area` hold the memory.

One source, two forms. Compiled, the functions below are the inline C of words.h on a `char *`. Run as Python they are
the `def`s here, and a "pointer" is the Mem itself; its atomics are libatomic's (Python has no compare-and-swap).

Trap: `struct.pack_into` zeroes its target before it writes, so that the other side reads a zero now and then. A word
that is shared is touched only by `ld32`/`st32`/`cas32`/`and16`, whole.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:  # at run time the compiled form needs none, and the Python form only this
    from evtchnd._core import nocython as cython

from evtchnd.errors import HostError

COMPILED: bool = bool(cython.compiled)

if not cython.compiled:
    import ctypes
    import os
    import select
    import sys

    if sys.byteorder != "little":
        raise HostError("Xen's x86 layouts need a little-endian host")

    class _Libatomic:
        """libatomic by ctypes. PyDLL: no GIL dance, which would cost more than the call."""

        def __init__(self) -> None:
            try:
                lib = ctypes.PyDLL("libatomic.so.1")
            except OSError:
                self.swap: Any = None
                self.fetch_and: Any = None
                return
            self.swap = lib.__getattr__("__atomic_compare_exchange_4")
            self.swap.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_int)
            self.swap.restype = ctypes.c_bool
            self.fetch_and = lib.__getattr__("__atomic_fetch_and_2")
            self.fetch_and.argtypes = (ctypes.c_void_p, ctypes.c_uint16, ctypes.c_int)
            self.fetch_and.restype = ctypes.c_uint16

    _libatomic = _Libatomic()
    _lock = threading.Lock()
    _SEQ_CST = 5

    def ld32(p: Mem, off: int) -> int:
        """A shared, aligned 32-bit word."""
        return p.v32[off >> 2]

    def st32(p: Mem, off: int, value: int) -> None:
        p.v32[off >> 2] = value & 0xFFFFFFFF

    def ld64(p: Mem, off: int) -> int:
        return p.v64[off >> 3]

    def st64(p: Mem, off: int, value: int) -> None:
        p.v64[off >> 3] = value

    def u32(value: int) -> int:
        """Modulo 2^32, as free-running indices are. (A mask in the source would be a Python integer when compiled.)"""
        return value & 0xFFFFFFFF

    def fence() -> None:
        """A full barrier: no later load passes an earlier store. Taking a lock is a locked instruction on x86."""
        with _lock:
            pass

    def cas32(p: Mem, off: int, expected: int, desired: int) -> int:
        """Compare-and-swap; what was there (equal to `expected`: swapped)."""
        if _libatomic.swap is None:
            raise HostError(NO_LIBATOMIC)
        was = ctypes.c_uint32(expected)
        _libatomic.swap(p.address + off, ctypes.addressof(was), desired, _SEQ_CST, _SEQ_CST)
        return was.value

    def and16(p: Mem, off: int, mask: int) -> None:
        """Clear the bits that `mask` lacks, atomically."""
        if _libatomic.fetch_and is None:
            raise HostError(NO_LIBATOMIC)
        _libatomic.fetch_and(p.address + off, mask & 0xFFFF, _SEQ_CST)

    def get8(p: Mem, off: int) -> int:
        """A private value, of any alignment."""
        return p.view[off]

    def get16(p: Mem, off: int) -> int:
        return int.from_bytes(p.view[off : off + 2], "little")

    def get32(p: Mem, off: int) -> int:
        if off & 3 == 0:
            return p.v32[off >> 2]
        return int.from_bytes(p.view[off : off + 4], "little")

    def get64(p: Mem, off: int) -> int:
        if off & 7 == 0:
            return p.v64[off >> 3]
        return int.from_bytes(p.view[off : off + 8], "little")

    def put8(p: Mem, off: int, value: int) -> None:
        p.view[off] = value & 0xFF

    def put16(p: Mem, off: int, value: int) -> None:
        p.view[off : off + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def put32(p: Mem, off: int, value: int) -> None:
        if off & 3 == 0:
            p.v32[off >> 2] = value & 0xFFFFFFFF
        else:
            p.view[off : off + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")

    def put64(p: Mem, off: int, value: int) -> None:
        if off & 7 == 0:
            p.v64[off >> 3] = value & 0xFFFFFFFFFFFFFFFF
        else:
            p.view[off : off + 8] = (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")

    def copy(to: Mem, to_off: int, source: Mem, source_off: int, n: int) -> None:
        to.view[to_off : to_off + n] = source.view[source_off : source_off + n]

    def sys_preadv(fd: int, views: Sequence[memoryview], count: int, offset: int, flags: int) -> int:
        """Bytes, or -errno (here the vectors are views, compiled the address of struct iovec)."""
        try:
            return os.preadv(fd, views, offset, flags)
        except OSError as error:
            return -(error.errno or 5)

    def sys_pwritev(fd: int, views: Sequence[memoryview], count: int, offset: int, flags: int) -> int:
        try:
            return os.pwritev(fd, views, offset, flags)
        except OSError as error:
            return -(error.errno or 5)

    def sys_readable(fd: int) -> bool:
        """Whether a read would not find nothing: data, or an error."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))


NO_LIBATOMIC = (
    "libatomic.so.1 is missing, and the uncompiled core needs it for grants: "
    "install Debian's libatomic1, or a C compiler and install evtchnd again"
)


def full_fence() -> None:
    """A full memory barrier, for callers in Python."""
    fence()


def need_atomics() -> None:
    """HostError if this form has no compare-and-swap (the Python form without libatomic)."""
    if not cython.compiled and _libatomic.swap is None:
        raise HostError(NO_LIBATOMIC)


class Mem:
    """A piece of memory, writable, a multiple of 8 bytes: guest pages, a journal, or a private copy.

    Methods are for callers in Python and check their offsets; `close()` gives the buffer back (idempotent). A Mem keeps
    the buffer's exporter from closing (`mmap.close()` raises BufferError) until then.
    """

    if TYPE_CHECKING:
        p: Mem
        view: memoryview
        v32: memoryview
        v64: memoryview
        size: int
        address: int

    def __init__(self, buffer: Any) -> None:
        view = memoryview(buffer)
        self.view = view = view.cast("B")
        if view.readonly or len(view) % 8:
            view.release()
            raise ValueError("memory must be writable and a multiple of 8 bytes")
        self.size = len(view)
        if cython.compiled:
            self.p = pointer(view)  # type: ignore[name-defined]  # noqa: F821
            self.address = cython.cast(uint64_t, self.p)  # type: ignore[name-defined]  # noqa: F821
        else:
            self.p = self
            self.v32 = view.cast("I")
            self.v64 = view.cast("Q")
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(view))

    def check(self, off: int, n: int) -> int:
        if off < 0 or n < 0 or off + n > self.size:
            raise IndexError(f"{n} bytes at {off} of {self.size}")
        return 0

    def load(self, off: int) -> int:
        """The shared 32-bit word at `off` (a multiple of 4)."""
        self.check(off, 4)
        return ld32(self.p, off)

    def store(self, off: int, value: int) -> None:
        """Store the shared 32-bit word at `off` (a multiple of 4); earlier stores are visible before it."""
        self.check(off, 4)
        st32(self.p, off, value)

    def swap(self, off: int, expected: int, desired: int) -> int:
        """Compare-and-swap of the word at `off`; what was there."""
        self.check(off, 4)
        return cas32(self.p, off, expected, desired)

    def keep16(self, off: int, mask: int) -> None:
        """Atomic and of the 16 bits at `off`."""
        self.check(off, 2)
        and16(self.p, off, mask)

    def read(self, off: int, n: int) -> bytes:
        """A copy of `n` bytes."""
        self.check(off, n)
        return bytes(self.view[off : off + n])

    def write(self, off: int, data: bytes) -> None:
        """Copy `data` there (not for shared words)."""
        self.check(off, len(data))
        self.view[off : off + len(data)] = data

    def close(self) -> None:
        self.size = 0
        if not cython.compiled:
            self.v32.release()
            self.v64.release()
        self.view.release()


class Area:
    """Pages that follow one another in a ring's address space, wherever they lie in this process.

    `pages`: writable buffers of 4096 bytes each. A ring's entry may straddle two pages; its indices lie in the first.
    """

    if TYPE_CHECKING:
        p: Mem
        pages: list[Mem]
        size: int

    def __init__(self, pages: Sequence[Any]) -> None:
        self.pages = []
        self.size = 0
        try:
            for page in pages:
                self.pages.append(Mem(page))
                if self.pages[len(self.pages) - 1].size != 4096:
                    raise ValueError("a page has 4096 bytes")
            if not self.pages:
                raise ValueError("an area has at least one page")
        except BaseException:
            self.close()
            raise
        self.size = 4096 * len(self.pages)
        self.p = self.first(self.pages[0])

    def first(self, page: Mem) -> Any:
        return page.p

    def take(self, off: int, to: Any, to_off: int, n: int) -> int:
        # n <= 4096, off + n inside the area: two pages at most
        page = self.pages[off >> 12]
        start = off & 4095
        part = 4096 - start
        if part >= n:
            copy(to, to_off, page.p, start, n)
            return 0
        copy(to, to_off, page.p, start, part)
        page = self.pages[(off >> 12) + 1]
        copy(to, to_off + part, page.p, 0, n - part)
        return 0

    def give(self, off: int, source: Any, source_off: int, n: int) -> int:
        page = self.pages[off >> 12]
        start = off & 4095
        part = 4096 - start
        if part >= n:
            copy(page.p, start, source, source_off, n)
            return 0
        copy(page.p, start, source, source_off, part)
        page = self.pages[(off >> 12) + 1]
        copy(page.p, 0, source, source_off + part, n - part)
        return 0

    def load(self, off: int) -> int:
        """The shared 32-bit word at `off` of the first page."""
        if not 0 <= off <= 4092 or not self.size:
            raise IndexError(off)
        return ld32(self.p, off)

    def store(self, off: int, value: int) -> None:
        if not 0 <= off <= 4092 or not self.size:
            raise IndexError(off)
        st32(self.p, off, value)

    def pending(self, at: int, seen: int) -> bool:
        """A cheap look: the producer's index at `at` (0: requests, 8: responses) is another one than `seen`."""
        if not 0 <= at <= 4088 or not self.size:
            raise IndexError(at)
        return ld32(self.p, at) != seen

    def arm(self, at: int, seen: int) -> bool:
        """Ask for an event at the first entry from `seen` on, in the word behind the index; True: there is one already.

        From what was consumed, never from the index read again: an entry in between would never be told.
        """
        if self.pending(at, seen):
            return True
        st32(self.p, at + 4, u32(seen + 1))
        fence()
        return ld32(self.p, at) != seen

    def read(self, off: int, n: int) -> bytes:
        """A copy of `n` bytes (at most 4096), across pages."""
        if not (off >= 0 and 0 <= n <= 4096 and off + n <= self.size):
            raise IndexError(f"{n} bytes at {off} of {self.size}")
        private = Mem(bytearray((n + 8) & ~7))
        self.take(off, private.p, 0, n)
        return bytes(private.view[:n])

    def write(self, off: int, data: bytes) -> None:
        """Copy `data` (at most 4096 bytes) there, across pages."""
        n = len(data)
        if not (off >= 0 and n <= 4096 and off + n <= self.size):
            raise IndexError(f"{n} bytes at {off} of {self.size}")
        private = Mem(bytearray((n + 8) & ~7))
        private.view[:n] = data
        self.give(off, private.p, 0, n)

    def close(self) -> None:
        """Give the pages' buffers back; idempotent."""
        self.size = 0
        for page in self.pages:
            page.close()
