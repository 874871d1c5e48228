"""What of the store goes into its log, and how the log is made shorter while the store goes on.

A commit is all that one request has changed: nodes, watches, transactions, domains, how far the guest's ring was read
and what is to be written to it. It is in the log, as one append, before anything of it can be seen outside. Records are
those of Xen's migration stream (migration.py), and some for what such a stream has no words for, since it never takes
anything away:

    RECEIVED   conn-id, position, bytes    its requests end at that position of the ring's stream; then so many bytes
                                           that are not a whole request, read from it
    QUEUED     conn-id, position, bytes    to be written to it, from that position of the other stream
    UNWATCH    as WATCH
    ENDED      conn-id, tx-id              a transaction
    CLOSED     conn-id
    DOMAIN     u16 domid, introduced, target, configured
    RELEASED   u32 domid

A node's `tx-id` and `access`, which mean nothing outside of a transaction, have its place among its siblings: 0, it is
where it was.

A position is the ring's own index: 32 bits, free-running. So after a crash the guest's page tells how much of it was
done: requests before the position are answered, bytes of replies before the page's producer have been written.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Generator, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

from . import migration, wire
from .log import Log, LogFullError
from .quota import NAMES, Connection, Domain, Quotas
from .tree import Node, Tree
from .watches import Watch

if TYPE_CHECKING:
    from .store import XenStore

log = logging.getLogger(__name__)


class Own(IntEnum):
    """Records of the log alone."""

    RECEIVED = 0x8000_0001
    QUEUED = 0x8000_0002
    UNWATCH = 0x8000_0003
    ENDED = 0x8000_0004
    CLOSED = 0x8000_0005
    DOMAIN = 0x8000_0006
    RELEASED = 0x8000_0007


# A log this long is copied when half of it or more is of no use any more: writing it took some seconds at full load
COMPACT_BYTES = 16 << 20
# Nodes and bytes between two pauses of a copy, and of giving back memory: a fifth of a millisecond
_STEP_NODES = 32
_STEP_BYTES = 512 << 10


class Recorder:
    """Writes the store's changes to `log`. `store.recorder` and every Connection with `log_id` are its sources."""

    def __init__(self, store: XenStore, to: Log, *, compact_bytes: int = COMPACT_BYTES) -> None:
        self.log = to
        self._store = store
        self._parts: list[bytes] = []
        self._perms: dict[wire.Perms, bytes] = {}
        self._next_id = 1
        self._compact_bytes = compact_bytes
        self._kept = 0  # length after the last copy
        self._copying = False
        self._full = False
        self.generation_limit = to.reserve(store.generation)
        self.rings: dict[int, Connection] = {}

    def adopt(self, rings: dict[int, Connection]) -> None:
        """Connections that the log has already, by their numbers there."""
        for conn_id, conn in rings.items():
            conn.log_id, conn.fresh = conn_id, []
            self._next_id = max(self._next_id, conn_id + 1)
        self.rings |= rings

    # ---- one commit

    def commit(self, ready: Iterable[Connection]) -> None:
        """All that was noted since the last one, and what is queued for rings of `ready`, counts from now on."""
        parts = self._parts
        for conn in ready if self.rings else ():
            if conn.fresh:
                data = b"".join(conn.fresh)
                conn.fresh.clear()
                parts.append(_positioned(Own.QUEUED, conn.log_id, conn.queued, data))
                conn.queued = (conn.queued + len(data)) & 0xFFFFFFFF
        if not parts:
            return
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        try:
            self.log.append(data)
        except LogFullError as error:
            self._stop(str(error))
            return
        if self._store.generation >= self.generation_limit:
            self.generation_limit = self.log.reserve(self._store.generation)
        if self.log.used > 2 * self._kept + self._compact_bytes and (walk := self.compact()) is not None:
            if self._store.later is not None:
                self._store.later(walk)
            else:
                for _ in walk:
                    pass

    def _stop(self, reason: str) -> None:
        """Half a log is worse than none: it would bring back a store that never was."""
        if not self._full:
            self._full = True
            log.error("xenstore: %s: not written any more, the store does not survive a restart", reason)
            self.log.clear()
        self._store.recorder = None
        for conn in self.rings.values():
            conn.fresh, conn.log_id = None, 0

    # ---- what is noted

    def node(self, path: bytes, node: Node | None, place: int) -> None:
        """A node is like this now (None: not there); `place` among its siblings, 0: where it was."""
        if node is None:
            self._parts.append(migration.pack_node(path, b"", b""))
            return
        specifiers = self._perms.get(node.perms) or self._specifiers(node.perms)
        self._parts.append(migration.pack_node(path, node.value, specifiers, place))

    def _specifiers(self, perms: wire.Perms) -> bytes:
        found = self._perms.get(perms)
        if found is None:
            if len(self._perms) >= 4096:
                self._perms.clear()
            found = self._perms[perms] = migration.pack_perms(perms)
        return found

    def opened(self, conn: Connection, received: int, queued: int) -> None:
        """A ring is served. `received`, `queued`: positions of both streams."""
        if not conn.log_id:
            conn.log_id = self._next_id
            self._next_id += 1
        conn.fresh = []
        conn.received, conn.partial, conn.queued = received, b"", queued
        self.rings[conn.log_id] = conn
        self._parts += self._ring(conn)

    def closed(self, conn: Connection) -> None:
        """A ring is not served any more."""
        if conn.log_id:
            del self.rings[conn.log_id]
            self._parts.append(migration.record(Own.CLOSED, struct.pack("<I", conn.log_id)))
            conn.log_id, conn.fresh = 0, None

    def received(self, conn: Connection, position: int, partial: bytes) -> None:
        """Requests up to `position` are under way or answered; `partial` was read from there on."""
        if conn.log_id:
            conn.received, conn.partial = position, partial
            self._parts.append(_positioned(Own.RECEIVED, conn.log_id, position, partial))

    def watch(self, watch: Watch) -> None:
        if watch.conn.log_id:
            self._parts.append(migration.pack(_watch(watch)))

    def unwatch(self, watch: Watch) -> None:
        if watch.conn.log_id:
            plain = migration.pack(_watch(watch)._replace(depth=None))
            self._parts.append(struct.pack("<I", Own.UNWATCH) + plain[4:])

    def started(self, conn: Connection, tx_id: int) -> None:
        if conn.log_id:
            self._parts.append(migration.pack(migration.Transaction(conn.log_id, tx_id)))

    def ended(self, conn: Connection, tx_id: int) -> None:
        if conn.log_id:
            self._parts.append(migration.record(Own.ENDED, struct.pack("<II", conn.log_id, tx_id)))

    def domain(self, domain: Domain) -> None:
        """It was introduced, has another target, features or quotas."""
        self._parts += _domain(domain)

    def released(self, domid: int) -> None:
        self._parts.append(migration.record(Own.RELEASED, struct.pack("<I", domid)))

    def quotas(self, quotas: Quotas) -> None:
        """Of domains to come."""
        self._parts.append(migration.pack(migration.GlobalQuota(by_name(quotas), {})))

    def _ring(self, conn: Connection) -> list[bytes]:
        """All of one connection as it is: the position of what waits is in a record of its own."""
        waiting = conn.unsent + b"".join(conn.out)
        return [
            migration.pack(migration.Connection(conn.log_id, conn.domid)),
            _positioned(Own.RECEIVED, conn.log_id, conn.received, conn.partial),
            _positioned(Own.QUEUED, conn.log_id, (conn.queued - len(waiting)) & 0xFFFFFFFF, waiting),
            *[migration.pack(_watch(watch)) for watch in conn.watches.values()],
            *[migration.pack(migration.Transaction(conn.log_id, tx_id)) for tx_id in conn.transactions],
        ]

    # ---- a shorter log

    def compact(self) -> Generator[None, None, None] | None:
        """A copy, which whoever has asked goes through; None: one is under way."""
        if self._copying:
            return None
        self._copying = True
        return self._guarded_copy()

    def _guarded_copy(self) -> Generator[None, None, None]:
        try:
            yield from self.copy()
        except LogFullError as error:
            self._stop(str(error))
        finally:
            self._copying = False

    def copy(self) -> Generator[None, None, None]:
        """The store as it is now, then what has changed since, to the other area; then that one is the log.

        In steps. What a connection looks like is written some time after the beginning, so the changes that are copied
        behind it may have been in it: each record says how something is, or from which position on, and may come twice.
        """
        with self._store.kept() as tree:
            yield from self._copy(tree)

    def _copy(self, tree: Tree) -> Generator[None, None, None]:
        store, to = self._store, self.log
        start = to.used
        to.begin_copy()
        parts = [migration.pack(migration.GlobalQuota(by_name(store.quotas), {}))] if store.quotas_set else []
        for number, domain in enumerate(list(store.domains.values()), 1):
            if store.domains.get(domain.domid) is domain:
                parts += _domain(domain)
            if number % _STEP_NODES == 0:
                to.copy(b"".join(parts))
                parts = []
                yield
        to.copy(b"".join(parts))
        for conn in list(self.rings.values()):
            # what is queued for it is in the log before its position is read
            self.commit(store.ready)
            if conn.log_id:
                to.copy(b"".join(self._ring(conn)))
                yield
        parts = []
        perms: wire.Perms = ()
        specifiers = b""
        for number, (path, node, place) in enumerate(store.everything(tree, ordered=False), 1):
            if node.perms is not perms:
                perms, specifiers = node.perms, self._specifiers(node.perms)
            parts.append(migration.pack_node(path, node.value, specifiers, place))
            if number % _STEP_NODES == 0:
                to.copy(b"".join(parts))
                parts = []
                yield
        to.copy(b"".join(parts))
        at = start
        while to.used - at > _STEP_BYTES:
            at = to.copy_tail(at, _STEP_BYTES)
            yield
        to.copy_tail(at, _STEP_BYTES)
        old = to.used
        to.switch()
        self._kept = to.used
        for at in range(0, old, _STEP_BYTES):
            yield
            to.free(at, _STEP_BYTES)


def _positioned(kind: Own, conn_id: int, position: int, data: bytes) -> bytes:
    return migration.record(kind, struct.pack("<III", conn_id, position, len(data)) + data)


def _watch(watch: Watch) -> migration.Watch:
    return migration.Watch(watch.conn.log_id, watch.path[watch.strip :], watch.token, watch.depth)


def by_name(quotas: Quotas) -> dict[str, int]:
    """Under the C server's names."""
    return {name: getattr(quotas, field) for name, (field, _) in NAMES.items()}


def _domain(domain: Domain) -> list[bytes]:
    target = migration.DOMID_INVALID if domain.target is None else domain.target
    words = struct.pack("<HHHH", domain.domid, domain.introduced, target, domain.configured)
    state = migration.record(Own.DOMAIN, words)
    # Quotas are those of the day when it was first named, configured or not
    return [state, migration.pack(migration.Domain(domain.domid, domain.features, by_name(domain.quotas)))]
