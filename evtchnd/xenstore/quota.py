"""The store's clients and what each may hold: connections, domains, quotas.

Nobody is refused in silence: every refusal is counted with domid and quota, and logged, once a second at most for each.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from . import wire
from .tree import Transaction
from .watches import Watch
from .wire import Op

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Limits of one guest: the C server's defaults, 0 = not checked. Domain 0 has none; a worker's are WORKER."""

    nodes: int = 1000
    watches: int = 128
    # Replies that the client has not taken: it is not listened to meanwhile (XSA-326)
    outstanding: int = 20
    transactions: int = 10
    # A transaction's nodes, read or written
    transaction_nodes: int = 1024
    permissions: int = 5
    # Without /local/domain/<domid>/
    path_bytes: int = 2048
    # Name, value and permissions
    node_bytes: int = 2048
    # Nodes, watches, what open transactions have written, what waits for the client. Beyond it writes and watches are
    # refused and watch events dropped, as the C server does
    memory_bytes: int = 2_621_440
    # Beyond it there is a line in the log
    memory_soft_bytes: int = 2_097_152
    # An event that another guest's request has fired counts as that request's reply until it is taken: who fires faster
    # than is read has to wait, but for so long at most
    unread_s: float = 20.0


# A worker's connection, whatever the guests have: it serves up to 1,024 disks, with two watches each. `nodes` counts
# below one device (a vbd has 26, a vif of 16 queues some 100); transactions are client.TRANSACTIONS.
WORKER = Quotas(nodes=256, watches=4096)

# The C server's names (GET_QUOTA, SET_QUOTA, `xenstore-control quota`), and what they mean
NAMES = {
    "nodes": ("nodes", "Nodes per domain"),
    "watches": ("watches", "Watches per domain"),
    "outstanding": ("outstanding", "Outstanding requests per domain"),
    "memory": ("memory_bytes", "Total Xenstore memory per domain"),
    "soft-memory": ("memory_soft_bytes", "Total Xenstore memory per domain"),
    "transactions": ("transactions", "Active transactions per domain"),
    "transaction-nodes": ("transaction_nodes", "Max. number of accessed nodes per transaction"),
    "node-permissions": ("permissions", "Max. number of permissions per node"),
    "path-max": ("path_bytes", "Max. length of a node path"),
    "node-size": ("node_bytes", "Max. size of a node"),
}
# Most that can be set: the C server's are int
QUOTA_MAX = 0x7FFFFFFF
# What a node costs besides path, value and permissions (8 bytes each): the C server's struct node_hdr
NODE_HEADER = 24
PERM_SIZE = 8


def node_size(path: bytes, value: bytes, perms: wire.Perms) -> int:
    """Bytes of memory that a node is charged with."""
    return NODE_HEADER + len(path) + len(value) + PERM_SIZE * len(perms)


# A tool of domain 0 that reads nothing is disconnected at so many bytes: 10,000 devices' worth of events
PRIVILEGED_OUT_MAX = 16 << 20


class Refusals:
    """Counts what quotas refuse, and says it. Quotas go by the C server's names."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._said: dict[tuple[int, str], float] = {}
        self.counts: dict[tuple[int, str], int] = {}

    def note(self, domid: int, operation: str, quota: str, value: int, limit: int) -> None:
        """One refusal of `operation`: `value` is above `limit`."""
        key = domid, quota
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.due(domid, quota):
            log.warning(
                "domain %d: xenstore: %s refused: quota %s: %d, limit %d (%d refusals so far)",
                *(domid, operation, quota, value, limit, self.counts[key]),
            )

    def due(self, domid: int, quota: str) -> bool:
        """May there be a line about this now?"""
        now, key = self.clock(), (domid, quota)
        if now - self._said.get(key, float("-inf")) < 1.0:
            return False
        self._said[key] = now
        return True

    def forget(self, domid: int) -> None:
        """The domain is gone."""
        for table in (self._said, self.counts):
            for key in [key for key in table if key[0] == domid]:
                del table[key]


class Domain:
    """A domain as the store knows it.

    `named`: paths of nodes whose permissions name it; `owned`: how many it owns; `node_bytes`: what those cost
    `peaks`: the highest value of each quota so far; `configured`: a tool has set its features or quotas in advance
    """

    __slots__ = (
        *("configured", "connections", "domid", "features", "introduced", "named", "node_bytes", "owned", "peaks"),
        *("quotas", "softly", "target"),
    )

    def __init__(self, domid: int, quotas: Quotas) -> None:
        self.domid = domid
        self.introduced = domid == 0
        self.target: int | None = None
        self.features = wire.FEATURES
        self.configured = False
        self.owned = 0
        self.node_bytes = 0
        self.peaks: dict[str, int] = {}
        self.softly = False  # the soft quota was said
        self.named: set[bytes] = set()
        self.connections = 0
        self.quotas = quotas

    @property
    def idle(self) -> bool:
        """Nothing refers to it."""
        return not (self.introduced or self.connections or self.named or self.configured)


class Connection:
    """One client: its watches, open transactions and what waits to be sent to it.

    `confine`: the guest that a worker serves; see server.Server.attach_socket.
    `ready` is the store's list of connections with something new to send. The transport sets `flush` (send what waits),
    `on_close` (end, with the reason) and, where there is more to forget than is kept here, `on_reset`.
    `conflicts`, `rivals`, `holder`, `held_at`: see contention.py. Of a guest's ring: `unsent` was taken and is not yet
    written; `received`, `partial`, `queued` (positions, and what is between requests), `log_id`, `fresh` (queued since
    the last commit): see recorder.py.
    """

    __slots__ = (
        *("_readable", "_writable", "caused", "confine", "conflicts", "domain", "domid", "flush", "fresh", "held_at"),
        *(
            "holder",
            "home",
            "log_id",
            "next_tx",
            "partial",
            "queued",
            "received",
            "unsent",
            "on_close",
            "on_reset",
            "out",
            "out_bytes",
            "overflowed",
            "privileged",
            "quotas",
            "ready",
        ),
        *("refusals", "replies", "rivals", "transactions", "unread", "watch_bytes", "watches"),
    )

    def __init__(
        self, domain: Domain, ready: dict[Connection, None], refusals: Refusals, *, confine: int | None = None
    ) -> None:
        self.domain = domain
        self.domid = domain.domid
        self.privileged = domain.domid == 0
        self.confine = confine
        self.home = b"/local/domain/%d" % domain.domid
        # None: no quotas
        self.quotas = domain.quotas if not self.privileged else None if confine is None else WORKER
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self.next_tx = 1
        self.out: deque[bytes] = deque()
        self.out_bytes = 0
        self.replies = 0
        # Events that wait: whose request has fired them (None: domain 0's), and when
        self.unread: dict[bytes, tuple[Connection | None, float]] = {}
        self.unsent = b""
        self.log_id = self.received = self.queued = 0
        self.partial = b""
        self.fresh: list[bytes] | None = None
        self.caused = 0
        self.watch_bytes = 0
        self.conflicts = 0
        self.rivals: dict[Connection, None] = {}
        self.holder: Connection | None = None
        self.held_at = float("-inf")
        self.ready = ready
        self.on_close: Callable[[str], None] | None = None
        self.on_reset: Callable[[], None] | None = None
        self.flush: Callable[[], None] | None = None
        self.overflowed = False
        self.refusals = refusals
        if confine is not None:
            backends = rb"/local/domain/0/backend/[^/]+/%d" % confine
            self._readable = re.compile(rb"(?:%b|/local/domain/%d)(?:/.*)?" % (backends, confine))
            self._writable = re.compile(rb"%b/[^/]+/(?!params(?:/|\Z)).+" % backends)

    def may_read(self, path: bytes) -> bool:
        return self.confine is None or self._readable.fullmatch(path) is not None

    def may_write(self, path: bytes) -> bool:
        return self.confine is None or self._writable.fullmatch(path) is not None

    def rights(self, perms: wire.Perms) -> int:
        """What the client may do with a node of these permissions: a mask of wire.PERM_*."""
        if self.privileged:
            return wire.PERM_ALL
        domid, target = self.domid, self.domain.target
        if perms[0][0] == domid or perms[0][0] == target:
            return wire.PERM_ALL
        for who, mask in perms[1:]:
            if who in (domid, target):
                return mask
        return perms[0][1]

    @property
    def memory(self) -> int:
        """What counts for the quota of memory, bytes."""
        used = self.domain.node_bytes + self.watch_bytes + self.out_bytes
        for view in self.transactions.values():
            used += view.bytes
        return used

    def allows(self, quota: str, value: int) -> bool:
        """Is `value` within the quota of this name? If so, it is remembered as the highest that was."""
        quotas, domain = self.quotas, self.domain
        if quotas is None:
            return True
        limit: int = getattr(quotas, NAMES[quota][0])
        if limit and value > limit:
            return False
        if self.confine is None and value > domain.peaks.get(quota, 0):
            domain.peaks[quota] = value
        return True

    def allows_memory(self, more: int) -> bool:
        """May `more` bytes be added?"""
        quotas, domain = self.quotas, self.domain
        if quotas is None:
            return True
        value = self.memory + more
        softly = 0 < quotas.memory_soft_bytes < value
        if softly and not domain.softly and self.refusals.due(self.domid, "soft-memory"):
            log.warning(
                "domain %d: xenstore: memory %d, soft quota %d (limit %d)",
                *(self.domid, value, quotas.memory_soft_bytes, quotas.memory_bytes),
            )
        domain.softly = softly
        return self.allows("memory", value)

    def reply(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Queue a reply; one that is too long becomes E2BIG (XSA-72)."""
        if len(payload) > wire.PAYLOAD_MAX:
            op, payload = Op.ERROR, b"E2BIG\0"
        message = wire.HEADER.pack(op, req_id, tx_id, len(payload)) + payload
        self.out.append(message)
        if self.fresh is not None:
            self.fresh.append(message)
        self.out_bytes += len(message)
        self.replies += 1
        self.ready[self] = None

    def event(self, path: bytes, token: bytes, cause: Connection | None = None) -> None:
        """Queue a watch event, unless the same one waits already (special ones name no domain: each of them counts).

        `cause`: the guest whose request fires it.
        """
        payload = b"%b\0%b\0" % (path, token)
        size = wire.HEADER_SIZE + len(payload)
        if len(payload) > wire.PAYLOAD_MAX or (path[:1] != b"@" and payload in self.unread):
            return
        if self.quotas is None or not self.quotas.memory_bytes:
            limit, used = PRIVILEGED_OUT_MAX, self.out_bytes + size
        else:
            limit, used = self.quotas.memory_bytes, self.memory + size
        if used > limit:
            self.refusals.note(self.domid, "WATCH_EVENT", "memory", used, limit)
            # A domain-0 tool would wait for ever for what was dropped
            self.overflowed = self.overflowed or self.privileged
            self.ready[self] = None
            return
        if path[:1] != b"@":
            self.unread[payload] = cause, self.refusals.clock()
            if cause is not None:
                cause.caused += 1
        message = wire.pack(Op.WATCH_EVENT, 0, 0, payload)
        self.out.append(message)
        if self.fresh is not None:
            self.fresh.append(message)
        self.out_bytes += size
        self.ready[self] = None

    def _settled(self, payload: bytes) -> None:
        cause, _ = self.unread.pop(payload, (None, 0.0))
        if cause is not None:
            cause.caused -= 1
            # It may be waiting for just this
            self.ready[cause] = None

    def expire(self, before: float) -> None:
        """Events that have waited since `before` hold up nobody any more; they stay in the queue."""
        for payload, (cause, since) in list(self.unread.items()):
            if cause is not None and since <= before:
                self.unread[payload] = None, since
                cause.caused -= 1
                self.ready[cause] = None

    def new_tx_id(self) -> int:
        """A transaction id that is not in use; never 0."""
        while self.next_tx in self.transactions or self.next_tx == 0:
            self.next_tx = (self.next_tx + 1) & 0xFFFFFFFF
        tx_id = self.next_tx
        self.next_tx = (tx_id + 1) & 0xFFFFFFFF
        return tx_id

    def clear(self) -> None:
        """Forget what waits to be sent."""
        self.unsent = b""
        if self.fresh:
            self.fresh.clear()
        self.out.clear()
        for payload in list(self.unread):
            self._settled(payload)
        self.out_bytes = self.replies = 0

    def take(self) -> bytes:
        """The next message to send; IndexError if there is none."""
        message = self.out.popleft()
        self.out_bytes -= len(message)
        if message[0] == Op.WATCH_EVENT:
            self._settled(message[wire.HEADER_SIZE :])
        else:
            self.replies -= 1
        return message

    @property
    def busy(self) -> bool:
        """So much waits to be sent that no request is taken from the client now."""
        if self.holder is not None:
            return True
        if self.quotas is None:
            return self.replies + self.caused >= Quotas.outstanding
        # Not checked: then the room in its ring is what there is
        limit = self.quotas.outstanding or 1 << 20
        waiting = self.replies + self.caused
        return waiting >= limit or not self.allows("outstanding", waiting)
