"""The messages of the VMM's socket, one dataclass a body; tables are in tables.py, headers in protocol.py.

A class checks its values when it is made, so that what was decoded is valid, and says how many descriptors it
carries (`nfds`). A struct in a docstring is little-endian and without hidden padding; `pad` is 0.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, Self

from evtchnd.abi import DOMID_FIRST_RESERVED, EVTCHN_2L_PORTS_64, PAGE_SHIFT, PAGE_SIZE
from evtchnd.errors import VmmError

VERSION = 1

MAX_MESSAGE = 64 << 10  # far below the kernel's default socket buffer (208 KiB): a message is never too big to queue
MAX_FDS = 253  # SCM_MAX_FD of the kernel
MAX_SLOTS = 512  # KVM's user slots of a guest are 509 (x86, before 5.12): every older VMM's table fits
MAX_GRANT_FRAMES = 64  # Xen's gnttab_max_frames
MAX_PORTS = EVTCHN_2L_PORTS_64  # 2-level ABI, 64-bit guest
MAX_VCPUS = 4096  # CPUID and ACPI end below; the daemon keeps nothing a vCPU
MAX_REASON = 1024
MAX_QUEUES = 64  # of a vif: more than a guest of any size asks for
MAX_GFN = 1 << (52 - PAGE_SHIFT)  # 52 physical address bits, the most that x86 has
MAX_OFFSET = 1 << 63  # off_t
ALL_PORTS = 0xFFFFFFFF  # PortClosed.port


class Type(IntEnum):
    """Number of a message; a reply has its request's."""

    HELLO = 1
    REGISTER = 2
    RESUME = 3
    TABLE_BEGIN = 4
    TABLE_CHUNK = 5
    TABLE_COMMIT = 6
    SLOT_ADD = 7
    SLOT_REMOVE = 8
    GRANT_FRAME_ADD = 9
    GRANT_FRAME_REMOVE = 10
    XENSTORE = 11
    START = 12
    PORT_CLOSED = 13
    DISK = 14
    DISK_REMOVE = 15
    RELEASE = 16
    PING = 17
    CONSOLE = 18
    VIF = 19
    VIF_REMOVE = 20
    BIND_PORTS = 32
    UNBIND_PORTS = 33


class Flag(IntFlag):
    """Header.flags."""

    REPLY = 1
    ERROR = 2


class Feature(IntFlag):
    """Hello.features: what a side can do beyond the messages that every side must understand."""

    RESUME = 1  # daemon: serves RESUME
    DISK = 2  # daemon: serves DISK and DISK_REMOVE
    CONSOLE = 4  # daemon: serves CONSOLE
    VIF = 8  # daemon: serves VIF and VIF_REMOVE


ALL_FEATURES = Feature.RESUME | Feature.DISK | Feature.CONSOLE | Feature.VIF
"""The optional parts that this version knows."""


class Kind(IntEnum):
    """Which table TABLE_BEGIN, TABLE_CHUNK and TABLE_COMMIT are about."""

    MEMORY = 1
    GRANTS = 2
    PORTS = 3


class RegisterFlag(IntFlag):
    LONG_MODE = 1  # 64-bit shared_info: 4096 ports; without it 1024


class DiskFlag(IntFlag):
    READONLY = 1
    CDROM = 2


def check(ok: bool, reason: str, number: int = errno.EINVAL) -> None:
    if not ok:
        raise VmmError(reason, number)


def check_port(port: int) -> None:
    check(0 < port < MAX_PORTS, f"port {port}: not in 1..{MAX_PORTS - 1}", errno.ERANGE)


def check_indices(indices: Sequence[int], *, shared: bool) -> int:
    """Number of descriptors that `indices` name: 0..n-1, each used; `shared`: more than once is fine."""
    used = set(indices)
    count = len(used)
    check(shared or len(indices) == count, "a descriptor index is used twice")
    check(used == set(range(count)), "descriptor indices must be 0, 1, 2, ... with none left out")
    check(count <= MAX_FDS, f"{count} descriptors in a message, {MAX_FDS} at most", errno.E2BIG)
    return count


def _text(raw: bytes, what: str) -> str:
    """A char array: UTF-8, padded with NUL to its size (all of it may be used), no control character."""
    head, _, rest = raw.partition(b"\0")
    check(not rest.strip(b"\0"), f"{what}: bytes after its end must be 0")
    try:
        text = head.decode()
    except UnicodeDecodeError:
        raise VmmError(f"{what}: not UTF-8") from None
    check(text.isprintable(), f"{what}: {text!r} holds a character that cannot be printed")
    return text


def values_of(message: Message) -> tuple[Any, ...]:
    """The fields in their order. (dataclasses.astuple copies deeply: forty times slower.)"""
    return tuple(getattr(message, each.name) for each in fields(message))


@dataclass(frozen=True)
class Message:
    """Base of all bodies: `layout` in the order of the dataclass' fields, `fds` how many descriptors go along."""

    __slots__ = ()
    layout: ClassVar[struct.Struct] = struct.Struct("<")
    type: ClassVar[Type]
    reply: ClassVar[bool] = False
    fds: ClassVar[int] = 0

    @property
    def nfds(self) -> int:
        """Descriptors that travel with this message."""
        return self.fds

    def body(self) -> bytes:
        return self.layout.pack(*values_of(self))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(*split(cls.layout, body, cls.__name__))


def split(layout: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    """Unpacks, and refuses padding that is not 0: a later version may give it a meaning."""
    check(len(body) == layout.size, f"{what}: {len(body)} bytes of body, {layout.size} expected")
    values = layout.unpack(body)
    check(layout.pack(*values) == body, f"{what}: reserved bytes must be 0")
    return values


# ---- replies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ack:
    """Reply with no body: done. (`type` is the request's; it is in the header.)"""

    type: int
    reply: ClassVar[bool] = True
    nfds: ClassVar[int] = 0

    def body(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Reply that refuses: struct { int32_t errno; uint32_t len; char reason[len]; }, flags REPLY | ERROR.

    `errno` is a positive Linux number; `reason` one line of UTF-8 for the operator, at most 1024 bytes.
    """

    type: int
    errno: int
    reason: str
    reply: ClassVar[bool] = True
    nfds: ClassVar[int] = 0
    head: ClassVar[struct.Struct] = struct.Struct("<iI")

    def body(self) -> bytes:
        line = " ".join(self.reason.splitlines())
        # what a cut leaves of a character goes too
        text = line.encode(errors="replace")[:MAX_REASON].decode(errors="ignore").encode()
        return self.head.pack(self.errno, len(text)) + text

    @classmethod
    def parse(cls, type: int, body: bytes) -> ErrorReply:
        check(len(body) >= cls.head.size, "error reply: cut off")
        number, size = cls.head.unpack_from(body)
        check(0 < number < 4096, f"error reply: errno {number} is not in 1..4095")
        check(size <= MAX_REASON and size == len(body) - cls.head.size, f"error reply: length {size} is wrong")
        return cls(type, number, body[cls.head.size :].decode(errors="replace"))

    @classmethod
    def of(cls, type: int, error: Exception) -> ErrorReply:
        """The reply for an error: its `errno` (EINVAL where it has none) and its text."""
        number = getattr(error, "errno", None)
        return cls(type, number if isinstance(number, int) and 0 < number < 4096 else errno.EINVAL, str(error))


# ---- the VMM asks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First message: struct { uint32_t version; uint32_t pad; uint64_t features; }."""

    version: int = VERSION
    features: int = 0
    type: ClassVar[Type] = Type.HELLO
    layout: ClassVar[struct.Struct] = struct.Struct("<I4xQ")


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """struct { uint32_t version, pad; uint64_t features; uint32_t max_fds, max_message, max_slots,
    max_grant_frames, max_ports, pad2; }, 40 bytes. `features`: those of the request that the daemon has."""

    version: int = VERSION
    features: int = 0
    max_fds: int = MAX_FDS
    max_message: int = MAX_MESSAGE
    max_slots: int = MAX_SLOTS
    max_grant_frames: int = MAX_GRANT_FRAMES
    max_ports: int = MAX_PORTS
    type: ClassVar[Type] = Type.HELLO
    reply: ClassVar[bool] = True
    layout: ClassVar[struct.Struct] = struct.Struct("<I4xQ5I4x")


@dataclass(frozen=True, slots=True)
class Register(Message):
    """struct { uint16_t domid, pad; uint32_t flags, vcpus, grant_version; uint8_t uuid[16]; char name[64]; }."""

    domid: int
    flags: int
    vcpus: int
    grant_version: int = 1
    uuid: bytes = bytes(16)
    name: str = ""
    type: ClassVar[Type] = Type.REGISTER
    layout: ClassVar[struct.Struct] = struct.Struct("<H2xIII16s64s")

    def __post_init__(self) -> None:
        check(0 < self.domid < DOMID_FIRST_RESERVED, f"domain {self.domid}: not in 1..{DOMID_FIRST_RESERVED - 1}")
        what = f"domain {self.domid}"
        check(not self.flags & ~int(RegisterFlag.LONG_MODE), f"{what}: unknown flags {self.flags:#x}")
        check(0 < self.vcpus <= MAX_VCPUS, f"{what}: {self.vcpus} vCPUs: not in 1..{MAX_VCPUS}")
        check(
            self.grant_version == 1,
            f"{what}: grant table version {self.grant_version} is not served; give the guest version 1",
            errno.EOPNOTSUPP,
        )
        check(len(self.uuid) == 16, f"{what}: a uuid has 16 bytes")
        check(len(self.name.encode()) <= 64, f"{what}: a name has at most 64 bytes")
        check(self.name.isprintable(), f"{what}: name {self.name!r} holds a character that cannot be printed")

    def body(self) -> bytes:
        return self.layout.pack(self.domid, self.flags, self.vcpus, self.grant_version, self.uuid, self.name.encode())

    @classmethod
    def parse(cls, body: bytes) -> Self:
        domid, flags, vcpus, grant_version, uuid, name = split(cls.layout, body, cls.__name__)
        return cls(domid, flags, vcpus, grant_version, uuid, _text(name, f"domain {domid}: name"))


@dataclass(frozen=True, slots=True)
class Resume(Register):
    """Register's body, to a daemon that was restarted: the domain has been running."""

    type: ClassVar[Type] = Type.RESUME


def listed(head: struct.Struct, entry: struct.Struct, body: bytes, what: str) -> list[tuple[int, ...]]:
    """n entries behind {u32 n, u32 pad}."""
    check(len(body) >= head.size, f"{what}: cut off")
    (count,) = split(head, body[: head.size], what)
    rest = body[head.size :]
    check(len(rest) == count * entry.size, f"{what}: {count} entries do not fill its {len(rest)} bytes")
    return list(entry.iter_unpack(rest))


@dataclass(frozen=True, slots=True)
class SlotRemove(Message):
    """struct { uint32_t slot, pad; }: replied once no request holds a page of it."""

    slot: int
    type: ClassVar[Type] = Type.SLOT_REMOVE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")


@dataclass(frozen=True, slots=True)
class GrantFrameRemove(Message):
    """struct { uint32_t index, pad; }."""

    index: int
    type: ClassVar[Type] = Type.GRANT_FRAME_REMOVE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")


@dataclass(frozen=True, slots=True)
class XenStore(Message):
    """The guest's XenStore page and port: struct { uint32_t port, pad; uint64_t offset; }, 1 descriptor (a memfd)."""

    port: int
    offset: int
    type: ClassVar[Type] = Type.XENSTORE
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<I4xQ")

    def __post_init__(self) -> None:
        check_port(self.port)
        check(self.offset % PAGE_SIZE == 0, f"xenstore page: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        check(0 <= self.offset <= MAX_OFFSET - PAGE_SIZE, f"xenstore page: offset {self.offset:#x} wraps")


@dataclass(frozen=True, slots=True)
class Start(Message):
    """Empty. Replied when the domain is served."""

    type: ClassVar[Type] = Type.START


@dataclass(frozen=True, slots=True)
class PortClosed(Message):
    """The guest closed this port, or was reset: struct { uint32_t port, pad; }; port 0xffffffff is all of them."""

    port: int
    type: ClassVar[Type] = Type.PORT_CLOSED
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")

    def __post_init__(self) -> None:
        if self.port != ALL_PORTS:
            check_port(self.port)


@dataclass(frozen=True, slots=True)
class Disk(Message):
    """A disk for the guest: struct { uint32_t devid, flags; char vdev[16]; }, 1 descriptor (file or block device)."""

    devid: int
    flags: int
    vdev: str
    type: ClassVar[Type] = Type.DISK
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<II16s")

    def __post_init__(self) -> None:
        check(not self.flags & ~int(DiskFlag.READONLY | DiskFlag.CDROM), f"disk {self.devid}: unknown flags")
        check(0 < len(self.vdev.encode()) <= 16, f"disk {self.devid}: vdev has 1 to 16 bytes")
        check(self.vdev.isascii() and self.vdev.isalnum(), f"disk {self.devid}: vdev {self.vdev!r} is no name")

    def body(self) -> bytes:
        return self.layout.pack(self.devid, self.flags, self.vdev.encode())

    @classmethod
    def parse(cls, body: bytes) -> Self:
        devid, flags, vdev = split(cls.layout, body, cls.__name__)
        return cls(devid, flags, _text(vdev, f"disk {devid}: vdev"))


@dataclass(frozen=True, slots=True)
class DiskRemove(Message):
    """struct { uint32_t devid, pad; }: replied when the disk is gone."""

    devid: int
    type: ClassVar[Type] = Type.DISK_REMOVE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")


@dataclass(frozen=True, slots=True)
class Vif(Message):
    """A network interface: struct { uint32_t devid, queues; uint8_t mac[6]; uint16_t mtu; }, a descriptor a queue.

    mac: 6 bytes, the guest's; mtu: 0: the TAP's
    """

    devid: int
    queues: int
    mac: bytes
    mtu: int = 0
    type: ClassVar[Type] = Type.VIF
    layout: ClassVar[struct.Struct] = struct.Struct("<II6sH")

    def __post_init__(self) -> None:
        check(self.devid < 1 << 16, f"vif {self.devid}: not below 65536")
        check(0 < self.queues <= MAX_QUEUES, f"vif {self.devid}: {self.queues} queues, 1 to {MAX_QUEUES} are served")
        check(len(self.mac) == 6 and not self.mac[0] & 1 and any(self.mac), f"vif {self.devid}: no MAC address")
        check(self.mtu == 0 or 68 <= self.mtu <= 65521, f"vif {self.devid}: mtu {self.mtu} is not in 68..65521")

    @property
    def nfds(self) -> int:
        return self.queues


@dataclass(frozen=True, slots=True)
class VifRemove(Message):
    """struct { uint32_t devid, pad; }: replied when the interface is gone."""

    devid: int
    type: ClassVar[Type] = Type.VIF_REMOVE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Orderly end: struct { uint32_t reason, pad; }; reason as SHUTDOWN_* of sched.h (0 poweroff .. 5 soft reset)."""

    reason: int = 0
    type: ClassVar[Type] = Type.RELEASE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Empty; either side asks."""

    type: ClassVar[Type] = Type.PING


@dataclass(frozen=True, slots=True)
class Console(Message):
    """The guest's primary console: struct { uint32_t port, pad; uint64_t gfn; }; its page is in a memory slot."""

    port: int
    gfn: int
    type: ClassVar[Type] = Type.CONSOLE
    layout: ClassVar[struct.Struct] = struct.Struct("<I4xQ")

    def __post_init__(self) -> None:
        check_port(self.port)
        check(0 <= self.gfn < MAX_GFN, f"console page: gfn {self.gfn:#x} is not below {MAX_GFN:#x}")


# ---- the daemon asks -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BindPorts(Message):
    """Bind guest ports to eventfds, all or none: struct { uint32_t n, pad; struct { uint32_t port, fd_index; }[n]; }.

    n descriptors: kick eventfds, which the guest's EVTCHNOP_send on that port has to signal.
    """

    ports: tuple[tuple[int, int], ...]
    type: ClassVar[Type] = Type.BIND_PORTS
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")
    entry: ClassVar[struct.Struct] = struct.Struct("<II")

    def __post_init__(self) -> None:
        for port, _ in self.ports:
            check_port(port)
        check(len(self.ports) > 0, "no port to bind")
        check(len({port for port, _ in self.ports}) == len(self.ports), "a port is named twice")
        check_indices([index for _, index in self.ports], shared=False)

    @property
    def nfds(self) -> int:
        return len(self.ports)

    def body(self) -> bytes:
        return self.layout.pack(len(self.ports)) + b"".join(self.entry.pack(*each) for each in self.ports)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(tuple((port, index) for port, index in listed(cls.layout, cls.entry, body, "port list")))


@dataclass(frozen=True, slots=True)
class BindPortsReply(BindPorts):
    """As BindPorts, the same ports; n descriptors: notify eventfds, each the eventfd of an irqfd for that port."""

    reply: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class UnbindPorts(Message):
    """struct { uint32_t n, pad; uint32_t port[n]; }: a port that is not bound (any more) is no error."""

    ports: tuple[int, ...]
    type: ClassVar[Type] = Type.UNBIND_PORTS
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")
    entry: ClassVar[struct.Struct] = struct.Struct("<I")

    def __post_init__(self) -> None:
        check(0 < len(self.ports) < MAX_PORTS, f"{len(self.ports)} ports to unbind, 1..{MAX_PORTS - 1} expected")
        for port in self.ports:
            check_port(port)

    def body(self) -> bytes:
        return self.layout.pack(len(self.ports)) + b"".join(self.entry.pack(port) for port in self.ports)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(tuple(port for (port,) in listed(cls.layout, cls.entry, body, "port list")))
