"""The store: a table of requests and replies, watches, transactions, permissions, quotas, the advisories."""

from __future__ import annotations

import logging

import pytest

from evtchnd.xenstore import wire
from evtchnd.xenstore.client import TRANSACTIONS
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.quota import Connection
from evtchnd.xenstore.store import Quotas, XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled

OK = b"OK\0"


class Guest:
    """A client of the pure store, by hand."""

    def __init__(self, store: XenStore, domid: int, confine: int | None = None) -> None:
        self.store = store
        self.conn: Connection = store.connect(domid, confine=confine)

    def ask(self, op: int, payload: bytes = b"\0", tx: int = 0) -> bytes | str:
        """The reply's payload, or the name of the error. Events that waited are dropped."""
        self.events()
        handle(self.store, self.conn, op, 77, tx, payload)
        replies = [m for m in self.conn.out if m[0] != Op.WATCH_EVENT]
        assert len(replies) == 1
        kind, req_id, tx_id, length = wire.HEADER.unpack_from(replies[0])
        body = replies[0][16:]
        assert (req_id, tx_id, length) == (77, tx, len(body))
        if kind == Op.ERROR:
            assert body[-1:] == b"\0"
            assert body[:-1].decode() in wire.ERROR_NAMES
            return body[:-1].decode()
        assert kind == op
        return body

    def events(self) -> list[tuple[str, str]]:
        """(path, token) of the events that wait; replies are dropped."""
        found = []
        while self.conn.out:
            message = self.conn.take()
            if message[0] == Op.WATCH_EVENT:
                assert message[4:12] == bytes(8)
                path, token, end = message[16:].split(b"\0")
                assert end == b""
                found.append((path.decode(), token.decode()))
        return found

    def write(self, path: str, value: str = "", tx: int = 0) -> bytes | str:
        return self.ask(Op.WRITE, path.encode() + b"\0" + value.encode(), tx)

    def read(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.READ, path.encode() + b"\0", tx)

    def ls(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.DIRECTORY, path.encode() + b"\0", tx)

    def rm(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.RM, path.encode() + b"\0", tx)

    def chmod(self, path: str, *perms: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.SET_PERMS, "\0".join([path, *perms, ""]).encode(), tx)

    def watch(self, path: str, token: str = "t", *more: str) -> bytes | str:
        return self.ask(Op.WATCH, "\0".join([path, token, *more, ""]).encode())

    def start(self) -> int:
        reply = self.ask(Op.TRANSACTION_START)
        assert isinstance(reply, bytes)
        return int(reply[:-1])

    def end(self, tx: int, verdict: str = "T") -> bytes | str:
        return self.ask(Op.TRANSACTION_END, verdict.encode() + b"\0", tx)


@pytest.fixture
def store() -> XenStore:
    return XenStore()


@pytest.fixture
def tool(store: XenStore) -> Guest:
    return Guest(store, 0)


def boot(store: XenStore, tool: Guest, domid: int) -> Guest:
    """A domain with its home, as xl leaves it."""
    store.introduce(domid)
    home = f"/local/domain/{domid}"
    assert tool.write(home) == OK
    assert tool.chmod(home, "n0", f"r{domid}") == OK
    for name in ("device", "data", "control"):
        assert tool.write(f"{home}/{name}") == OK
        assert tool.chmod(f"{home}/{name}", f"n{domid}") == OK
    return Guest(store, domid)


@pytest.fixture
def guest(store: XenStore, tool: Guest) -> Guest:
    return boot(store, tool, 7)


@pytest.mark.parametrize(
    ("op", "payload", "reply"),
    [
        (Op.READ, b"/t/v\0", b"val\0ue"),
        (Op.READ, b"/t\0", b""),
        (Op.READ, b"/t/none\0", "ENOENT"),
        (Op.READ, b"/t/v", "EINVAL"),
        (Op.READ, b"/t/v\0x\0", "EINVAL"),
        (Op.READ, b"", "EINVAL"),
        (Op.READ, b"\0", "EINVAL"),
        (Op.READ, b"@releaseDomain\0", "EINVAL"),
        (Op.DIRECTORY, b"/t\0", b"v\0d\0"),
        (Op.DIRECTORY, b"/t/v\0", b""),
        (Op.DIRECTORY, b"/none\0", "ENOENT"),
        (Op.GET_PERMS, b"/t\0", b"n0\0"),
        (Op.GET_PERMS, b"@introduceDomain\0", b"n0\0"),
        (Op.WRITE, b"/t/new/deep\0x", OK),
        (Op.WRITE, b"/t/v", "EINVAL"),
        (Op.WRITE, b"/\0x", OK),
        (Op.WRITE, b"@releaseDomain\0x", "EINVAL"),
        (Op.MKDIR, b"/t/v\0", OK),
        (Op.MKDIR, b"/t/e/f\0", OK),
        (Op.RM, b"/t\0", OK),
        (Op.RM, b"/none\0", OK),
        (Op.RM, b"/none/none\0", "ENOENT"),
        (Op.RM, b"/\0", "EINVAL"),
        (Op.SET_PERMS, b"/t\0n0\0b7\0", OK),
        (Op.SET_PERMS, b"/t\0", "EINVAL"),
        (Op.SET_PERMS, b"/t\0q0\0", "EINVAL"),
        (Op.SET_PERMS, b"/none\0n0\0", "ENOENT"),
        (Op.UNWATCH, b"/t\0t\0", "ENOENT"),
        (Op.UNWATCH, b"/t\0", "EINVAL"),
        (Op.WATCH, b"/t\0", "EINVAL"),
        (Op.WATCH, b"/t\0t\0-1\0", "EINVAL"),
        (Op.WATCH, b"/none/yet\0t\0", OK),
        (Op.TRANSACTION_END, b"T\0", "ENOENT"),
        (Op.TRANSACTION_END, b"X\0", "EINVAL"),
        (Op.GET_DOMAIN_PATH, b"007\0", b"/local/domain/7\0"),
        (Op.GET_DOMAIN_PATH, b"x\0", "EINVAL"),
        (Op.IS_DOMAIN_INTRODUCED, b"0\0", b"T\0"),
        (Op.IS_DOMAIN_INTRODUCED, b"9\0", b"F\0"),
        (Op.INTRODUCE, b"9\x001\x002\0", "EINVAL"),
        (Op.INTRODUCE, b"9\0", "EINVAL"),
        (Op.RELEASE, b"9\0", "ENOENT"),
        (Op.RELEASE, b"0\0", "EINVAL"),
        (Op.RESUME, b"9\0", "ENOENT"),
        (Op.SET_TARGET, b"9\x008\0", "ENOENT"),
        (Op.CONTROL, b"check\0", OK),
        (Op.CONTROL, b"nonsense\0", "EINVAL"),
        (Op.RESET_WATCHES, b"\0", OK),
        (Op.DIRECTORY_PART, b"/t\0", "EINVAL"),
        (Op.WATCH_EVENT, b"\0", "ENOSYS"),
        (Op.ERROR, b"\0", "ENOSYS"),
        (20, b"\0", "ENOSYS"),
        (0xFFFF, b"\0", "ENOSYS"),
        (2**32 - 1, b"\0", "ENOSYS"),
    ],
)
def test_requests_of_a_tool(tool: Guest, store: XenStore, op: int, payload: bytes, reply: bytes | str) -> None:
    tool.ask(Op.WRITE, b"/t/v\0val\0ue")
    tool.write("/t/d/x")
    assert tool.ask(op, payload) == reply
    assert store.check() == []


@pytest.mark.parametrize(
    ("op", "payload", "reply"),
    [
        (Op.READ, b"data\0", b""),
        (Op.READ, b"/local/domain/7\0", b""),
        (Op.READ, b"/local/domain/7/none\0", "ENOENT"),
        (Op.READ, b"/local/domain/8\0", "EACCES"),
        (Op.READ, b"/none\0", "EACCES"),
        (Op.READ, b"/\0", "EACCES"),
        (Op.WRITE, b"none\0x", "EACCES"),
        (Op.WRITE, b"data/a/b\0x", OK),
        (Op.WRITE, b"/local/domain/7/control/shutdown\0", OK),
        (Op.WRITE, b"/local/domain/8/data\0x", "EACCES"),
        (Op.MKDIR, b"/tool\0", "EACCES"),
        (Op.RM, b"/local/domain/7\0", "EACCES"),
        (Op.RM, b"data/none\0", OK),
        (Op.SET_PERMS, b"data\0n7\0r8\0", OK),
        (Op.SET_PERMS, b"data\0n8\0", "EPERM"),
        (Op.SET_PERMS, b"/local/domain/7\0n7\0", "EACCES"),
        (Op.SET_PERMS, b"/\0n7\0", "EACCES"),
        (Op.SET_PERMS, b"@releaseDomain\0n7\0", "EACCES"),
        (Op.GET_PERMS, b"@releaseDomain\0", "EACCES"),
        (Op.INTRODUCE, b"8\x001\x002\0", "EACCES"),
        (Op.RELEASE, b"8\0", "EACCES"),
        (Op.CONTROL, b"check\0", "EACCES"),
        (Op.SET_TARGET, b"7\x008\0", "EACCES"),
        (Op.IS_DOMAIN_INTRODUCED, b"8\0", "EACCES"),
        (Op.GET_DOMAIN_PATH, b"8\0", b"/local/domain/8\0"),
    ],
)
def test_requests_of_a_guest(
    store: XenStore, tool: Guest, guest: Guest, op: int, payload: bytes, reply: bytes | str
) -> None:
    boot(store, tool, 8)
    assert guest.ask(op, payload) == reply
    assert store.check() == []


def test_what_a_guest_makes_is_its_own_and_inherits_the_rest(tool: Guest, guest: Guest) -> None:
    tool.chmod("/local/domain/7/data", "b0", "r8")
    assert guest.write("data/x/y") == OK
    assert tool.ask(Op.GET_PERMS, b"/local/domain/7/data/x\0") == b"b7\0r8\0"


def test_directory_in_parts(tool: Guest) -> None:
    names = [f"node-{number:04d}" for number in range(1000)]
    for name in names:
        tool.write(f"/many/{name}")
    assert tool.ls("/many") == "E2BIG"
    got, generations = b"", set()
    while True:
        reply = tool.ask(Op.DIRECTORY_PART, b"/many\0%d\0" % len(got))
        assert isinstance(reply, bytes)
        assert len(reply) <= 4096
        generation, _, part = reply.partition(b"\0")
        generations.add(generation)
        if part.endswith(b"\0\0"):
            got += part[:-1]
            break
        got += part
    assert got == b"".join(name.encode() + b"\0" for name in names)
    assert len(generations) == 1
    generation = generations.pop()
    assert tool.ask(Op.DIRECTORY_PART, b"/many\x00999999\0") == generation + b"\0\0"
    tool.write("/many/one-more")
    assert tool.ask(Op.DIRECTORY_PART, b"/many\x00999999\0") != generation + b"\0\0"


# ---- watches


def test_a_watch_replies_first_then_fires_once(tool: Guest) -> None:
    handle(tool.store, tool.conn, Op.WATCH, 1, 0, b"/a\0tok\0")
    assert [message[0] for message in tool.conn.out] == [Op.WATCH, Op.WATCH_EVENT]
    assert tool.events() == [("/a", "tok")]
    assert tool.watch("/a", "tok") == "EEXIST"
    assert tool.watch("/a", "other") == OK


def test_watches_fire_for_what_is_below_and_not_beside(store: XenStore, tool: Guest) -> None:
    other = Guest(store, 0)
    for path in ("/", "/a", "/a/b", "/a/b/c", "/ab"):
        other.watch(path, path)
    other.events()
    tool.write("/a/b", "1")
    assert other.events() == [("/a/b", "/"), ("/a/b", "/a"), ("/a/b", "/a/b")]
    tool.write("/a/b", "1")  # the same value fires, too
    assert len(other.events()) == 3
    tool.ask(Op.MKDIR, b"/a/b\0")  # is there: nothing happens
    assert other.events() == []
    tool.write("/ab/c")
    assert other.events() == [("/ab/c", "/"), ("/ab/c", "/ab")]
    tool.write("/a/b/c")
    other.events()
    tool.rm("/a")
    assert other.events() == [("/a/b/c", "/a/b/c"), ("/a/b", "/a/b"), ("/a", "/"), ("/a", "/a")]
    tool.rm("/a")
    assert other.events() == []


def test_relative_watches_get_relative_events(tool: Guest, guest: Guest) -> None:
    guest.watch("data", "rel")
    assert guest.events() == [("data", "rel")]
    tool.write("/local/domain/7/data/x")
    assert guest.events() == [("data/x", "rel")]
    assert guest.ask(Op.UNWATCH, b"data\0rel\0") == OK
    tool.write("/local/domain/7/data/x")
    assert guest.events() == []


@pytest.mark.parametrize(("depth", "seen"), [("0", ["/w"]), ("1", ["/w", "/w/a"]), ("2", ["/w", "/w/a", "/w/a/b"])])
def test_watch_depth(tool: Guest, depth: str, seen: list[str]) -> None:
    other = Guest(tool.store, 0)
    other.watch("/w", "t", depth)
    other.events()
    got = []
    for path in ("/w", "/w/a", "/w/a/b", "/w/a/b/c"):
        tool.write(path)
        got += [path for path, _ in other.events()]
    assert got == seen


def test_identical_unread_events_are_one(store: XenStore, tool: Guest) -> None:
    other = Guest(store, 0)
    other.watch("/a")
    other.events()
    for _ in range(1000):
        tool.write("/a/state", "4")
    assert other.events() == [("/a/state", "t")]
    tool.write("/a/state", "4")
    assert other.events() == [("/a/state", "t")]


def test_special_watches(store: XenStore, tool: Guest, guest: Guest) -> None:
    tool.watch("@introduceDomain", "i")
    tool.watch("@releaseDomain", "r")
    tool.watch("/", "root")
    guest.watch("@releaseDomain", "r")
    tool.events()
    guest.events()
    store.introduce(9)
    assert tool.events() == [("@introduceDomain", "i")]
    store.release(9)
    assert tool.events() == [("@releaseDomain", "r")]
    assert guest.events() == []
    assert tool.chmod("@releaseDomain", "n0", "r7") == OK
    guest.events()
    store.introduce(9)
    store.release(9)
    assert guest.events() == [("@releaseDomain", "r")]


def test_xsa_115_no_event_of_what_cannot_be_read(store: XenStore, tool: Guest, guest: Guest) -> None:
    other = boot(store, tool, 8)
    guest.watch("/", "root")
    guest.watch("/local/domain/8/data", "other")
    guest.events()
    other.write("data/secret", "x")
    tool.write("/tool/secret")
    other.rm("data/secret")
    assert guest.events() == []
    other.chmod("data", "n8", "r7")
    guest.events()
    other.write("data/open", "x")
    assert {token for _, token in guest.events()} == {"root", "other"}
    # whoever loses the right to read is told
    other.chmod("data", "n8")
    assert {token for _, token in guest.events()} == {"root", "other"}


# ---- transactions


def test_a_transaction_sees_its_own_root(tool: Guest) -> None:
    other = Guest(tool.store, 0)
    tool.write("/a", "1")
    tx = tool.start()
    other.write("/b", "2")
    assert tool.read("/b", tx) == "ENOENT"
    tool.write("/a", "mine", tx)
    assert (tool.read("/a", tx), tool.read("/a"), other.read("/a")) == (b"mine", b"1", b"1")
    assert tool.ask(Op.TRANSACTION_START, b"\0", tx) == "EBUSY"
    assert tool.end(tx, "F") == OK
    assert tool.read("/a") == b"1"
    assert tool.read("/a", tx) == "ENOENT"
    assert tool.end(tx) == "ENOENT"


@pytest.mark.parametrize(
    ("mine", "theirs", "reply"),
    [
        ([("read", "/a")], [("write", "/a", "9")], "EAGAIN"),
        ([("read", "/a")], [("write", "/b", "9")], OK),
        ([("read", "/a")], [("write", "/a/child", "9")], OK),
        ([("read", "/a")], [("rm", "/a")], "EAGAIN"),
        ([("read", "/none")], [("write", "/none", "9")], "EAGAIN"),
        ([("ls", "/a")], [("write", "/a/child", "9")], "EAGAIN"),
        ([("ls", "/a")], [("write", "/a", "9")], OK),
        ([("write", "/a", "8")], [("write", "/a", "9")], "EAGAIN"),
        ([("write", "/a/x", "8")], [("write", "/a/y", "9")], OK),
        ([("write", "/a/x/y", "8")], [("rm", "/a")], "EAGAIN"),
        ([("rm", "/a")], [("write", "/a/b", "9")], "EAGAIN"),
        ([("rm", "/a")], [("write", "/a/new", "9")], "EAGAIN"),
        ([("write", "/a/n/m", "8")], [("write", "/a/n", "9")], "EAGAIN"),
        ([("chmod", "/a", "b0")], [("write", "/a/child", "9")], OK),
        ([("chmod", "/a", "b0")], [("write", "/a", "9")], "EAGAIN"),
    ],
)
def test_conflicts_are_found_by_path(
    tool: Guest, mine: list[tuple[str, ...]], theirs: list[tuple[str, ...]], reply: bytes | str
) -> None:
    other = Guest(tool.store, 0)
    tool.write("/a/b", "1")
    tool.write("/b", "1")
    tx = tool.start()
    for name, *args in mine:
        getattr(tool, name)(*args, tx=tx)
    for name, *args in theirs:
        getattr(other, name)(*args)
    before = dict(tool.store.tree.items())
    assert tool.end(tx) == reply
    if reply == "EAGAIN":
        assert dict(tool.store.tree.items()) == before
    assert tool.store.check() == []


def test_events_of_a_transaction_come_at_its_end(store: XenStore, tool: Guest) -> None:
    other = Guest(store, 0)
    other.watch("/a")
    other.events()
    tx = tool.start()
    for value in "123":
        tool.write("/a/b", value, tx)
    tool.write("/a/c", "x", tx)
    assert other.events() == []
    tool.end(tx)
    assert other.events() == [("/a/b", "t"), ("/a/c", "t")]
    tx = tool.start()
    tool.write("/a/b", "no", tx)
    tool.end(tx, "F")
    assert other.events() == []


def test_xsa_414_415_421_nothing_is_orphaned(tool: Guest) -> None:
    other = Guest(tool.store, 0)
    tool.write("/a/b/c", "1")
    tx = tool.start()
    tool.rm("/a", tx)
    tool.write("/a/b/d", "2", tx)
    tool.rm("/a/b", tx)
    tool.write("/a/z", "3", tx)
    other.write("/elsewhere", "4")
    assert tool.end(tx) == OK
    assert tool.store.check() == []
    assert sorted(path for path, _ in tool.store.tree.walk()) == [b"/", b"/a", b"/a/z", b"/elsewhere"]


# ---- quotas


def test_quota_of_nodes(store: XenStore, tool: Guest, guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    store.set_quotas(7, Quotas(nodes=10))
    assert store.domains[7].owned == 3
    assert [guest.write(f"data/{number}") for number in range(8)] == [OK] * 7 + ["ENOSPC"]
    assert guest.write("data/deep/er/than/that") == "ENOSPC"
    assert guest.write("data/0", "again") == OK
    tx = guest.start()
    assert guest.write("data/x", tx=tx) == "ENOSPC"
    assert guest.rm("data/0", tx=tx) == OK
    assert guest.write("data/x", tx=tx) == OK
    assert guest.end(tx) == OK
    assert store.domains[7].owned == 10
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["domain 7: xenstore: WRITE refused: quota nodes: 11, limit 10 (1 refusals so far)"]
    assert store.refusals.counts == {(7, "nodes"): 3}
    assert store.check() == []


def test_two_transactions_do_not_slip_past_the_quota(store: XenStore, tool: Guest, guest: Guest) -> None:
    store.set_quotas(7, Quotas(nodes=5))
    first, second = guest.start(), guest.start()
    for tx, name in ((first, "a"), (second, "b")):
        assert guest.write(f"data/{name}1", tx=tx) == OK
        assert guest.write(f"data/{name}2", tx=tx) == OK
    assert guest.end(first) == OK
    assert guest.end(second) == "ENOSPC"
    assert store.domains[7].owned == 5


def test_other_quotas(guest: Guest) -> None:
    assert guest.write("data/big", "x" * 2049) == "ENOSPC"
    assert guest.write("data/" + "x" * 2044) == "EINVAL"
    assert guest.chmod("data", "n7", *["r8"] * 5) == "ENOSPC"
    assert [guest.watch("data", f"t{number}") for number in range(129)] == [OK] * 128 + ["ENOSPC"]
    assert len([guest.start() for _ in range(10)]) == 10
    assert guest.ask(Op.TRANSACTION_START) == "ENOSPC"
    assert guest.ask(Op.RESET_WATCHES) == OK
    assert guest.start()


def test_quota_of_a_transactions_nodes(guest: Guest) -> None:
    tx = guest.start()
    replies = [guest.read(f"data/none{number}", tx) for number in range(1100)]
    assert replies.index("ENOSPC") > 1000
    assert guest.end(tx) == "ENOMEM"


def test_a_refusal_is_said_once_a_second(tool: Guest, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    store = XenStore(Quotas(transactions=1), clock=lambda: now[0])
    guest = Guest(store, 7)
    guest.start()
    caplog.set_level(logging.WARNING)
    for _ in range(5):
        assert guest.ask(Op.TRANSACTION_START) == "ENOSPC"
    assert len(caplog.records) == 1
    now[0] = 1.0
    guest.ask(Op.TRANSACTION_START)
    assert len(caplog.records) == 2
    assert caplog.records[1].getMessage().endswith("(6 refusals so far)")


# ---- hostile guests, by advisory


def test_xsa_206_a_transaction_beside_a_storm_elsewhere(store: XenStore, tool: Guest, guest: Guest) -> None:
    tx = tool.start()
    tool.write("/tool/x", "1", tx)
    for number in range(scaled(2000, least=100)):
        guest.write(f"data/{number % 20}", str(number))
    assert tool.end(tx) == OK


def test_xsa_322_417_a_reused_domid_inherits_nothing(store: XenStore, tool: Guest) -> None:
    first = boot(store, tool, 7)
    other = boot(store, tool, 8)
    tool.write("/shared", "x")
    tool.chmod("/shared", "n0", "b7", "r8")
    tool.write("/given", "x")
    tool.chmod("/given", "n7")
    other.write("data/for-9")
    other.chmod("data/for-9", "n8", "r9")  # domain 9 is not there yet
    first.write("data/mine")
    tool.chmod("@releaseDomain", "n7", "r7")
    store.release(7)
    assert tool.ask(Op.GET_PERMS, b"@releaseDomain\0") == b"n0\0"
    assert "7" not in str(tool.ls("/local/domain"))
    assert tool.ask(Op.GET_PERMS, b"/shared\0") == b"n0\0r8\0"
    assert tool.read("/given") == "ENOENT"
    again = boot(store, tool, 7)
    assert again.read("/shared") == "EACCES"
    assert again.read("data/mine") == "ENOENT"
    assert store.domains[7].owned == 3
    ninth = boot(store, tool, 9)
    assert ninth.read("/local/domain/8/data/for-9") == "EACCES"
    assert store.check() == []


def test_xsa_322_417_nor_what_a_transaction_grants_to_who_is_gone(store: XenStore, tool: Guest) -> None:
    boot(store, tool, 7)
    other = boot(store, tool, 8)
    tx, plain = other.start(), other.start()
    assert other.chmod("data", "n8", "r7", tx=tx) == OK
    assert other.write("data/x", tx=plain) == OK
    store.release(7)
    again = boot(store, tool, 7)
    assert other.end(tx) == "EAGAIN"
    assert other.end(plain) == OK
    assert again.read("/local/domain/8/data") == "EACCES"
    assert store.check() == []


def test_xsa_324_huge_tokens(guest: Guest) -> None:
    token = "t" * 4000
    assert guest.watch("data", token) == OK
    assert guest.events() == [("data", token)]
    # "data/<90>" and the token do not fit into one message: no such event, and nothing breaks
    assert guest.write("data/" + "x" * 90) == OK
    assert guest.events() == []


def test_xsa_326_events_that_nobody_reads_are_bounded(store: XenStore, tool: Guest, guest: Guest) -> None:
    store.set_quotas(7, Quotas(memory_bytes=10_000))
    for number in range(5):
        guest.watch("data", f"{number}")
    for number in range(500):
        tool.write(f"/local/domain/7/data/{number}")
    assert guest.conn.out_bytes <= 10_000
    assert store.refusals.counts[7, "memory"] > 0
    assert len(guest.events()) > 100


def test_xsa_330_resetting_watches_leaks_nothing(store: XenStore, guest: Guest) -> None:
    for _ in range(scaled(10_000, least=200)):
        guest.watch("data")
        guest.start()
        assert guest.ask(Op.RESET_WATCHES) == OK
    assert (len(store.watches), guest.conn.watches, guest.conn.transactions) == (0, {}, {})


def test_xsa_352_353_nodes_are_not_given_away(tool: Guest, guest: Guest) -> None:
    guest.write("data/x")
    for path in ("data/x", "/", "/local", "/local/domain/7"):
        assert guest.chmod(path, "n8") in ("EPERM", "EACCES")
    tx = guest.start()
    assert guest.chmod("data/x", "n0", tx=tx) == "EPERM"
    assert guest.end(tx) == OK


def test_xsa_418_a_thousand_levels(store: XenStore, tool: Guest, guest: Guest) -> None:
    path = "data" + "/a" * 950
    assert guest.write(path, "deep") == OK
    assert guest.read(path) == b"deep"
    tool.watch("/local/domain/7" + "/" + path)
    tool.events()
    assert guest.rm("data/a") == OK
    assert len(tool.events()) == 1
    assert store.domains[7].owned == 3
    deep = "/deep" + "/a" * 1000
    assert tool.write(deep) == OK
    assert tool.rm("/deep") == OK
    assert store.check() == []


def test_xsa_419_reboots_leave_nothing(store: XenStore, tool: Guest) -> None:
    other = boot(store, tool, 8)
    base = len(store.tree)
    other.write("data/open")
    for _ in range(scaled(1000, least=20)):
        guest = boot(store, tool, 7)
        other.chmod("data/open", "n8", "b7")
        for number in range(20):
            guest.write(f"/local/domain/8/data/open/{number}")
        store.release(7)
        assert len(store.tree) == base + 1
    assert store.check() == []
    assert 7 not in store.domains


def test_xsa_484_every_operation_in_every_state_of_a_transaction(store: XenStore, tool: Guest, guest: Guest) -> None:
    payloads: dict[int, bytes] = {
        Op.WRITE: b"data/x\0v",
        Op.SET_PERMS: b"data\0n7\0",
        Op.WATCH: b"data\0t\0",
        Op.UNWATCH: b"data\0t\0",
        Op.TRANSACTION_START: b"\0",
        Op.TRANSACTION_END: b"T\0",
        Op.DIRECTORY_PART: b"data\x000\0",
        Op.GET_DOMAIN_PATH: b"7\0",
        Op.INTRODUCE: b"7\x001\x002\0",
        Op.RESUME: b"7\0",
        Op.SET_TARGET: b"7\x007\0",
        Op.GET_QUOTA: b"nodes\0",
        Op.SET_QUOTA: b"nodes\x001000\0",
        Op.GET_FEATURE: b"7\0",
        Op.SET_FEATURE: b"9\x007\0",
    }
    for client in (guest, tool):
        for op in range(28):
            for verdict in ("T", "F", "open", "ended", "never"):
                tx = client.start() if verdict != "never" else 12345
                if verdict == "ended":
                    client.end(tx)
                client.ask(op, payloads.get(op, b"data\0"), tx)
                if verdict in ("T", "F"):
                    client.end(tx, verdict)
                client.ask(Op.RESET_WATCHES)
                assert client.conn.transactions == {}
                assert store.check() == []


def test_a_domid_that_is_only_named_is_not_kept(store: XenStore, tool: Guest) -> None:
    tool.write("/x")
    for domid in range(100, 200):
        tool.chmod("/x", "n0", f"r{domid}")
    assert sorted(store.domains) == [0, 199]


def test_set_target(store: XenStore, tool: Guest, guest: Guest) -> None:
    other = boot(store, tool, 8)
    assert other.read("/local/domain/7/data") == "EACCES"
    assert tool.ask(Op.SET_TARGET, b"8\x007\0") == OK
    assert other.read("/local/domain/7/data") == b""
    assert other.write("/local/domain/7/data/x") == OK
    store.release(7)
    assert store.domains[8].target is None


# ---- workers: domain 0, confined


@pytest.mark.parametrize(
    ("op", "payload", "reply"),
    [
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712/state\x002", OK),
        (Op.WRITE, b"backend/vbd/7/51712/sectors\x002", OK),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712/queue-0/x\0", OK),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712/params\0/etc/shadow", "EACCES"),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712/params/x\0", "EACCES"),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712/params2\0x", OK),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/51712\0x", "EACCES"),
        (Op.WRITE, b"/local/domain/0/backend/vbd/7/99/state\x006", "ENOENT"),
        (Op.WRITE, b"/local/domain/0/backend/vbd/8/51712/state\x002", "EACCES"),
        (Op.WRITE, b"/local/domain/0/backend/vbd/77/1/state\x002", "EACCES"),
        (Op.WRITE, b"/local/domain/7/data\0x", "EACCES"),
        (Op.WRITE, b"/tool\0x", "EACCES"),
        (Op.RM, b"/local/domain/0/backend/vbd/7/51712\0", "EACCES"),
        (Op.RM, b"/local/domain/0/backend/vbd/7/51712/params\0", "EACCES"),
        (Op.SET_PERMS, b"/local/domain/0/backend/vbd/7/51712/state\0b7\0", "EACCES"),
        (Op.READ, b"/local/domain/0/backend/vbd/7/51712/params\0", b"disk.img"),
        (Op.READ, b"/local/domain/7/data\0", b""),
        (Op.DIRECTORY, b"/local/domain/0/backend/vbd/7\0", b"51712\0"),
        (Op.READ, b"/local/domain/8/data\0", "EACCES"),
        (Op.READ, b"/local/domain/77/data\0", "EACCES"),
        (Op.DIRECTORY, b"/local/domain/0/backend/vbd\0", "EACCES"),
        (Op.DIRECTORY, b"/\0", "EACCES"),
        (Op.WATCH, b"/local/domain/0/backend/vbd/7\0t\0", OK),
        (Op.WATCH, b"/local/domain/7/device\0t\0", OK),
        (Op.WATCH, b"/local/domain\0t\0", "EACCES"),
        (Op.WATCH, b"@releaseDomain\0t\0", "EACCES"),
        (Op.GET_PERMS, b"@releaseDomain\0", "EACCES"),
        (Op.RELEASE, b"7\0", "EACCES"),
        (Op.CONTROL, b"check\0", "EACCES"),
    ],
)
def test_a_worker_reaches_its_guest_only(
    store: XenStore, tool: Guest, guest: Guest, op: int, payload: bytes, reply: bytes | str
) -> None:
    boot(store, tool, 8)
    boot(store, tool, 77)
    tool.write("/local/domain/0/backend/vbd/7/51712/params", "disk.img")
    tool.write("/local/domain/0/backend/vbd/8/51712/params", "disk.img")
    worker = Guest(store, 0, confine=7)
    assert worker.ask(op, payload) == reply
    assert store.check() == []


def test_a_worker_s_quotas_are_not_its_guests() -> None:
    store = XenStore(Quotas(watches=1, transactions=1, nodes=4))
    tool = Guest(store, 0)
    device = "/local/domain/0/backend/vbd/7/51712"
    for number in range(51712, 51715):
        tool.write(f"/local/domain/0/backend/vbd/7/{number}")
    worker = Guest(store, 0, confine=7)
    for number in range(200):
        assert worker.ask(Op.WATCH, b"%b/state\0%d\0" % (device.encode(), number)) == OK
    for _ in range(TRANSACTIONS):
        assert isinstance(worker.ask(Op.TRANSACTION_START), bytes)
    # what it may leave in this process has a bound: so many nodes a device, at any depth
    made = 0
    while worker.ask(Op.WRITE, f"{device}/queue-{made % 9}/{made}\0x".encode()) == OK:
        made += 1
    assert 200 < made < 256
    assert worker.ask(Op.MKDIR, f"{device}/more\0".encode()) == "ENOSPC"
    assert worker.ask(Op.WRITE, f"{device}/queue-0/0\0again".encode()) == OK
    assert worker.ask(Op.WRITE, b"/local/domain/0/backend/vbd/7/51713/state\x002") == OK
    assert store.check() == []


def test_who_fires_events_waits_until_they_are_read(tool: Guest) -> None:
    now = [0.0]
    store = XenStore(clock=lambda: now[0])
    tool = Guest(store, 0)
    guest = boot(store, tool, 7)
    tool.watch("/local/domain/7/data")
    tool.events()
    for number in range(20):
        assert not guest.conn.busy
        guest.write(f"data/{number}")
        guest.events()
    assert (guest.conn.caused, guest.conn.busy) == (20, True)
    tool.events()
    assert (guest.conn.caused, guest.conn.busy) == (0, False)
    assert guest.conn in store.ready
    for number in range(20):
        guest.write(f"data/{number}")
    now[0] = 19.0
    assert store.expire()
    assert guest.conn.caused == 20
    now[0] = 20.0
    assert not store.expire()
    assert guest.conn.caused == 0
    # they are not lost, and not counted twice
    assert len(tool.events()) == 20
    assert guest.conn.caused == 0
    guest.write("data/x")
    store.disconnect(tool.conn)
    assert guest.conn.caused == 0
