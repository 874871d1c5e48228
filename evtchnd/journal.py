"""The in-flight journals of a vbd's rings: what a ring alone cannot tell, in a memfd that outlives the worker.

Response i overwrites the slot of request i, so that a new worker could not know from the ring which requests are still
due. The journal keeps a private copy of each, in vhost-user's order:

    copy and counter -> state INFLIGHT -> consumed     take: before any of its data moves
    unpin -> state DONE, response index, status        done: before the response is written into the ring
    target -> the ring's rsp_prod -> entries FREE -> published        push

A worker may die between any two of these stores; BlkRing.attach (evtchnd/_core/blk.py) puts each case right.

Each queue of a vbd has a journal of its own; they lie one behind the other, all of one size. Between the queues there
is no order to keep: a frontend that wants one waits for the answer.

    0    u32 magic 'EVJL' | u32 version | u32 entries | u32 stride (128)
    16   u64 consumed      absolute index of the next request to take (the ring's req_cons is its lower half)
    24   u32 published     rsp_prod that is known to be in the ring
    28   u32 target        rsp_prod that is being put there
    32   u32 started       0: no ring yet, nothing to restore
    36   u32 abi (32, 64) | u32 ring size in entries
    128  entries of 128 bytes:
         0   u32 state     FREE 0, INFLIGHT 1, DONE 2 | status << 16 (s16, of DONE)
         4   u32 response  free-running index of its response (of DONE)
         8   u64 counter   absolute request index: the order of a replay
         16  the raw request, 112 bytes
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import NamedTuple

from evtchnd._core.blk import passed
from evtchnd._core.points import AT_SETTLE, AT_START
from evtchnd._core.words import Mem
from evtchnd.errors import GuestError, HostError
from evtchnd.memory import map_range, sealed_memfd

MAGIC = 0x4C4A5645
VERSION = 1
HEADER = 128
STRIDE = 128
FREE, INFLIGHT, DONE = 0, 1, 2
# 16 ring pages hold 512 requests of the 32-bit or 64-bit ABI
MAX_ENTRIES = 1024
# As many as config.Vbd.max_queues may say
MAX_QUEUES = 64


def size_of(entries: int) -> int:
    """Bytes of one queue's journal for `entries` requests in flight, whole pages."""
    return (HEADER + entries * STRIDE + mmap.PAGESIZE - 1) & -mmap.PAGESIZE


def create(entries: int, *, queues: int = 1, name: str) -> int:
    """New, empty journals for `queues` rings of at most `entries` requests (blkif: 32 a page); -> the memfd, sealed.

    The caller owns the descriptor. HostError if there is none to be had.
    """
    if not 0 < entries <= MAX_ENTRIES:
        raise ValueError(f"a journal has 1 to {MAX_ENTRIES} entries, not {entries}")
    if not 0 < queues <= MAX_QUEUES:
        raise ValueError(f"1 to {MAX_QUEUES} queues have journals, not {queues}")
    fd = sealed_memfd(name, queues * size_of(entries), f"journal {name}")
    head = b"".join(word.to_bytes(4, "little") for word in (MAGIC, VERSION, entries, STRIDE))
    try:
        for queue in range(queues):
            os.pwrite(fd, head, queue * size_of(entries))
    except OSError as error:
        os.close(fd)
        raise HostError(f"journal {name}: {error.strerror}") from None
    return fd


class Left(NamedTuple):
    """What is restored: absolute index of the next request, rsp_prod, entries answered and not published (in the order
    of their responses), entries in flight (in the order in which they were taken)."""

    consumed: int
    published: int
    done: list[int]
    inflight: list[int]


class Journal:
    """The journal of one queue, mapped. HostError if it is none, of another version, or too small.

    mem: its memory; entries: how many requests it holds. The descriptor is not kept.
    """

    def __init__(self, fd: int, queue: int = 0) -> None:
        try:
            size = os.fstat(fd).st_size
        except OSError as error:
            raise HostError(f"journal: descriptor {fd}: {error.strerror}") from None
        if size < HEADER or size % mmap.PAGESIZE:
            raise HostError(f"journal: {size} bytes are no journal")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == 0:
            raise HostError("journal: is not sealed against shrinking")
        each = _size_of_each(fd, size)
        if (queue + 1) * each > size:
            raise HostError(f"journal: {size // each} queues, queue {queue} is not there")
        region = map_range(fd, queue * each, each, "journal")
        self._area = region.area
        self.mem = Mem(region.view)
        region.view.release()
        magic, version, self.entries, stride = (self.mem.load(off) for off in (0, 4, 8, 12))
        if reason := _fault(magic, version, self.entries, stride, each):
            self.close()
            raise HostError(f"journal: {reason}: it cannot be replayed")

    @property
    def started(self) -> bool:
        """Whether a ring was ever served with it (and a restart has something to restore)."""
        return self.mem.load(32) != 0

    def restore(self, rsp_prod: int, size: int) -> Left:
        """What the last worker left, given the ring's shared rsp_prod; settles the batch that it was publishing.

        | rsp_prod   | it died                           | answers between published and target       |
        |------------|-----------------------------------|--------------------------------------------|
        | = target   | after the index was in the ring   | the guest has them: their entries go FREE  |
        | = published| before that                       | are published again                        |
        | other      | -                                 | the guest wrote the index: GuestError      |

        HostError if the entries contradict one another: nothing can be replayed safely then.
        """
        published, target = self.mem.load(24), self.mem.load(28)
        if rsp_prod not in (published, target):
            raise GuestError(
                f"ring: rsp_prod is {rsp_prod:#x}, and this end left it at {published:#x} or {target:#x}: "
                "the guest wrote to it"
            )
        fresh = (rsp_prod - published) & 0xFFFFFFFF
        consumed = self._counter(16)
        inflight: dict[int, int] = {}
        done: dict[int, int] = {}
        for entry in range(size):
            base = HEADER + STRIDE * entry
            state = self.mem.load(base) & 0xFFFF
            counter = self._counter(base + 8)
            ahead = (self.mem.load(base + 4) - published) & 0xFFFFFFFF
            if state == FREE:
                continue
            consumed = max(consumed, counter + 1)
            if state == INFLIGHT:
                inflight[counter] = entry
            elif state == DONE and ahead < fresh:
                passed(AT_SETTLE)
                self.mem.store(base, FREE)
            elif state == DONE:
                done[ahead - fresh] = entry
            else:
                raise HostError(f"journal: entry {entry} has state {state}")
        passed(AT_SETTLE)
        self.mem.store(24, rsp_prod)
        passed(AT_SETTLE)
        self.mem.store(28, rsp_prod)
        if sorted(done) != list(range(len(done))) or ((consumed - rsp_prod - len(done)) & 0xFFFFFFFF != len(inflight)):
            raise HostError(
                f"journal: {len(inflight)} requests in flight and {len(done)} answers do not fit "
                f"request {consumed:#x} and response {rsp_prod:#x}: it cannot be replayed"
            )
        return Left(consumed, rsp_prod, [done[i] for i in sorted(done)], [inflight[i] for i in sorted(inflight)])

    def _counter(self, off: int) -> int:
        return int.from_bytes(self.mem.read(off, 8), "little")

    def reset(self) -> None:
        """Forget everything: a new handshake with the frontend begins (its old requests are gone with its ring)."""
        passed(AT_START)
        self.mem.store(32, 0)

    def close(self) -> None:
        """Unmap it; the memfd and what is in it stay. Idempotent. Close the ring first."""
        self.mem.close()
        self._area.close()


def _size_of_each(fd: int, size: int) -> int:
    """Bytes of one queue's journal, as the first one says."""
    magic, version, entries, stride = struct.unpack("<4I", os.pread(fd, 16, 0))
    each = size_of(entries) if 0 < entries <= MAX_ENTRIES else size
    if reason := _fault(magic, version, entries, stride, each if size % each == 0 else 0):
        raise HostError(f"journal: {reason}: it cannot be replayed")
    return each


def _fault(magic: int, version: int, entries: int, stride: int, size: int) -> str:
    """What is wrong with a header whose journal has `size` bytes; "" if nothing is."""
    if magic != MAGIC:
        return f"magic {magic:#x} is not {MAGIC:#x}"
    if version != VERSION or stride != STRIDE:
        return f"version {version} with entries of {stride} bytes; this program writes version {VERSION}"
    if not 0 < entries <= MAX_ENTRIES or size != size_of(entries):
        return f"{entries} entries do not make {size} bytes"
    return ""
