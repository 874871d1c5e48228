"""The disk side of a vbd: a raw image file or a block device, between guest pages and the page cache or the device.

Which way a request goes, as measured:

| request                                   | way                                                                     |
|-------------------------------------------|-------------------------------------------------------------------------|
| READ that the page cache holds            | `BlkRing.run` does it with RWF_NOWAIT where `nowait` says that this pays |
| READ, WRITE whose pages O_DIRECT refuses  | through memory of our own, one at a time                                |
| WRITE of whole pages, buffered, small     | inline, 5 us, unless the kernel lately made such a write wait, or there |
|                                           | is a server behind the file system (NFS, FUSE): it may never answer     |
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
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from evtchnd.blkif import SECTOR_SIZE, Op, Status
from evtchnd.errors import HostError
from evtchnd.transport import close_all

from .bounce import Bounce
from .geometry import KEEP_SIZE, PUNCH_HOLE, Geometry, is_local, length, punches, takes_nowait
from .threads import Engine, Threads

if TYPE_CHECKING:
    from evtchnd._core.req import Req
    from evtchnd._core.uring import Uring
    from evtchnd.channel import Poller

log = logging.getLogger(__name__)

# io/blkif.h: BLKIF_DISCARD_SECURE
_SECURE = 1
_PAGE = 4096
# IOV_MAX: more vectors than this are refused; the rest of such a request follows when the kernel has done with these
_MOST_VECTORS = 1024

INLINE_BYTES = 128 << 10
"""A larger write copies for longer than a slice of polling lasts; the kernel's workers do it beside the loop."""
SLOW_NS = 2_000_000
"""An inline write that took longer was held up by the kernel (dirty throttling, a full journal): 4 KiB takes 5 us."""
COOL_NS, LONGEST_COOL_NS = 100_000_000, 1_600_000_000
"""For so long writes then go the other way, twice as long if it happens again soon. The kernel pauses a writer for
200 ms at most, and goes on doing so; a CPU that was taken away for a moment looks the same, and is no reason."""
TELL_NS = 60_000_000_000
"""One log line a minute for each kind of error."""
_ADVICE = {
    errno.ENOSPC: "make room where the image lies",
    errno.EDQUOT: "raise the quota of the image's owner",
    errno.EFBIG: "a limit of file sizes (LimitFSIZE, ulimit -f) is below the image's",
    errno.EIO: "look at the storage (dmesg)",
    errno.EROFS: "the file system went read-only: look at the storage (dmesg)",
}


class RawDisk:
    """A raw image or block device behind `fd` (which stays the caller's).

    uring: None takes threads. eventfd: where completions show (the uring's own; threads make one if none is given).
    Threads work on copies of `fd` and `eventfd`: the attributes of these names.
    poller: **pass the device's**: it looks at this disk and calls `wake` when there is something to collect; without
    one the caller adds a reader of `eventfd` itself. direct: opened with O_DIRECT.
    sectors: of 512 bytes, sector_size: bytes; 0: as the image or device has them.
    holes: of a block device, granularity and alignment in bytes, None where it cannot discard (only sysfs tells).
    name: for log lines and errors. HostError: neither a file nor a block device, or smaller than a sector.

    sectors, sector_size, physical_sector_size: for the nodes of these names.
    discard: (granularity, alignment) in bytes, None where the disk cannot. nowait: `BlkRing.run(fd)` pays.
    inflight: requests started and not yet returned by `finished()`. failed: why every FLUSH fails from now on (also of
    an earlier worker's disk, by the same descriptor); `on_failed` is called with it before the first answer.
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
        sectors: int = 0,
        sector_size: int = 0,
        holes: tuple[int, int] | None = None,
        failed: str = "",
        on_failed: Callable[[str], None] | None = None,
        poller: Poller | None = None,
        name: str = "disk",
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.fd = fd
        self.readonly = readonly
        self.wake = wake
        self.name = name
        self.inflight = 0
        self.failed = failed
        self._on_failed = on_failed
        self.inline = 0
        self.errors = 0
        # io_uring answers EAGAIN on a non-blocking file; a VMM may have passed one.
        os.set_blocking(fd, True)
        self.direct = direct or bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        found = Geometry.of(fd, name)
        self.is_block = found.is_block
        self.sector_size = sector_size or found.sector_size
        self.sectors = sectors or found.sectors(self.sector_size)
        physical = max(found.physical_sector_size, self.sector_size)
        while self.sectors * SECTOR_SIZE % physical:  # io/blkif.h: the size is a multiple of it
            physical //= 2
        self.physical_sector_size = physical
        self.nowait = not self.direct and takes_nowait(fd)
        self._local = is_local(fd)
        self._named = self.is_block or os.fstat(fd).st_nlink > 0
        self.discard = None if readonly else holes if found.is_block else punches(fd, found)
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
        if uring is not None:
            uring.aside = not self._local
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
        self._bounce: Bounce | None = None
        self._told_ready = False
        if poller is not None:
            poller.add_source(self)

    def resize(self, sectors: int) -> None:
        """It has `sectors` of 512 bytes from now on. HostError: it has not."""
        found = Geometry.of(self.fd, self.name).sectors(self.sector_size)
        if sectors > found:
            raise HostError(f"{self.name}: {sectors} sectors of 512 bytes, and the image has {found}")
        self.sectors = sectors

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
        if self.direct or not self._local or want > INLINE_BYTES or (want | offset) % _PAGE:
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
        if self._named and not self.is_block and length(self.fd)[1] == 0:
            where = f"/proc/{os.getpid()}/fd/{self.fd}"
            self._error("deleted", f"the image was deleted: it is gone when the disk is; until then it is {where}")
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
            if self._on_failed is not None:
                self._on_failed(self.failed)
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
            taken = self._engine.readv(self.fd, req.iov_addr, min(req.iov_count, _MOST_VECTORS), offset, tag)
        elif op == Op.WRITE:
            taken = self._engine.writev(self.fd, req.iov_addr, min(req.iov_count, _MOST_VECTORS), offset, tag)
        elif op == Op.FLUSH_DISKCACHE:
            taken = self._engine.fsync(self.fd, tag)
        else:
            length = req.nr_sectors * SECTOR_SIZE
            taken = self._engine.fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length, tag)
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
            self._finish(req, Status.OKAY)
        elif result > 0:
            # Short: what stopped it (end of file, no space, too many vectors) shows when it goes on.
            req.advance(result)
            self._begin([req, offset + result, left - result])
        elif result == 0:
            self._error("short", f"{self._what(req)} at byte {offset}: no data: the image is shorter than its disk")
            self._finish(req, Status.ERROR)
        elif result == -errno.EINVAL and self.direct and req.op in (Op.READ, Op.WRITE) and req is not self._bounce:
            # The guest's pages lie as it likes, in units of 512 bytes; some devices want more of O_DIRECT.
            if self._bounce is None:
                self._bounce = Bounce()
                if isinstance(self._engine, Threads):
                    self._engine.holds.append(self._bounce)
            if self._bounce.take(req, offset, left):
                self._bounced()
        elif req.op == Op.DISCARD and result == -errno.EOPNOTSUPP:
            self.discard = None
            self._done.append((req, Status.EOPNOTSUPP))
        else:
            what = self._what(req)
            advice = f": {_ADVICE[-result]}" if -result in _ADVICE else ""
            self._error(f"{what} {result}", f"{what} at byte {offset}: {os.strerror(-result)}{advice}")
            self._finish(req, Status.ERROR)

    def _finish(self, req: Any, status: int) -> None:
        """Answers a READ or WRITE; of one that goes through the bounce buffer, first what is left of it."""
        bounce = self._bounce
        if bounce is None or req is not bounce:
            self._done.append((req, status))
            return
        if status != Status.OKAY or bounce.done():
            self._done.append((bounce.give(), status))
        if bounce.busy:
            self._bounced()

    def _bounced(self) -> None:
        bounce = self._bounce
        if bounce is not None:
            self._begin([bounce, *bounce.piece()])

    def _whole(self) -> bool:
        """False, with a line, if the image was truncated: a write would make it long again, with zeros for data."""
        if self.is_block:
            return True
        # a seek to the end asks the server, where there is one
        size = os.lseek(self.fd, 0, os.SEEK_END) if self._local else length(self.fd)[0]
        if size < 0 or size >= self.sectors * SECTOR_SIZE:
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
