"""Transactions of the store: what they see, what conflicts, when they are told."""

from __future__ import annotations

import pytest

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
