"""Requests of toolstacks: domains, features, CONTROL, special watches; and who waits for a transaction."""

from __future__ import annotations

import logging

import pytest

from evtchnd.xenstore import contention, wire
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from xenstore_guest import OK, Guest, boot


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def store(clock: list[float]) -> XenStore:
    return XenStore(clock=lambda: clock[0])


@pytest.fixture
def tool(store: XenStore) -> Guest:
    return Guest(store, 0)


@pytest.fixture
def guest(store: XenStore, tool: Guest) -> Guest:
    return boot(store, tool, 7)


ALL = (
    b"nodes watches outstanding memory soft-memory transactions transaction-nodes node-permissions path-max node-size\0"
)


@pytest.mark.parametrize(
    ("op", "payload", "reply"),
    [
        (Op.INTRODUCE, b"7\x00123\x002\0", OK),
        (Op.INTRODUCE, b"7\x00123\x002\0more\0", OK),
        (Op.INTRODUCE, b"7\x00123\x000\0", "EINVAL"),
        (Op.INTRODUCE, b"7\x00123\0", "EINVAL"),
        (Op.INTRODUCE, b"9\x00123\x002\0", "EINVAL"),
        (Op.INTRODUCE, b"0\x00123\x002\0", "EINVAL"),
        (Op.IS_DOMAIN_INTRODUCED, b"7\0", b"T\0"),
        (Op.IS_DOMAIN_INTRODUCED, b"32752\0", b"T\0"),  # DOMID_SELF
        (Op.IS_DOMAIN_INTRODUCED, b"65536\0", "EINVAL"),
        (Op.RESUME, b"7\0", OK),
        (Op.SET_TARGET, b"7\0", "EINVAL"),
        (Op.SET_TARGET, b"7\x007\0more\0", OK),
        (Op.GET_FEATURE, b"", b"7\0"),
        (Op.GET_FEATURE, b"\0", b"7\0"),
        (Op.GET_FEATURE, b"7\0", b"7\0"),
        (Op.GET_FEATURE, b"9\0", b"7\0"),
        (Op.GET_FEATURE, b"32752\0", "ENOENT"),
        (Op.GET_FEATURE, b"7\x008\0", "EINVAL"),
        (Op.SET_FEATURE, b"7\x003\0", "EBUSY"),
        (Op.SET_FEATURE, b"9\x003\0", OK),
        (Op.SET_FEATURE, b"9\x008\0", "EINVAL"),
        (Op.SET_FEATURE, b"9\0", "EINVAL"),
        (Op.SET_FEATURE, b"32752\x003\0", "ENOENT"),
        (Op.GET_QUOTA, b"", ALL),
        (Op.GET_QUOTA, b"\0", ALL),
        (Op.GET_QUOTA, b"nodes\0", b"1000\0"),
        (Op.GET_QUOTA, b"7\0nodes\0", b"1000\0"),
        (Op.GET_QUOTA, b"7\0permissions\0", b"5\0"),
        (Op.GET_QUOTA, b"7\0none\0", "EINVAL"),
        (Op.GET_QUOTA, b"none\0", "EINVAL"),
        (Op.GET_QUOTA, b"32752\0nodes\0", "ENOENT"),
        (Op.GET_QUOTA, b"7\0nodes\0more\0", "EINVAL"),
        (Op.SET_QUOTA, b"nodes\x005\0", OK),
        (Op.SET_QUOTA, b"7\0nodes\x005\0", OK),
        (Op.SET_QUOTA, b"7\0nodes\x00-1\0", "EINVAL"),
        (Op.SET_QUOTA, b"7\0nodes\x002147483648\0", "EINVAL"),
        (Op.SET_QUOTA, b"7\0none\x005\0", "EINVAL"),
        (Op.SET_QUOTA, b"nodes\0", "EINVAL"),
        (Op.CONTROL, b"", "EINVAL"),
        (Op.CONTROL, b"check\0more\0", "EINVAL"),
        (Op.CONTROL, b"log\0", b"Log switch settings:\nio      : off\n\0"),
        (Op.CONTROL, b"log\0loud\0", "EINVAL"),
        (Op.CONTROL, b"logfile\0/tmp/x\0", "EINVAL"),
        (Op.CONTROL, b"memreport\0/tmp/x\0", "EINVAL"),
        (Op.CONTROL, b"print\0", "EINVAL"),
        (Op.CONTROL, b"quota\0set\0nodes\x005\0", OK),
        (Op.CONTROL, b"quota\0set\0nodes\x000\0", "EINVAL"),
        (Op.CONTROL, b"quota\0set\0soft-memory\x005\0", "EINVAL"),
        (Op.CONTROL, b"quota\x009\0", "ENOENT"),
        (Op.CONTROL, b"quota\0x\0", "EINVAL"),
        (Op.CONTROL, b"quota\x007\0x\0", "EINVAL"),
        (Op.CONTROL, b"quota\0max\0-x\0", "EINVAL"),
        (Op.CONTROL, b"quota-soft\0set\0memory\x0050000\0", OK),
        (Op.CONTROL, b"quota-soft\0set\0nodes\x005\0", "EINVAL"),
        (Op.CONTROL, b"quota-soft\0x\0", "EINVAL"),
        (
            *(Op.CONTROL, b"quota-soft\0"),
            b"Quota settings:\nmemory           :  2097152 Total Xenstore memory per domain\n\0",
        ),
        (Op.CONTROL, b"help\0x\0", "EINVAL"),
    ],
)
def test_requests(tool: Guest, guest: Guest, op: int, payload: bytes, reply: bytes | str) -> None:
    assert tool.ask(op, payload) == reply
    assert tool.store.check() == []


@pytest.mark.parametrize(
    ("op", "payload", "reply"),
    [
        (Op.GET_FEATURE, b"\0", b"7\0"),
        (Op.GET_FEATURE, b"7\0", "EACCES"),
        (Op.SET_FEATURE, b"8\x001\0", "EACCES"),
        (Op.GET_QUOTA, b"\0", "EACCES"),
        (Op.SET_QUOTA, b"7\0nodes\x000\0", "EACCES"),
        (Op.CONTROL, b"help\0", "EACCES"),
        (Op.RESUME, b"7\0", "EACCES"),
    ],
)
def test_what_guests_and_workers_may_ask(
    store: XenStore, guest: Guest, op: int, payload: bytes, reply: bytes | str
) -> None:
    assert guest.ask(op, payload) == reply
    assert Guest(store, 0, confine=7).ask(op, payload) == reply


def test_help_lists_what_there_is(tool: Guest) -> None:
    said = tool.ask(Op.CONTROL, b"help\0")
    assert isinstance(said, bytes)
    for line in said[:-1].decode().splitlines():
        assert tool.ask(Op.CONTROL, f"{line.split()[0]}\0nonsense\0and\0more\0".encode()) == "EINVAL"
    assert len(said.splitlines()) == 7 + 1


# ---- features


def test_a_domain_without_depth(store: XenStore, tool: Guest) -> None:
    assert tool.ask(Op.SET_FEATURE, b"9\x003\0") == OK
    guest = boot(store, tool, 9)
    assert guest.ask(Op.GET_FEATURE) == b"3\0"
    assert guest.watch("data", "t", "1") == "EINVAL"
    assert guest.watch("data", "t") == OK
    store.release(9)
    assert tool.ask(Op.GET_FEATURE, b"9\0") == b"7\0"


# ---- CONTROL log


def test_requests_are_logged_when_a_tool_wants_it(tool: Guest, guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert tool.ask(Op.CONTROL, b"log\0on\0") == OK
    caplog.clear()
    guest.write("data/x", "secret" * 100)
    guest.ask(77)
    assert tool.ask(Op.CONTROL, b"log\0") == b"Log switch settings:\nio      : on\n\0"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("domain 7: xenstore: WRITE tx 0 b'data/x\\x00secretsecret")
    assert lines[0].endswith(" -> b'OK\\x00'")
    assert len(lines[0]) < 300
    assert lines[1] == "domain 7: xenstore: 77 tx 0 b'\\x00' -> b'ENOSYS\\x00'"
    assert tool.ask(Op.CONTROL, b"log\0-io\0") == OK
    caplog.clear()
    guest.write("data/x")
    assert not caplog.records
    assert tool.ask(Op.CONTROL, b"print\0two words\n\0") == OK
    assert caplog.records[0].getMessage() == "xenstore: control: 'two words\\n'"


# ---- special watches


def test_special_watches_of_one_domain_and_with_its_number(store: XenStore, tool: Guest) -> None:
    for path, *depth in (
        ("@introduceDomain",),
        ("@introduceDomain", "1"),
        ("@introduceDomain", "0"),
        ("@introduceDomain/9",),
        ("@introduceDomain/9", "1"),
        ("@introduceDomain/8",),
        ("@other",),
        ("/",),
    ):
        assert tool.watch(path, ":".join([path, *depth]), *depth) == OK
    tool.events()
    store.introduce(9)
    assert tool.events() == [
        ("@introduceDomain", "@introduceDomain"),
        ("@introduceDomain/9", "@introduceDomain/9"),
        ("@introduceDomain/9", "@introduceDomain/9:1"),
        ("@introduceDomain/9", "@introduceDomain:1"),
    ]
    store.introduce(9)
    assert tool.events() == []
    tool.watch("@releaseDomain/9", "gone")
    tool.events()
    store.release(8)
    assert tool.events() == []
    store.release(9)
    assert tool.events() == [("@releaseDomain/9", "gone")]


def test_special_watches_need_the_right_to_read(store: XenStore, tool: Guest, guest: Guest) -> None:
    assert guest.watch("@releaseDomain", "all") == OK
    assert guest.watch("@releaseDomain/9", "one") == OK
    assert guest.watch("@releaseDomain", "depth", "1") == OK
    for _ in range(2):
        guest.events()
        store.introduce(9)
        store.release(9)
        seen = guest.events()
        assert tool.chmod("@releaseDomain", "n0", "r7") == OK
    assert seen == [("@releaseDomain", "all"), ("@releaseDomain/9", "one"), ("@releaseDomain/9", "depth")]


@pytest.mark.parametrize(
    ("path", "of_tool", "of_guest"),
    [
        ("@releaseDomain", b"n0\0", "EACCES"),
        ("@releaseDomain/7", "ENOENT", "EACCES"),
        ("@none", "ENOENT", "EACCES"),
        ("@", "ENOENT", "EACCES"),
        ("@/", "EINVAL", "EINVAL"),
    ],
)
def test_permissions_of_special_paths(tool: Guest, guest: Guest, path: str, of_tool: object, of_guest: object) -> None:
    assert tool.ask(Op.GET_PERMS, path.encode() + b"\0") == of_tool
    assert guest.ask(Op.GET_PERMS, path.encode() + b"\0") == of_guest
    for op in (Op.READ, Op.WRITE, Op.MKDIR, Op.RM, Op.DIRECTORY):
        assert tool.ask(op, path.encode() + b"\0") == "EINVAL"


def test_depth_of_a_watch_on_the_root(store: XenStore, tool: Guest) -> None:
    other = Guest(store, 0)
    other.watch("/", "t", "1")
    other.events()
    tool.write("/a/b")
    tool.write("/a")
    tool.write("/")
    assert other.events() == [("/a", "t"), ("/", "t")]


# ---- transactions under pressure


def storm(tool: Guest, guest: Guest, tries: int) -> list[object]:
    """A transaction that relies on a node that the guest writes whenever it is listened to."""
    ends: list[object] = []
    for number in range(tries):
        tx = tool.start()
        tool.read("/local/domain/7/data/x", tx)
        tool.write("/tool/x", str(number), tx)
        if not guest.conn.busy:
            guest.write("data/x", str(number))
        ends.append(tool.end(tx))
        if ends[-1] == OK:
            break
    return ends


def test_xsa_206_writers_do_not_starve_a_transaction_for_ever(tool: Guest, guest: Guest) -> None:
    tool.write("/local/domain/7/data/x")
    assert storm(tool, guest, 10) == ["EAGAIN"] * 3 + [OK]
    assert (guest.conn.holder, guest.conn.busy, tool.conn.conflicts) == (None, False, 0)
    assert guest.conn in tool.store.ready


def test_a_guest_is_held_for_a_tenth_of_a_second_and_seldom(
    tool: Guest, guest: Guest, store: XenStore, clock: list[float]
) -> None:
    storm(tool, guest, 3)
    tool.start()
    assert guest.conn.busy
    clock[0] = 0.09
    assert store.expire()
    assert guest.conn.busy
    clock[0] = 0.1
    assert not store.expire()
    assert not guest.conn.busy
    # who holds on purpose takes a tenth of the time
    tool.ask(Op.RESET_WATCHES)
    for _ in range(5):
        assert storm(tool, guest, 10) == ["EAGAIN"] * 10
    clock[0] = 1.0
    assert storm(tool, guest, 10) == [OK]


def test_only_who_has_disturbed_is_held(store: XenStore, tool: Guest, guest: Guest) -> None:
    other = boot(store, tool, 8)
    for number in range(3):
        tx = tool.start()
        tool.ls("/local/domain/7/data", tx)
        other.write("data/x", str(number))
        guest.write(f"data/{number}")
        assert tool.end(tx) == "EAGAIN"
    tool.start()
    assert (guest.conn.busy, other.conn.busy) == (True, False)
    store.disconnect(tool.conn)
    assert not guest.conn.busy


def test_writers_are_remembered_only_while_it_matters(
    store: XenStore, tool: Guest, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contention, "_WRITERS_MAX", 50)
    guest.write("data/x")
    assert not store.contention._writers
    tx = tool.start()
    for number in range(100):
        guest.write(f"data/{number}")
    assert len(store.contention._writers) == 50
    tool.end(tx)
    assert not store.contention._writers


def test_a_domain_that_is_introduced_again_starts_anew(store: XenStore, tool: Guest, guest: Guest) -> None:
    tool.watch("@introduceDomain")
    guest.watch("data")
    guest.start()
    resets = []
    guest.conn.on_reset = lambda: resets.append(1)
    tool.events()
    assert tool.ask(Op.INTRODUCE, b"7\x001\x002\0") == OK
    assert (guest.conn.watches, guest.conn.transactions, list(guest.conn.out), resets) == ({}, {}, [], [1])
    assert tool.events() == []
    assert guest.conn.domain.features == wire.FEATURES
