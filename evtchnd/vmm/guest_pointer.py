"""A hypercall's pointers: virtual addresses of the vCPU that calls, translated page by page.

Layouts differ between 32- and 64-bit guests where a struct has a pointer or an unsigned long: `Layout` has both.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE
from evtchnd.errors import GuestError
from evtchnd.vmm.physmap import Physmap

# Nothing that is read in one piece is longer; the longest, text for the console, is cut to it.
MAX_READ = 1 << 16

Translate = Callable[[int], int | None]


class Layout:
    """One struct of Xen's ABI in both forms; `both` where they are the same."""

    def __init__(self, both: str, narrow: str = "") -> None:
        self.wide = struct.Struct("<" + both)
        self.narrow = struct.Struct("<" + narrow) if narrow else self.wide

    def of(self, long_mode: bool) -> struct.Struct:
        return self.wide if long_mode else self.narrow


class Pointers:
    """Guest memory as one vCPU sees it. `translate`: a page's address -> its physical one, None where there is none.

    Every method raises GuestError for a pointer that leads nowhere: the guest gets EFAULT.
    """

    def __init__(self, memory: Physmap, translate: Translate, *, vcpu: int, long_mode: bool) -> None:
        self.memory, self.vcpu, self.long_mode = memory, vcpu, long_mode
        self._translate = translate

    @property
    def word(self) -> int:
        """sizeof(unsigned long)."""
        return 8 if self.long_mode else 4

    def physical(self, address: int) -> int:
        page = address & ~(PAGE_SIZE - 1)
        gpa = self._translate(page)
        if gpa is None:
            raise GuestError(f"no page at {address:#x}")
        return gpa + (address - page)

    def contiguous(self, address: int, size: int) -> int:
        """The physical address of a struct that KVM will write; GuestError where its two pages are apart."""
        gpa, last = self.physical(address), self.physical(address + size - 1)
        if last != gpa + size - 1:
            raise GuestError(f"{size} bytes at {address:#x} lie in two pages that are apart")
        if any(self.memory.find(at >> PAGE_SHIFT) is None for at in (gpa, last)):
            raise GuestError(f"address {gpa:#x} is in no memory slot")
        return gpa

    def read(self, address: int, size: int) -> bytes:
        data = bytearray()
        size = min(size, MAX_READ)
        while len(data) < size:
            at = address + len(data)
            part = min(size - len(data), PAGE_SIZE - at % PAGE_SIZE)
            data += self.memory.read(self.physical(at), part)
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            at = address + done
            part = data[done : done + PAGE_SIZE - at % PAGE_SIZE]
            self.memory.write(self.physical(at), part)
            done += len(part)

    def take(self, layout: Layout, address: int) -> tuple[int, ...]:
        """The struct's fields."""
        form = layout.of(self.long_mode)
        return form.unpack(self.read(address, form.size))

    def put(self, layout: Layout, address: int, *fields: int) -> None:
        self.write(address, layout.of(self.long_mode).pack(*fields))

    def word_at(self, address: int, index: int) -> int:
        """One of an array of unsigned longs (frame numbers)."""
        return int.from_bytes(self.read(address + index * self.word, self.word), "little")

    def put_word(self, address: int, index: int, value: int) -> None:
        size = self.word
        self.write(address + index * size, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
