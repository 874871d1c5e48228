"""Any sequence of operations of several clients, inside and outside of transactions, beside a plain model.

After each step: the same replies and nodes as the model's, the store's own accounts hold, and no client has an event of
a node that it may not see. A commit that succeeds is equal to running the whole transaction at that moment.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.quota import Connection, Quotas
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import PERM_READ, Op
from scale import scaled
from xenstore_model import Model, Reply

PATHS = ["/", "/a", "/a/b", "/a/b/c", "/a/d", "/x", "/local/domain/7", "/local/domain/7/data", "/local/domain/7/data/y"]
paths = st.sampled_from([*PATHS, "/local/domain/8/data", "/a/b/c/d/e"])
clients = st.sampled_from([0, 7, 8])
values = st.sampled_from([b"", b"1", b"two"])
perms = st.tuples(
    st.tuples(st.sampled_from([0, 7, 8]), st.integers(0, 3)), st.tuples(st.sampled_from([7, 8]), st.integers(0, 3))
)
reads = st.sampled_from([Op.READ, Op.DIRECTORY, Op.GET_PERMS])
# Few enough to be reached
NODES_MAX = 6
Log = list[tuple[Op, str, object, Reply]]


def related(one: str, other: str) -> bool:
    return (one + "/").startswith(other.rstrip("/") + "/") or (other + "/").startswith(one.rstrip("/") + "/")


class StoreMachine(RuleBasedStateMachine):
    transactions = Bundle("transactions")

    def __init__(self) -> None:
        super().__init__()
        self.store = XenStore()
        self.conns = {domid: self.store.connect(domid) for domid in (0, 7, 8)}
        self.model = Model()
        # What a transaction sees, what it has done, how much of `changed` came before it
        self.logs: dict[tuple[int, int], tuple[Model, Log, int]] = {}
        self.changed: list[str] = []
        # what a transaction's owner had at its start
        self.had: dict[tuple[int, int], int] = {}
        self.model.limit = NODES_MAX
        for domid in (7, 8):
            self.store.set_quotas(domid, Quotas(nodes=NODES_MAX))

    @initialize()
    def boot(self) -> None:
        for domid in (7, 8):
            self.boot_one(domid)

    def boot_one(self, domid: int) -> None:
        self.store.introduce(domid)
        self.store.set_quotas(domid, Quotas(nodes=NODES_MAX))
        home = f"/local/domain/{domid}"
        for path, what in ((home, ((0, 0), (domid, 1))), (home + "/data", ((domid, 0),))):
            assert self.both(0, Op.WRITE, path, b"") == ("OK", None)
            assert self.both(0, Op.SET_PERMS, path, what) == ("OK", None)
        handle(self.store, self.conns[domid], Op.WATCH, 1, 0, b"/\0t\0")
        self.conns[domid].clear()

    # ---- asking

    def take_events(self, conn: Connection) -> list[str]:
        found = []
        while conn.out:
            message = conn.take()
            if message[0] == Op.WATCH_EVENT:
                found.append(message[16:].split(b"\0")[0].decode())
        return found

    def ask(self, who: int, op: Op, path: str, arg: object, tx: int) -> Reply:
        conn = self.conns[who]
        payload = path.encode() + b"\0"
        if op == Op.WRITE:
            assert isinstance(arg, bytes)
            payload += arg
        elif op == Op.SET_PERMS:
            assert isinstance(arg, tuple)
            payload += b"".join(text + b"\0" for text in wire.format_perms(arg))
        handle(self.store, conn, op, 1, tx, payload)
        kind, body = next((m[0], m[16:]) for m in conn.out if m[0] != Op.WATCH_EVENT)
        if kind == Op.ERROR:
            return body[:-1].decode(), None
        match op:
            case Op.READ:
                return "OK", body
            case Op.DIRECTORY:
                return "OK", sorted(name.decode() for name in wire.strings(body))
            case Op.GET_PERMS:
                return "OK", wire.parse_perms(wire.strings(body))
        return "OK", None

    def both(self, who: int, op: Op, path: str, arg: object = None) -> Reply:
        before = self.model.copy()
        reply = self.ask(who, op, path, arg, 0)
        assert reply == self.model.apply(who, op, path, arg), (who, op, path, arg)
        self.events_are_allowed(before)
        return reply

    def events_are_allowed(self, before: Model) -> None:
        everything = {**before.nodes, **self.model.nodes}
        self.changed += [path for path in everything if before.nodes.get(path) != self.model.nodes.get(path)]
        for who, conn in self.conns.items():
            for path in self.take_events(conn):
                parent = path.rpartition("/")[0] or "/"
                assert any(
                    model.rights(who, seen) & PERM_READ
                    for model in (before, self.model)
                    for seen in (path, parent)
                    if seen in model.nodes
                ), (who, path)

    # ---- rules

    @rule(who=clients, op=reads, path=paths)
    def read(self, who: int, op: Op, path: str) -> None:
        self.both(who, op, path)

    @rule(who=clients, path=paths, value=values)
    def write(self, who: int, path: str, value: bytes) -> None:
        self.both(who, Op.WRITE, path, value)

    @rule(who=clients, op=st.sampled_from([Op.MKDIR, Op.RM]), path=paths)
    def change(self, who: int, op: Op, path: str) -> None:
        self.both(who, op, path)

    @rule(who=clients, path=paths, what=perms)
    def chmod(self, who: int, path: str, what: tuple[tuple[int, int], ...]) -> None:
        self.both(who, Op.SET_PERMS, path, what)

    @rule(target=transactions, who=clients)
    def start(self, who: int) -> tuple[int, int]:
        if len(self.conns[who].transactions) == 10:
            self.raw_end(who, next(iter(self.conns[who].transactions)), b"F\0")
            self.conns[who].clear()
        conn = self.conns[who]
        handle(self.store, conn, Op.TRANSACTION_START, 1, 0, b"\0")
        tx = int(conn.take()[16:-1])
        self.logs[who, tx] = (self.model.copy(), [], len(self.changed))
        self.had[who, tx] = self.model.owned(who)
        return who, tx

    @rule(which=transactions, op=reads, path=paths)
    def read_inside(self, which: tuple[int, int], op: Op, path: str) -> None:
        self.inside(which, op, path)

    @rule(which=transactions, path=paths, value=values)
    def write_inside(self, which: tuple[int, int], path: str, value: bytes) -> None:
        self.inside(which, Op.WRITE, path, value)

    @rule(which=transactions, op=st.sampled_from([Op.MKDIR, Op.RM]), path=paths)
    def change_inside(self, which: tuple[int, int], op: Op, path: str) -> None:
        self.inside(which, op, path)

    @rule(which=transactions, path=paths, what=perms)
    def chmod_inside(self, which: tuple[int, int], path: str, what: tuple[tuple[int, int], ...]) -> None:
        self.inside(which, Op.SET_PERMS, path, what)

    def inside(self, which: tuple[int, int], op: Op, path: str, arg: object = None) -> None:
        if which not in self.logs:
            return
        who, tx = which
        view, log, _ = self.logs[which]
        reply = self.ask(who, op, path, arg, tx)
        elsewhere = self.model.owned(who) - self.had[which]
        assert reply == view.apply(who, op, path, arg, elsewhere=elsewhere), (who, op, path, arg)
        if reply[0] != "ENOSPC":
            log.append((op, path, arg, reply))
        self.events_are_allowed(self.model)

    @rule(which=consumes(transactions), commit=st.booleans())
    def end(self, which: tuple[int, int], commit: bool) -> None:
        if which not in self.logs:
            return
        who, tx = which
        view, log, since = self.logs.pop(which)
        before = self.model.copy()
        growth = view.owned(who) - self.had.pop(which)
        reply = self.raw_end(who, tx, b"T\0" if commit else b"F\0")
        if not commit:
            assert reply == "OK"
        elif reply == "OK":
            self.model.limit = 1000
            for op, path, arg, answer in log:
                assert self.model.apply(who, op, path, arg) == answer, "the commit was no single moment"
            self.model.limit = NODES_MAX
            assert who == 0 or growth <= 0 or self.model.owned(who) <= NODES_MAX
        elif reply == "ENOSPC":
            assert growth > 0
            assert self.model.owned(who) + growth > NODES_MAX
        else:
            assert reply == "EAGAIN"
            near = [(path, other) for _, path, _, _ in log for other in self.changed[since:]]
            assert any(related(path, other) for path, other in near), "nobody has touched what it relied on"
        self.events_are_allowed(before)

    def raw_end(self, who: int, tx: int, verdict: bytes) -> str:
        self.logs.pop((who, tx), None)
        conn = self.conns[who]
        handle(self.store, conn, Op.TRANSACTION_END, 1, tx, verdict)
        return next("OK" if m[0] != Op.ERROR else m[16:-1].decode() for m in conn.out if m[0] != Op.WATCH_EVENT)

    @rule(who=st.sampled_from([7, 8]), whom=st.sampled_from([7, 8]))
    def stand_in(self, who: int, whom: int) -> None:
        handle(self.store, self.conns[0], Op.SET_TARGET, 1, 0, b"%d\0%d\0" % (who, whom))
        self.conns[0].clear()
        self.model.targets[who] = whom

    @rule(who=st.sampled_from([7, 8]))
    def reboot(self, who: int) -> None:
        """The next domain of this number inherits nothing."""
        before = Model(dict(self.model.nodes), dict(self.model.targets))
        assert self.store.release(who)
        assert who not in self.store.domains
        self.model.release(who)
        self.logs = {which: log for which, log in self.logs.items() if which[0] != who}
        self.conns[who].clear()
        self.events_are_allowed(before)
        self.conns[who] = self.store.connect(who)
        self.boot_one(who)

    @rule(who=st.sampled_from([7, 8]))
    def reset(self, who: int) -> None:
        conn = self.conns[who]
        handle(self.store, conn, Op.RESET_WATCHES, 1, 0, b"\0")
        self.logs = {which: log for which, log in self.logs.items() if which[0] != who}
        assert (conn.watches, conn.transactions) == ({}, {})
        handle(self.store, conn, Op.WATCH, 1, 0, b"/\0t\0")
        conn.clear()

    # ---- always

    @invariant()
    def nodes_are_the_models(self) -> None:
        nodes = {path.decode(): (node.value, node.perms) for path, node in self.store.tree.walk()}
        assert nodes == self.model.nodes

    @invariant()
    def quotas_hold(self) -> None:
        for who in (7, 8):
            domain = self.store.domains[who]
            assert domain.owned == self.model.owned(who)
            sizes = [
                24 + len(path.encode()) + len(value) + 8 * len(perms)
                for path, (value, perms) in self.model.nodes.items()
                if perms[0][0] == who
            ]
            assert domain.node_bytes == sum(sizes)

    @invariant()
    def accounts_hold(self) -> None:
        assert self.store.check() == []
        assert not self.store.now.changes
        assert self.store.now.tree is self.store.now.base


TestStore = StoreMachine.TestCase

few = st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/a/d", "/x"])
operations = st.one_of(
    st.tuples(reads, few, st.none()),
    st.tuples(st.just(Op.WRITE), few, values),
    st.tuples(st.sampled_from([Op.MKDIR, Op.RM]), few, st.none()),
    st.tuples(st.just(Op.SET_PERMS), few, perms),
)
sequences = st.lists(operations, min_size=1, max_size=3)


@settings(max_examples=scaled(10_000, least=500))
@given(st.lists(operations, max_size=4), clients, sequences, clients, sequences)
def test_a_transaction_beside_others(
    before: list[tuple[Op, str, object]],
    who: int,
    mine: list[tuple[Op, str, object]],
    other: int,
    theirs: list[tuple[Op, str, object]],
) -> None:
    machine = StoreMachine()
    machine.boot()
    for op, path, arg in before:
        machine.both(0, op, path, arg)
    which = machine.start(who)
    for op, path, arg in mine:
        machine.inside(which, op, path, arg)
    for op, path, arg in theirs:
        machine.both(other, op, path, arg)
    machine.end(which, True)
    machine.nodes_are_the_models()
    machine.accounts_hold()
