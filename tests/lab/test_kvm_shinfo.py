"""What the kernel's own xen_shinfo_test looks at, with eventfds of another process.

the kernel's case                               here
----------------------------------------------  ------------------------------------------------------------------
upcall flag set by hand                         test_an_upcall_that_is_pending_comes
runstates set, adjusted, given; steal time      test_runstates
irqfd to a masked, to an unmasked port          test_kvm_ports.py test_a_masked_port_is_pending_and_says_nothing
irqfd after a memory slot has changed           test_an_event_after_memory_slots_have_changed
KVM_XEN_HVM_EVTCHN_SEND                         test_the_vmm_raises_an_event
EVTCHNOP_send to a port                         test_kvm_ports.py test_loopback_*; a moved target: the same
EVTCHNOP_send to an eventfd that is an irqfd    test_a_send_to_an_eventfd_that_is_an_irqfd
EVTCHNOP_send, eventfd assigned by hand         test_kvm_ports.py test_sends_reach_the_other_process_*
timer set by the guest, read back               test_a_timer_of_the_guest
timer restored                                  test_a_restored_timer
timer read back as set, and when it has fired   test_a_restored_timer
timer in the past                               test_a_timer_in_the_past
SCHEDOP_poll: pending, timeout, masked, other   test_poll_*
two races over a shared_info that comes, goes   test_sends_while_shared_info_comes_and_goes, test_polls_while_...
wall clock, time info, runstate of a vCPU       test_clocks
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from evtchnd.abi import PAGE_SIZE, Virq
from evtchnd.vmm.kvm import INVALID_GFN, Runstate, RunstateTimes
from evtchnd.vmm.kvm_agent import VECTOR_UPCALL, Command
from evtchnd.vmm.kvm_ioctl import KvmError
from evtchnd.vmm.kvm_vm import Xen
from evtchnd.vmm.soft import SHARED_INFO_GFN
from kvmguest import Other
from lab.kvmdomain import NONE, Domain
from lab.patience import patient
from scale import scaled
from test_kvm import other  # noqa: F401
from test_soft import Daemon, daemon  # noqa: F401

pytestmark = pytest.mark.timeout(120)

RUNSTATE = 0x3000  # addresses in RAM
TIME_INFO = 0x4000
MS = 1_000_000
SOON = int(patient(50)) * MS


@pytest.fixture
def domain(other: Other, daemon: Daemon) -> Iterator[Domain]:  # noqa: F811
    with Domain(daemon, other, vcpus=2) as domain:
        domain.runners[0].vcpu.xen.set_runstate_address(RUNSTATE)
        domain.quiet()
        yield domain


def poll(domain: Domain, *ports: int, timeout: int = 0) -> tuple[int, dict[str, int]]:
    """SCHEDOP_poll by vCPU 0: struct sched_poll {ports, nr_ports, timeout}, then the ports."""
    at = domain.scratch()
    data = struct.pack("<QI4xQ", at + 32, len(ports), timeout).ljust(32, b"\0") + struct.pack(f"<{len(ports)}I", *ports)
    return domain.call(Xen.SCHED_OP, 3, at, data=data)


# ---- events ---------------------------------------------------------------------------------------------------------


def test_an_upcall_that_is_pending_comes(domain: Domain) -> None:
    before = domain.upcalls()
    with domain.runners[0].vcpu.outside():
        domain.ram.write(SHARED_INFO_GFN * PAGE_SIZE, b"\1")
    domain.until(lambda: domain.upcalls() == before + 1)


def test_an_event_after_memory_slots_have_changed(domain: Domain) -> None:
    port = domain.bound()
    page = mmap.mmap(-1, PAGE_SIZE)
    for slot in (10, 11):
        domain.machine.add_memory(slot, 0xC0000000 + slot * PAGE_SIZE, PAGE_SIZE, _address(page))
        domain.other.write(domain.notify_fd(port))
        domain.until(lambda slot=slot: domain.taken(port) == slot - 9)  # type: ignore[misc]
    for slot in (10, 11):
        domain.machine.add_memory(slot, 0, 0, 0)


def _address(page: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


def test_the_vmm_raises_an_event(domain: Domain) -> None:
    port = domain.bound()
    for vcpu in (0, 1):
        before = domain.upcalls(vcpu)
        domain.machine.xen.send(port, vcpu)
        domain.until(lambda vcpu=vcpu, before=before: domain.upcalls(vcpu) == before + 1)  # type: ignore[misc]
    domain.until(lambda: domain.taken(port) == 2)
    for wrong in (0, 4096):
        with pytest.raises(KvmError):
            domain.machine.xen.send(wrong, 0)


def test_a_send_to_an_eventfd_that_is_an_irqfd(domain: Domain) -> None:
    """Port to port by way of an eventfd, all in the kernel."""
    source, target = domain.bound(), domain.bound()
    domain.channels.bind([(source, os.dup(domain.notify_fd(target)))])
    domain.until(lambda: domain.taken(target) == 1)  # a bind kicks once
    assert domain.sends(source, 1) == (0, NONE)
    domain.until(lambda: domain.taken(target) == 2)


# ---- timers ---------------------------------------------------------------------------------------------------------


def test_a_timer_of_the_guest(domain: Domain) -> None:
    """set_timer_op and VCPUOP_set_singleshot_timer stay in the kernel, and so does what comes of them."""
    timer, xen = domain.bind_virq(Virq.TIMER, 0), domain.runners[0].vcpu.xen
    due = domain.now() + 3600 * 1000 * MS
    assert domain.call(Xen.SET_TIMER_OP, due) == (0, NONE)
    assert xen.timer() == (timer, due)
    assert domain.call(Xen.SET_TIMER_OP, 0) == (0, NONE)
    assert xen.timer() == (timer, 0)
    before = domain.exits()
    assert domain.call(Xen.SET_TIMER_OP, domain.now() + SOON) == (0, NONE)
    domain.until(lambda: domain.taken(timer) == 1)
    data = struct.pack("<QII", domain.now() + SOON, 0, 0)
    assert domain.call(Xen.VCPU_OP, 8, 0, domain.scratch(), data=data) == (0, NONE)
    domain.until(lambda: domain.taken(timer) == 2)
    assert dict(domain.exits() - before) == {"io": 2}
    assert domain.call(Xen.VCPU_OP, 8, 1, domain.scratch(), data=data) == (-22, NONE), "another vCPU's"
    assert domain.call(Xen.VCPU_OP, 9, 0, 0) == (0, NONE), "stop"


def test_a_restored_timer(domain: Domain) -> None:
    timer, xen = domain.bind_virq(Virq.TIMER, 0), domain.runners[0].vcpu.xen
    due = domain.now() + SOON
    xen.set_timer(timer, due)
    assert xen.timer() in ((timer, due), (timer, 0)), "what was set, or it has fired"
    domain.until(lambda: domain.taken(timer) == 1)
    assert xen.timer() == (timer, 0)


def test_a_timer_in_the_past(domain: Domain) -> None:
    timer, xen = domain.bind_virq(Virq.TIMER, 0), domain.runners[0].vcpu.xen
    xen.set_timer(timer, 1)
    domain.until(lambda: domain.taken(timer) == 1)
    assert xen.timer() == (timer, 0)
    assert domain.call(Xen.SET_TIMER_OP, 1) == (0, NONE)
    domain.until(lambda: domain.taken(timer) == 2)


# ---- SCHEDOP_poll ---------------------------------------------------------------------------------------------------


def test_poll_of_a_pending_port_returns_at_once(domain: Domain) -> None:
    port = domain.bound()
    domain.mask(port)
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.pending(port))
    assert poll(domain, port) == (0, NONE)
    assert poll(domain, 3999, port) == (0, NONE), "one of several"
    assert poll(domain, 4096) == (-22, NONE)


def test_poll_ends_after_its_timeout(domain: Domain) -> None:
    port = domain.bound()
    began = time.monotonic()
    assert poll(domain, port, timeout=100 * MS) == (0, NONE)
    assert time.monotonic() - began >= 0.05
    assert not domain.pending(port)


def test_poll_is_woken_by_a_masked_port(domain: Domain) -> None:
    timer, xen = domain.bind_virq(Virq.TIMER, 0), domain.runners[0].vcpu.xen
    domain.mask(timer)
    upcalls = domain.upcalls()
    xen.set_timer(timer, domain.now() + SOON)
    assert poll(domain, timer) == (0, NONE)
    assert domain.pending(timer)
    assert domain.upcalls() == upcalls


def test_poll_is_woken_by_another_port_that_is_not_masked(domain: Domain) -> None:
    timer, xen = domain.bind_virq(Virq.TIMER, 0), domain.runners[0].vcpu.xen
    xen.set_timer(timer, domain.now() + SOON)
    assert poll(domain, timer + 1) == (0, NONE)
    domain.until(lambda: domain.taken(timer) == 1)


# ---- races ----------------------------------------------------------------------------------------------------------


class Juggler(threading.Thread):
    """Takes shared_info away and brings it back, by its frame and by its address, until told to stop."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self._domain, self._stop_it = domain, threading.Event()
        self.rounds = 0
        self.address = domain.special_address + (SHARED_INFO_GFN - domain.special_gfn) * PAGE_SIZE

    def run(self) -> None:
        xen = self._domain.machine.xen
        while not self._stop_it.is_set():
            xen.set_shared_info(SHARED_INFO_GFN)
            xen.set_shared_info(INVALID_GFN)
            xen.set_shared_info_hva(self.address)
            xen.set_shared_info_hva(0)
            self.rounds += 1
        xen.set_shared_info(SHARED_INFO_GFN)

    def __enter__(self) -> Juggler:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_it.set()
        self.join()


def test_sends_while_shared_info_comes_and_goes(domain: Domain) -> None:
    port = domain.bound()
    refused = 0
    with Juggler(domain) as juggler:
        for _ in range(scaled(20_000)):
            try:
                domain.machine.xen.send(port, 0)
            except KvmError:
                refused += 1
        domain.until(lambda: juggler.rounds > 3)
    taken = domain.taken(port)
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.taken(port) > taken or domain.pending(port), "events reach the guest afterwards")


def test_polls_while_shared_info_comes_and_goes(domain: Domain) -> None:
    timer = domain.bind_virq(Virq.TIMER, 0)
    with Juggler(domain) as juggler:
        for _ in range(scaled(1_000)):
            assert poll(domain, timer, timeout=MS) == (0, NONE)
        domain.until(lambda: juggler.rounds > 3)
    assert poll(domain, timer, timeout=MS) == (0, NONE)


# ---- time -----------------------------------------------------------------------------------------------------------


def test_runstates(domain: Domain) -> None:
    vcpu = domain.runners[0].vcpu
    xen = vcpu.xen

    def by_hand() -> None:
        for state in (Runstate.RUNNABLE, Runstate.BLOCKED, Runstate.OFFLINE):
            before = xen.runstate_times()
            xen.set_runstate(state)
            assert xen.runstate() == state
            assert xen.runstate_times().entry >= before.entry
        times = xen.runstate_times()
        assert times.entry == times.running + times.runnable + times.blocked + times.offline
        blocked, offline = 0x5A - times.blocked, 0x6B6B - times.offline
        xen.adjust_runstate(RunstateTimes(-1, 0, 0, -blocked - offline, blocked, offline))
        assert (xen.runstate_times().blocked, xen.runstate_times().offline) == (0x5A, 0x6B6B)
        xen.set_runstate_times(RunstateTimes(Runstate.RUNNING, 0x6B6B + 0x5A, 0, 0, 0x6B6B, 0x5A))
        assert (xen.runstate_times().blocked, xen.runstate_times().offline) == (0x6B6B, 0x5A)
        for wrong in (RunstateTimes(0, 5, 1, 1, 1, 1), RunstateTimes(0, 1 << 60, 1 << 60, 0, 0, 0)):
            with pytest.raises(KvmError, match="add up"):
                xen.set_runstate_times(wrong)
        with pytest.raises(KvmError):
            xen.set_runstate(4)

    domain.in_vcpu(0, by_hand)
    domain.command(Command.NOP)
    with vcpu.outside():
        state, entry, *rest = struct.unpack("<I4x5Q", domain.ram.read(RUNSTATE, 48))
        times = xen.runstate_times()
        assert (state, entry, *rest) == (
            times.state,
            times.entry,
            times.running,
            times.runnable,
            times.blocked,
            times.offline,
        )


def test_clocks(domain: Domain) -> None:
    xen = domain.runners[0].vcpu.xen
    began = time.time()
    domain.machine.xen.set_shared_info(SHARED_INFO_GFN)
    xen.set_time_info(TIME_INFO)
    domain.command(Command.NOP)
    version, seconds, nanoseconds = struct.unpack("<III", domain.ram.read(SHARED_INFO_GFN * PAGE_SIZE + 0xC00, 12))
    assert version
    assert version % 2 == 0
    booted = seconds + nanoseconds / 1e9
    for place in (TIME_INFO, SHARED_INFO_GFN * PAGE_SIZE + 32):
        version, _, _, system, scale, _ = struct.unpack("<IIQQIi", domain.ram.read(place, 32))
        assert version
        assert version % 2 == 0
        assert scale
        assert abs(booted + system / 1e9 - began) < patient(60), "wall clock at boot and time since make the time"


# ---- attributes -----------------------------------------------------------------------------------------------------


def test_attributes_are_read_back(domain: Domain) -> None:
    xen, vcpu = domain.machine.xen, domain.runners[1].vcpu.xen
    assert xen.long_mode()
    assert xen.shared_info() == SHARED_INFO_GFN
    assert xen.shared_info_hva() == 0
    assert xen.upcall_vector() == VECTOR_UPCALL
    for on in (True, False):
        xen.set_runstate_update_flag(on)
        assert xen.runstate_update_flag() is on
    xen.set_version(0x40012)
    assert xen.version() == 0x40012
    assert domain.call(Xen.XEN_VERSION, 0) == (0x40012, NONE)
    xen.set_version(0)
    assert domain.call(Xen.XEN_VERSION, 0) == (0x40011, {"io": 1, "xen": 1})
    with pytest.raises(KvmError, match="belong to the processor"):
        xen.set_upcall_vector(0x0F)
    assert vcpu.info() == SHARED_INFO_GFN * PAGE_SIZE + 64
    assert vcpu.info_hva() == 0
    address = domain.special_address + (SHARED_INFO_GFN - domain.special_gfn) * PAGE_SIZE + 64
    vcpu.set_info_hva(address)
    assert (vcpu.info_hva(), vcpu.info()) == (address, INVALID_GFN)
    vcpu.set_info(SHARED_INFO_GFN * PAGE_SIZE + 64)
    assert vcpu.id() == 1
    vcpu.set_id(5)
    assert vcpu.id() == 5
    vcpu.set_time_info(TIME_INFO)
    assert vcpu.time_info() == TIME_INFO
    vcpu.set_time_info(INVALID_GFN)
    assert vcpu.time_info() == INVALID_GFN
    with pytest.raises(KvmError):
        vcpu.runstate_address()
    vcpu.set_runstate_address(RUNSTATE + 64)
    assert vcpu.runstate_address() == RUNSTATE + 64
    vcpu.set_upcall_vector(0xF4)
    assert vcpu.upcall_vector() == 0xF4


def test_shared_info_by_its_address(domain: Domain) -> None:
    port = domain.bound()
    address = domain.special_address + (SHARED_INFO_GFN - domain.special_gfn) * PAGE_SIZE
    domain.machine.xen.set_shared_info_hva(address)
    assert (domain.machine.xen.shared_info_hva(), domain.machine.xen.shared_info()) == (address, INVALID_GFN)
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.taken(port) == 1)
