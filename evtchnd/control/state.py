"""What the next control plane has to know of a domain that its descriptors alone do not say: in a memfd, one a domain.

        0  8 bytes  "evtstate"
        8  u32      bytes of an area
       64  u32      active: 0 nothing was said yet, else the area that counts (1, 2)
      128  u32      version of what the first area says | u32 its bytes | u32 their CRC-32
      192  u32      the same of the second one
     4096  area 1, then area 2: JSON, a DomainState

This program writes VERSION, and reads OLDEST to VERSION: what the release before this one wrote.

It is written whole into the area that does not count, and counts when `active` is stored: a process that is killed
anywhere leaves what was said before, or what is said now. Unknown fields are ignored and missing ones have defaults, so
that only a change of meaning takes a new version.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from typing import Any

import msgspec

from evtchnd._core.words import Mem
from evtchnd.control.config import Vbd
from evtchnd.errors import HostError
from evtchnd.memory import sealed_memfd

VERSION = 1
OLDEST = 1
_MAGIC = b"evtstate"
_AREA, _ACTIVE, _SAID = 8, 64, (128, 192)
_HEADER = 4096
# 1,024 disks (limits.disks allows no more) of four queues are half of this. An address range: what is written takes
# memory.
AREA_BYTES = 4 << 20


class VersionError(HostError):
    """Another version of this program wrote it."""


class DiskState(msgspec.Struct, kw_only=True):
    """A disk. passed: its VMM passes the image, and does so again; connected: the worker's words of its live rings;
    vbd: what its guest was offered."""

    devid: int
    vdev: str
    target: str
    sectors: int
    sector_size: int
    readonly: bool
    cdrom: bool
    direct: bool
    discard: bool
    passed: bool = False
    connected: dict[str, Any] | None = None
    vbd: Vbd = msgspec.field(default_factory=Vbd)


class VifState(msgspec.Struct, kw_only=True):
    """A network interface. spec: its string; name: of its TAP, whose `queues` are kept; made: by this program, which
    takes it away, too; origin: who has opened it, "" for this program; passed: its VMM does so, and passes it again."""

    devid: int
    spec: str
    name: str
    queues: int
    rate: tuple[int, int]
    carrier: bool
    made: bool = False
    origin: str = ""
    passed: bool = False
    connected: dict[str, Any] | None = None


class DomainState(msgspec.Struct, kw_only=True):
    """A domain: whose it is (the VMM's user), which guest, and its devices."""

    domid: int
    uuid: str
    uid: int
    disks: list[DiskState] = []
    vifs: list[VifState] = []


class State:
    """An open one. The descriptor stays open as `state.fd`."""

    def __init__(self, fd: int) -> None:
        """HostError: it is none, or can be made shorter."""
        self.fd = fd
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            self._map = mmap.mmap(fd, 0)
        except (OSError, ValueError) as error:
            raise HostError(f"the descriptor is no state: {error}") from None
        size = len(self._map)
        if not sealed or size <= _HEADER or size % mmap.PAGESIZE:
            self._map.close()
            raise HostError(f"its state was cut short, or can be: {size} bytes")
        self._view = memoryview(self._map)
        self._words = Mem(self._view)
        self._area = self._words.load(_AREA)
        if bytes(self._map[:8]) != _MAGIC or size != _HEADER + 2 * self._area:
            self.close()
            raise HostError(f"the descriptor is no state: {size} bytes")

    @classmethod
    def create(cls, name: str) -> State:
        """An empty one. HostError: there is none to be had."""
        fd = sealed_memfd(name, _HEADER + 2 * AREA_BYTES, name)
        os.pwrite(fd, _MAGIC + AREA_BYTES.to_bytes(4, "little"), 0)
        return cls(fd)

    def read(self) -> DomainState:
        """What was said last. HostError: it is damaged, or nothing was said; VersionError."""
        active = self._words.load(_ACTIVE)
        if active not in (1, 2):
            raise HostError(f"its state is damaged: area {active}" if active else "its state is empty")
        version, used, crc = (self._words.load(_SAID[active - 1] + at) for at in (0, 4, 8))
        if not OLDEST <= version <= VERSION:
            raise VersionError(
                f"its state has version {version}, and this evtchnd reads {OLDEST} to {VERSION}: "
                "start the version that wrote it"
            )
        begin = _HEADER + (active - 1) * self._area
        data = bytes(self._map[begin : begin + min(used, self._area)])
        if used > self._area or zlib.crc32(data) != crc:
            raise HostError("its state is damaged: the checksum is wrong")
        try:
            return msgspec.json.decode(data, type=DomainState)
        except msgspec.MsgspecError as exc:
            raise HostError(f"its state cannot be understood: {exc}") from None

    def write(self, said: DomainState) -> None:
        """From now on this counts. HostError: it is longer than an area; what was said before counts on."""
        data = msgspec.json.encode(said)
        if len(data) > self._area:
            raise HostError(f"{len(data)} bytes of state are more than {self._area}")
        area = 2 if self._words.load(_ACTIVE) == 1 else 1
        begin = _HEADER + (area - 1) * self._area
        self._map[begin : begin + len(data)] = data
        for at, word in ((0, VERSION), (4, len(data)), (8, zlib.crc32(data))):
            self._words.store(_SAID[area - 1] + at, word)
        self._words.store(_ACTIVE, area)

    def close(self) -> None:
        """The descriptor stays open. Idempotent."""
        self._words.close()
        self._view.release()
        self._map.close()
