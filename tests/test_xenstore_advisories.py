"""What hostile guests have done to a XenStore, by the number of the advisory, at the pure store."""

from __future__ import annotations

import pytest

from evtchnd.xenstore.store import Quotas, XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled
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


def test_xsa_349_the_same_event_waits_once(store: XenStore, tool: Guest, guest: Guest) -> None:
    """A path that is written again and again while its watcher does not read costs one event."""
    tool.write("/local/domain/7/data/state")
    guest.watch("data/state")
    guest.events()
    for number in range(scaled(1_000_000, least=2000)):
        tool.write("/local/domain/7/data/state", str(number % 2))
    assert guest.conn.out_bytes < 100
    assert guest.events() == [("data/state", "t")]
    tool.write("/local/domain/7/data/state", "1")
    assert guest.events() == [("data/state", "t")]


def test_xsa_330_resetting_watches_leaks_nothing(store: XenStore, guest: Guest) -> None:
    for _ in range(scaled(10_000, least=200)):
        guest.watch("data")
        guest.start()
        assert guest.ask(Op.RESET_WATCHES) == OK
    assert (len(store.watches), guest.conn.watches, guest.conn.transactions) == (0, {}, {})
    assert guest.conn.watch_bytes == 0
    assert store.check() == []


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
        # one that is over, was never begun, or is none at all, is no way to the public tree
        over = client.start()
        assert client.end(over) == OK
        for tx in (over, 12345):
            assert client.write("/local/domain/7/data/through", "x", tx) == "ENOENT"
            assert client.end(tx) == "ENOENT"
        assert client.end(0) == "ENOENT"
        assert store.tree.get(b"/local/domain/7/data/through") is None


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
