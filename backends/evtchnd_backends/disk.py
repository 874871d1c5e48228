"""The disk side of a vbd: a raw image file or a block device, between guest pages and the page cache or the device.

Which way a request goes, as measured:

| request                                   | way                                                                     |
|-------------------------------------------|-------------------------------------------------------------------------|
| READ that the page cache holds            | `BlkRing.run` does it with RWF_NOWAIT where `nowait` says that this pays |
| WRITE of whole pages, buffered, small     | inline, 5 us, unless the kernel lately made such a write wait           |
| every other READ and WRITE                | io_uring; where that is refused, threads                                |
| FLUSH                                     | fdatasync, there too; one at a time, what comes meanwhile shares a next |
| DISCARD                                   | fallocate, there too: a hole that reads as zeros                        |

A pump goes: take requests, `start()` each, `finished()`, answer, push. Completions raise one eventfd; the disk is the
poller's `Source` for it and calls `wake`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from evtchnd.blkif import SECTOR_SIZE, Op, Status
from evtchnd.errors import HostError
from evtchnd.transport import close_all

from .threads import Engine, Threads, fallocate

if TYPE_CHECKING:
    from evtchnd._core.req import Req
    from evtchnd._core.uring import Uring
    from evtchnd.channel import Poller

log = logging.getLogger(__name__)

# linux/fs.h: _IO(0x12, 104), _IOR(0x12, 114, size_t), _IO(0x12, 123)
_BLKSSZGET, _BLKGETSIZE64, _BLKPBSZGET = 0x1268, 0x8008_1272, 0x127B
# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# io/blkif.h: BLKIF_DISCARD_SECURE
_SECURE = 1
_PAGE = 4096

INLINE_BYTES = 128 << 10
"""A larger write copies for longer than a slice of polling lasts; the kernel's workers do it beside the loop."""
SLOW_NS = 2_000_000
"""An inline write that took longer was held up by the kernel (dirty throttling, a full journal): 4 KiB takes 5 us."""
COOL_NS, LONGEST_COOL_NS = 100_000_000, 1_600_000_000
"""For so long writes then go the other way, twice as long if it happens again soon. The kernel pauses a writer for
200 ms at most, and goes on doing so; a CPU that was taken away for a moment looks the same, and is no reason."""
TELL_NS = 60_000_000_000
"""One log line a minute for each kind of error."""


class RawDisk:
    """A raw image or block device behind `fd` (which stays the caller's).

    uring: None takes threads. eventfd: where completions show (the uring's own; threads make one if none is given).
    Threads work on copies of `fd` and `eventfd`: the attributes of these names.
    poller: **pass the device's**: it looks at this disk and calls `wake` when there is something to collect; without
    one the caller adds a reader of `eventfd` itself. direct: opened with O_DIRECT.
    name: for log lines and errors. HostError: neither a file nor a block device, or smaller than a sector.

    sectors: of 512 bytes. sector_size, physical_sector_size: bytes, for the nodes of these names.
    discard: (granularity, alignment) in bytes, None where the disk cannot. nowait: `BlkRing.run(fd)` pays.
    inflight: requests started and not yet returned by `finished()`. failed: why every FLUSH fails from now on.
    inline, errors: counters.
    """

    def __init__(
        self,
        fd: int,
        *,
        readonly: bool,
        uring: Uring | None,
        wake: Callable[[], None] | None = None,
        eventfd: int | None = None,
        direct: bool = False,
        poller: Poller | None = None,
        name: str = "disk",
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.fd = fd
        self.readonly = readonly
        self.wake = wake
        self.name = name
        self.inflight = 0
        self.failed = ""
        self.inline = 0
        self.errors = 0
        # io_uring answers EAGAIN on a non-blocking file; a VMM may have passed one.
        os.set_blocking(fd, True)
        self.direct = direct or bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self._geometry()
        self.nowait = not self.direct and _takes_nowait(fd)
        self.discard = None if readonly else self._discard()
        self._own: list[int] = []
        if uring is not None:
            eventfd = uring.eventfd
        else:
            # io_uring holds the files it works on; a thread has but their numbers, which must not be others' when it
            # comes back late
            self.fd = os.dup(fd)
            eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if eventfd is None else os.dup(eventfd)
            self._own = [self.fd, eventfd]
        self.eventfd: int = eventfd
        self._closed = False
        self._engine: Engine = uring or Threads(eventfd)
        self._poller = poller
        self._clock = clock
        self._cool = COOL_NS // 2
        self._inline_from = clock()
        self._told: dict[str, int] = {}
        self._tag = 0
        # tag -> [req, offset, bytes left]; flushes and discards have 0 bytes left
        self._at_disk: dict[int, list[Any]] = {}
        self._queue: deque[list[Any]] = deque()
        self._flushing: list[Req] = []
        self._flush_next: list[Req] = []
        self._done: list[tuple[Req, int]] = []
        self._told_ready = False
        if poller is not None:
            poller.add_source(self)

    # -- requests

    def start(self, req: Req) -> None:
        """Begins READ, WRITE, FLUSH or DISCARD; the answer comes by `finished()`, perhaps at once.

        Other operations are answered EOPNOTSUPP.
        """
        self.inflight += 1
        op = req.op
        if op == Op.READ:
            self._begin([req, req.sector * SECTOR_SIZE, req.want])
        elif op == Op.WRITE:
            self._write(req)
        elif op == Op.FLUSH_DISKCACHE:
            self._flush_next.append(req)
            if not self._flushing:
                self._flush()
        elif op == Op.DISCARD:
            self._punch(req)
        else:
            self._done.append((req, Status.EOPNOTSUPP))

    def finished(self) -> list[tuple[Req, int]]:
        """Every request that is done since the last time, with its blkif status; also submits what was started."""
        self._told_ready = False
        engine = self._engine
        if engine.inflight:
            for tag, result in engine.reap():
                entry = self._at_disk.pop(tag)
                self._completed(entry, result)
            while self._queue and self._push(self._queue[0]):
                self._queue.popleft()
            engine.submit()
        found = self._done
        if found:
            self._done = []
            self.inflight -= len(found)
        return found

    def pending(self) -> bool:
        """For the poller: submits what was queued; True: `finished()` has something, and nobody was woken for it."""
        more = self._engine.pending() or bool(self._done)
        return more and not self._told_ready

    def ready(self) -> None:
        # Once: an owner that cannot collect now would else keep the poller looking for ever.
        self._told_ready = True
        if self.wake is not None:
            self.wake()

    async def close(self, seconds: float = 10.0) -> None:
        """Waits for what is in flight, `seconds` at most, then leaves it to the kernel; drops its results.

        Leaves the poller, ends own threads; `fd` and the uring stay the caller's. Idempotent.
        """
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        due = asyncio.Event()
        self.wake = due.set
        if self._poller is None:
            loop.add_reader(self.eventfd, due.set)
        try:
            while True:
                due.clear()
                self.finished()
                if not self.inflight:
                    break
                async with asyncio.timeout_at(end):
                    await due.wait()
        except TimeoutError:
            log.error("%s: %d requests are still at the disk after %g s", self.name, self.inflight, seconds)
        finally:
            self.wake = None
            if self._poller is None:
                loop.remove_reader(self.eventfd)
            else:
                self._poller.remove_source(self)
            if isinstance(self._engine, Threads):
                self._engine.close()
            self._closed = not self.inflight
            if self._closed:  # else they stay open for the thread that hangs
                close_all(self._own)

    # -- each operation

    def _write(self, req: Req) -> None:
        offset, want = req.sector * SECTOR_SIZE, req.want
        if self.readonly:
            self._done.append((req, Status.ERROR))
            return
        if not self._whole():
            self._done.append((req, Status.ERROR))
            return
        if self.direct or want > INLINE_BYTES or (want | offset) % _PAGE:
            self._begin([req, offset, want])
            return
        began = self._clock()
        if began < self._inline_from:
            self._begin([req, offset, want])
            return
        result = req.pwritev(self.fd, offset)
        ended = self._clock()
        if ended - began > SLOW_NS:
            again = began - self._inline_from < LONGEST_COOL_NS
            self._cool = min(2 * self._cool, LONGEST_COOL_NS) if again else COOL_NS
            self._inline_from = ended + self._cool
        self.inline += 1
        if result == want:
            self._done.append((req, Status.OKAY))
        else:
            self._completed([req, offset, want], result)

    def _flush(self) -> None:
        """One fdatasync for all that wait: the kernel tells a lost write to only one of two that run side by side."""
        reqs, self._flush_next = self._flush_next, []
        if self.failed or not self._whole():
            self._done += [(req, Status.ERROR) for req in reqs]
            return
        self._flushing = reqs
        self._begin([reqs[0], 0, 0])

    def _flushed(self, result: int) -> None:
        reqs, self._flushing = self._flushing, []
        if result < 0:
            # The kernel forgets a lost write once it has told: a later success would be a lie.
            self.failed = os.strerror(-result)
            self._error("flush", f"fdatasync: {self.failed}: every flush fails until the disk is attached again")
        status = Status.ERROR if result < 0 else Status.OKAY
        self._done += [(req, status) for req in reqs]
        if self._flush_next:
            self._flush()

    def _punch(self, req: Req) -> None:
        if self.discard is None or req.flag & _SECURE:
            self._done.append((req, Status.EOPNOTSUPP))
        elif req.sector + req.nr_sectors > self.sectors or not self._whole():
            self._done.append((req, Status.ERROR))
        elif req.nr_sectors == 0:
            self._done.append((req, Status.OKAY))
        else:
            self._begin([req, req.sector * SECTOR_SIZE, 0])

    # -- to the engine and back

    def _begin(self, entry: list[Any]) -> None:
        if self._queue or not self._push(entry):
            self._queue.append(entry)

    def _push(self, entry: list[Any]) -> bool:
        req, offset, _ = entry
        tag = self._tag
        op = req.op
        if op == Op.READ:
            taken = self._engine.readv(self.fd, req.iov_addr, req.iov_count, offset, tag)
        elif op == Op.WRITE:
            taken = self._engine.writev(self.fd, req.iov_addr, req.iov_count, offset, tag)
        elif op == Op.FLUSH_DISKCACHE:
            taken = self._engine.fsync(self.fd, tag)
        else:
            length = req.nr_sectors * SECTOR_SIZE
            taken = self._engine.fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length, tag)
        if taken:
            self._at_disk[tag] = entry
            self._tag = (tag + 1) & 0xFFFF_FFFF
        return taken

    def _completed(self, entry: list[Any], result: int) -> None:
        req, offset, left = entry
        if result == -errno.EINTR:
            self._begin(entry)
        elif req.op == Op.FLUSH_DISKCACHE:
            self._flushed(result)
        elif result == left:
            self._done.append((req, Status.OKAY))
        elif result > 0:
            # Short: what stopped it (end of file, no space) shows when it goes on.
            req.advance(result)
            self._begin([req, offset + result, left - result])
        elif result == 0:
            self._error("short", f"{self._what(req)} at byte {offset}: no data: the image is shorter than its disk")
            self._done.append((req, Status.ERROR))
        elif req.op == Op.DISCARD and result == -errno.EOPNOTSUPP:
            self.discard = None
            self._done.append((req, Status.EOPNOTSUPP))
        else:
            what = self._what(req)
            self._error(f"{what} {result}", f"{what} at byte {offset}: {os.strerror(-result)}")
            self._done.append((req, Status.ERROR))

    def _whole(self) -> bool:
        """False, with a line, if the image was truncated: a write would make it long again, with zeros for data."""
        if self.is_block or os.lseek(self.fd, 0, os.SEEK_END) >= self.sectors * SECTOR_SIZE:
            return True
        self._error("short", "the image was truncated: writes and flushes fail until it has its old length")
        return False

    def _what(self, req: Req) -> str:
        return Op(req.op).name.lower()

    def _error(self, kind: str, line: str) -> None:
        self.errors += 1
        now = self._clock()
        if kind not in self._told or now - self._told[kind] >= TELL_NS:
            self._told[kind] = now
            log.error("%s: %s", self.name, line)

    # -- what the disk is

    def _geometry(self) -> None:
        info = os.fstat(self.fd)
        self.is_block = stat.S_ISBLK(info.st_mode)
        if self.is_block:
            size = _ioctl(self.fd, _BLKGETSIZE64, "Q")
            self.sector_size = _ioctl(self.fd, _BLKSSZGET, "i")
            self.physical_sector_size = _ioctl(self.fd, _BLKPBSZGET, "I")
        elif stat.S_ISREG(info.st_mode):
            size = info.st_size
            self.sector_size = SECTOR_SIZE
            self.physical_sector_size = min(max(info.st_blksize, SECTOR_SIZE), _PAGE)
        else:
            raise HostError(f"{self.name}: neither a file nor a block device")
        self.sectors = size // SECTOR_SIZE
        if not self.sectors:
            raise HostError(f"{self.name}: {size} bytes: smaller than one sector of {SECTOR_SIZE}")

    def _discard(self) -> tuple[int, int] | None:
        """Whether holes can be punched. Nothing is lost by asking: a file is asked behind its end."""
        if not self.is_block:
            offset = (self.sectors * SECTOR_SIZE + (1 << 20)) & ~(_PAGE - 1)
            if fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, _PAGE) < 0:
                return None
            return self.physical_sector_size, 0
        # A hole in a device is "write zeroes, unmap"; the kernel refuses it where the device cannot.
        granularity, most = self._queue_limit("discard_granularity"), self._queue_limit("write_zeroes_max_bytes")
        if not granularity or not most:
            return None
        return granularity, self._queue_limit("../discard_alignment")

    def _queue_limit(self, name: str) -> int:
        device = os.fstat(self.fd).st_rdev
        base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
        # A partition has its disk's queue.
        for path in (f"{base}/queue/{name}", f"{base}/../queue/{name}"):
            with suppress(OSError, ValueError), open(path) as file:  # noqa: PTH123 - sysfs, before the loop matters
                return int(file.read())
        return 0


def _ioctl(fd: int, request: int, form: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(form)))
    return int(struct.unpack(form, answer)[0])


def _takes_nowait(fd: int) -> bool:
    """tmpfs and some others refuse RWF_NOWAIT for every read."""
    try:
        os.preadv(fd, [bytearray(SECTOR_SIZE)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
