"""A store from its records: the log of an earlier process, or a migration stream; and a stream of a store.

Reading goes in two passes, so that a million nodes take seconds: records into plain dicts, then one tree of them all.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from . import migration, wire
from .log import Log
from .migration import MigrationError
from .quota import NAMES, Connection, Quotas
from .recorder import Own, Recorder, by_name
from .store import INTRODUCED, RELEASED, XenStore
from .tree import Node, PMap, Tree
from .watches import Watch

if TYPE_CHECKING:
    from .wire import Perms

_STEP_NODES = 128


@dataclass
class _Ring:
    """A guest's connection. `queued`: bytes to be written from position `start` on."""

    domid: int
    received: int = 0
    partial: bytes = b""
    start: int = 0
    queued: bytearray = field(default_factory=bytearray)
    watches: dict[tuple[bytes, bytes], int | None] = field(default_factory=dict)
    transactions: dict[int, None] = field(default_factory=dict)


@dataclass
class _Domain:
    introduced: bool = False
    configured: bool = True
    target: int | None = None
    features: int | None = None
    quotas: dict[str, int] = field(default_factory=dict)


class _Contents:
    """What the records say, record by record."""

    def __init__(self) -> None:
        # Value, permissions, place among the siblings (0: behind those that came before)
        self.nodes: dict[bytes, tuple[bytes, Perms, int]] = {}
        self.domains: dict[int, _Domain] = {}
        self.rings: dict[int, _Ring] = {}
        self.quotas: dict[str, int] | None = None
        # Permissions are few, and shared
        self._perms: dict[Perms, Perms] = {}

    def take(self, item: migration.Record) -> None:
        """A record of a migration stream."""
        match item:
            case migration.Node(path, value, perms, conn_id):
                if conn_id:
                    return  # of an open transaction: it meets a conflict instead
                if perms:
                    order = item.tx_id | item.access << 32
                    if not order and path in self.nodes:
                        order = self.nodes[path][2]
                    self.nodes[path] = value, self._perms.setdefault(perms, perms), order
                else:
                    self.nodes.pop(path, None)
            case migration.Connection(conn_id, domid, target, ring=True):
                pending = bytearray(item.pending)
                self.rings[conn_id] = _Ring(domid, partial=item.received, queued=pending)
                domain = self.domains.setdefault(domid, _Domain())
                domain.introduced = True
                if target is not None:
                    domain.target = target
            case migration.Watch(conn_id, path, token, depth):
                if conn_id in self.rings:
                    self.rings[conn_id].watches[path, token] = depth
            case migration.Transaction(conn_id, tx_id):
                if conn_id in self.rings:
                    self.rings[conn_id].transactions[tx_id] = None
            case migration.GlobalQuota(domain=quotas):
                self.quotas = dict(quotas)
            case migration.Domain(domid, features, quotas):
                domain = self.domains.setdefault(domid, _Domain())
                domain.features, domain.quotas = features, dict(quotas)

    def foreign(self) -> _Contents:
        """These are of a stream: whatever its nodes have in place of an order means nothing."""
        self.nodes = {path: (value, perms, 0) for path, (value, perms, _) in self.nodes.items()}
        return self

    def take_own(self, kind: int, body: bytes) -> None:
        """A record of the log alone. struct.error, ValueError: it is malformed.

        One about a connection that is not there was about one that has been closed since: see Recorder.copy.
        """
        if kind == Own.DOMAIN:
            domid, introduced, target, configured = struct.unpack_from("<HHHH", body)
            domain = self.domains.setdefault(domid, _Domain())
            domain.introduced, domain.configured = bool(introduced), bool(configured)
            domain.target = None if target == migration.DOMID_INVALID else target
            return
        (number,) = struct.unpack_from("<I", body)
        if kind == Own.RELEASED:
            self.domains.pop(number, None)
            return
        ring = self.rings.get(number)
        if ring is None:
            return
        if kind == Own.CLOSED:
            del self.rings[number]
        elif kind == Own.ENDED:
            ring.transactions.pop(struct.unpack_from("<II", body)[1], None)
        elif kind == Own.UNWATCH:
            watch = migration.parse(migration.Type.WATCH, body, 0)
            if isinstance(watch, migration.Watch):
                ring.watches.pop((watch.path, watch.token), None)
        elif kind in (Own.RECEIVED, Own.QUEUED):
            _, position, size = struct.unpack_from("<III", body)
            data = body[12 : 12 + size]
            if kind == Own.RECEIVED:
                ring.received, ring.partial = position, data
            elif not ring.queued and not ring.watches and not ring.start:
                ring.start, ring.queued = position, bytearray(data)
            elif position == (ring.start + len(ring.queued)) & 0xFFFFFFFF:
                ring.queued += data


def open_store(log: Log, quotas: Quotas | None = None) -> XenStore:
    """The store that is in the log, empty for an empty one; from now on its changes are written there.

    MigrationError: the log is damaged.
    """
    store, rings = from_log(log, quotas)
    store.recorder = Recorder(store, log)
    store.recorder.adopt(rings)
    return store


def from_log(log: Log, quotas: Quotas | None = None) -> tuple[XenStore, dict[int, Connection]]:
    """The store that the log's commits have made, and its rings by their numbers in the log.

    The rings wait for their domains' VMMs: `store.waiting`. MigrationError: the log is damaged.
    """
    contents = _Contents()
    for kind, body, at in log.records():
        if kind > Own.RECEIVED - 1:
            try:
                contents.take_own(kind, body)
            except (struct.error, ValueError) as error:
                raise MigrationError(f"offset {at}: a malformed record of type {kind:#x}: {error}") from None
        elif (item := migration.parse(kind, body, at)) is not None:
            contents.take(item)
    return _store(contents, quotas, log.generation)


def from_stream(data: memoryview | bytes, quotas: Quotas | None = None) -> XenStore:
    """The store of a migration stream. MigrationError: it is none, or is damaged."""
    contents = _Contents()
    for item in migration.records(data):
        contents.take(item)
    return _store(contents.foreign(), quotas, 0)[0]


def _store(contents: _Contents, quotas: Quotas | None, generation: int) -> tuple[XenStore, dict[int, Connection]]:
    store = XenStore(quotas)
    if contents.quotas is not None:
        store.quotas, store.quotas_set = _named(store.quotas, contents.quotas), True
    store.generation = max(generation, store.generation)
    for domid, said in contents.domains.items():
        domain = store.domain(domid)
        domain.introduced, domain.target = said.introduced or domid == 0, said.target
        if said.features is not None:
            domain.features, domain.quotas = said.features, _named(store.quotas, said.quotas)
            domain.configured = said.configured
    store.now.base = store.now.tree = _tree(contents.nodes, store)
    store.account_all()
    for domid, known in store.domains.items():
        if domid and known.introduced:
            store.waiting[domid] = None
    rings = {}
    for conn_id, ring in contents.rings.items():
        if store.exists(ring.domid):
            rings[conn_id] = _connection(store, ring)
    return store, rings


def _named(quotas: Quotas, by: dict[str, int]) -> Quotas:
    return replace(quotas, **{NAMES[name][0]: value for name, value in by.items() if name in NAMES})


def _tree(nodes: dict[bytes, tuple[bytes, Perms, int]], store: XenStore) -> Tree:
    """All nodes at once; siblings in the order of the records. MigrationError: a parent is missing, a path is none."""
    made = {path: (node.value, node.perms, 0) for path, node in store.tree.items()} | nodes
    children: dict[bytes, dict[bytes, int]] = {}
    for path, (_, _, order) in made.items():
        _check_path(path)
        if path[:1] != b"@" and path != b"/":
            above = wire.parent_of(path)
            if above not in made:
                raise MigrationError(f"node {wire.decode(path)} is without the one above it")
            children.setdefault(above, {})[path[path.rfind(b"/") + 1 :]] = order or store.tick()
    generation = store.tick()
    below = {path: PMap.of(names) for path, names in children.items()}
    return Tree.of({path: Node(value, perms, below.get(path), generation) for path, (value, perms, _) in made.items()})


def _check_path(path: bytes) -> None:
    """MigrationError: no request could have made a node of this name, so that none would find it either."""
    try:
        if path[:1] == b"/" or path in (INTRODUCED, RELEASED):
            wire.canonical(path, b"", special=True)
            return
    except wire.XenStoreError:
        pass
    raise MigrationError(f"node {wire.decode(path)!r}: this is no path of a node")


def _connection(store: XenStore, ring: _Ring) -> Connection:
    conn = store.connect(ring.domid)
    conn.received, conn.partial = ring.received, ring.partial
    conn.unsent = bytes(ring.queued)
    conn.queued = (ring.start + len(ring.queued)) & 0xFFFFFFFF
    for (path, token), depth in ring.watches.items():
        relative = path[:1] not in (b"/", b"@")
        whole = conn.home + b"/" + path if relative else path
        store.add_watch(Watch(conn, whole, token, len(conn.home) + 1 if relative else 0, depth))
    for tx_id in ring.transactions:
        # What it had read and written is not known: its commit meets a conflict, and the client begins again
        store.begin(conn, tx_id).stale = b"/"
    store.waiting[ring.domid] = conn
    return conn


# ---- a stream of a store


def stream(store: XenStore) -> Generator[bytes, None, None]:
    """The store as it is now, as a migration stream in pieces; others may change it between two of them.

    Connections of guests with what waits for them, watches, open transactions, domains, quotas, nodes. Clients of the
    socket do not outlive their server: they are left out.
    """
    with store.kept() as tree:
        yield from _stream(store, tree)


def _stream(store: XenStore, tree: Tree) -> Generator[bytes, None, None]:
    head = [migration.header()]
    if store.quotas_set:
        head.append(migration.pack(migration.GlobalQuota(by_name(store.quotas), {})))
    head += [
        migration.pack(migration.Domain(domain.domid, domain.features, by_name(domain.quotas)))
        for domain in store.domains.values()
        if domain.configured
    ]
    head.append(_connections(store.connections))
    yield b"".join(head)
    parts = []
    perms: Perms = ()
    specifiers = b""
    for number, (path, node, _) in enumerate(store.everything(tree), 1):
        if node.perms is not perms:
            perms, specifiers = node.perms, migration.pack_perms(node.perms)
        parts.append(migration.pack_node(path, node.value, specifiers))
        if number % _STEP_NODES == 0:
            yield b"".join(parts)
            parts = []
    parts.append(migration.end())
    yield b"".join(parts)


def _connections(connections: Iterable[Connection]) -> bytes:
    parts = []
    guests = [conn for conn in connections if conn.domid]
    for conn_id, conn in enumerate(guests, 1):
        pending = conn.unsent + b"".join(conn.out)
        partial = len(conn.unsent)
        ring = migration.Connection(conn_id, conn.domid, conn.domain.target, 0, conn.partial, pending, partial)
        parts.append(migration.pack(ring))
        for watch in conn.watches.values():
            path = watch.path[watch.strip :]
            parts.append(migration.pack(migration.Watch(conn_id, path, watch.token, watch.depth)))
        parts += [migration.pack(migration.Transaction(conn_id, tx_id)) for tx_id in conn.transactions]
    return b"".join(parts)
