"""XenStore's wire format: header, operations, errors, paths, permissions.

    struct xsd_sockmsg (io/xs_wire.h)            after it: `len` bytes, mostly strings that end in NUL
      0  u32 type     operation, echoed
      4  u32 req_id   echoed
      8  u32 tx_id    0 = no transaction, echoed
     12  u32 len      at most 4096, or the connection ends

Sources: io/xs_wire.h, docs/misc/xenstore.txt. Pure; what a guest sends is checked before use.
"""

from __future__ import annotations

import errno as _errno
import re
import struct
from collections.abc import Iterable
from enum import IntEnum

from ..abi import XENSTORE_PAYLOAD_MAX
from ..errors import EvtchndError

HEADER = struct.Struct("<4I")
HEADER_SIZE = HEADER.size
PAYLOAD_MAX = XENSTORE_PAYLOAD_MAX
ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048


class Op(IntEnum):
    """xs_wire.h: enum xsd_sockmsg_type. 20 is a hole (RESTRICT was there)."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


# Only these may be sent: clients translate the string by their own copy of xs_wire.h's table.
ERROR_NAMES = (
    *("EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO", "ENOTEMPTY", "ENOSYS", "EROFS"),
    *("EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM"),
)

# Words of the ring page (io/xs_wire.h struct xenstore_domain_interface; their places are in stream.py): connection,
# server_features, error
RING_CONNECTED = 0
RING_RECONNECT = 1
FEATURE_RECONNECTION = 1 << 0
FEATURE_ERROR = 1 << 1
FEATURE_WATCHDEPTH = 1 << 2
FEATURES = FEATURE_RECONNECTION | FEATURE_ERROR | FEATURE_WATCHDEPTH
ERROR_COMM = 1
ERROR_RINGIDX = 2
ERROR_PROTO = 3


class XenStoreError(EvtchndError, OSError):
    """What the store answers with: `.name` "ENOENT", `.errno` the host's number for it."""

    def __init__(self, name: str, what: str = "") -> None:
        super().__init__(getattr(_errno, name, _errno.EINVAL), f"{name}: {what}" if what else name)
        self.name = name

    def __str__(self) -> str:
        return str(self.strerror)


class PathTooLongError(XenStoreError):
    """EINVAL: `.size` is above the quota."""

    def __init__(self, size: int) -> None:
        super().__init__("EINVAL", "path is too long")
        self.size = size


class ProtocolError(EvtchndError):
    """A stream of messages is lost (payload above 4096): its connection has to end."""


def pack(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """One message. `payload` must not exceed PAYLOAD_MAX."""
    return HEADER.pack(op, req_id, tx_id, len(payload)) + payload


class Parser:
    """Cuts a byte stream into messages; keeps at most one that is not whole."""

    __slots__ = ("_at", "_buffer")

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0

    def feed(self, data: bytes) -> None:
        """More bytes of the stream."""
        self._buffer = self._buffer[self._at :] + data if self._at < len(self._buffer) else data
        self._at = 0

    def next(self) -> tuple[int, int, int, bytes] | None:
        """(type, req_id, tx_id, payload) of the next whole message. ProtocolError for a length above 4096."""
        buffer, at = self._buffer, self._at
        if len(buffer) - at < HEADER_SIZE:
            return None
        op, req_id, tx_id, length = HEADER.unpack_from(buffer, at)
        if length > PAYLOAD_MAX:
            raise ProtocolError(f"a message of {length} bytes, {PAYLOAD_MAX} at most")
        end = at + HEADER_SIZE + length
        if len(buffer) < end:
            return None
        self._at = end
        return op, req_id, tx_id, buffer[at + HEADER_SIZE : end]

    def rest(self) -> bytes:
        """What is held back."""
        return self._buffer[self._at :]

    @property
    def partial(self) -> int:
        """Bytes held back."""
        return len(self._buffer) - self._at


# ---- paths: bytes inside, `str` at the edge

_PATH_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-/_@"
_DOMAIN_PREFIX = re.compile(rb"/local/domain/[0-9]{1,5}/")


def canonical(path: bytes, home: bytes, *, special: bool = False, quota: int = ABS_PATH_MAX) -> bytes:
    """The absolute form of `path` (no NUL in it); a relative one belongs to `home`. EINVAL as the C server has it.

    `quota` counts without /local/domain/<domid>/, which a guest that sends a relative path did not write.
    """
    first = path[:1]
    if path.translate(None, _PATH_BYTES) or (first == b"@" and not special):
        raise XenStoreError("EINVAL", "path has a character that is not allowed")
    if first != b"/" and first != b"@":
        path = b"%b/%b" % (home, path)
    if b"//" in path or (path[-1:] == b"/" and path != b"/"):
        raise XenStoreError("EINVAL", "path has an empty part")
    size = len(path)
    if size > quota and (match := _DOMAIN_PREFIX.match(path)) is not None:
        size -= match.end()
    if size > quota or len(path) > ABS_PATH_MAX:
        raise PathTooLongError(size)
    return path


def parent_of(path: bytes) -> bytes:
    """The path of the node above; `/` for a node at the top, for a special one and for `/` itself."""
    at = path.rfind(b"/")
    return path[:at] if at > 0 else b"/"


def strings(payload: bytes) -> list[bytes]:
    """The NUL-ended strings of a payload; what follows the last NUL is dropped, as the C server does."""
    return payload.split(b"\0")[:-1]


def one_string(payload: bytes) -> bytes:
    """A payload of exactly one NUL-ended string. EINVAL otherwise."""
    if payload.find(b"\0") != len(payload) - 1 or not payload:
        raise XenStoreError("EINVAL", "payload is not one string")
    return payload[:-1]


def number(text: bytes, most: int) -> int:
    """An unsigned decimal number up to `most`. EINVAL otherwise."""
    if not text.isdigit() or len(text) > 10 or (value := int(text)) > most:
        raise XenStoreError("EINVAL", "not a number in range")
    return value


# ---- permissions: a tuple of (domid, mask); the first is the owner with everyone's default

Perms = tuple[tuple[int, int], ...]
PERM_NONE = 0
PERM_READ = 1
PERM_WRITE = 2
PERM_OWNER = 4
PERM_ALL = PERM_READ | PERM_WRITE | PERM_OWNER
_LETTERS = b"nrwb"


def parse_perms(texts: Iterable[bytes]) -> Perms:
    """`[b"n0", b"r7"]` as permissions. EINVAL for another letter or a number that is no domid."""
    perms = []
    for text in texts:
        mask = _LETTERS.find(text[:1]) if text else -1
        if mask < 0:
            raise XenStoreError("EINVAL", "permission is not n, r, w or b with a domid")
        perms.append((number(text[1:], 0xFFFF), mask))
    return tuple(perms)


def format_perms(perms: Perms) -> list[bytes]:
    """The reverse of `parse_perms`."""
    return [b"%c%d" % (_LETTERS[mask & 3], domid) for domid, mask in perms]


# ---- str at the edge


def encode(text: str | bytes | int) -> bytes:
    """A value or path of the Python side as bytes; surrogate escapes become the bytes they stand for."""
    if isinstance(text, bytes):
        return text
    return str(text).encode("utf-8", "surrogateescape")


def encode_path(path: str) -> bytes:
    """A path as bytes; EINVAL for a NUL, which would end it early."""
    data = path.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise XenStoreError("EINVAL", "path has a NUL")
    return data


def decode(data: bytes) -> str:
    """The reverse of `encode`: any bytes survive."""
    return data.decode("utf-8", "surrogateescape")
