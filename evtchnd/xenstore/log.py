"""The store's log: records appended to a memfd that somebody else holds, too, and that outlives this process.

        0  8 bytes  "evtxslog"
        8  u32      version
       12  u32      bytes of an area / 8
       64  u32      active: which of both areas holds the log
      128  u32      committed[0]: bytes / 8 of the first area that count
      192  u32      committed[1]
      256  u32      generations / 2^20 that no node has had
     4096  area 0, then area 1

Only whole words are shared state. Records are written behind `committed`, and count when it is stored: a process that
is killed leaves a part of a record there, which nobody sees. A compacted copy is written to the other area and counts
when `active` is stored. The file is sparse: memory is taken by what is written, and given back by a compaction.

Whoever holds it cannot make it shorter (a shorter file would fault this process); it is sealed for that, and against
more seals.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

from evtchnd._core.words import Mem

from ..errors import HostError
from . import migration

_MAGIC = b"evtxslog"
_VERSION = 1
_AREA_AT, _ACTIVE, _COMMITTED, _GENERATIONS = 12, 64, (128, 192), 256
_HEADER = 4096
_GENERATION_STEP = 1 << 20
# Of each area: 20 million nodes. An address range, no memory.
AREA_BYTES = 4 << 30
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class LogFullError(HostError):
    """An area has no room for more."""


class Log:
    """An open log. `used`: bytes of the active area that count. Takes `fd`, which stays open as `log.fd`."""

    def __init__(self, fd: int) -> None:
        """HostError: it is no such log."""
        self.fd = fd
        try:
            self._map = mmap.mmap(fd, 0)
        except (OSError, ValueError) as error:
            raise HostError(f"descriptor {fd} is no XenStore log: {error}") from None
        self._header = memoryview(self._map)[:_HEADER]
        self._words = Mem(self._header)
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        self._area = self._words.load(_AREA_AT) * 8
        self._activate(self._words.load(_ACTIVE) & 1)
        self.used = self._words.load(self._committed) * 8
        self._copied = 0
        if self.used > self._area:
            self.close()
            raise HostError(f"the XenStore log is damaged: {self.used} bytes of {self._area}")

    @classmethod
    def create(cls, area: int = AREA_BYTES) -> Log:
        """An empty one, in a memfd of its own."""
        return cls.adopt(os.memfd_create("evtchnd-xenstore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), area)

    @classmethod
    def adopt(cls, fd: int, area: int = AREA_BYTES) -> Log:
        """The log in a memfd that somebody else holds, too; an empty memfd becomes one. HostError: it is none."""
        try:
            if os.fstat(fd).st_size == 0:
                os.ftruncate(fd, _HEADER + 2 * area)
                os.pwrite(fd, _MAGIC + _VERSION.to_bytes(4, "little") + (area // 8).to_bytes(4, "little"), 0)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise HostError(
                f"descriptor {fd} cannot hold a XenStore log: {error.strerror}: a memfd with MFD_ALLOW_SEALING can"
            ) from None
        return cls(fd)

    def _activate(self, which: int) -> None:
        """Appends go to this area."""
        self._active, self._committed, self._begin = which, _COMMITTED[which], _HEADER + which * self._area

    def clear(self) -> None:
        """Nothing is in it any more."""
        self.begin_copy()
        self.switch()

    def _check(self) -> None:
        size = len(self._map)
        area = self._words.load(_AREA_AT) * 8
        if bytes(self._map[:8]) != _MAGIC or size != _HEADER + 2 * area:
            raise HostError(f"descriptor {self.fd} is no XenStore log")
        if (version := self._words.load(8)) != _VERSION:
            raise HostError(f"the XenStore log has version {version}, this evtchnd writes {_VERSION}")
        if not fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise HostError(f"descriptor {self.fd} is a log that can be made shorter under us: not used")

    # ---- appending

    def append(self, data: bytes) -> None:
        """Records, all at once: they count, or nothing of them does. LogFullError."""
        start, end = self.used, self.used + len(data)
        if end > self._area:
            raise LogFullError(f"the XenStore log is full ({self._area} bytes)")
        at = self._begin
        self._map[at + start : at + end] = data
        self._words.store(self._committed, end >> 3)
        self.used = end

    def reserve(self, generation: int) -> int:
        """Notes that generations up to some above `generation` may be in use; -> that one."""
        steps = generation // _GENERATION_STEP + 1
        self._words.store(_GENERATIONS, steps)
        return steps * _GENERATION_STEP

    @property
    def generation(self) -> int:
        """None above it was in use."""
        return self._words.load(_GENERATIONS) * _GENERATION_STEP

    def records(self) -> Iterator[tuple[int, bytes, int]]:
        """(type, body, offset) of all that count. MigrationError: the log is damaged."""
        start = self._begin
        with memoryview(self._map) as view, view[start : start + self.used] as data:
            yield from migration.raw_records(data, 0, self.used)

    # ---- compaction

    def begin_copy(self) -> None:
        """The other area is empty now."""
        self._words.store(_COMMITTED[1 - self._active], 0)
        self._copied = 0

    def copy(self, data: bytes) -> None:
        """Appends to the other area."""
        end = self._copied + len(data)
        if end > self._area:
            raise LogFullError(f"the XenStore log is full ({self._area} bytes)")
        at = _HEADER + (1 - self._active) * self._area
        self._map[at + self._copied : at + end] = data
        self._copied = end

    def copy_tail(self, start: int, most: int) -> int:
        """What the log has got since it was `start` bytes long, `most` at most, to the other area; -> where it ends."""
        end = min(self.used, start + most)
        at = self._begin
        self.copy(self._map[at + start : at + end])
        return end

    def switch(self) -> None:
        """The copy is the log from now on."""
        other = 1 - self._active
        self._words.store(_COMMITTED[other], self._copied >> 3)
        self._words.store(_ACTIVE, other)
        self._activate(other)
        self.used, self._copied = self._copied, 0

    def free(self, start: int, size: int) -> None:
        """Gives back memory of the other area: whole pages."""
        size = min(size, self._area - start)
        self._map.madvise(mmap.MADV_REMOVE, _HEADER + (1 - self._active) * self._area + start, size)

    def close(self) -> None:
        """The descriptor stays open."""
        self._words.close()
        self._header.release()
        self._map.close()
