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

`MESSAGES` says for each type who asks, what answers, and in which state it may be sent. The messages'
classes are in messages.py and tables.py; all of their names can be had from here.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from evtchnd.errors import VmmError
from evtchnd.messages import (
    ALL_FEATURES,
    ALL_PORTS,
    MAX_FDS,
    MAX_GFN,
    MAX_GRANT_FRAMES,
    MAX_MESSAGE,
    MAX_OFFSET,
    MAX_PORTS,
    MAX_REASON,
    MAX_SLOTS,
    MAX_VCPUS,
    VERSION,
    Ack,
    BindPorts,
    BindPortsReply,
    Console,
    Disk,
    DiskFlag,
    DiskRemove,
    ErrorReply,
    Feature,
    Flag,
    GrantFrameRemove,
    Hello,
    HelloReply,
    Kind,
    Message,
    Ping,
    PortClosed,
    Register,
    RegisterFlag,
    Release,
    Resume,
    SlotRemove,
    Start,
    Type,
    UnbindPorts,
    Vif,
    VifRemove,
    XenStore,
    check,
)
from evtchnd.tables import (
    GrantEntry,
    GrantFrameAdd,
    MemoryEntry,
    PortEntry,
    SlotAdd,
    TableBegin,
    TableChunk,
    TableCommit,
    TableEntry,
    check_table,
)

MAGIC = 0x48435645
HEADER = struct.Struct("<IHHIII12x")
HEADER_SIZE = HEADER.size


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
    Type.CONSOLE: Spec(Console, True, _SETUP),
    Type.VIF: Spec(Vif, True, _OURS),
    Type.VIF_REMOVE: Spec(VifRemove, True, _OURS),
    Type.BIND_PORTS: Spec(BindPorts, False, _OURS, daemon=True, reply=BindPortsReply),
    Type.UNBIND_PORTS: Spec(UnbindPorts, False, _OURS, daemon=True),
}

_THEN: Mapping[Type, State] = {
    Type.HELLO: State.GREETED,
    Type.REGISTER: State.SETUP,
    Type.RESUME: State.SETUP,
    Type.START: State.SERVED,
    Type.RELEASE: State.GONE,
}


def after(state: State, type: Type) -> State:
    """The state once a VMM's request of this type has succeeded. VmmError: it must not be asked in `state`."""
    spec = MESSAGES[type]
    if not spec.vmm:
        raise VmmError(f"{type.name} is not a VMM's to ask", errno.EPROTO)
    if state not in spec.states:
        raise VmmError(f"{type.name} must not come in state {state.name}", errno.EPROTO)
    return _THEN.get(type, state)


Body = Message | Ack | ErrorReply


def pack(message: Body, *, id: int) -> bytes:
    """A whole message. `message.nfds` descriptors have to travel with it. VmmError: a value does not fit."""
    flags = Flag.REPLY if message.reply else 0
    if isinstance(message, ErrorReply):
        flags |= Flag.ERROR
    if isinstance(message, MemoryEntry | GrantEntry):
        check(message.fd_index == 0, "descriptor index must be 0: there is one descriptor")
    try:
        body = message.body()
    except struct.error as e:
        raise VmmError(f"{type(message).__name__}: {e}") from None
    size = HEADER_SIZE + len(body)
    check(size <= MAX_MESSAGE, f"message of {size} bytes, {MAX_MESSAGE} at most", errno.EMSGSIZE)
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
    # int: the complement of an IntFlag (3.11) holds known flags only
    if flags & ~int(Flag.REPLY | Flag.ERROR) or flags == Flag.ERROR:
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
    check(header.nfds == nfds, f"{nfds} descriptors came, the header says {header.nfds}")
    if header.flags & Flag.ERROR:
        check(nfds == 0, f"{nfds} descriptors came with an error")
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
        check(not body, f"{len(body)} bytes in a reply that is empty")
        message = Ack(header.type)
    if isinstance(message, MemoryEntry | GrantEntry):
        check(message.fd_index == 0, "descriptor index must be 0: there is one descriptor")
    check(nfds == message.nfds, f"{Type(header.type).name}: {nfds} descriptors, {message.nfds} expected")
    return message


__all__ = [
    "ALL_FEATURES",
    "ALL_PORTS",
    "Ack",
    "BindPorts",
    "BindPortsReply",
    "Body",
    "Console",
    "Disk",
    "DiskFlag",
    "DiskRemove",
    "ErrorReply",
    "Feature",
    "Flag",
    "GrantEntry",
    "GrantFrameAdd",
    "GrantFrameRemove",
    "HEADER",
    "HEADER_SIZE",
    "Header",
    "Hello",
    "HelloReply",
    "Kind",
    "MAGIC",
    "MAX_FDS",
    "MAX_GFN",
    "MAX_GRANT_FRAMES",
    "MAX_MESSAGE",
    "MAX_OFFSET",
    "MAX_PORTS",
    "MAX_REASON",
    "MAX_SLOTS",
    "MAX_VCPUS",
    "MESSAGES",
    "MemoryEntry",
    "Message",
    "Ping",
    "PortClosed",
    "PortEntry",
    "Register",
    "RegisterFlag",
    "Release",
    "Resume",
    "SlotAdd",
    "SlotRemove",
    "Spec",
    "Start",
    "State",
    "TableBegin",
    "TableChunk",
    "TableCommit",
    "TableEntry",
    "Type",
    "UnbindPorts",
    "Vif",
    "VifRemove",
    "VERSION",
    "WireError",
    "XenStore",
    "after",
    "check_table",
    "pack",
    "unpack",
    "unpack_header",
]
