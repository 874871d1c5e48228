"""Event ports in the kernel, by a real guest: which sends stay in it, what reaches the guest, what leaks."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from evtchnd.abi import DOMID_SELF, Evtchnop, Virq
from evtchnd.errors import XenError
from evtchnd.ports import Kind, Setting
from evtchnd.vmm import kvm_agent, kvm_machine, physdev
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.kvm import XenHvm
from evtchnd.vmm.kvm_agent import Command
from evtchnd.vmm.kvm_ioctl import KvmError
from evtchnd.vmm.kvm_irq import EventRoute, irqfd, set_gsi_routing
from evtchnd.vmm.kvm_kernel import KvmKernel
from evtchnd.vmm.kvm_machine import Machine
from evtchnd.vmm.kvm_vm import Xen
from evtchnd.vmm.settings import Applier, Route
from evtchnd.vmm.soft import SHARED_INFO_GFN
from kvmguest import Other
from lab.kvmdomain import NONE, Domain, eventfd_number
from scale import scaled
from test_kvm import other  # noqa: F401
from test_soft import Daemon, daemon  # noqa: F401

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def domain(other: Other, daemon: Daemon) -> Iterator[Domain]:  # noqa: F811
    with Domain(daemon, other, vcpus=2) as domain:
        yield domain


@pytest.fixture
def narrow(other: Other, daemon: Daemon) -> Iterator[Domain]:  # noqa: F811
    """A 32-bit guest."""
    with Domain(daemon, other, long_mode=False) as domain:
        yield domain


def interdomain(domain: Domain) -> tuple[int, int]:
    """Two connected ports of the guest; the second was raised, and that is taken."""
    first = domain.alloc_unbound(DOMID_SELF)
    second = domain.bind_interdomain(DOMID_SELF, first)
    domain.until(lambda: domain.taken(second) == 1)
    return first, second


# ---- guest to backend -----------------------------------------------------------------------------------------------


def test_sends_reach_the_other_process_and_no_vcpu_exits(domain: Domain) -> None:
    count = scaled(100_000)
    port = domain.bound()
    domain.other.read(domain.kick_of(port), count)
    assert domain.sends(port, count) == (0, NONE)
    kicks, wakeups = domain.other.heard()
    assert kicks == count
    assert 1 <= wakeups <= count
    assert domain.forwarded == 0


def test_two_vcpus_send_at_once(domain: Domain) -> None:
    count = scaled(20_000)
    ports = [domain.bound(), domain.bound()]
    before = domain.exits()
    for vcpu, port in enumerate(ports):
        domain.post(Command.SENDS, port, count, 0, vcpu=vcpu)
    assert [domain.finish(vcpu) for vcpu in range(2)] == [0, 0]
    assert dict(domain.exits() - before) == {"io": 2}
    for port in ports:
        assert os.eventfd_read(domain.kick_of(port)) == count


def test_32_bit_sends_stay_in_the_kernel(narrow: Domain) -> None:
    count = scaled(20_000)
    assert not narrow.machine.xen.long_mode()
    port = narrow.bound()
    assert narrow.sends(port, count) == (0, NONE)
    assert os.eventfd_read(narrow.kick_of(port)) == count
    narrow.quiet()
    first, second = interdomain(narrow)
    assert narrow.sends(first, 50) == (0, NONE)
    assert narrow.taken(second) == 51


# ---- within the guest -----------------------------------------------------------------------------------------------


def test_loopback_stays_in_the_kernel(domain: Domain) -> None:
    count = scaled(10_000)
    domain.quiet()
    first, second = interdomain(domain)
    assert domain.sends(first, count) == (0, NONE)
    assert domain.taken(second) == count + 1, "the vCPU that sends takes each event before its next instruction"
    assert domain.taken(first) == 0
    assert domain.sends(second, 3) == (0, NONE), "and the other way"
    assert domain.taken(first) == 3


def test_loopback_reaches_the_vcpu_of_its_target(domain: Domain) -> None:
    domain.quiet()
    first, second = interdomain(domain)
    domain.bind_vcpu(second, 1)
    before = domain.upcalls(0), domain.upcalls(1)
    assert domain.sends(first, 1) == (0, NONE)
    domain.until(lambda: domain.taken(second) == 2)
    assert (domain.upcalls(0), domain.upcalls(1)) == (before[0], before[1] + 1)


def test_ipis_stay_in_the_kernel(domain: Domain) -> None:
    domain.quiet()
    ipi = domain.bind_ipi(1)
    upcalls = domain.upcalls(0), domain.upcalls(1)
    idle = sum(domain.runners[1].vcpu.exits.values())
    for i in range(1, 1 + scaled(200, least=10)):
        assert domain.sends(ipi, 1) == (0, NONE)
        domain.until(lambda i=i: domain.taken(ipi) == i)  # type: ignore[misc]
    assert (domain.upcalls(0), domain.upcalls(1)) == (upcalls[0], upcalls[1] + i)
    assert sum(domain.runners[1].vcpu.exits.values()) == idle, "the vCPU that is told does not exit either"


def test_a_closed_port_is_invalid(domain: Domain) -> None:
    port = domain.bound()
    domain.close_port(port)
    with pytest.raises(XenError) as caught:
        domain.send(port)
    assert caught.value.errno == errno.EINVAL
    failed, exits = domain.sends(port, 5)
    assert (failed, exits) == (5, {"io": 1, "xen": 5})


def test_32_bit_sends_by_doorbell(other: Other, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As where KVM knows nothing of Xen."""
    monkeypatch.setattr(kvm_machine, "xen_capability", lambda _: XenHvm(0))
    count = scaled(5_000)
    with Domain(daemon, other, long_mode=False) as domain:
        assert not domain.xen
        port = domain.bound()
        assert domain.sends(port, count) == (0, NONE)
        assert os.eventfd_read(domain.kick_of(port)) == count
        domain.quiet()
        domain.other.write(domain.notify_fd(port))
        domain.until(lambda: domain.upcalls() > 0)


@pytest.mark.parametrize("mode", ["domain", "narrow"])
def test_user_mode_may_not_send(mode: str, request: pytest.FixtureRequest) -> None:
    domain: Domain = request.getfixturevalue(mode)
    port = domain.bound()
    before = domain.exits()
    arguments = (Xen.EVENT_CHANNEL_OP, Evtchnop.SEND, domain.scratch())
    assert domain.command(Command.USERCALL, *arguments, data=struct.pack("<I", port)) == -errno.EPERM
    assert dict(domain.exits() - before) == {"io": 1, "xen": 1}
    with pytest.raises(BlockingIOError):
        os.eventfd_read(domain.kick_of(port))
    assert domain.sends(port, 1) == (0, NONE), "the kernel's mode may"


# ---- backend to guest -----------------------------------------------------------------------------------------------


def test_an_eventfd_of_another_process_raises_a_port(domain: Domain) -> None:
    domain.quiet()
    port = domain.bound()
    before = domain.exits()
    for i in range(1, 11):
        domain.other.write(domain.notify_fd(port))
        domain.until(lambda i=i: domain.taken(port) == i)  # type: ignore[misc]
    assert domain.exits() == before, "no vCPU has left the guest"


def test_a_masked_port_is_pending_and_says_nothing(domain: Domain) -> None:
    port = domain.bound()
    domain.mask(port)
    upcalls = domain.upcalls()
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.pending(port))
    domain.command(Command.NOP)
    assert domain.upcalls() == upcalls
    domain.unmask(port)
    domain.until(lambda: domain.upcalls() == upcalls + 1)
    assert domain.wait(port, 0)
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.upcalls() == upcalls + 2)
    assert domain.wait(port, 0)


def test_unmask_of_a_port_that_is_not_pending(domain: Domain) -> None:
    port = domain.bound()
    domain.mask(port)
    upcalls = domain.upcalls()
    domain.unmask(port)
    domain.command(Command.NOP)
    assert domain.upcalls() == upcalls
    assert not domain.pending(port)


def test_a_moved_port_tells_another_vcpu(domain: Domain) -> None:
    domain.quiet()
    port = domain.bound()
    for vcpu in (1, 0, 1):
        domain.bind_vcpu(port, vcpu)
        before = domain.upcalls(0), domain.upcalls(1)
        domain.other.write(domain.notify_fd(port))
        domain.until(lambda vcpu=vcpu, before=before: domain.upcalls(vcpu) == before[vcpu] + 1)  # type: ignore[misc]
        assert domain.upcalls(1 - vcpu) == before[1 - vcpu]


def test_a_vector_of_its_own(domain: Domain) -> None:
    """HVMOP_set_evtchn_upcall_vector: the upcall comes through the local APIC; below 0x10 is refused."""
    domain.quiet()
    port = domain.bound()
    for vector, wanted in ((0x0F, -errno.EINVAL), (kvm_agent.VECTOR_UPCALL_APIC, 0)):
        assert domain.call(Xen.HVM_OP, 23, domain.scratch(), data=struct.pack("<IB", 0, vector))[0] == wanted
    assert domain.runners[0].vcpu.xen.upcall_vector() == kvm_agent.VECTOR_UPCALL_APIC
    domain.other.write(domain.notify_fd(port))
    domain.until(lambda: domain.taken(port) == 1)


def test_an_event_before_vcpu_info_is_kept(other: Other, daemon: Daemon) -> None:  # noqa: F811
    """Linux up to 6.9 refuses it (EINVAL, nothing is pending), later ones keep it; the guest hears it either way, once
    the vCPU can be told."""
    with Domain(daemon, other, vcpus=2, own_info=True) as domain:
        domain.quiet()
        ipi, port, late = domain.bind_ipi(1), domain.bound(), domain.bind_ipi(1)
        domain.bind_vcpu(port, 1)
        try:
            domain.machine.xen.send(ipi, 1)
        except KvmError as error:
            assert error.errno == errno.EINVAL
            assert not domain.pending(ipi)
        assert domain.sends(ipi, 1)[0] == 0
        domain._kernel.raise_event(late, 1)
        assert not domain.pending(late), "kept by the VMM"
        domain.other.write(domain.notify_fd(port))
        domain.command(Command.NOP, vcpu=1)
        assert [domain.taken(each) for each in (ipi, port, late)] == [0, 0, 0]
        info = struct.pack("<QII", SHARED_INFO_GFN, 64, 0)
        assert domain.call(Xen.VCPU_OP, 10, 1, domain.scratch(), data=info)[0] == 0
        domain.until(lambda: all(domain.taken(each) for each in (ipi, port, late)))
        assert [domain.taken(each) for each in (ipi, late)] == [1, 1]
        assert domain.taken(port) <= 2, "an eventfd's port is raised once more, in case KVM has forgotten it"
        assert domain.sends(ipi, 1) == (0, NONE)
        domain.until(lambda: domain.taken(ipi) == 2)


# ---- physical interrupts --------------------------------------------------------------------------------------------


def pirq_of(domain: Domain) -> tuple[int, int]:
    """A pirq that the guest has mapped, and the port that it has bound to it."""
    request = struct.pack("<H2xiiiiii4xQ", DOMID_SELF, 0, -1, -1, 0, 8, 0, 0)
    result, _ = domain.call(Xen.PHYSDEV_OP, physdev.Physdevop.MAP_PIRQ, domain.scratch(), data=request)
    assert result == 0
    pirq = struct.unpack_from("<i", domain.runners[0].mailbox.scratch(40), 12)[0]
    result, out = domain.hypercall_evtchn(Evtchnop.BIND_PIRQ, struct.pack("<III", pirq, 1, 0))
    assert result == 0
    return pirq, struct.unpack("<III", out)[2]


def test_a_device_s_eventfd_is_a_pirq(domain: Domain) -> None:
    domain.quiet()
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        pirq, port = pirq_of(domain)
        domain.attach_pirq(pirq, fd)
        before = domain.exits()
        for i in range(1, 6):
            domain.other.write(fd)
            domain.until(lambda i=i: domain.taken(port) == i)  # type: ignore[misc]
        assert domain.exits() == before
        failed, _ = domain.sends(port, 1)
        assert failed == 1, "nobody sends on a pirq"
        domain.bind_vcpu(port, 1)
        upcalls = domain.upcalls(1)
        domain.other.write(fd)
        domain.until(lambda: domain.upcalls(1) == upcalls + 1)
        domain.attach_pirq(pirq, -1)
        domain.other.write(fd)
        assert os.eventfd_read(fd) == 1, "KVM listens no more"
    finally:
        os.close(fd)


def test_a_message_with_vector_0_is_a_pirq(domain: Domain) -> None:
    domain.quiet()
    pirq, port = pirq_of(domain)
    address, data = physdev.msi_of_pirq(pirq)
    domain.device_msi(address, data)
    domain.until(lambda: domain.taken(port) == 1)
    assert domain.runners[0].mailbox.msis == 0
    domain.device_msi(*kvm_agent.message(0, kvm_agent.VECTOR_MSI))
    domain.until(lambda: domain.runners[0].mailbox.msis == 1)
    assert domain.taken(port) == 1


# ---- the whole table ------------------------------------------------------------------------------------------------


class Table:
    """KVM's side alone: a VM with one vCPU that never runs."""

    def __init__(self, *, long_mode: bool = True) -> None:
        self.machine = Machine()
        self.machine.xen.config()
        self.machine.xen.set_long_mode(long_mode)
        vcpu = self.machine.add_vcpu(0)
        self.kernel = KvmKernel(self.machine.xen, [vcpu.xen], [0], EventBits(0, long_mode=long_mode))
        self.routings: list[int] = []
        inner = self.kernel.set_routes

        def counted(routes: list[Route]) -> None:
            self.routings.append(len(routes))
            inner(routes)

        self.kernel.set_routes = counted  # type: ignore[method-assign, assignment]
        self.applier = Applier()

    def close(self) -> None:
        self.applier.close()
        self.machine.close()


@pytest.fixture
def table() -> Iterator[Table]:
    table = Table()
    yield table
    table.close()


def ports_with_eventfds(fds: list[int], first: int, serial: int) -> list[Setting]:
    pairs = zip(fds[::2], fds[1::2], strict=True)
    return [Setting(first + i, Kind.EVENTFD, 0, 0, *pair, serial + i) for i, pair in enumerate(pairs)]


def test_one_call_sets_and_replaces_the_whole_table(table: Table) -> None:
    """Source and target port, eventfds, IPIs, timers; routes go in one KVM_SET_GSI_ROUTING."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(200)]
    try:
        loops = [Setting(port, Kind.LOOPBACK, 0, port ^ 1) for port in range(1000, 1500)]
        ipis = [Setting(port, Kind.IPI, 0, port) for port in range(2000, 4096)]
        table.applier.apply([*ports_with_eventfds(fds, 1, 1), *loops, *ipis, Setting(999, Kind.TIMER, 0)], table.kernel)
        assert table.routings == [100]
        assert table.machine.vcpus[0].xen.timer() == (999, 0)
        for port in (1, 100, 1000, 1499, 2000, 4095):
            with pytest.raises(KvmError) as caught:
                table.machine.xen.assign_ipi(port, 0)
            assert caught.value.errno == errno.EEXIST, f"port {port} is set"
        table.applier.apply([*ports_with_eventfds(fds, 501, 1001), *ipis[:10]], table.kernel)
        assert table.routings == [100, 100]
        assert table.machine.vcpus[0].xen.timer() == (0, 0)
        for port in (1, 100, 1000, 999, 4095):
            table.machine.xen.assign_ipi(port, 0)
        table.applier.apply([], table.kernel)
        assert table.routings == [100, 100, 0]
    finally:
        for fd in fds:
            os.close(fd)


def test_setting_to_nothing_deassigns(table: Table) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        table.applier.apply([Setting(5, Kind.EVENTFD, 0, 0, fd, -1, 1), Setting(6, Kind.IPI, 0, 6)], table.kernel)
        table.applier.apply([Setting(6, Kind.IPI, 0, 6)], table.kernel)
        with pytest.raises(KvmError) as caught:
            table.machine.xen.deassign(5)
        assert caught.value.errno == errno.ENOENT
        table.machine.xen.deassign(6)
    finally:
        os.close(fd)


def test_what_cannot_be_applied_changes_nothing(table: Table) -> None:
    table.applier.apply([Setting(6, Kind.IPI, 0, 6)], table.kernel)
    with pytest.raises(Exception, match="nothing was changed"):
        table.applier.apply([Setting(6, Kind.IPI, 0, 6), Setting(4096, Kind.IPI, 0, 4096)], table.kernel)
    table.machine.xen.update_port(6, 6, 0, ipi=True)


def test_4096_routes_and_no_more(table: Table) -> None:
    set_gsi_routing(table.machine.fd, [EventRoute(gsi, max(gsi, 1), 0) for gsi in range(4096)])
    with pytest.raises(KvmError, match="4096 routes"):
        set_gsi_routing(table.machine.fd, [EventRoute(gsi, 1, 0) for gsi in range(4097)])


def test_ports_from_1024_on_are_for_long_mode() -> None:
    table = Table(long_mode=False)
    try:
        table.machine.xen.assign_ipi(1023, 0)
        with pytest.raises(KvmError, match="1024 until the guest is in long mode") as caught:
            table.machine.xen.assign_ipi(1024, 0)
        assert caught.value.errno == errno.EINVAL
        table.machine.xen.set_long_mode(True)
        table.machine.xen.assign_ipi(1024, 0)
        table.machine.xen.assign_ipi(4095, 0)
        for port in (0, 4096):
            with pytest.raises(KvmError):
                table.machine.xen.assign_ipi(port, 0)
    finally:
        table.close()


def test_what_kvm_refuses(table: Table) -> None:
    """EEXIST, and no UPDATE of an eventfd or a target: why an exchange is a clear and a set."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        xen = table.machine.xen
        xen.assign_eventfd(5, fd)
        with pytest.raises(KvmError, match="deassign it first"):
            xen.assign_eventfd(5, fd)
        with pytest.raises(KvmError, match="eventfd that was to be updated"):
            xen.update_port(5, 6, 0)
        xen.assign_port(6, 8, 0)
        xen.update_port(6, 8, 0)
        with pytest.raises(KvmError):
            xen.update_port(6, 9, 0)
        with pytest.raises(KvmError):
            xen.assign_eventfd(7, table.machine.fd)
        xen.reset_ports()
        for port in (5, 6):
            xen.assign_ipi(port, 0)
    finally:
        os.close(fd)


# ---- eventfds that change -------------------------------------------------------------------------------------------


def test_changing_an_eventfd_leaks_no_reference(table: Table) -> None:
    """The kernel gives an eventfd the lowest free number, and frees it with the last reference, KVM's too."""
    xen = table.machine.xen
    probe = os.eventfd(0)
    lowest = eventfd_number(probe)
    xen.assign_eventfd(9, probe)
    os.close(probe)
    held = os.eventfd(0)
    assert eventfd_number(held) != lowest, "KVM holds it, so this test would see a leak"
    os.close(held)
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(scaled(100_000)):
        fd = os.eventfd(0)
        xen.deassign(9)
        xen.assign_eventfd(9, fd)
        set_gsi_routing(table.machine.fd, [EventRoute(3, 9, 0)])
        irqfd(table.machine.fd, fd, 3)
        irqfd(table.machine.fd, fd, 3, assign=False)
        os.close(fd)
    xen.deassign(9)
    assert len(os.listdir("/proc/self/fd")) == fds
    fd = os.eventfd(0)
    # an irqfd lets go of its eventfd in the kernel's own time: a few may be under way
    assert eventfd_number(fd) <= lowest + 8
    os.close(fd)


def test_no_send_is_lost_while_the_eventfd_changes(domain: Domain) -> None:
    """A send that finds no eventfd leaves the kernel, and the VMM forwards it: every one is counted in the end."""
    count = scaled(1_000_000)
    port = domain.bound()
    ends = [os.eventfd(0), os.eventfd(0)]
    number = 0x8000  # in RAM: the guest counts its sends there
    binds = 0
    try:
        domain.channels.bind([(port, os.dup(ends[0]))])
        binds += 1
        domain.post(Command.SENDS, port, count, number)
        while not domain.runners[0].mailbox.done:
            domain.channels.bind([(port, os.dup(ends[binds % 2]))])
            binds += 1
        assert domain.finish() == 0, "every send succeeded"
        assert int.from_bytes(domain.ram.read(number, 8), "little") == count
        assert binds > 3
        kicks = 0
        domain.other.write(ends[0])
        domain.other.write(ends[1])
        for end in ends:
            domain.other.read(end, 1)
            kicks += domain.other.heard()[0] - 1
        assert kicks == count + binds, "each bind kicks once, as Xen leaves the port pending"
    finally:
        for end in ends:
            os.close(end)


# ---- reset ----------------------------------------------------------------------------------------------------------


def test_reset_takes_every_port_out_of_the_kernel(domain: Domain) -> None:
    port, ipi = domain.bound(), domain.bind_ipi(1)
    domain.reset()
    for each in (port, ipi):
        assert domain.sends(each, 1) == (1, {"io": 1, "xen": 1})
    with pytest.raises(KvmError):
        domain.machine.xen.deassign(port)
    again = domain.bound()
    assert domain.sends(again, 3) == (0, NONE)


def test_a_soft_reset_begins_anew(domain: Domain) -> None:
    port = domain.bound()
    domain.machine.xen.assign_ipi(3000, 0)
    domain.reboot()
    assert domain.sends(port, 1)[0] == 1
    domain.machine.xen.reset_ports()
    domain.machine.xen.assign_ipi(3000, 0)
    domain.machine.xen.deassign(3000)


def test_the_timer_follows_its_port(domain: Domain) -> None:
    """VIRQ_TIMER is the kernel's from bind to close; moved never, bound on each vCPU."""
    timers = [domain.bind_virq(Virq.TIMER, vcpu) for vcpu in range(2)]
    assert [runner.vcpu.xen.timer()[0] for runner in domain.runners] == timers
    domain.close_port(timers[1])
    assert domain.runners[1].vcpu.xen.timer() == (0, 0)
    with pytest.raises(XenError):
        domain.send(timers[0])
    threads = threading.active_count()
    domain.reset()
    assert domain.runners[0].vcpu.xen.timer() == (0, 0)
    assert threading.active_count() == threads
