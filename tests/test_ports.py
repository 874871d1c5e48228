"""Event ports: Xen's states, numbers and errors; against a plain model of two domains; the wire form."""

from __future__ import annotations

import contextlib
import errno
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from evtchnd.abi import DOMID_SELF, PER_VCPU_VIRQS, Evtchnop, Evtchnstat, Virq
from evtchnd.errors import XenError
from evtchnd.ports import NR_PIRQS, Delivery, Effect, Kind, PortTable, Setting, Status
from evtchnd.vmm.hypercall import CALLS, event_channel_op

DOMID, VCPUS = 7, 3


@pytest.fixture
def effects() -> list[Delivery]:
    return []


@pytest.fixture
def table(effects: list[Delivery]) -> PortTable:
    return PortTable(DOMID, vcpus=VCPUS, deliver=effects.append)


def error_of(call: Callable[[], object]) -> int:
    with pytest.raises(XenError) as caught:
        call()
    return caught.value.errno


# ---- against a model -------------------------------------------------------------------------------------------

LIMIT = 12


class SmallTable(PortTable):
    limit = LIMIT  # type: ignore[assignment]


class Model:
    """Two domains as Xen has them: each a dict of ports, an interdomain port naming (domain, port) at the other end.

    Domain 0's ports carry what the daemon bound: `kick` and the guest port that it asked for (`name`).
    """

    def __init__(self) -> None:
        self.guest: dict[int, dict[str, Any]] = {}
        self.dom0: dict[int, dict[str, Any]] = {}
        self.kept: set[int] = set()
        self.effects: list[tuple[Any, ...]] = []
        self.serial = 0

    def free(self) -> int:
        for port in range(1, LIMIT):
            if port not in self.guest and port not in self.kept:
                return port
        raise XenError(errno.ENOSPC)

    def end_named(self, name: int) -> int | None:
        return next((number for number, end in self.dom0.items() if end["name"] == name), None)

    def alloc_unbound(self, dom: int, remote: int) -> int:
        self.check_dom(dom)
        port = self.free()
        self.guest[port] = {"state": "unbound", "vcpu": 0, "for": DOMID if remote == DOMID_SELF else remote}
        return port

    def check_dom(self, dom: int) -> None:
        if dom not in (DOMID, DOMID_SELF):
            raise XenError(errno.EPERM if dom == 0 else errno.ESRCH)

    def bind_interdomain(self, dom: int, remote: int) -> int:
        if dom == 0:
            end = self.dom0.get(remote)
            usable = end is not None and end["port"] is None
            if usable and end["name"] in self.kept and end["name"] not in self.guest:
                port = end["name"]
            else:
                port = self.free()
            if not usable:
                raise XenError(errno.EINVAL)
            end["port"] = port
            self.guest[port] = {"state": "interdomain", "vcpu": 0, "to": (0, remote)}
        elif dom in (DOMID, DOMID_SELF):
            port = self.free()
            other = self.guest.get(remote)
            if other is None or other["state"] != "unbound" or other["for"] != DOMID:
                raise XenError(errno.EINVAL)
            self.guest[port] = {"state": "interdomain", "vcpu": 0, "to": (DOMID, remote)}
            self.guest[remote] = {"state": "interdomain", "vcpu": other["vcpu"], "to": (DOMID, port)}
        else:
            raise XenError(errno.ESRCH)
        self.effects.append((Effect.RAISE, port, 0))
        return port

    def bind_virq(self, virq: int, vcpu: int) -> int:
        if virq >= 24 or (virq not in PER_VCPU_VIRQS and vcpu != 0):
            raise XenError(errno.EINVAL)
        if vcpu >= VCPUS:
            raise XenError(errno.ENOENT)
        if any(p["state"] == "virq" and p["virq"] == (virq, vcpu) for p in self.guest.values()):
            raise XenError(errno.EEXIST)
        port = self.free()
        self.guest[port] = {"state": "virq", "vcpu": vcpu, "virq": (virq, vcpu)}
        return port

    def bind_ipi(self, vcpu: int) -> int:
        if vcpu >= VCPUS:
            raise XenError(errno.ENOENT)
        port = self.free()
        self.guest[port] = {"state": "ipi", "vcpu": vcpu}
        return port

    def bind_pirq(self, pirq: int, _flags: int) -> int:
        if pirq >= NR_PIRQS:
            raise XenError(errno.EINVAL)
        if any(p["state"] == "pirq" and p["pirq"] == pirq for p in self.guest.values()):
            raise XenError(errno.EEXIST)
        port = self.free()
        self.guest[port] = {"state": "pirq", "vcpu": 0, "pirq": pirq}
        return port

    def bind_vcpu(self, port: int, vcpu: int) -> None:
        if vcpu >= VCPUS:
            raise XenError(errno.ENOENT)
        entry = self.guest.get(port)
        if entry is None or entry["state"] == "ipi" or ("virq" in entry and entry["virq"][0] in PER_VCPU_VIRQS):
            raise XenError(errno.EINVAL)
        entry["vcpu"] = vcpu

    def send(self, port: int) -> None:
        entry = self.guest.get(port)
        if entry is None or entry["state"] in ("virq", "pirq"):
            raise XenError(errno.EINVAL)
        if entry["state"] == "unbound":
            self.effects.append((Effect.DROP, port, 0))
        elif entry["state"] == "ipi":
            self.effects.append((Effect.RAISE, port, entry["vcpu"]))
        elif entry["to"][0] == 0:
            self.effects.append((Effect.SIGNAL, port, 0))
        else:
            other = entry["to"][1]
            self.effects.append((Effect.RAISE, other, self.guest[other]["vcpu"]))

    def close(self, port: int) -> None:
        entry = self.guest.pop(port, None)
        if entry is None:
            raise XenError(errno.EINVAL)
        self.effects.append((Effect.CLEAR, port, 0))
        if entry["state"] == "interdomain":
            dom, other = entry["to"]
            if dom == 0:
                self.dom0[other]["port"] = None
                self.effects.append((Effect.CLOSED, self.dom0[other]["name"], 0))
            else:
                self.guest[other] = {"state": "unbound", "vcpu": self.guest[other]["vcpu"], "for": DOMID}

    def reset(self, dom: int) -> None:
        self.check_dom(dom)
        for port in sorted(self.guest):
            self.close(port)

    def unmask(self, port: int) -> None:
        if not 0 < port < LIMIT:
            raise XenError(errno.EINVAL)
        if port in self.guest:
            self.effects.append((Effect.UNMASK, port, self.guest[port]["vcpu"]))

    def reserve(self, port: int) -> None:
        if not 0 < port < LIMIT:
            raise XenError(errno.EINVAL)
        if port in self.guest:
            raise XenError(errno.EBUSY)
        self.kept.add(port)
        self.guest[port] = {"state": "unbound", "vcpu": 0, "for": 0}

    def connect(self, port: int, kick: int) -> None:
        entry = self.guest.get(port)
        fresh = {"name": port, "port": port, "kick": kick}
        if entry is not None and entry["state"] == "interdomain" and entry["to"][0] == 0:
            number = entry["to"][1]
            # a name belongs to one end; another end that had it is stale
            stale = self.end_named(port)
            if stale is not None and stale != number:
                self.hang_up(stale)
            self.dom0[number] = fresh
        elif entry is not None and entry["state"] == "unbound" and entry["for"] == 0:
            stale = self.end_named(port)
            if stale is not None:
                self.hang_up(stale)
            number = min(set(range(1, len(self.dom0) + 2)) - self.dom0.keys())
            self.dom0[number] = fresh
            self.guest[port] = {"state": "interdomain", "vcpu": entry["vcpu"], "to": (0, number)}
        else:
            raise XenError(errno.EINVAL)

    def hang_up(self, number: int) -> None:
        end = self.dom0.pop(number)
        if end["port"] is not None:
            self.guest[end["port"]] = {"state": "unbound", "vcpu": self.guest[end["port"]]["vcpu"], "for": 0}

    def disconnect(self, name: int) -> None:
        number = self.end_named(name)
        if number is None:
            raise XenError(errno.ENOENT)
        self.hang_up(number)

    def status(self, port: int) -> Status:
        entry = self.guest.get(port)
        if entry is None:
            return Status(Evtchnstat.CLOSED)
        match entry["state"]:
            case "unbound":
                return Status(Evtchnstat.UNBOUND, entry["vcpu"], dom=entry["for"])
            case "interdomain":
                return Status(Evtchnstat.INTERDOMAIN, entry["vcpu"], dom=entry["to"][0], port=entry["to"][1])
            case "virq":
                return Status(Evtchnstat.VIRQ, entry["vcpu"], irq=entry["virq"][0])
            case "pirq":
                return Status(Evtchnstat.PIRQ, entry["vcpu"], irq=entry["pirq"])
            case _:
                return Status(Evtchnstat.IPI, entry["vcpu"])

    def kernel(self) -> dict[int, tuple[Any, ...]]:
        out: dict[int, tuple[Any, ...]] = {}
        for port, entry in self.guest.items():
            if entry["state"] == "ipi":
                out[port] = (Kind.IPI, entry["vcpu"], port, -1)
            elif entry["state"] == "interdomain" and entry["to"][0] == 0:
                out[port] = (Kind.EVENTFD, entry["vcpu"], 0, self.dom0[entry["to"][1]]["kick"])
            elif entry["state"] == "interdomain":
                other = entry["to"][1]
                out[port] = (Kind.LOOPBACK, self.guest[other]["vcpu"], other, -1)
        return out


ports = st.integers(1, 4) | st.integers(0, LIMIT) | st.sampled_from([0xFFFFFFFF, 1 << 31])
doms = st.sampled_from([DOMID_SELF, DOMID_SELF, DOMID, 0, 8, 0x7FF4])
vcpus = st.integers(0, VCPUS)


class PortMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.effects: list[Delivery] = []
        self.table = SmallTable(DOMID, vcpus=VCPUS, deliver=self.effects.append)
        self.model = Model()
        self.fd = 100

    def both(self, name: str, *args: int, model_args: tuple[int, ...] | None = None) -> None:
        def run(target: Any, given: tuple[int, ...]) -> tuple[str, object]:
            try:
                return "value", getattr(target, name)(*given)
            except XenError as error:
                return "error", error.errno

        before = self.table.save()
        got = run(self.table, args)
        wanted = run(self.model, args if model_args is None else model_args)
        if name == "send" and got[0] == "value":
            assert got[1] == self.effects[-1]
        else:
            assert got == wanted, name
        assert got[0] == wanted[0]
        if got[0] == "error":
            assert self.table.save() == before, "a refused call changed something"
        assert [(e.effect, e.port, e.vcpu) for e in self.effects] == self.model.effects
        self.effects.clear()
        self.model.effects.clear()

    @rule(dom=doms, remote=st.sampled_from([0, 0, 0, DOMID_SELF, DOMID, 9]))
    def alloc_unbound(self, dom: int, remote: int) -> None:
        self.both("alloc_unbound", dom, remote)

    @rule(dom=doms, remote=ports)
    def bind_interdomain(self, dom: int, remote: int) -> None:
        self.both("bind_interdomain", dom, remote)

    @rule(remote=st.integers(1, 4))
    def bind_to_domain_0(self, remote: int) -> None:
        self.both("bind_interdomain", 0, remote)

    @rule(virq=st.sampled_from([Virq.TIMER, Virq.DEBUG, Virq.CONSOLE, 16, 23, 24, 0xFFFFFFFF]), vcpu=vcpus)
    def bind_virq(self, virq: int, vcpu: int) -> None:
        self.both("bind_virq", virq, vcpu)

    @rule(vcpu=vcpus)
    def bind_ipi(self, vcpu: int) -> None:
        self.both("bind_ipi", vcpu)

    @rule(pirq=st.sampled_from([0, 1, NR_PIRQS - 1, NR_PIRQS]))
    def bind_pirq(self, pirq: int) -> None:
        self.both("bind_pirq", pirq, 0)

    @rule(port=ports, vcpu=vcpus)
    def bind_vcpu(self, port: int, vcpu: int) -> None:
        self.both("bind_vcpu", port, vcpu)

    @rule(port=ports)
    def send(self, port: int) -> None:
        self.both("send", port)

    @rule(port=ports)
    def close(self, port: int) -> None:
        self.both("close", port)

    @rule(port=ports)
    def unmask(self, port: int) -> None:
        self.both("unmask", port)

    @rule(dom=doms)
    def reset(self, dom: int) -> None:
        self.both("reset", dom)

    @rule(port=st.integers(0, 3))
    def reserve(self, port: int) -> None:
        self.both("reserve", port)

    @rule(port=st.integers(1, 4))
    def open_and_connect(self, port: int) -> None:
        self.fd += 1
        self.both("alloc_unbound", DOMID_SELF, 0)
        self.both("connect", port, self.fd)

    @rule(port=ports)
    def connect(self, port: int) -> None:
        self.fd += 1
        self.both("connect", port, self.fd)

    @rule(first=st.integers(1, 3), second=st.integers(1, 3))
    def swap_ends(self, first: int, second: int) -> None:
        """The guest closes two ports and binds to domain 0's ends again, in another order."""
        numbers = [self.table.status(DOMID, port).port for port in (second, first)]
        for port in (first, second):
            self.both("close", port)
        for number in numbers:
            self.both("bind_interdomain", 0, number)

    @rule(port=ports)
    def disconnect(self, port: int) -> None:
        self.both("disconnect", port)

    @rule(port=ports)
    def save_and_restore(self, port: int) -> None:
        before, kept = self.table.table(), self.table.save()
        for undone in (self.table.close, self.table.disconnect, lambda _: self.table.reset(DOMID_SELF)):
            with contextlib.suppress(XenError):
                undone(port)
        self.table.restore(kept)
        assert self.table.table() == before
        self.effects.clear()

    @invariant()
    def same(self) -> None:
        for port in range(1, LIMIT):
            assert self.table.status(DOMID, port) == self.model.status(port)
        settings = self.table.table()
        assert [s.port for s in settings] == sorted(s.port for s in settings)
        assert {s.port: (s.kind, s.vcpu, s.target_port, s.kick_fd) for s in settings} == self.model.kernel()
        assert self.table.table() is settings
        bound = {end["name"]: end["port"] is not None for end in self.model.dom0.values()}
        assert self.table.bound() == bound


TestPortMachine = PortMachine.TestCase


# ---- what Xen does, case by case ---------------------------------------------------------------------------------


def test_port_0_is_never_valid(table: PortTable) -> None:
    for call in (table.send, table.close, table.unmask, lambda p: table.status(DOMID, p), table.reserve):
        assert error_of(lambda call=call: call(0)) == errno.EINVAL
    assert error_of(lambda: table.bind_vcpu(0, 0)) == errno.EINVAL
    assert error_of(lambda: table.bind_interdomain(DOMID_SELF, 0)) == errno.EINVAL
    assert error_of(lambda: table.connect(0, 5)) == errno.EINVAL


def test_loopback_raises_the_other_end(table: PortTable, effects: list[Delivery]) -> None:
    first = table.alloc_unbound(DOMID_SELF, DOMID_SELF)
    table.bind_vcpu(first, 2)
    second = table.bind_interdomain(DOMID_SELF, first)
    assert effects == [Delivery(Effect.RAISE, second)]
    assert table.send(first) == Delivery(Effect.RAISE, second, 0)
    assert table.send(second) == Delivery(Effect.RAISE, first, 2)
    assert table.table() == (
        Setting(first, Kind.LOOPBACK, 0, second),
        Setting(second, Kind.LOOPBACK, 2, first),
    )
    table.close(second)
    assert table.status(DOMID, first) == Status(Evtchnstat.UNBOUND, 2, dom=DOMID)
    assert table.send(first).effect is Effect.DROP


def test_a_moved_port_changes_who_is_told(table: PortTable) -> None:
    port = table.alloc_unbound(DOMID_SELF, 0)
    table.connect(port, 5, 6)
    table.bind_vcpu(port, 1)
    assert table.table() == (Setting(port, Kind.EVENTFD, 1, 0, 5, 6, 1),)


def test_the_same_number_of_a_descriptor_is_told_apart(table: PortTable) -> None:
    port = table.alloc_unbound(DOMID_SELF, 0)
    table.connect(port, 5, 6)
    before = table.table()
    table.connect(port, 5, 6)
    assert before != table.table()


def test_windows_way_of_a_reset(table: PortTable, effects: list[Delivery]) -> None:
    """Status of the store's port, reset, bind to what the status named: same number, same eventfd."""
    table.reserve(1)
    table.reserve(2)
    table.connect(1, 50, 51)
    table.connect(2, 60, 61)
    other = table.alloc_unbound(DOMID_SELF, 0)
    before = table.status(DOMID_SELF, 2)
    table.reset(DOMID_SELF)
    assert [e.port for e in effects if e.effect is Effect.CLOSED] == [1, 2]
    assert table.table() == ()
    assert table.bound() == {1: False, 2: False}
    assert table.alloc_unbound(DOMID_SELF, 0) == other, "the store's and the console's number stay theirs"
    assert table.bind_interdomain(before.dom, before.port) == 2
    assert table.table() == (Setting(2, Kind.EVENTFD, 0, 0, 60, 61, 2),)
    assert error_of(lambda: table.bind_interdomain(before.dom, before.port)) == errno.EINVAL
    table.reserve(1)
    table.connect(1, 70)
    assert [s.kick_fd for s in table.table()] == [70, 60]


def test_a_guest_cannot_bind_what_domain_0_does_not_offer(table: PortTable) -> None:
    assert error_of(lambda: table.bind_interdomain(0, 1)) == errno.EINVAL
    port = table.alloc_unbound(DOMID_SELF, 0)
    table.connect(port, 5)
    assert error_of(lambda: table.bind_interdomain(0, 1)) == errno.EINVAL


def test_domain_0_only_binds_what_waits_for_it(table: PortTable) -> None:
    for port in (table.alloc_unbound(DOMID, 9), table.bind_ipi(0), table.bind_virq(Virq.TIMER, 0), 77):
        assert error_of(lambda port=port: table.connect(port, 5)) == errno.EINVAL
    assert error_of(lambda: table.disconnect(1)) == errno.ENOENT
    assert table.bound() == {}


def test_domain_0_closes_its_end(table: PortTable) -> None:
    port = table.alloc_unbound(DOMID_SELF, 0)
    table.connect(port, 5)
    table.bind_vcpu(port, 1)
    table.disconnect(port)
    assert table.status(DOMID, port) == Status(Evtchnstat.UNBOUND, 1)
    assert table.send(port).effect is Effect.DROP
    assert table.table() == ()


def test_virqs(table: PortTable, effects: list[Delivery]) -> None:
    timer = table.bind_virq(Virq.TIMER, 1)
    console = table.bind_virq(Virq.CONSOLE, 0)
    assert error_of(lambda: table.bind_virq(Virq.CONSOLE, 1)) == errno.EINVAL
    assert error_of(lambda: table.bind_virq(Virq.TIMER, 1)) == errno.EEXIST
    assert error_of(lambda: table.bind_virq(Virq.TIMER, VCPUS)) == errno.ENOENT
    assert error_of(lambda: table.bind_vcpu(timer, 0)) == errno.EINVAL
    table.bind_vcpu(console, 2)
    assert error_of(lambda: table.bind_virq(Virq.CONSOLE, 0)) == errno.EEXIST, "moved, but bound"
    table.restore(table.save())
    assert table.raise_virq(Virq.CONSOLE)
    assert table.raise_virq(Virq.TIMER, 1)
    assert not table.raise_virq(Virq.TIMER, 0)
    assert effects == [Delivery(Effect.RAISE, console, 2), Delivery(Effect.RAISE, timer, 1)]
    assert error_of(lambda: table.send(timer)) == errno.EINVAL
    table.close(console)
    assert not table.raise_virq(Virq.CONSOLE)
    assert table.bind_virq(Virq.CONSOLE, 0) == console


@pytest.mark.parametrize(("long_mode", "count"), [(True, 4095), (False, 1023)])
def test_xsa_496_ports_run_out(long_mode: bool, count: int) -> None:
    table = PortTable(DOMID, vcpus=1, long_mode=long_mode)
    first = table.alloc_unbound(DOMID_SELF, DOMID_SELF)
    for _ in range(count - 1):
        table.bind_ipi(0)
    before = table.save()
    full: list[Callable[[], object]] = [
        lambda: table.alloc_unbound(DOMID_SELF, 0),
        lambda: table.bind_interdomain(DOMID_SELF, first),
        lambda: table.bind_interdomain(0, 1),
        lambda: table.bind_virq(Virq.TIMER, 0),
        lambda: table.bind_pirq(3, 0),
        lambda: table.bind_ipi(0),
    ]
    for call in full:
        assert error_of(call) == errno.ENOSPC
    assert table.save() == before
    assert len(table.table()) == count - 1
    table.close(count // 2)
    assert table.bind_ipi(0) == count // 2, "the lowest free number"
    assert error_of(lambda: table.unmask(count + 1)) == errno.EINVAL
    table.reset(DOMID)
    assert table.table() == ()
    assert table.bind_ipi(0) == 1


# ---- the hypercall's form ----------------------------------------------------------------------------------------


def test_hypercall_alloc_and_status(table: PortTable) -> None:
    rc, out = event_channel_op(table, Evtchnop.ALLOC_UNBOUND, struct.pack("<HHI", DOMID_SELF, 0, 0) + b"beyond")
    assert (rc, out) == (0, struct.pack("<HHI", DOMID_SELF, 0, 1))
    table.connect(1, 5)
    rc, out = event_channel_op(table, Evtchnop.STATUS, struct.pack("<H2xIII", DOMID_SELF, 1, 9, 9) + b"\xff" * 8)
    assert rc == 0
    assert struct.unpack("<H2xIIIH2sI", out) == (DOMID_SELF, 1, Evtchnstat.INTERDOMAIN, 0, 0, b"\xff\xff", 1)
    table.bind_virq(Virq.DEBUG, 2)
    rc, out = event_channel_op(table, Evtchnop.STATUS, struct.pack("<H2xIII8x", DOMID, 2, 0, 0))
    assert struct.unpack("<H2xIIII4x", out) == (DOMID, 2, Evtchnstat.VIRQ, 2, Virq.DEBUG)
    rc, out = event_channel_op(table, Evtchnop.STATUS, struct.pack("<H2xIII8x", DOMID, 3, 0, 0))
    assert struct.unpack("<H2xIII8x", out) == (DOMID, 3, Evtchnstat.CLOSED, 0)


def test_hypercall_binds(table: PortTable, effects: list[Delivery]) -> None:
    first = table.alloc_unbound(DOMID_SELF, DOMID_SELF)
    arg = struct.pack("<H2xII", DOMID_SELF, first, 0)
    assert event_channel_op(table, Evtchnop.BIND_INTERDOMAIN, arg) == (0, struct.pack("<H2xII", DOMID_SELF, first, 2))
    assert event_channel_op(table, Evtchnop.BIND_VIRQ, struct.pack("<III", 0, 1, 0)) == (
        0,
        struct.pack("<III", 0, 1, 3),
    )
    assert event_channel_op(table, Evtchnop.BIND_PIRQ, struct.pack("<III", 9, 1, 0)) == (
        0,
        struct.pack("<III", 9, 1, 4),
    )
    assert event_channel_op(table, Evtchnop.BIND_IPI, struct.pack("<II", 2, 0)) == (0, struct.pack("<II", 2, 5))
    assert event_channel_op(table, Evtchnop.BIND_VCPU, struct.pack("<II", 4, 1)) == (0, b"")
    effects.clear()
    assert event_channel_op(table, Evtchnop.SEND, struct.pack("<I", 5)) == (0, b"")
    assert event_channel_op(table, Evtchnop.UNMASK, struct.pack("<I", 4)) == (0, b"")
    assert event_channel_op(table, Evtchnop.CLOSE, struct.pack("<I", 4)) == (0, b"")
    assert effects == [Delivery(Effect.RAISE, 5, 2), Delivery(Effect.UNMASK, 4, 1), Delivery(Effect.CLEAR, 4)]
    assert event_channel_op(table, Evtchnop.CLOSE, struct.pack("<I", 4)) == (-errno.EINVAL, b"")
    assert event_channel_op(table, Evtchnop.RESET, struct.pack("<H", 0)) == (-errno.EPERM, b"")
    assert event_channel_op(table, Evtchnop.RESET, struct.pack("<H", 8)) == (-errno.ESRCH, b"")
    assert event_channel_op(table, Evtchnop.RESET, struct.pack("<H", DOMID_SELF)) == (0, b"")
    assert table.table() == ()


def test_fifo_and_unknown_operations(table: PortTable) -> None:
    fifo = (Evtchnop.INIT_CONTROL, Evtchnop.EXPAND_ARRAY, Evtchnop.SET_PRIORITY, Evtchnop.RESET_CONT, 15, 99, -1)
    assert {event_channel_op(table, op, bytes(64)) for op in fifo} == {(-errno.ENOSYS, b"")}


@given(op=st.integers(-1, 16), arg=st.binary(max_size=32))
def test_no_argument_breaks_it(op: int, arg: bytes) -> None:
    table = PortTable(DOMID, vcpus=1)
    table.reserve(1)
    table.connect(1, 5)
    rc, out = event_channel_op(table, op, arg)
    assert isinstance(rc, int)
    assert rc <= 0
    if op in CALLS and len(arg) < CALLS[op][0].size:
        assert rc == -errno.EFAULT
    assert rc == 0 or not out


STRUCTS = {
    "alloc_unbound": (Evtchnop.ALLOC_UNBOUND, ("dom", "remote_dom", "port")),
    "bind_interdomain": (Evtchnop.BIND_INTERDOMAIN, ("remote_dom", "remote_port", "local_port")),
    "bind_virq": (Evtchnop.BIND_VIRQ, ("virq", "vcpu", "port")),
    "bind_pirq": (Evtchnop.BIND_PIRQ, ("pirq", "flags", "port")),
    "bind_ipi": (Evtchnop.BIND_IPI, ("vcpu", "port")),
    "close": (Evtchnop.CLOSE, ("port",)),
    "send": (Evtchnop.SEND, ("port",)),
    "status": (Evtchnop.STATUS, ("dom", "port", "status", "vcpu", "u")),
    "bind_vcpu": (Evtchnop.BIND_VCPU, ("port", "vcpu")),
    "unmask": (Evtchnop.UNMASK, ("port",)),
    "reset": (Evtchnop.RESET, ("dom",)),
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[int]]]:
    """What a C compiler says of Xen's own header: operation, size, offset of each field."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/xen/event_channel.h").exists():
        pytest.skip("needs a C compiler and Debian's libxen-dev")
    folder = tmp_path_factory.mktemp("header")
    lines = "".join(
        f'    printf("{name} %d %zu", EVTCHNOP_{name}, sizeof(struct evtchn_{name}));\n'
        + "".join(f'    printf(" %zu", offsetof(struct evtchn_{name}, {field}));\n' for field in fields)
        + '    puts("");\n'
        for name, (_, fields) in STRUCTS.items()
    )
    source = folder / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <xen/xen.h>\n"
        f"#include <xen/event_channel.h>\nint main(void) {{\n{lines}    return 0;\n}}\n"
    )
    subprocess.run([compiler, "-o", folder / "layout", source], check=True)
    text = subprocess.run([folder / "layout"], check=True, capture_output=True, text=True).stdout
    yield {line.split()[0]: [int(word) for word in line.split()[1:]] for line in text.splitlines()}


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_the_headers(header: dict[str, list[int]], name: str) -> None:
    op, fields = STRUCTS[name]
    layout = CALLS[op][0]
    number, size, *offsets = header[name]
    assert (op, layout.size) == (number, size)
    # each byte of the struct has one field; where a byte changes the first field that changes is the one there
    for i, offset in enumerate(offsets):
        raw = bytearray(size)
        raw[offset] = 1
        values = layout.unpack(raw)
        changed = [k for k, value in enumerate(values) if value not in (0, bytes(8))]
        assert changed == [i], f"{name}.{fields[i]}"
