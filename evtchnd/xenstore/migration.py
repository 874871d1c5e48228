"""Xen's migration stream of a XenStore: a header, then records (docs/designs/xenstore-migration.md, version 2).

    header, big-endian                    record, little-endian here, as `flags` says
      0  u64 ident    "xenstore"            0  u32 type
      8  u32 version                        4  u32 len      of the body
     12  u32 flags    bit 0: big-endian     8  body, zeros to a multiple of 8

The document does not count the zeros in `len`, the C server does (tools/xenstored/xenstore_state.h), and goes by it
from one record to the next. Written as there, read both ways. The same with WATCH_DATA_EXTENDED: two bytes of padding
after its depth are in the document only. A record that is of no use here (GLOBAL_DATA, what is reserved) is skipped.
Pure: bytes in, named tuples out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

from ..errors import EvtchndError
from .wire import Perms

IDENT = int.from_bytes(b"xenstore", "big")
VERSION = 2
HEADER = struct.Struct(">QII")
_BIG_ENDIAN = 1
# A record's largest part is what waits for a connection: 16 MiB for a tool of domain 0 (quota.PRIVILEGED_OUT_MAX)
RECORD_MAX = 32 << 20
DOMID_INVALID = 0x7FF4
DEPTH_UNLIMITED = 0xFFFF
_LETTERS = b"nrwb"
_STALE = 1  # of a permission: its domain is gone


class Type(IntEnum):
    """Kinds of records."""

    END = 0
    GLOBAL_DATA = 1
    CONNECTION = 2
    WATCH = 3
    TRANSACTION = 4
    NODE = 5
    GLOBAL_QUOTA = 6
    DOMAIN = 7
    WATCH_EXT = 8


class MigrationError(EvtchndError):
    """The stream is not what it should be; the text says where."""


class Connection(NamedTuple):
    """A guest's ring. `received`: read from it, not yet a whole request; `pending`: to be written to it.

    Of a socket only `conn_id` counts: it does not outlive its server here.
    """

    conn_id: int
    domid: int
    target: int | None = None
    port: int = 0
    received: bytes = b""
    pending: bytes = b""
    partial: int = 0  # bytes of `pending` that end a reply whose beginning was written
    ring: bool = True


class Watch(NamedTuple):
    """`path` and `token` as the client sent them."""

    conn_id: int
    path: bytes
    token: bytes
    depth: int | None = None


class Transaction(NamedTuple):
    """An open transaction; its nodes follow with its numbers."""

    conn_id: int
    tx_id: int


class Node(NamedTuple):
    """A node. `perms` empty: it was removed (in a transaction; in a log, at all). `access`: 1 read, 2 written."""

    path: bytes
    value: bytes
    perms: Perms
    conn_id: int = 0
    tx_id: int = 0
    access: int = 0


class GlobalQuota(NamedTuple):
    """Quotas by name: of each domain that has none of its own, and of all together."""

    domain: Mapping[str, int]
    overall: Mapping[str, int]


class Domain(NamedTuple):
    """Features and quotas of one domain."""

    domid: int
    features: int
    quotas: Mapping[str, int]


Record = Connection | Watch | Transaction | Node | GlobalQuota | Domain


# ---- records as bytes

_RECORD = struct.Struct("<II")
_KIND_NODE = int(Type.NODE)
_NODE = struct.Struct("<IIIIHHHH")  # with the record's own two words
_CONNECTION = struct.Struct("<IHHHHIHHI")
_PERM = struct.Struct("<BBH")
_PADDING = [bytes(-size % 8) for size in range(8)]


def header() -> bytes:
    """What a stream begins with."""
    return HEADER.pack(IDENT, VERSION, 0)


def end() -> bytes:
    """What a stream ends with."""
    return _RECORD.pack(Type.END, 0)


def record(kind: int, body: bytes) -> bytes:
    """A record of that type."""
    padding = _PADDING[len(body) & 7]
    return b"".join((_RECORD.pack(kind, len(body) + len(padding)), body, padding))


def pack_perms(perms: Perms) -> bytes:
    """Permission specifiers, 4 bytes each."""
    return b"".join([_PERM.pack(_LETTERS[mask & 3], 0, domid) for domid, mask in perms])


def pack_node(path: bytes, value: bytes, specifiers: bytes, order: int = 0) -> bytes:
    """A committed node; `specifiers`: pack_perms(), empty for one that was removed. The log's most frequent record.

    `order`: 48 bits in `tx-id` and `access`, which readers ignore in such a record.
    """
    path_size, value_size = len(path) + 1, len(value)
    size = 16 + len(specifiers) + path_size + value_size
    padded = (size + 7) & ~7
    head = _NODE.pack(
        _KIND_NODE, padded, 0, order & 0xFFFFFFFF, path_size, value_size, order >> 32, len(specifiers) >> 2
    )
    return b"".join((head, specifiers, path, b"\0", value, _PADDING[size & 7]))


def pack(item: Record) -> bytes:
    """One record."""
    match item:
        case Node():
            specifiers = pack_perms(item.perms)
            head = struct.pack(
                "<IIHHHH",
                *(item.conn_id, item.tx_id, len(item.path) + 1, len(item.value), item.access, len(item.perms)),
            )
            return record(Type.NODE, b"".join((head, specifiers, item.path, b"\0", item.value)))
        case Connection():
            target = DOMID_INVALID if item.target is None else item.target
            head = _CONNECTION.pack(
                *(item.conn_id, 0 if item.ring else 1, 0, item.domid, target, item.port),
                *(len(item.received), item.partial, len(item.pending)),
            )
            return record(Type.CONNECTION, head + item.received + item.pending)
        case Watch():
            texts = item.path + b"\0" + item.token + b"\0"
            lengths = (item.conn_id, len(item.path) + 1, len(item.token) + 1)
            if item.depth is None:
                return record(Type.WATCH, struct.pack("<IHH", *lengths) + texts)
            depth = min(item.depth, DEPTH_UNLIMITED - 1)
            return record(Type.WATCH_EXT, struct.pack("<IHHH", *lengths, depth) + texts)
        case Transaction():
            return record(Type.TRANSACTION, struct.pack("<II", *item))
        case GlobalQuota():
            values = [*item.domain.values(), *item.overall.values()]
            head = struct.pack(f"<HH{len(values)}I", len(item.domain), len(item.overall), *values)
            return record(Type.GLOBAL_QUOTA, head + _names([*item.domain, *item.overall]))
        case Domain():
            values = list(item.quotas.values())
            head = struct.pack(f"<HHI{len(values)}I", item.domid, len(values), item.features, *values)
            return record(Type.DOMAIN, head + _names(item.quotas))


def _names(names: Mapping[str, int] | list[str]) -> bytes:
    return b"".join([name.encode() + b"\0" for name in names])


# ---- bytes as records


def records(data: memoryview | bytes) -> Iterator[Record]:
    """The records of a whole stream, END included. MigrationError: it is none, or is cut off."""
    if len(data) < HEADER.size:
        raise MigrationError("no XenStore stream: shorter than its header")
    ident, version, flags = HEADER.unpack_from(data)
    if ident != IDENT:
        raise MigrationError("no XenStore stream")
    if version not in (1, VERSION) or flags & ~_BIG_ENDIAN:
        raise MigrationError(f"a XenStore stream of version {version}, flags {flags:#x}: not known here")
    order = ">" if flags & _BIG_ENDIAN else "<"
    for kind, body, at in raw_records(data, HEADER.size, len(data), order):
        if kind == Type.END:
            return
        item = parse(kind, body, at, order)
        if item is not None:
            yield item
    raise MigrationError("the stream is cut off: it has no END")


def raw_records(data: memoryview | bytes, at: int, stop: int, order: str = "<") -> Iterator[tuple[int, bytes, int]]:
    """(type, body, offset) of each record between two offsets. MigrationError: one does not end there."""
    head = struct.Struct(order + "II")
    while at < stop:
        if stop - at < head.size:
            raise MigrationError(f"offset {at}: the stream ends within a record")
        kind, size = head.unpack_from(data, at)
        if size > RECORD_MAX or at + head.size + size > stop:
            raise MigrationError(f"offset {at}: a record of {size} bytes does not fit")
        yield kind, bytes(data[at + head.size : at + head.size + size]), at
        at += head.size + size + -size % 8


def parse(kind: int, body: bytes, at: int, order: str = "<") -> Record | None:
    """A record's meaning; None: it is of no use here. MigrationError, with `at`: it is malformed."""
    try:
        reader = _READERS.get(kind)
        return None if reader is None else reader(body, order)
    except (struct.error, ValueError, IndexError) as error:
        raise MigrationError(f"offset {at}: a malformed record of type {kind}: {error}") from None


def _take(body: bytes, at: int, size: int) -> bytes:
    if at + size > len(body):
        raise ValueError(f"{size} bytes at {at} of {len(body)}")
    return body[at : at + size]


def _text(body: bytes, at: int, size: int) -> bytes:
    """A string whose length counts its NUL."""
    text = _take(body, at, size)
    if not size or text.find(b"\0") != size - 1:
        raise ValueError("a string without its NUL")
    return text[:-1]


def _node(body: bytes, order: str) -> Record:
    conn_id, tx_id, path_len, value_len, access, count = struct.unpack_from(order + "IIHHHH", body)
    perms = []
    for n in range(count):
        letter, flags, domid = struct.unpack_from(order + "BBH", body, 16 + 4 * n)
        mask = _LETTERS.index(letter)
        if not n or not flags & _STALE:
            perms.append((domid, mask))
    at = 16 + 4 * count
    path, value = _text(body, at, path_len), _take(body, at + path_len, value_len)
    return Node(path, value, tuple(perms), conn_id, tx_id, access)


def _connection(body: bytes, order: str) -> Record:
    conn_id, kind, _, domid, target, port, received, partial, pending = struct.unpack_from(order + "IHHHHIHHI", body)
    if not conn_id or kind > 1 or partial > pending:
        raise ValueError("a connection that cannot be")
    data = _take(body, _CONNECTION.size, received + pending)
    if kind == 1:
        return Connection(conn_id, 0, ring=False)
    return Connection(
        *(conn_id, domid, None if target == DOMID_INVALID else target, port),
        *(data[:received], data[received:], partial),
    )


def _watch(body: bytes, order: str) -> Record:
    conn_id, path_len, token_len = struct.unpack_from(order + "IHH", body)
    return Watch(conn_id, _text(body, 8, path_len), _text(body, 8 + path_len, token_len))


def _watch_ext(body: bytes, order: str) -> Record:
    conn_id, path_len, token_len, depth = struct.unpack_from(order + "IHHH", body)
    at = 12 if body[10:12] == b"\0\0" else 10  # no path begins with NUL
    path, token = _text(body, at, path_len), _text(body, at + path_len, token_len)
    return Watch(conn_id, path, token, None if depth == DEPTH_UNLIMITED else depth)


def _transaction(body: bytes, order: str) -> Record:
    return Transaction(*struct.unpack_from(order + "II", body))


def _named(body: bytes, at: int, count: int, order: str) -> list[tuple[str, int]]:
    values = struct.unpack_from(f"{order}{count}I", body, at)
    names = body[at + 4 * count :].split(b"\0")[:count]
    return list(zip((name.decode() for name in names), values, strict=True))


def _global_quota(body: bytes, order: str) -> Record:
    domain, overall = struct.unpack_from(order + "HH", body)
    pairs = _named(body, 4, domain + overall, order)
    return GlobalQuota(dict(pairs[:domain]), dict(pairs[domain:]))


def _domain(body: bytes, order: str) -> Record:
    domid, count, features = struct.unpack_from(order + "HHI", body)
    return Domain(domid, features, dict(_named(body, 8, count, order)))


_READERS: dict[int, Callable[[bytes, str], Record]] = {
    Type.NODE: _node,
    Type.CONNECTION: _connection,
    Type.WATCH: _watch,
    Type.WATCH_EXT: _watch_ext,
    Type.TRANSACTION: _transaction,
    Type.GLOBAL_QUOTA: _global_quota,
    Type.DOMAIN: _domain,
}
