"""The VMM's messages: bytes to dataclasses and back. Pure; the ABI in words is docs/protocol.md.

Every message is one SOCK_SEQPACKET record, little-endian, a header and a body:

    struct evtchnd_header {      /* 32 bytes                                   */
        uint32_t magic;          /*  0  'E' 'V' 'C' 'H' = 0x48435645           */
        uint16_t type;           /*  4  enum Type                              */
        uint16_t flags;          /*  6  REPLY = 1, ERROR = 2 (only with REPLY) */
        uint32_t id;             /*  8  the asker's number; a reply repeats it */
        uint32_t size;           /* 12  of the whole message, header included  */
        uint32_t nfds;           /* 16  descriptors that travel with it        */
        uint32_t reserved[3];    /* 20  0                                      */
    };

`MESSAGES` says for each type who asks, what answers, and in which state it may be sent. A message's class checks its
values when it is made, so that what was decoded is valid; tables are checked as a whole by `check_table`.
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, IntEnum, IntFlag, auto
from typing import Any, ClassVar, Self

from evtchnd.abi import DOMID_FIRST_RESERVED, EVTCHN_2L_PORTS_64, PAGE_SHIFT, PAGE_SIZE
from evtchnd.errors import VmmError

VERSION = 1
MAGIC = 0x48435645
HEADER = struct.Struct("<IHHIII12x")
HEADER_SIZE = HEADER.size

MAX_MESSAGE = 64 << 10  # far below the kernel's default socket buffer (208 KiB): a message is never too big to queue
MAX_FDS = 253  # SCM_MAX_FD of the kernel
MAX_SLOTS = 512  # KVM's user slots of a guest are 509 (x86, before 5.12): every older VMM's table fits
MAX_GRANT_FRAMES = 64  # Xen's gnttab_max_frames
MAX_PORTS = EVTCHN_2L_PORTS_64  # 2-level ABI, 64-bit guest
MAX_VCPUS = 4096  # CPUID and ACPI end below; the daemon keeps nothing a vCPU
MAX_REASON = 1024
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


class State(Enum):
    """Where a VMM's connection is (docs/protocol.md, "States")."""

    NEW = auto()  # connected: only HELLO
    GREETED = auto()  # versions agreed: REGISTER or RESUME
    SETUP = auto()  # the domain is ours: tables, slots, grant frames, XenStore
    SERVED = auto()  # after START
    GONE = auto()  # after RELEASE or the end of the connection


class WireError(VmmError):
    """What came is not a message of this protocol.

    `header` is its header where that could be read: an ERROR reply can be sent, and the connection goes on. Without
    it the connection has to end.
    """

    def __init__(self, reason: str, errno: int = errno.EINVAL, header: Header | None = None) -> None:
        super().__init__(reason, errno)
        self.header = header


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header after magic and size were checked. `type` may be unknown."""

    type: int
    flags: int
    id: int
    nfds: int

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & Flag.REPLY)


def _check(ok: bool, reason: str, number: int = errno.EINVAL) -> None:
    if not ok:
        raise VmmError(reason, number)


def _check_port(port: int) -> None:
    _check(0 < port < MAX_PORTS, f"port {port}: not in 1..{MAX_PORTS - 1}", errno.ERANGE)


def _check_indices(indices: Sequence[int], *, shared: bool) -> int:
    """Number of descriptors that `indices` name: 0..n-1, each used; `shared`: more than once is fine."""
    used = set(indices)
    count = len(used)
    _check(shared or len(indices) == count, "a descriptor index is used twice")
    _check(used == set(range(count)), "descriptor indices must be 0, 1, 2, ... with none left out")
    _check(count <= MAX_FDS, f"{count} descriptors in a message, {MAX_FDS} at most", errno.E2BIG)
    return count


def _text(raw: bytes, what: str) -> str:
    """A char array: UTF-8, padded with NUL to its size (all of it may be used), no control character."""
    head, _, rest = raw.partition(b"\0")
    _check(not rest.strip(b"\0"), f"{what}: bytes after its end must be 0")
    try:
        text = head.decode()
    except UnicodeDecodeError:
        raise VmmError(f"{what}: not UTF-8") from None
    _check(text.isprintable(), f"{what}: {text!r} holds a character that cannot be printed")
    return text


def _values(message: Message | PortEntry) -> tuple[Any, ...]:
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
        return self.layout.pack(*_values(self))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(*_split(cls.layout, body, cls.__name__))


def _split(layout: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    """Unpacks, and refuses padding that is not 0: a later version may give it a meaning."""
    _check(len(body) == layout.size, f"{what}: {len(body)} bytes of body, {layout.size} expected")
    values = layout.unpack(body)
    _check(layout.pack(*values) == body, f"{what}: reserved bytes must be 0")
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
        text = self.reason.encode(errors="replace")[:MAX_REASON]
        while text and text[-1] & 0xC0 == 0x80 and not _decodes(text):  # cut inside a character
            text = text[:-1]
        if not _decodes(text):
            text = text[:-1]
        return self.head.pack(self.errno, len(text)) + text

    @classmethod
    def parse(cls, type: int, body: bytes) -> ErrorReply:
        _check(len(body) >= cls.head.size, "error reply: cut off")
        number, size = cls.head.unpack_from(body)
        _check(0 < number < 4096, f"error reply: errno {number} is not in 1..4095")
        _check(size <= MAX_REASON and size == len(body) - cls.head.size, f"error reply: length {size} is wrong")
        return cls(type, number, body[cls.head.size :].decode(errors="replace"))

    @classmethod
    def of(cls, type: int, error: Exception) -> ErrorReply:
        """The reply for an error: its `errno` (EINVAL where it has none) and its text."""
        number = getattr(error, "errno", None)
        return cls(type, number if isinstance(number, int) and 0 < number < 4096 else errno.EINVAL, str(error))


def _decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


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
        _check(0 < self.domid < DOMID_FIRST_RESERVED, f"domain {self.domid}: not in 1..{DOMID_FIRST_RESERVED - 1}")
        what = f"domain {self.domid}"
        _check(not self.flags & ~RegisterFlag.LONG_MODE, f"{what}: unknown flags {self.flags:#x}")
        _check(0 < self.vcpus <= MAX_VCPUS, f"{what}: {self.vcpus} vCPUs: not in 1..{MAX_VCPUS}")
        _check(
            self.grant_version == 1,
            f"{what}: grant table version {self.grant_version} is not served; give the guest version 1",
            errno.EOPNOTSUPP,
        )
        _check(len(self.uuid) == 16, f"{what}: a uuid has 16 bytes")
        _check(len(self.name.encode()) <= 64, f"{what}: a name has at most 64 bytes")
        _check(self.name.isprintable(), f"{what}: name {self.name!r} holds a character that cannot be printed")

    def body(self) -> bytes:
        return self.layout.pack(self.domid, self.flags, self.vcpus, self.grant_version, self.uuid, self.name.encode())

    @classmethod
    def parse(cls, body: bytes) -> Self:
        domid, flags, vcpus, grant_version, uuid, name = _split(cls.layout, body, cls.__name__)
        return cls(domid, flags, vcpus, grant_version, uuid, _text(name, f"domain {domid}: name"))


@dataclass(frozen=True, slots=True)
class Resume(Register):
    """Register's body, to a daemon that was restarted: the domain has been running."""

    type: ClassVar[Type] = Type.RESUME


@dataclass(frozen=True, slots=True)
class MemoryEntry(Message):
    """A slot of guest memory: struct { uint32_t slot, fd_index; uint64_t gfn, pages, offset; }.

    `pages` of 4096 bytes from guest frame `gfn` on; `offset` bytes into the descriptor (a multiple of 4096).
    Alone it is the body of SLOT_ADD, with one descriptor (fd_index 0).
    """

    slot: int
    fd_index: int
    gfn: int
    pages: int
    offset: int
    type: ClassVar[Type] = Type.SLOT_ADD
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<IIQQQ")

    def __post_init__(self) -> None:
        what = f"memory slot {self.slot}"
        _check(0 <= self.slot < MAX_SLOTS, f"{what}: not in 0..{MAX_SLOTS - 1}", errno.ERANGE)
        _check(self.pages > 0, f"{what}: no pages")
        # Python's integers do not wrap; a C reader compares pages > MAX_GFN - gfn instead
        _check(0 <= self.gfn <= MAX_GFN - self.pages, f"{what}: gfn {self.gfn:#x} + {self.pages:#x} pages wraps")
        _check(self.offset % PAGE_SIZE == 0, f"{what}: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        _check(0 <= self.offset <= MAX_OFFSET - self.pages * PAGE_SIZE, f"{what}: offset {self.offset:#x} wraps")


@dataclass(frozen=True, slots=True)
class GrantEntry(Message):
    """A frame of the grant table: struct { uint32_t index, fd_index; uint64_t offset; }.

    Alone it is the body of GRANT_FRAME_ADD, with one descriptor (fd_index 0).
    """

    index: int
    fd_index: int
    offset: int
    type: ClassVar[Type] = Type.GRANT_FRAME_ADD
    fds: ClassVar[int] = 1
    layout: ClassVar[struct.Struct] = struct.Struct("<IIQ")

    def __post_init__(self) -> None:
        what = f"grant frame {self.index}"
        _check(0 <= self.index < MAX_GRANT_FRAMES, f"{what}: not in 0..{MAX_GRANT_FRAMES - 1}", errno.ERANGE)
        _check(self.offset % PAGE_SIZE == 0, f"{what}: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        _check(0 <= self.offset <= MAX_OFFSET - PAGE_SIZE, f"{what}: offset {self.offset:#x} wraps")


@dataclass(frozen=True, slots=True)
class PortEntry:
    """A bound port: struct { uint32_t port, kick_fd_index, notify_fd_index, flags; }; flags is 0."""

    port: int
    kick_fd_index: int
    notify_fd_index: int
    flags: int = 0
    layout: ClassVar[struct.Struct] = struct.Struct("<IIII")

    def __post_init__(self) -> None:
        _check_port(self.port)
        _check(self.flags == 0, f"port {self.port}: unknown flags {self.flags:#x}")


TableEntry = MemoryEntry | GrantEntry | PortEntry


@dataclass(frozen=True, slots=True)
class TableBegin(Message):
    """struct { uint32_t kind, entries; }: `entries` of `kind` come in chunks. Drops a table that is not committed."""

    kind: int
    entries: int
    type: ClassVar[Type] = Type.TABLE_BEGIN
    layout: ClassVar[struct.Struct] = struct.Struct("<II")

    def __post_init__(self) -> None:
        most = _capacity(self.kind)
        _check(0 <= self.entries <= most, f"table of {self.entries} entries, {most} at most", errno.E2BIG)


@dataclass(frozen=True, slots=True)
class TableChunk(Message):
    """struct { uint32_t kind, n; } and n entries, with the descriptors that they name (253 at most)."""

    kind: int
    entries: tuple[TableEntry, ...]
    type: ClassVar[Type] = Type.TABLE_CHUNK
    layout: ClassVar[struct.Struct] = struct.Struct("<II")

    def __post_init__(self) -> None:
        of = _entry_class(self.kind)
        _check(all(type(entry) is of for entry in self.entries), f"table kind {self.kind}: entries of another kind")
        _check(len(self.entries) > 0, "table chunk without an entry")
        _check_indices(self._indices(), shared=self.kind != Kind.PORTS)

    def _indices(self) -> list[int]:
        indices: list[int] = []
        for entry in self.entries:
            if isinstance(entry, PortEntry):
                indices += (entry.kick_fd_index, entry.notify_fd_index)
            else:
                indices.append(entry.fd_index)
        return indices

    @property
    def nfds(self) -> int:
        return len(set(self._indices()))

    def body(self) -> bytes:
        entry = _entry_class(self.kind).layout
        return self.layout.pack(self.kind, len(self.entries)) + b"".join(
            entry.pack(*_values(each)) for each in self.entries
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        kind, count, rest = _counted(cls.layout, body, "table chunk")
        of = _entry_class(kind)
        _check(len(rest) == count * of.layout.size, f"table chunk: {count} entries do not fill its {len(rest)} bytes")
        return cls(kind, tuple(of(*values) for values in of.layout.iter_unpack(rest)))


def _counted(layout: struct.Struct, body: bytes, what: str) -> tuple[int, int, bytes]:
    _check(len(body) >= layout.size, f"{what}: cut off")
    first, second = layout.unpack_from(body)
    return first, second, body[layout.size :]


def _entry_class(kind: int) -> type[MemoryEntry] | type[GrantEntry] | type[PortEntry]:
    classes: dict[int, type[MemoryEntry] | type[GrantEntry] | type[PortEntry]] = {
        Kind.MEMORY: MemoryEntry,
        Kind.GRANTS: GrantEntry,
        Kind.PORTS: PortEntry,
    }
    _check(kind in classes, f"table kind {kind} is unknown")
    return classes[kind]


def _capacity(kind: int) -> int:
    _entry_class(kind)
    return {Kind.MEMORY: MAX_SLOTS, Kind.GRANTS: MAX_GRANT_FRAMES, Kind.PORTS: MAX_PORTS - 1}[Kind(kind)]


@dataclass(frozen=True, slots=True)
class TableCommit(Message):
    """struct { uint32_t kind, pad; }: the whole table is replaced, or refused and nothing has changed."""

    kind: int
    type: ClassVar[Type] = Type.TABLE_COMMIT
    layout: ClassVar[struct.Struct] = struct.Struct("<I4x")

    def __post_init__(self) -> None:
        _entry_class(self.kind)


# SLOT_ADD and GRANT_FRAME_ADD are one entry and its descriptor
SlotAdd = MemoryEntry
GrantFrameAdd = GrantEntry


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
        _check_port(self.port)
        _check(self.offset % PAGE_SIZE == 0, f"xenstore page: offset {self.offset:#x} is not a multiple of {PAGE_SIZE}")
        _check(0 <= self.offset <= MAX_OFFSET - PAGE_SIZE, f"xenstore page: offset {self.offset:#x} wraps")


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
            _check_port(self.port)


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
        _check(not self.flags & ~(DiskFlag.READONLY | DiskFlag.CDROM), f"disk {self.devid}: unknown flags")
        _check(0 < len(self.vdev.encode()) <= 16, f"disk {self.devid}: vdev has 1 to 16 bytes")
        _check(self.vdev.isascii() and self.vdev.isalnum(), f"disk {self.devid}: vdev {self.vdev!r} is no name")

    def body(self) -> bytes:
        return self.layout.pack(self.devid, self.flags, self.vdev.encode())

    @classmethod
    def parse(cls, body: bytes) -> Self:
        devid, flags, vdev = _split(cls.layout, body, cls.__name__)
        return cls(devid, flags, _text(vdev, f"disk {devid}: vdev"))


@dataclass(frozen=True, slots=True)
class DiskRemove(Message):
    """struct { uint32_t devid, pad; }: replied when the disk is gone."""

    devid: int
    type: ClassVar[Type] = Type.DISK_REMOVE
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
            _check_port(port)
        _check(len(self.ports) > 0, "no port to bind")
        _check(len({port for port, _ in self.ports}) == len(self.ports), "a port is named twice")
        _check_indices([index for _, index in self.ports], shared=False)

    @property
    def nfds(self) -> int:
        return len(self.ports)

    def body(self) -> bytes:
        return self.layout.pack(len(self.ports)) + b"".join(self.entry.pack(*each) for each in self.ports)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(tuple((port, index) for port, index in _list(cls.layout, cls.entry, body, "port list")))


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
        _check(0 < len(self.ports) < MAX_PORTS, f"{len(self.ports)} ports to unbind, 1..{MAX_PORTS - 1} expected")
        for port in self.ports:
            _check_port(port)

    def body(self) -> bytes:
        return self.layout.pack(len(self.ports)) + b"".join(self.entry.pack(port) for port in self.ports)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(tuple(port for (port,) in _list(cls.layout, cls.entry, body, "port list")))


# ---- the table, and bytes to messages and back -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spec:
    """What a type's request carries, who asks (`vmm`, `daemon`), in which states, and what answers it."""

    request: type[Message]
    vmm: bool
    states: frozenset[State]
    daemon: bool = False
    reply: type[Message] | None = None  # None: Ack


_NEW = frozenset({State.NEW})
_GREETED = frozenset({State.GREETED})
_SETUP = frozenset({State.SETUP})
_SERVED = frozenset({State.SERVED})
_OURS = _SETUP | _SERVED
_ANY = _GREETED | _OURS

MESSAGES: Mapping[Type, Spec] = {
    Type.HELLO: Spec(Hello, True, _NEW, reply=HelloReply),
    Type.REGISTER: Spec(Register, True, _GREETED),
    Type.RESUME: Spec(Resume, True, _GREETED),
    Type.TABLE_BEGIN: Spec(TableBegin, True, _SETUP),
    Type.TABLE_CHUNK: Spec(TableChunk, True, _SETUP),
    Type.TABLE_COMMIT: Spec(TableCommit, True, _SETUP),
    Type.SLOT_ADD: Spec(MemoryEntry, True, _OURS),
    Type.SLOT_REMOVE: Spec(SlotRemove, True, _OURS),
    Type.GRANT_FRAME_ADD: Spec(GrantEntry, True, _OURS),
    Type.GRANT_FRAME_REMOVE: Spec(GrantFrameRemove, True, _OURS),
    Type.XENSTORE: Spec(XenStore, True, _SETUP),
    Type.START: Spec(Start, True, _SETUP),
    Type.PORT_CLOSED: Spec(PortClosed, True, _OURS),
    Type.DISK: Spec(Disk, True, _OURS),
    Type.DISK_REMOVE: Spec(DiskRemove, True, _OURS),
    Type.RELEASE: Spec(Release, True, _OURS),
    Type.PING: Spec(Ping, True, _ANY, daemon=True),
    Type.BIND_PORTS: Spec(BindPorts, False, _OURS, daemon=True, reply=BindPortsReply),
    Type.UNBIND_PORTS: Spec(UnbindPorts, False, _OURS, daemon=True),
}

Body = Message | Ack | ErrorReply


def pack(message: Body, *, id: int) -> bytes:
    """A whole message. `message.nfds` descriptors have to travel with it. VmmError: a value does not fit."""
    flags = Flag.REPLY if message.reply else 0
    if isinstance(message, ErrorReply):
        flags |= Flag.ERROR
    if isinstance(message, MemoryEntry | GrantEntry):
        _check(message.fd_index == 0, "descriptor index must be 0: there is one descriptor")
    try:
        body = message.body()
    except struct.error as e:
        raise VmmError(f"{type(message).__name__}: {e}") from None
    size = HEADER_SIZE + len(body)
    _check(size <= MAX_MESSAGE, f"message of {size} bytes, {MAX_MESSAGE} at most", errno.EMSGSIZE)
    return HEADER.pack(MAGIC, message.type, flags, id, size, message.nfds) + body


def unpack_header(data: bytes) -> Header:
    """Checks what does not depend on the type. WireError without a header: the connection has to end."""
    if len(data) < HEADER_SIZE:
        raise WireError(f"message of {len(data)} bytes, a header has {HEADER_SIZE}", errno.EBADMSG)
    magic, kind, flags, id, size, nfds = values = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"magic {magic:#010x} is not {MAGIC:#010x}", errno.EBADMSG)
    header = Header(kind, flags, id, nfds)
    if size != len(data):
        raise WireError(f"size {size} in the header of a message of {len(data)} bytes", errno.EBADMSG, header)
    if flags & ~(Flag.REPLY | Flag.ERROR) or flags == Flag.ERROR:
        raise WireError(f"flags {flags:#x} are unknown", errno.EBADMSG, header)
    if HEADER.pack(*values) != data[:HEADER_SIZE]:
        raise WireError("reserved words of the header must be 0", errno.EBADMSG, header)
    return header


def unpack(data: bytes, nfds: int) -> tuple[Header, Body]:
    """A message that came with `nfds` descriptors. WireError where it is none (see there)."""
    header = unpack_header(data)
    try:
        return header, _unpack_body(header, data[HEADER_SIZE:], nfds)
    except WireError:
        raise
    except VmmError as e:
        raise WireError(str(e), e.errno, header) from None


def _unpack_body(header: Header, body: bytes, nfds: int) -> Body:
    _check(header.nfds == nfds, f"{nfds} descriptors came, the header says {header.nfds}")
    if header.flags & Flag.ERROR:
        _check(nfds == 0, f"{nfds} descriptors came with an error")
        return ErrorReply.parse(header.type, body)
    try:
        spec = MESSAGES[Type(header.type)]
    except ValueError:
        raise VmmError(f"message type {header.type} is unknown", errno.ENOSYS) from None
    message: Body
    if not header.is_reply:
        message = spec.request.parse(body)
    elif spec.reply is not None:
        message = spec.reply.parse(body)
    else:
        _check(not body, f"{len(body)} bytes in a reply that is empty")
        message = Ack(header.type)
    if isinstance(message, MemoryEntry | GrantEntry):
        _check(message.fd_index == 0, "descriptor index must be 0: there is one descriptor")
    _check(nfds == message.nfds, f"{Type(header.type).name}: {nfds} descriptors, {message.nfds} expected")
    return message


def _list(head: struct.Struct, entry: struct.Struct, body: bytes, what: str) -> list[tuple[int, ...]]:
    """n entries behind {u32 n, u32 pad}."""
    _check(len(body) >= head.size, f"{what}: cut off")
    (count,) = _split(head, body[: head.size], what)
    rest = body[head.size :]
    _check(len(rest) == count * entry.size, f"{what}: {count} entries do not fill its {len(rest)} bytes")
    return list(entry.iter_unpack(rest))


def check_table(entries: Sequence[TableEntry]) -> None:
    """A whole table: no slot, frame or port twice; no guest frame in two slots. VmmError names the pair."""
    seen: set[int] = set()
    for entry in entries:
        if isinstance(entry, MemoryEntry):
            what, number = "memory slot", entry.slot
        elif isinstance(entry, GrantEntry):
            what, number = "grant frame", entry.index
        else:
            what, number = "port", entry.port
        _check(number not in seen, f"{what} {number} is there twice", errno.EEXIST)
        seen.add(number)
    slots = sorted((entry for entry in entries if isinstance(entry, MemoryEntry)), key=lambda entry: entry.gfn)
    for low, high in itertools.pairwise(slots):
        _check(
            low.gfn + low.pages <= high.gfn,
            f"memory slots {low.slot} ({low.gfn:#x} + {low.pages:#x} pages) and {high.slot} ({high.gfn:#x}) overlap",
            errno.EEXIST,
        )
