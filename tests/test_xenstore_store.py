"""The store: a table of requests and replies, watches."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from evtchnd.xenstore import restore
from evtchnd.xenstore.log import Log
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from xenstore_guest import OK, Guest, boot


@pytest.fixture
def store() -> XenStore:
    return XenStore()


@pytest.fixture
def tool(store: XenStore) -> Guest:
    return Guest(store, 0)


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


# ---- one root, changed in place


def contents(store: XenStore) -> list[tuple[bytes, bytes, object, list[bytes]]]:
    return [(path, node.value, node.perms, node.names()) for path, node, _ in store.everything(store.tree)]


def change_all(tool: Guest, paths: list[bytes]) -> None:
    """Each node in another way: another value, removed, removed and made again."""
    for number, path in enumerate(paths):
        if number % 3:
            assert tool.ask(Op.RM, path + b"\0") == OK
        if number % 3 != 1:
            assert tool.ask(Op.WRITE, path + b"\0changed") == OK
        assert tool.ask(Op.WRITE, path + b"-new/below\0x") == OK


@pytest.mark.parametrize("walk", [restore.stream, XenStore.check_steps])
@pytest.mark.parametrize("at_first", [False, True], ids=["in a transaction's company", "alone"])
def test_a_walk_sees_one_moment(
    store: XenStore, tool: Guest, walk: Callable[[XenStore], Generator[object, None, object]], at_first: bool
) -> None:
    paths = [b"/w/%d/%d" % (n // 10, n % 10) for n in range(200)]
    for path in paths:
        tool.ask(Op.WRITE, path + b"\0first")
    then = contents(store)
    if not at_first:
        handle(store, store.connect(0), Op.TRANSACTION_START, 0, 0, b"\0")
    steps = walk(store)
    parts = [next(steps)]
    change_all(tool, paths)
    result: Any = None
    try:
        while True:
            parts.append(next(steps))
    except StopIteration as end:
        result = end.value
    if walk is restore.stream:
        assert contents(restore.from_stream(b"".join(parts))) == then  # type: ignore[arg-type]
    else:
        assert result == []
    assert store.now.holders == (0 if at_first else 1)
    assert store.check() == []


def test_a_shorter_log_is_of_one_moment(tool: Guest) -> None:
    log = Log.create()
    store = restore.open_store(log)
    tool = Guest(store, 0)
    paths = [b"/w/%d/%d" % (n // 10, n % 10) for n in range(200)]
    for path in paths:
        tool.ask(Op.WRITE, path + b"\0first")
    assert store.recorder is not None
    steps = store.recorder.compact()
    assert steps is not None
    next(steps)
    change_all(tool, paths)
    for _ in steps:
        pass
    assert contents(restore.open_store(Log(log.fd))) == contents(store)
    assert store.now.holders == 0


def test_a_transaction_sees_the_moment_of_its_start(store: XenStore, tool: Guest) -> None:
    paths = [b"/w/%d" % n for n in range(50)]
    for path in paths:
        tool.ask(Op.WRITE, path + b"\0first")
    reader = Guest(store, 0)
    tx = reader.start()
    change_all(tool, paths)
    assert [reader.ask(Op.READ, path + b"\0", tx) for path in paths] == [b"first"] * 50
    assert reader.ask(Op.DIRECTORY, b"/w\0", tx) == b"".join(b"%d\0" % n for n in range(50))
    assert reader.ask(Op.TRANSACTION_END, b"T\0", tx) == "EAGAIN"
    change_all(tool, paths[:10])
    tx = reader.start()
    store.disconnect(reader.conn)
    assert store.now.holders == 0


@pytest.mark.parametrize(
    ("op", "payload"),
    [
        (Op.WRITE, b"/t/a/new/deep\0x"),
        (Op.MKDIR, b"/t/new\0"),
        (Op.RM, b"/t\0"),
        (Op.RM, b"/t/b\0"),
        (Op.SET_PERMS, b"/t/b\0n7\0"),
    ],
)
@pytest.mark.parametrize("holders", [0, 1])
def test_a_defect_leaves_nothing_behind(
    store: XenStore, tool: Guest, monkeypatch: pytest.MonkeyPatch, op: Op, payload: bytes, holders: int
) -> None:
    for path in (b"/t/a", b"/t/b/c", b"/t/b/d", b"/t/e"):
        tool.ask(Op.WRITE, path + b"\0value")
    store.introduce(7)
    if holders:
        handle(store, store.connect(0), Op.TRANSACTION_START, 0, 0, b"\0")
    before = contents(store)

    def defective(self: XenStore, view: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(XenStore, "publish", defective)
        assert tool.ask(op, payload) == "EIO"
    assert contents(store) == before
    assert store.check() == []
    assert store.now.holders == holders
    assert tool.ask(op, payload) == OK
    assert contents(store) != before
    assert store.check() == []
