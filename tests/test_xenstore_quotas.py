"""Quotas: what is refused, counted and said; changes while a guest runs; memory."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest

from evtchnd.control.config import Xenstore
from evtchnd.xenstore.quota import NAMES, Quotas
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


def test_xsa_414_415_421_two_transactions_do_not_slip_past_the_quota(
    store: XenStore, tool: Guest, guest: Guest
) -> None:
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


def test_quotas_are_those_of_the_config_and_of_the_c_server() -> None:
    config = Xenstore()
    assert Quotas(**{field.name: getattr(config, field.name) for field in fields(Quotas)}) == Quotas()
    assert {name for name, _ in NAMES.values()} | {"unread_s"} == {field.name for field in fields(Quotas)}


def test_a_quota_changes_while_the_domain_runs(store: XenStore, tool: Guest, guest: Guest) -> None:
    other = boot(store, tool, 8)
    assert tool.ask(Op.SET_QUOTA, b"7\0watches\x002\0") == OK
    assert [guest.watch("data", str(number)) for number in range(3)] == [OK, OK, "ENOSPC"]
    assert [other.watch("data", str(number)) for number in range(3)] == [OK] * 3
    assert tool.ask(Op.SET_QUOTA, b"7\0watches\x003\0") == OK
    assert guest.watch("data", "2") == OK
    assert tool.ask(Op.SET_QUOTA, b"7\0watches\x000\0") == OK
    assert [guest.watch("data", str(number)) for number in range(3, 300)] == [OK] * 297
    store.release(7)
    again = boot(store, tool, 7)
    assert [again.watch("data", str(number)) for number in range(129)] == [OK] * 128 + ["ENOSPC"]


def test_global_quotas_are_of_domains_to_come(store: XenStore, tool: Guest, guest: Guest) -> None:
    assert tool.ask(Op.SET_QUOTA, b"transactions\x001\0") == OK
    assert tool.ask(Op.GET_QUOTA, b"7\0transactions\0") == b"10\0"
    assert len({guest.start() for _ in range(10)}) == 10
    other = boot(store, tool, 8)
    other.start()
    assert other.ask(Op.TRANSACTION_START) == "ENOSPC"


def test_quotas_may_come_before_the_domain(store: XenStore, tool: Guest) -> None:
    assert tool.ask(Op.SET_QUOTA, b"9\0node-permissions\x001\0") == OK
    assert boot(store, tool, 9).chmod("data", "n9", "r8") == "ENOSPC"


@pytest.mark.parametrize("name", NAMES)
def test_0_is_no_quota(store: XenStore, tool: Guest, guest: Guest, name: str) -> None:
    assert tool.ask(Op.SET_QUOTA, f"7\0{name}\0".encode() + b"0\0") == OK
    assert guest.write("data/x", "1") == OK
    assert guest.watch("data") == OK
    assert guest.end(guest.start()) == OK
    assert guest.chmod("data", "n7", "r8") == OK
    assert not guest.conn.busy
    assert store.refusals.counts == {}


def test_paths_have_an_end_without_a_quota(tool: Guest, guest: Guest) -> None:
    tool.ask(Op.SET_QUOTA, b"7\0path-max\x000\0")
    tool.ask(Op.SET_QUOTA, b"7\0node-size\x000\0")
    assert guest.write("data/" + "x" * 2500) == OK
    assert guest.write("data/" + "x" * 3072) == "EINVAL"


def test_memory_counts_nodes_watches_and_transactions(store: XenStore, tool: Guest, guest: Guest) -> None:
    tool.ask(Op.SET_QUOTA, b"7\0memory\x0020000\0")
    for number in range(9):
        assert guest.write(f"data/{number}", "x" * 2000) == OK
    assert guest.write("data/9", "x" * 2000) == "ENOMEM"
    assert guest.watch("data", "t" * 2000) == "ENOMEM"
    assert guest.write("data/0", "y" * 2000) == OK
    assert guest.rm("data/8") == OK
    assert guest.watch("data", "t" * 1500) == OK
    assert guest.write("data/8", "x" * 2000) == "ENOMEM"
    assert guest.ask(Op.RESET_WATCHES) == OK
    tx = guest.start()
    assert guest.write("data/8", "x" * 2000, tx) == OK
    assert guest.write("data/9", "x" * 2000, tx) == "ENOMEM"
    assert guest.rm("data/8", tx) == OK
    assert guest.write("data/8", "x" * 2000, tx) == OK
    assert guest.write("data/8", "x" * 2001, tx) == OK
    other = guest.start()
    assert guest.write("data/9", "x" * 2000, other) == "ENOMEM"
    assert guest.end(tx, "F") == OK
    assert guest.write("data/9", "x" * 2000, other) == OK
    assert guest.end(other) == OK
    assert store.check() == []
    assert store.refusals.counts == {(7, "memory"): 5}


def test_the_soft_quota_is_said_once(
    tool: Guest, guest: Guest, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tool.ask(Op.SET_QUOTA, b"7\0soft-memory\x003000\0")
    for number in range(4):
        guest.write(f"data/{number}", "x" * 1500)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("domain 7: xenstore: memory 3")
    for number in range(4):
        guest.rm(f"data/{number}")
    for _ in range(9):
        guest.write("data/0", "x" * 1500)
        guest.write("data/1", "x" * 1500)
        guest.rm("data/1")
    assert len(caplog.records) == 1
    clock[0] = 1.0
    guest.write("data/0", "x")
    guest.write("data/1", "x" * 2000)
    guest.write("data/2", "x" * 2000)
    assert len(caplog.records) == 2


def test_what_a_domain_uses_is_told(store: XenStore, tool: Guest, guest: Guest) -> None:
    for number in range(5):
        guest.write(f"data/{number}", "x" * 100)
    guest.rm("data/4")
    guest.watch("data")
    guest.write("data/big", "x" * 3000)
    said = tool.ask(Op.CONTROL, b"quota\x007\0")
    assert isinstance(said, bytes)
    lines = said[:-1].decode().splitlines()
    assert lines[:3] == [
        "Domain 7:",
        "nodes            :        7 (max        8)",
        "watches          :        1 (max        1)",
    ]
    assert lines[-1] == f"node-size        :        0 (max {22 + 100 + 8:8}) 1 refused"
    report = tool.ask(Op.CONTROL, b"memreport\0")
    assert isinstance(report, bytes)
    assert f"{guest.conn.memory:>9} bytes counted for domain 7\n" in report.decode()
    most = tool.ask(Op.CONTROL, b"quota\0max\0")
    assert isinstance(most, bytes)
    assert most.decode().splitlines()[1] == "nodes            :        8"
    again = tool.ask(Op.CONTROL, b"quota\0max\0-r\0")
    assert isinstance(again, bytes)
    assert again.decode().splitlines()[1] == "nodes            :        7"
