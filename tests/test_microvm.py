"""A MicroVm on the host's KVM, which need not know of Xen: its Xen calls are kept here; the guest makes no hypercall.

What a real guest does with it: tests/lab/test_micro.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd.abi import DOMID_SELF, Evtchnop
from evtchnd.errors import HostError, OperatorError
from evtchnd.vmm import kvm, kvm_kernel, kvm_machine, micro
from evtchnd.vmm.client import Disconnected, Refused
from evtchnd.vmm.elf import Image, Segment
from evtchnd.vmm.guest_words import GuestWords
from evtchnd.vmm.hypercalls import Shutdown
from evtchnd.vmm.kvm import XenHvm
from evtchnd.vmm.microvm import Ended, Guest, MicroVm
from kvmguest import why_no_kvm

ENTRY = 0x100000
HALT = b"\xf4\xeb\xfd"  # hlt; jmp
TRIPLE = b"\x0f\x0b"  # ud2, without a table of interrupts
RESET = b"\x66\xba\xf9\x0c\xb0\x04\xee" + HALT  # outb(4, 0xcf9)


class XenCalls:
    """What the VMM has told KVM of Xen: by descriptor and attribute."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, int, int], bytes] = {}
        self.on_set: Callable[[int, int, bytes], None] = lambda *_: None

    def ioctl(self, fd: int, request: int, argument: Any, call: str) -> int:
        if request in (kvm._XEN_HVM_SET_ATTR, kvm._XEN_VCPU_SET_ATTR):
            kind = int.from_bytes(argument[:2], "little")
            self.values[fd, request & 0xFF, kind] = argument[8:]
            self.on_set(request, kind, argument[8:])
        elif request in (kvm._XEN_HVM_GET_ATTR, kvm._XEN_VCPU_GET_ATTR):
            kind = int.from_bytes(argument[:2], "little")
            argument[8:] = self.values.get((fd, (request & 0xFF) + 1, kind), bytes(64))
        return 0


@pytest.fixture(autouse=True)
def xen(monkeypatch: pytest.MonkeyPatch) -> XenCalls:
    if why := why_no_kvm():
        pytest.skip(why)
    calls = XenCalls()
    everything = XenHvm(sum(flag.value for flag in XenHvm))
    monkeypatch.setattr(kvm_machine, "xen_capability", lambda _: everything)
    monkeypatch.setattr(kvm, "ioctl", calls.ioctl)
    monkeypatch.setattr(kvm_kernel, "irqfd", lambda *_, **__: None)
    monkeypatch.setattr(kvm_kernel, "set_gsi_routing", lambda *_: None)
    return calls


def guest(folder: Path, code: bytes = HALT, *, vcpus: int = 2, resume: float = 60.0) -> Guest:
    image = Image(ENTRY, (Segment(ENTRY, memoryview(code), 4096),))
    return Guest(folder / "vmm.sock", 1, "g1", image, memory=16 << 20, vcpus=vcpus, resume=resume)


@contextlib.contextmanager
def running(vm: MicroVm) -> Iterator[tuple[MicroVm, list[Ended]]]:
    """It, and its end when that has come."""
    ended: list[Ended] = []
    with vm:
        thread = threading.Thread(target=lambda: ended.append(vm.run()))
        thread.start()
        try:
            yield vm, ended
        finally:
            vm.end(Shutdown.POWEROFF, "by the test")
            thread.join()


# ---- its end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "reason"),
    [(None, Shutdown.CRASH), (Shutdown.POWEROFF, Shutdown.POWEROFF), (Shutdown.SOFT_RESET, Shutdown.CRASH)],
)
def test_a_triple_fault_is_told_with_the_registers(
    announced: Shutdown | None, reason: Shutdown, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DaemonProcess(tmp_path), MicroVm(guest(tmp_path, TRIPLE), print) as vm:
        vm.hypercalls._code = announced
        assert vm.run() == Ended(reason, "vCPU 0: triple fault", fault=True)
    lines = [(record.levelno, record.message) for record in caplog.records]
    assert [level for level, _ in lines] == [logging.ERROR] * 2
    assert lines[0][1].startswith("domain 1 (g1): vCPU 0: rip 0x")
    assert ", cr2 0x" in lines[0][1]
    assert lines[1][1] == "domain 1 (g1): vCPU 1: not up"


def test_a_guest_that_reboots_over_and_over_is_held_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    pauses: list[float] = []

    class Signals:
        asked = None

        def follow(self, vm: MicroVm | None) -> None:
            pass

        def wait(self, timeout: float) -> Ended | None:
            pauses.append(timeout)
            return Ended(Shutdown.POWEROFF, "by the test") if len(pauses) == 4 else None

    it = guest(tmp_path, RESET)
    with DaemonProcess(tmp_path), GuestWords(2) as words:
        stats = micro.Stats(it)
        ended = micro.run(it, words, stats, Signals(), restart=True, console=False)  # type: ignore[arg-type]
    assert ended.text == "by the test"
    assert pauses == [0.05, 0.1, 0.2, 0.4]
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4
    assert '"boots": 4' in stats.json(ended)
    assert micro.pause_after(3, 0.8) == micro.pause_after(3, 1.0) == 1.0
    assert micro.pause_after(3600, 1.0) == 0.0


def test_vifs_are_attached_before_the_guest_runs(tmp_path: Path) -> None:
    """One that is refused is a reason not to begin."""
    attached: list[str] = []
    it = dataclasses.replace(guest(tmp_path, TRIPLE), vifs=("a", "b"), attach_vif=attached.append)
    with DaemonProcess(tmp_path) as daemon:
        with MicroVm(it, print):
            assert attached == ["a", "b"]
        attach = functools.partial(micro.attach_vif, it.socket, it.domid)
        with pytest.raises(OperatorError, match=r"^--vif: .*control.sock: no evtchnd serves there"):
            MicroVm(dataclasses.replace(it, vifs=("script=none",), attach_vif=attach), print)
        until(lambda: daemon.call("list") == [], "the domain stays")


# ---- the daemon --------------------------------------------------------------------------------------------------


def alloc(vm: MicroVm) -> int:
    """A guest's call that changes the table of ports."""
    result, out = vm.channels.hypercall(Evtchnop.ALLOC_UNBOUND, struct.pack("<HHI", DOMID_SELF, 0, 0))
    assert result == 0
    return int(struct.unpack("<HHI", out)[2])


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_a_guests_calls_go_on_while_the_daemon_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = DaemonProcess(tmp_path)
    with running(MicroVm(guest(tmp_path), print)) as (vm, ended):
        first.end_at_once()
        until(lambda: "domain 1 (g1): the daemon has gone: waiting for it" in caplog.messages, "not noticed")
        calls = in_thread(lambda: [alloc(vm) for _ in range(20)])
        calls.join(20)
        assert not calls.is_alive()
        with DaemonProcess(tmp_path) as second:
            until(lambda: "domain 1 (g1): the daemon is back" in caplog.messages, "it does not come back")
            assert second.call("info", 1)["name"] == "g1"
            assert caplog.messages.count("domain 1 (g1): the daemon has gone: waiting for it") == 1
            assert not ended
            vm.end(Shutdown.POWEROFF, "by the test")
            vm.close()


def test_a_soft_reset_waits_for_the_daemon_and_leaves_nothing_of_xen(tmp_path: Path, xen: XenCalls) -> None:
    first = DaemonProcess(tmp_path)
    with running(MicroVm(guest(tmp_path), print)) as (vm, ended):
        for vcpu in vm.vcpus:
            vcpu.xen.set_upcall_vector(0x31 + vcpu.number)
        vm.machine.xen.set_runstate_update_flag(True)
        paused: list[bool] = []

        def on_set(request: int, kind: int, _: bytes) -> None:
            if (request, kind) == (kvm._XEN_HVM_SET_ATTR, kvm._Attr.RUNSTATE_UPDATE_FLAG):
                paused.extend(vcpu._wanted > 0 and not vcpu._inside for vcpu in vm.vcpus)

        xen.on_set = on_set
        first.end_at_once()
        reset = in_thread(vm._soft_reset)
        until(lambda: len(paused) == 2, "no reset")
        assert paused == [True, True]
        with DaemonProcess(tmp_path) as second:
            reset.join(60)
            assert not reset.is_alive()
            assert [vcpu.xen.upcall_vector() for vcpu in vm.vcpus] == [0, 0]
            assert not vm.machine.xen.runstate_update_flag()
            assert second.call("info", 1)["name"] == "g1"
            assert not ended
            vm.end(Shutdown.POWEROFF, "by the test")
            vm.close()


def test_a_start_that_waits(tmp_path: Path) -> None:
    """For a daemon that is not there yet, for a number that is in use yet, and no longer than it is to."""
    with pytest.raises(Disconnected):
        MicroVm(guest(tmp_path), print)
    asked = threading.Event()
    stopping = in_thread(lambda: (asked.wait(0.2), asked.set()))
    with pytest.raises(HostError, match="domain 1: ended while the daemon was waited for"):
        MicroVm(guest(tmp_path), print, patience=600, stopped=asked.is_set)
    stopping.join()
    made: list[MicroVm] = []
    waiting = in_thread(lambda: made.append(MicroVm(guest(tmp_path), print, patience=60)))
    with DaemonProcess(tmp_path) as daemon:
        waiting.join(60)
        with pytest.raises(Refused):
            MicroVm(guest(tmp_path), print)
        waiting = in_thread(lambda: made.append(MicroVm(guest(tmp_path), print, patience=60)))
        made[0].close()
        waiting.join(60)
        assert [each["domid"] for each in daemon.call("list")] == [1]
        made[1].close()
