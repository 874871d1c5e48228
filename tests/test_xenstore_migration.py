"""Xen's migration stream: bytes drawn from the document and the C server's header, and round trips of anything."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.xenstore import migration as m
from evtchnd.xenstore import restore, wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.quota import Quotas
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
conn_ids = st.integers(1, 0xFFFFFFFF)
texts = st.binary(min_size=1, max_size=60).map(lambda data: data.replace(b"\0", b"x"))
names = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20)
quotas = st.dictionaries(names, u32, max_size=5)
perms = st.lists(st.tuples(st.integers(0, 0x7FF0), st.integers(0, 3)), max_size=5).map(tuple)
records = st.one_of(
    st.builds(m.Node, texts, st.binary(max_size=300), perms, u32, u32, u16),
    st.builds(
        m.Connection,
        *(conn_ids, st.integers(0, 0x7FF0), st.none() | st.integers(0, 0x7FF0), u32),
        *(st.binary(max_size=100), st.binary(min_size=4, max_size=100), st.integers(0, 4), st.just(True)),
    ),
    st.builds(m.Watch, conn_ids, texts, texts, st.none() | st.integers(0, 0xFFFE)),
    st.builds(m.Transaction, conn_ids, u32),
    st.builds(m.GlobalQuota, quotas, quotas),
    st.builds(m.Domain, u16, u32, quotas),
)


@given(st.lists(records, max_size=20))
def test_records_come_back(items: list[m.Record]) -> None:
    data = m.header() + b"".join(map(m.pack, items)) + m.end()
    assert len(data) % 8 == 0
    assert list(m.records(data)) == items


@given(st.lists(records, min_size=1, max_size=5), st.data())
def test_a_stream_that_is_cut_off_or_garbled_is_refused_or_read_but_never_worse(
    items: list[m.Record], data: st.DataObject
) -> None:
    whole = m.header() + b"".join(map(m.pack, items)) + m.end()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(m.MigrationError):
        list(m.records(whole[:cut]))
    at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    with suppress(m.MigrationError):
        list(m.records(whole[:at] + bytes([byte]) + whole[at + 1 :]))


def test_a_node_as_the_document_draws_it() -> None:
    body = struct.pack("<IIHHHH", 0, 0, 3, 2, 0, 2) + b"n\0\x00\x00" + b"r\0\x07\x00" + b"/a\0" + b"hi"
    node = m.Node(b"/a", b"hi", ((0, 0), (7, 1)))
    assert m.parse(m.Type.NODE, body, 0) == node
    # the C server counts the zeros at the end
    assert m.pack(node) == struct.pack("<II", 5, 32) + body + bytes(32 - len(body))
    assert m.pack(node) == m.pack_node(b"/a", b"hi", m.pack_perms(node.perms))


def test_a_stale_permission_grants_nothing() -> None:
    body = struct.pack("<IIHHHH", 0, 0, 3, 0, 0, 2) + b"n\0\x00\x00" + b"r\x01\x07\x00" + b"/a\0"
    assert m.parse(m.Type.NODE, body, 0) == m.Node(b"/a", b"", ((0, 0),))


@pytest.mark.parametrize("pad", [b"", b"\0\0"], ids=["C", "document"])
def test_a_watch_with_a_depth_with_and_without_its_padding(pad: bytes) -> None:
    body = struct.pack("<IHHH", 9, 3, 2, 4) + pad + b"/a\0t\0"
    assert m.parse(m.Type.WATCH_EXT, body, 0) == m.Watch(9, b"/a", b"t", 4)
    unlimited = struct.pack("<IHHH", 9, 3, 2, 0xFFFF) + pad + b"/a\0t\0"
    assert m.parse(m.Type.WATCH_EXT, unlimited, 0) == m.Watch(9, b"/a", b"t", None)


def test_a_ring_as_the_c_server_lays_it_out() -> None:
    body = struct.pack("<IHHHHIHHI", 3, 0, 0, 7, 0x7FF4, 5, 4, 2, 6) + b"reqs" + b"pe" + b"nded"
    assert m.parse(m.Type.CONNECTION, body, 0) == m.Connection(3, 7, None, 5, b"reqs", b"pended", 2)


def test_a_big_endian_stream_with_unknown_records_and_padding_that_is_not_counted() -> None:
    node = struct.pack(">IIHHHH", 0, 0, 3, 1, 0, 1) + b"b\0\x00\x07" + b"/a\0v"
    data = struct.pack(">QII", m.IDENT, 1, 1)
    data += struct.pack(">II", 1, 8) + struct.pack(">ii", -1, -1)
    data += struct.pack(">II", 77, 3) + b"abc" + bytes(5)
    data += struct.pack(">II", 5, len(node)) + node
    data += struct.pack(">II", 0, 0)
    assert list(m.records(data)) == [m.Node(b"/a", b"v", ((7, 3),))]


@pytest.mark.parametrize(
    "data", [b"", b"xenstore", b"xenstork" + bytes(8), b"xenstore\0\0\0\x09\0\0\0\0", b"xenstore\0\0\0\2\0\0\0\6"]
)
def test_what_is_no_stream(data: bytes) -> None:
    with pytest.raises(m.MigrationError):
        list(m.records(data))


# ---- a store's stream

paths = st.sampled_from(["/a", "/a/b", "/a/c", "/a/b/d", "/local/domain/7/x", "/local/domain/8/y/z", "/k"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just(Op.WRITE), paths, st.binary(max_size=20)),
        st.tuples(st.just(Op.RM), paths, st.just(b"")),
        st.tuples(st.just(Op.SET_PERMS), paths, st.sampled_from([b"n7\0r8\0", b"b0\0", b"r0\0w7\0b8\0"])),
    ),
    max_size=30,
)


def contents(store: XenStore) -> dict[bytes, object]:
    """All that a client can see of the nodes."""
    return {path: (node.value, node.perms, node.names()) for path, node, _ in store.everything(store.tree)}


@given(steps)
def test_a_store_comes_back_by_its_stream(operations: list[tuple[Op, str, bytes]]) -> None:
    store = XenStore()
    for domid in (7, 8):
        store.introduce(domid)
    tool, guest = store.connect(0), store.connect(7)
    handle(store, tool, Op.WRITE, 0, 0, b"/local/domain/7/x\0")
    handle(store, tool, Op.SET_QUOTA, 0, 0, b"7\0watches\x0099\0")
    handle(store, tool, Op.SET_QUOTA, 0, 0, b"nodes\x00555\0")
    handle(store, tool, Op.SET_TARGET, 0, 0, b"7\x008\0")
    for op, path, payload in operations:
        handle(store, tool, op, 0, 0, path.encode() + b"\0" + payload)
    handle(store, guest, Op.WATCH, 1, 0, b"x\0token\0")
    handle(store, guest, Op.WATCH, 2, 0, b"@releaseDomain\0other\x002\0")
    handle(store, guest, Op.TRANSACTION_START, 3, 0, b"\0")
    guest.partial = b"half a req"
    again = restore.from_stream(b"".join(restore.stream(store)))
    assert contents(again) == contents(store)
    assert again.check() == []
    assert again.quotas == Quotas(nodes=555)
    assert again.domains[7].quotas.watches == 99
    assert again.domains[7].target == 8
    (back,) = [conn for conn in again.connections if conn.domid == 7]
    assert set(back.watches) == set(guest.watches)
    assert {watch.strip for watch in back.watches.values()} == {watch.strip for watch in guest.watches.values()}
    assert back.unsent == b"".join(guest.out)
    assert back.partial == b"half a req"
    # what it has relied on is not known any more
    handle(again, back, Op.TRANSACTION_END, 4, next(iter(guest.transactions)), b"T\0")
    assert wire.HEADER.unpack_from(back.out[-1])[0] == Op.ERROR
    assert back.out[-1].endswith(b"EAGAIN\0")
    assert again.check() == []


def test_a_node_without_a_parent_is_refused() -> None:
    data = m.header() + m.pack(m.Node(b"/a/b", b"", ((0, 0),))) + m.end()
    with pytest.raises(m.MigrationError, match="/a/b"):
        restore.from_stream(data)


@pytest.mark.parametrize("path", [b"+a", b"a", b"/a//b", b"/a/", b"@other", b"/a b", b"/" + b"x" * 3072, b"\xd1\x90"])
def test_a_node_whose_path_is_none_is_refused(path: bytes) -> None:
    """It would be a node that no request finds, in nobody's walk of the tree (found by fuzzing)."""
    above = [m.Node(b"/a", b"", ((0, 0),), 0, 0, 0)]
    data = m.header() + b"".join(map(m.pack, [*above, m.Node(path, b"v", ((0, 0),), 0, 0, 0)])) + m.end()
    with pytest.raises(m.MigrationError, match=r"this is no path of a node|without the one above"):
        restore.from_stream(data)
