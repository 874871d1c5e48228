"""The store without I/O: its published root, domains, clients, watches. What a request means is in operations.py.

A change outside of a transaction is a transaction of one operation: made on `now`, then published, or forgotten as a
whole. Publishing makes a root the public one, then brings the accounts up to date, then tells the watches. While nobody
else has the public root (an open transaction, a walk), `now` changes it in place.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import wire
from .contention import Contention
from .quota import Connection, Domain, Quotas, Refusals, node_size
from .tree import Node, Transaction, Tree
from .watches import Watch, Watches
from .wire import XenStoreError

if TYPE_CHECKING:
    from .recorder import Recorder

__all__ = ["Connection", "Domain", "Quotas", "XenStore"]

INTRODUCED = b"@introduceDomain"
RELEASED = b"@releaseDomain"
# So many changed nodes, and the garbage collector is told to leave alone what is there now: a full collection of a
# million nodes stops everything for a second, and nodes are no part of cycles. Changed ones count, since each is a new
# object: as many are freed as are made, so the collector thinks that nothing happens while its youngest generation
# becomes as large as the store. 100 changes are some 300 objects: 0.2 ms.
_SETTLED_NODES = 100
# Nodes between two pauses of a walk: a tenth of a millisecond
_STEP = 32
DOMAIN_0: wire.Perms = ((0, wire.PERM_NONE),)


class XenStore:
    """The store's state.

    now             the public state; an operation outside of a transaction changes it, then `publish(now)`
    domains         those that are introduced, named in permissions or connected
    ready           connections that have something new to send
    generation      goes up with every change
    recorder        writes changes to a log; None: there is none
    waiting         domains of an earlier process, with their rings, until those are served again
    trace           each request and its reply goes into the log
    `clock` (seconds) is for the rate of log lines and the age of events.
    """

    def __init__(self, quotas: Quotas | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.quotas = Quotas() if quotas is None else quotas
        self.quotas_set = False  # by a tool
        self.recorder: Recorder | None = None
        self.waiting: dict[int, Connection | None] = {}
        self.refusals = Refusals(clock)
        self.contention = Contention(clock)
        self.trace = False
        # Who goes on with a long walk now and then; None: it is done at once
        self.later: Callable[[Generator[None, None, None]], None] | None = None
        self._unsettled = 0
        self.domains: dict[int, Domain] = {}
        self.connections: dict[Connection, None] = {}
        self.ready: dict[Connection, None] = {}
        self.watches = Watches()
        self.generation = 1
        # The guest whose request is being served: it pays for the events
        self.cause: Connection | None = None
        self.now = Transaction(Tree.empty(DOMAIN_0, (INTRODUCED, RELEASED)), record=False)
        self.now.holders = 0
        self.domain(0)

    @property
    def tree(self) -> Tree:
        """The published root. Changed in place: `kept()` for whoever looks at it for longer than a request."""
        return self.now.base

    @contextmanager
    def kept(self) -> Iterator[Tree]:
        """The published root as it is now, whatever is changed meanwhile."""
        self.now.holders += 1
        try:
            yield self.now.base
        finally:
            self.now.holders -= 1

    def tick(self) -> int:
        """A generation that no node has had."""
        self.generation += 1
        return self.generation

    # ---- clients

    def domain(self, domid: int) -> Domain:
        """The domain's account, made when the domain is first named."""
        found = self.domains.get(domid)
        if found is None:
            found = self.domains[domid] = Domain(domid, self.quotas)
        return found

    def exists(self, domid: int) -> bool:
        """Is the domain introduced and not released?"""
        domain = self.domains.get(domid)
        return domain is not None and domain.introduced

    def connect(self, domid: int, *, confine: int | None = None) -> Connection:
        """A new client. Domain 0 is privileged, unless it is confined to the nodes of one guest."""
        conn = Connection(self.domain(domid), self.ready, self.refusals, confine=confine)
        conn.domain.connections += 1
        self.connections[conn] = None
        return conn

    def disconnect(self, conn: Connection) -> None:
        """The client is gone, with its watches and transactions. Idempotent."""
        if conn in self.connections:
            if self.recorder is not None:
                self.recorder.closed(conn)
            if self.waiting.get(conn.domid) is conn:
                del self.waiting[conn.domid]
            self.reset(conn)
            conn.domain.connections -= 1
            del self.connections[conn]
            self.ready.pop(conn, None)
            # no cycle is left: the collector may not come by (see settle)
            conn.flush = conn.on_reset = None

    def expire(self) -> bool:
        """Whoever waits for others to take its events waits for `unread_s` at most; see also contention.py.

        True: somebody still waits.
        """
        before = self.refusals.clock() - self.quotas.unread_s
        for conn in self.connections:
            if conn.unread:
                conn.expire(before)
            self.contention.expire(conn)
        return any(conn.caused or conn.holder is not None for conn in self.connections)

    def reset(self, conn: Connection) -> None:
        """Watches, transactions and what waits to be sent go: a ring was reconnected."""
        self.reset_watches(conn)
        conn.clear()

    def reset_watches(self, conn: Connection) -> None:
        """Watches and transactions go."""
        for watch in conn.watches.values():
            self.watches.remove(watch)
            if self.recorder is not None:
                self.recorder.unwatch(watch)
        if self.recorder is not None:
            for tx_id in conn.transactions:
                self.recorder.ended(conn, tx_id)
        conn.watches.clear()
        conn.watch_bytes = 0
        self.now.holders -= len(conn.transactions)
        self.contention.dropped(conn)
        conn.transactions.clear()

    def begin(self, conn: Connection, tx_id: int) -> Transaction:
        """Opens a transaction."""
        made = conn.transactions[tx_id] = Transaction(self.tree, record=True)
        self.now.holders += 1
        self.contention.started(conn)
        return made

    def add_watch(self, watch: Watch) -> None:
        watch.conn.watches[watch.path, watch.token] = watch
        watch.conn.watch_bytes += len(watch.path) + len(watch.token)
        self.watches.add(watch)
        if self.recorder is not None:
            self.recorder.watch(watch)

    def remove_watch(self, conn: Connection, path: bytes, token: bytes) -> None:
        """ENOENT if there is none."""
        watch = conn.watches.pop((path, token), None)
        if watch is None:
            raise XenStoreError("ENOENT", "no such watch")
        conn.watch_bytes -= len(path) + len(token)
        self.watches.remove(watch)
        if self.recorder is not None:
            self.recorder.unwatch(watch)

    # ---- domains

    def introduce(self, domid: int) -> None:
        """The domain exists: fires @introduceDomain, unless it was introduced before."""
        domain = self.domain(domid)
        if not domain.introduced:
            domain.introduced = True
            self.changed(domain)
            self._fire_special(INTRODUCED, domid)

    def reintroduce(self, domid: int) -> None:
        """A domain that exists starts anew with its ring: nothing of its connection is kept."""
        for conn in [conn for conn in self.connections if conn.domid == domid]:
            self.reset(conn)
            if conn.on_reset is not None:
                conn.on_reset()

    def set_quotas(self, domid: int | None, quotas: Quotas) -> None:
        """From now on. None: of domains to come."""
        if domid is None:
            self.quotas, self.quotas_set = quotas, True
            if self.recorder is not None:
                self.recorder.quotas(quotas)
            return
        domain = self.domain(domid)
        domain.quotas, domain.configured = quotas, True
        self.changed(domain)
        for conn in self.connections:
            if conn.domain is domain and not conn.privileged:
                conn.quotas = quotas

    def changed(self, domain: Domain) -> None:
        """Its target, features or quotas are not what they were."""
        if self.recorder is not None:
            self.recorder.domain(domain)

    def release(self, domid: int) -> bool:
        """The domain is gone: its clients, nodes, permissions and quotas; then @releaseDomain fires.

        False: nothing was known of it. A later domain of this number inherits nothing (XSA-322, XSA-417, XSA-419).
        """
        domain = self.domains.get(domid)
        if domain is None or domid == 0:
            return False
        for conn in [conn for conn in self.connections if conn.domid == domid]:
            self.disconnect(conn)
            if conn.on_close is not None:
                conn.on_close("the domain is released")
        now = self.now
        home = b"/local/domain/%d" % domid
        if now.tree.get(home) is not None:
            now.remove(home, self.tick())
        for path in sorted(domain.named):
            node = now.tree.get(path)
            if node is None:
                continue
            if node.owner == domid and path[:1] == b"/" and path != b"/":
                now.remove(path, self.tick())
            else:
                owner = DOMAIN_0[0] if node.owner == domid else node.perms[0]
                others = tuple(entry for entry in node.perms[1:] if entry[0] != domid)
                now.update(path, node, node.value, (owner, *others), self.tick())
        self.publish(now)
        for conn in self.connections:
            for view in conn.transactions.values():
                view.forget_domain(domid)
        for other in self.domains.values():
            if other.target == domid:
                other.target = None
                self.changed(other)
        introduced = domain.introduced
        self.domains.pop(domid, None)
        self.waiting.pop(domid, None)
        if self.recorder is not None:
            self.recorder.released(domid)
        self.refusals.forget(domid)
        if introduced:
            self._fire_special(RELEASED, domid)
        return True

    # ---- publishing

    def publish(self, view: Transaction) -> None:
        """Make what `view` changed the public state. The caller has looked for conflicts."""
        now, recorder = self.now, self.recorder
        if view is now:
            tree, before, events = now.tree, now.changes, now.events
        else:
            tree = view.merged(self.tree)
            before = {path: self.tree.get(path) for path in view.changes}
            # what was made and removed again was never there
            events = {path: subtree for path, subtree in view.events.items() if before.get(path) or tree.get(path)}
            now.tree = tree
        now.settled()
        if self.cause is not None:
            self.contention.wrote(self.cause, before)
        alone = len(before) == 1
        for path, old in before.items():
            new = tree.get(path)
            if recorder is not None:
                if not alone or (old is None and view is not now):
                    place = tree.place(path)
                else:
                    # One request has changed this node alone: it is where it was, or the last of its siblings
                    place = 0 if old is not None or new is None else new.generation
                recorder.node(path, new, place)
            self._account(path, old, new)
        if self.watches.by_path:
            for path, subtree in events.items():
                self._fire(path, subtree, before.get(path))
        self._unsettled += len(before)
        if self._unsettled >= _SETTLED_NODES:
            self.settle()

    def rewrite(self, path: bytes, node: Node, value: bytes) -> None:
        """Another value for `node`, which is at `path`, while nobody else has the public root.

        What `update`, `fire` and `publish` of `now` come to for the most frequent of all changes, at half the price.
        """
        tree, recorder = self.now.tree, self.recorder
        new = Node(value, node.perms, node.children, self.tick())
        tree.replace(path, new)
        if recorder is not None:
            recorder.node(path, new, 0)
        if node.perms[0][0]:
            self._account(path, node, new)
        if self.watches.by_path:
            self._fire(path, True, node)
        self._unsettled += 1
        if self._unsettled >= _SETTLED_NODES:
            self.settle()

    def forget(self) -> None:
        """Undo what a failed operation did to `now`."""
        if self.now.changes or self.now.events:
            self.now.forget()

    def _account(self, path: bytes, old: Node | None, new: Node | None) -> None:
        if old is not None and new is not None and old.perms is new.perms:
            if owner := old.perms[0][0]:
                self.domains[owner].node_bytes += len(new.value) - len(old.value)
            return
        if old is not None:
            for domid, _ in old.perms:
                if domid:
                    self.domains[domid].named.discard(path)
            if old.owner:
                domain = self.domains[old.owner]
                domain.owned -= 1
                domain.node_bytes -= node_size(path, old.value, old.perms)
        if new is not None:
            for domid, _ in new.perms:
                if domid:
                    self.domain(domid).named.add(path)
            if new.owner:
                domain = self.domain(new.owner)
                domain.owned += 1
                domain.node_bytes += node_size(path, new.value, new.perms)
        if old is not None:
            for domid, _ in old.perms:
                # Any of 65,536 numbers may be named in permissions: what is not used is not kept
                if domid and (unused := self.domains.get(domid)) is not None and unused.idle:
                    del self.domains[domid]

    def settle(self) -> None:
        """The garbage collector looks at nothing of what is there now."""
        self._unsettled = 0
        gc.collect(1)  # what is garbage now would be kept for ever
        gc.freeze()

    def account_all(self) -> None:
        """The accounts of a tree that came from elsewhere."""
        for path, node in self.tree.items():
            self._account(path, None, node)
        self.settle()

    def _fire(self, path: bytes, subtree: bool, old: Node | None) -> None:
        found = self.watches.above(path) if subtree and path[:1] != b"@" else self.watches.exactly(path)
        allowed: dict[Connection, bool] = {}
        for watch in found:
            conn = watch.conn
            permitted = allowed.get(conn)
            if permitted is None:
                permitted = allowed[conn] = conn.privileged or self._may_see(conn, path, old)
            if permitted:
                conn.event(path[watch.strip :], watch.token, self.cause)

    def _fire_special(self, name: bytes, domid: int) -> None:
        """Watches of `@name`, then of `@name/<domid>`, which one of `@name` with a depth gets, too."""
        node = self.tree.get(name)
        if node is None:
            return
        one = b"%b/%d" % (name, domid)
        told = [(watch, name) for watch in self.watches.exactly(name) if watch.depth is None]
        told += [(watch, one) for watch in self.watches.exactly(one)]
        told += [(watch, one) for watch in self.watches.exactly(name) if watch.depth]
        for watch, path in told:
            if watch.conn.privileged or watch.conn.rights(node.perms) & wire.PERM_READ:
                watch.conn.event(path, watch.token)

    def _may_see(self, conn: Connection, path: bytes, old: Node | None) -> bool:
        """The node, as it is or was, or its parent is readable (XSA-115); a special one by its own permissions."""
        nodes = [old, self.tree.get(path)]
        if path[:1] != b"@":
            nodes.append(self.tree.get(wire.parent_of(path)))
        return any(node is not None and conn.rights(node.perms) & wire.PERM_READ for node in nodes)

    # ---- the whole of it

    def check(self) -> list[str]:
        """Faults of the tree and of the accounts; [] when all is well."""
        walk = self.check_steps()
        while True:
            try:
                next(walk)
            except StopIteration as end:
                faults: list[str] = end.value
                return faults

    def check_steps(self) -> Generator[None, None, list[str]]:
        """`check` of the store as it is now, in steps: others may change it in between."""
        faults = self._check_connections()
        with self.kept() as tree:
            yield from self._check_nodes(tree, faults)
        return faults

    def _check_nodes(self, tree: Tree, faults: list[str]) -> Generator[None, None, None]:
        counted = {domid: (domain.owned, domain.node_bytes) for domid, domain in self.domains.items()}
        owned: dict[int, int] = defaultdict(int)
        sizes: dict[int, int] = defaultdict(int)
        count = 0
        for path, node, _ in self.everything(tree, ordered=False):
            count += 1
            if count % _STEP == 0:
                yield
            perms = node.perms
            owner = perms[0][0]
            if owner == 0 and len(perms) == 1:
                continue  # nobody's account
            owned[owner] += 1
            sizes[owner] += node_size(path, node.value, perms)
            for domid, _ in perms:
                known = not domid or (domid in self.domains and path in self.domains[domid].named)
                if not known and self.tree.get(path) is node:
                    faults.append(f"{path!r}: domain {domid} does not know of it")
        if count != len(tree):
            faults.append(f"{len(tree)} nodes, {count} are reachable")
        faults += [
            f"domain {domid}: {nodes} nodes counted, {owned.get(domid, 0)} are there"
            for domid, (nodes, _) in counted.items()
            if domid and nodes != owned.get(domid, 0)
        ]
        faults += [
            f"domain {domid}: {size} bytes counted, {sizes.get(domid, 0)} are there"
            for domid, (_, size) in counted.items()
            if domid and size != sizes.get(domid, 0)
        ]

    def _check_connections(self) -> list[str]:
        faults = []
        watches = transactions = 0
        for conn in self.connections:
            watches += len(conn.watches)
            transactions += len(conn.transactions)
            watch_bytes = sum(len(path) + len(token) for path, token in conn.watches)
            if conn.watch_bytes != watch_bytes:
                faults.append(f"domain {conn.domid}: {conn.watch_bytes} bytes of watches counted, not {watch_bytes}")
            if conn.out_bytes != sum(map(len, conn.out)):
                faults.append(f"domain {conn.domid}: {conn.out_bytes} bytes wait, as counted")
        if watches != len(self.watches):
            faults.append(f"{len(self.watches)} watches, connections have {watches}")
        if transactions != self.contention.open:
            faults.append(f"{self.contention.open} transactions counted, connections have {transactions}")
        if transactions > self.now.holders:
            faults.append(f"{self.now.holders} hold the public root, {transactions} transactions do")
        return faults

    def everything(self, tree: Tree, *, ordered: bool = True) -> Iterator[tuple[bytes, Node, int]]:
        """All nodes as Tree.places has them, and the special ones."""
        yield from tree.places(ordered=ordered)
        for path in (INTRODUCED, RELEASED):
            node = tree.get(path)
            if node is not None:
                yield path, node, 0
