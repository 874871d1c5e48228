"""Workers: domain 0, confined to the nodes of one guest."""

from __future__ import annotations

import pytest

from evtchnd.xenstore.client import TRANSACTIONS
from evtchnd.xenstore.store import Quotas, XenStore
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
