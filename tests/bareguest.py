"""A guest's side for the core's tests, written by hand: memfds, grant entries and blkif requests as bytes.

It uses none of the core's layouts, so that a common mistake shows.
"""

from __future__ import annotations

import mmap
import os
import struct

from evtchnd._core.blk import BlkRing
from evtchnd.grants import GrantTable, Page
from evtchnd.journal import Journal, create
from evtchnd.memory import GuestMemory

PAGES = 1024


class Ram:
    """A domain's memory and grant table: 4 MiB in two slots (the second at frame 0x100000), grants of domain 7."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, PAGES * 4096)
        self.table_fd = os.memfd_create("grants", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.table_fd, 2 * 4096)
        self.ram = mmap.mmap(self.fd, PAGES * 4096)
        self.table = mmap.mmap(self.table_fd, 2 * 4096)
        self.attach()

    def attach(self) -> None:
        """The back end's view of it, new: what a restarted worker makes."""
        self.memory = GuestMemory()
        self.memory.add(0, 0, PAGES // 2, self.fd, 0)
        self.memory.add(1, 0x100000, PAGES // 2, self.fd, PAGES // 2 * 4096)
        self.grants = GrantTable(self.memory, 7)
        self.grants.add_frame(0, self.table_fd, 0)
        self.grants.add_frame(1, self.table_fd, 4096)

    def grant(self, gref: int, gfn: int, *, flags: int = 1, domid: int = 0) -> None:
        self.table[8 * gref : 8 * gref + 8] = struct.pack("<HHI", flags, domid, gfn)

    def flags(self, gref: int) -> int:
        return int.from_bytes(self.table[8 * gref : 8 * gref + 2], "little")

    def page(self, gfn: int) -> int:
        """Where a frame begins in `ram`."""
        return (gfn if gfn < 0x100000 else gfn - 0x100000 + PAGES // 2) * 4096

    def close(self) -> None:
        self.grants.close()
        self.memory.close()
        self.ram.close()
        self.table.close()
        os.close(self.fd)
        os.close(self.table_fd)


class Blkfront:
    """Ring pages and requests of one vbd. Data pages: gref 100 + n is frame 100 + n, granted on demand."""

    def __init__(self, ram: Ram, *, abi: int = 64, pages: int = 1, start: int = 0, **options: object) -> None:
        self.ram, self.abi, self.options = ram, abi, options
        self.entry = 112 if abi == 64 else 108
        self.gfns = [8 + 2 * n for n in range(pages)]  # neighbours in the ring, not in memory
        self.entries = 1 << (((pages * 4096 - 64) // self.entry).bit_length() - 1)
        for n, gfn in enumerate(self.gfns):
            ram.grant(8 + n, gfn)
        self.prod = self.rsp_cons = start & 0xFFFFFFFF
        for index, value in enumerate((start, start + 1, start, start + 1)):
            self.put_word(4 * index, value)
        self.journal_fd = create(self.entries, name="journal")
        self.attach()

    def attach(self) -> None:
        self.pages: list[Page] = [self.ram.grants.map(8 + n, write=True) for n in range(len(self.gfns))]
        self.journal = Journal(self.journal_fd)
        self.ring = BlkRing(
            self.ram.grants,
            self.pages,
            abi=self.abi,
            journal=self.journal,
            **{"sectors": 1 << 20, "max_indirect": 64, **self.options},  # type: ignore[arg-type]
        )

    def restart(self) -> list[object]:
        """What follows a worker's death: nothing is closed (only forgotten), everything is attached anew."""
        self.abandoned = getattr(self, "abandoned", [])
        self.abandoned.append((self.ram.memory, self.ram.grants, self.ring, self.journal, self.pages))
        self.ram.attach()
        self.attach()
        return list(self.ring.attach())

    def byte(self, offset: int) -> int:
        return self.ram.page(self.gfns[offset >> 12]) + (offset & 4095)

    def put(self, offset: int, data: bytes) -> None:
        for i, value in enumerate(data):
            self.ram.ram[self.byte(offset + i)] = value

    def get(self, offset: int, n: int) -> bytes:
        return bytes(self.ram.ram[self.byte(offset + i)] for i in range(n))

    def put_word(self, offset: int, value: int) -> None:
        at = self.byte(offset)  # at once: another process may look
        self.ram.ram[at : at + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")

    def word(self, offset: int) -> int:
        at = self.byte(offset)
        return int.from_bytes(self.ram.ram[at : at + 4], "little")

    def raw(self, request: bytes) -> None:
        self.put(64 + (self.prod & (self.entries - 1)) * self.entry, request.ljust(self.entry, b"\xee"))
        self.prod = (self.prod + 1) & 0xFFFFFFFF

    def data(self, *numbers: int, flags: int = 1) -> list[tuple[int, int, int]]:
        """Segments of whole pages: numbers of data pages."""
        for n in numbers:
            if not self.ram.flags(100 + n):
                self.ram.grant(100 + n, 100 + n, flags=flags)
        return [(100 + n, 0, 7) for n in numbers]

    def request(self, op: int, id: int, sector: int, segments: list[tuple[int, int, int]], count: int = -1) -> None:
        head = struct.pack("<BBH", op, len(segments) if count < 0 else count, 51712)
        head += (b"\xcc" * 4 if self.abi == 64 else b"") + struct.pack("<QQ", id, sector)
        self.raw(head + b"".join(struct.pack("<IBBH", gref, first, last, 0xAAAA) for gref, first, last in segments))

    def indirect(
        self,
        op: int,
        id: int,
        sector: int,
        segments: list[tuple[int, int, int]],
        gref: int = 90,
        count: int = -1,
        list_gfn: int = 90,
    ) -> None:
        self.ram.grant(gref, list_gfn)
        at = self.ram.page(90)
        for i, (ref, first, last) in enumerate(segments):
            self.ram.ram[at + 8 * i : at + 8 * i + 8] = struct.pack("<IBBH", ref, first, last, 0)
        head = struct.pack("<BBH", 6, op, len(segments) if count < 0 else count)
        head += (b"\xcc" * 4 if self.abi == 64 else b"") + struct.pack("<QQHH", id, sector, 51712, 0)
        self.raw(head + struct.pack("<8I", gref, 0, 0, 0, 0, 0, 0, 0))

    def discard(self, id: int, sector: int, count: int, flag: int = 0) -> None:
        head = struct.pack("<BBH", 5, flag, 51712) + (b"\xcc" * 4 if self.abi == 64 else b"")
        self.raw(head + struct.pack("<QQQ", id, sector, count))

    def publish(self) -> None:
        self.put_word(0, self.prod)

    def responses(self) -> list[tuple[int, int, int]]:
        """(id, op, status) of every new response; checks that the rest of its entry is zero."""
        found = []
        while self.rsp_cons != self.word(8):
            raw = self.get(64 + (self.rsp_cons & (self.entries - 1)) * self.entry, self.entry)
            id, op, pad, status = struct.unpack_from("<QBBh", raw)
            assert pad == 0
            assert not any(raw[12:])
            found.append((id, op, status))
            self.rsp_cons = (self.rsp_cons + 1) & 0xFFFFFFFF
        return found

    def close(self) -> None:
        self.ring.close()
        for page in self.pages:
            page.close()
        self.journal.close()
        os.close(self.journal_fd)
