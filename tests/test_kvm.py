"""KVM's structs against <linux/kvm.h>; and a domain on the host's KVM, by doorbell where it knows nothing of Xen."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import test_control_daemon
import test_soft
from daemonprocess import DaemonProcess
from evtchnd.errors import HostError
from evtchnd.vmm import kvm, kvm_agent, kvm_ioctl, kvm_irq, kvm_machine, physdev
from evtchnd.vmm.kvm import XenHvm
from evtchnd.vmm.kvm_agent import Command
from evtchnd.vmm.kvm_ioctl import KvmError
from evtchnd.vmm.kvm_irq import PinRoute, irqfd, set_gsi_routing
from evtchnd.vmm.kvm_vm import KvmVmm
from kvmguest import Other, agent, eventfds, why_no_kvm
from scale import scaled
from test_control_daemon import Guest, image
from test_soft import (  # noqa: F401  (they run here too, on a KVM domain)
    Daemon,
    daemon,
    test_a_bind_is_all_or_nothing,
    test_a_closed_port_is_told_before_its_number_is_used_again,
    test_a_lost_daemon_is_logged,
    test_a_refused_domain_leaves_nothing,
    test_closing_wakes_who_waits,
    test_it_conforms,
    test_it_registers_and_gives_its_tables,
    test_kicks_and_events,
    test_loopback_and_ipis_need_no_daemon,
    test_rebinds_over_the_socket_end_with_the_same_descriptors,
    test_reboot_begins_anew,
    test_resume_sends_everything_again,
    test_resume_waits_for_the_daemon,
    test_the_guest_from_several_threads,
    test_unmask_and_wrong_hypercalls,
    test_xsa_342_343_344_reset_and_the_way_back,
    vmm,
)

OF_THE_HEADER = {"test_the_numbers_are_the_header_s", "test_errors_have_hints", "test_pirq_messages"}


@pytest.fixture(autouse=True)
def on_kvm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft VMM's tests make KVM domains here."""
    if request.node.originalname in OF_THE_HEADER:
        return
    if why := why_no_kvm():
        pytest.skip(why)
    monkeypatch.setattr(test_soft, "SoftVmm", functools.partial(KvmVmm, code=agent()))


# ---- against the header -------------------------------------------------------------------------------------------

CALLS = {
    "KVM_GET_API_VERSION": kvm_machine._GET_API_VERSION,
    "KVM_CREATE_VM": kvm_machine._CREATE_VM,
    "KVM_GET_VCPU_MMAP_SIZE": kvm_machine._GET_VCPU_MMAP_SIZE,
    "KVM_GET_SUPPORTED_CPUID": kvm_machine._GET_SUPPORTED_CPUID,
    "KVM_CREATE_VCPU": kvm_machine._CREATE_VCPU,
    "KVM_SET_USER_MEMORY_REGION": kvm_machine._SET_USER_MEMORY_REGION,
    "KVM_SET_TSS_ADDR": kvm_machine._SET_TSS_ADDR,
    "KVM_CREATE_IRQCHIP": kvm_machine._CREATE_IRQCHIP,
    "KVM_RUN": kvm_machine._RUN,
    "KVM_SET_REGS": kvm_machine._SET_REGS,
    "KVM_GET_SREGS": kvm_machine._GET_SREGS,
    "KVM_SET_SREGS": kvm_machine._SET_SREGS,
    "KVM_SET_SIGNAL_MASK": kvm_machine._SET_SIGNAL_MASK,
    "KVM_SET_CPUID2": kvm_machine._SET_CPUID2,
    "KVM_GET_MP_STATE": kvm_machine._GET_MP_STATE,
    "KVM_SET_MP_STATE": kvm_machine._SET_MP_STATE,
    "KVM_GET_REGS": kvm_machine._GET_REGS,
    "KVM_NMI": kvm_machine._NMI,
    "KVM_GET_VCPU_EVENTS": kvm_machine._GET_VCPU_EVENTS,
    "KVM_CHECK_EXTENSION": kvm._CHECK_EXTENSION,
    "KVM_SET_GSI_ROUTING": kvm_irq._SET_GSI_ROUTING,
    "KVM_IRQFD": kvm_irq._IRQFD,
    "KVM_IOEVENTFD": kvm_irq._IOEVENTFD,
    "KVM_SIGNAL_MSI": kvm_irq._SIGNAL_MSI,
    "KVM_XEN_HVM_CONFIG": kvm._XEN_HVM_CONFIG,
    "KVM_XEN_HVM_GET_ATTR": kvm._XEN_HVM_GET_ATTR,
    "KVM_XEN_HVM_SET_ATTR": kvm._XEN_HVM_SET_ATTR,
    "KVM_XEN_VCPU_GET_ATTR": kvm._XEN_VCPU_GET_ATTR,
    "KVM_XEN_VCPU_SET_ATTR": kvm._XEN_VCPU_SET_ATTR,
    "KVM_XEN_HVM_EVTCHN_SEND": kvm._XEN_HVM_EVTCHN_SEND,
}
NUMBERS = {
    "KVM_CAP_XEN_HVM": kvm.CAP_XEN_HVM,
    "KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL": kvm.PRIO_2LEVEL,
    "KVM_IRQ_ROUTING_XEN_EVTCHN": kvm_irq._ROUTE_XEN_EVTCHN,
    "KVM_IRQ_ROUTING_MSI": kvm_irq._ROUTE_MSI,
    "KVM_IRQ_ROUTING_IRQCHIP": kvm_irq._ROUTE_IRQCHIP,
    "KVM_IRQCHIP_IOAPIC": kvm_irq._IOAPIC,
    "KVM_IRQFD_FLAG_DEASSIGN": kvm_irq._IRQFD_DEASSIGN,
    "KVM_IRQFD_FLAG_RESAMPLE": kvm_irq._IRQFD_RESAMPLE,
    "KVM_IOEVENTFD_FLAG_DATAMATCH": kvm_irq._IOEVENTFD_DATAMATCH,
    "KVM_IOEVENTFD_FLAG_PIO": kvm_irq._IOEVENTFD_PIO,
    "KVM_IOEVENTFD_FLAG_DEASSIGN": kvm_irq._IOEVENTFD_DEASSIGN,
    "KVM_XEN_EVTCHN_DEASSIGN": kvm._EVTCHN_DEASSIGN,
    "KVM_XEN_EVTCHN_UPDATE": kvm._EVTCHN_UPDATE,
    "KVM_XEN_EVTCHN_RESET": kvm._EVTCHN_RESET,
    "KVM_EXIT_IO": kvm_machine.EXIT_IO,
    "KVM_EXIT_XEN": kvm_machine.EXIT_XEN,
    **{f"KVM_XEN_HVM_CONFIG_{flag.name}": flag.value for flag in XenHvm},
    **{f"KVM_XEN_ATTR_TYPE_{attr.name}": attr.value for attr in kvm._Attr},
    **{f"KVM_XEN_VCPU_ATTR_TYPE_{attr.name}": attr.value for attr in kvm._VcpuAttr},
}
# offsets of members, and sizes, that the structs here were packed by
LAYOUT = {
    "sizeof(struct kvm_xen_hvm_attr)": kvm._ATTR.size,
    "sizeof(struct kvm_xen_vcpu_attr)": kvm._ATTR.size,
    "sizeof(struct kvm_irq_routing_entry)": kvm_irq._ROUTE.size,
    "sizeof(struct kvm_irqfd)": 32,
    "sizeof(struct kvm_ioeventfd)": 64,
    "sizeof(struct kvm_msi)": 32,
    "sizeof(struct kvm_xen_hvm_config)": 56,
    "sizeof(struct kvm_segment)": kvm_machine._SEGMENT.size,
    "offsetof(struct kvm_sregs, tr)": kvm_machine._SREGS_TR,
    "offsetof(struct kvm_sregs, gdt)": kvm_machine._SREGS_GDT,
    "offsetof(struct kvm_sregs, cr0)": kvm_machine._SREGS_CR0,
    "offsetof(struct kvm_sregs, cr3)": kvm_machine._SREGS_CR3,
    "offsetof(struct kvm_sregs, cr4)": kvm_machine._SREGS_CR4,
    "offsetof(struct kvm_sregs, efer)": kvm_machine._SREGS_EFER,
    "offsetof(struct kvm_run, exit_reason)": kvm_machine._EXIT_REASON,
    "offsetof(struct kvm_run, immediate_exit)": kvm_machine._IMMEDIATE_EXIT,
    "offsetof(struct kvm_run, io)": kvm_machine._UNION,
    "offsetof(struct kvm_run, io.data_offset)": kvm_machine._UNION + 8,
    "offsetof(struct kvm_run, xen.u.hcall.longmode)": kvm_machine._UNION + 8,
    "offsetof(struct kvm_run, xen.u.hcall.cpl)": kvm_machine._UNION + 12,
    "offsetof(struct kvm_run, xen.u.hcall.input)": kvm_machine._UNION + 16,
    "offsetof(struct kvm_run, xen.u.hcall.result)": kvm_machine._XEN_RESULT,
    "offsetof(struct kvm_run, xen.u.hcall.params)": kvm_machine._UNION + 32,
    "offsetof(struct kvm_xen_hvm_attr, u.evtchn.flags)": 8 + 8,
    "offsetof(struct kvm_xen_hvm_attr, u.evtchn.deliver)": 8 + 12,
    "offsetof(struct kvm_xen_hvm_attr, u.evtchn.deliver.eventfd.fd)": 8 + 16,
    "offsetof(struct kvm_xen_hvm_attr, u.evtchn.deliver.port.priority)": 8 + 20,
    "offsetof(struct kvm_xen_vcpu_attr, u.timer.expires_ns)": 8 + 8,
    "offsetof(struct kvm_xen_vcpu_attr, u.runstate.time_offline)": 8 + 40,
    "offsetof(struct kvm_irq_routing_entry, u.xen_evtchn.priority)": 16 + 8,
    "offsetof(struct kvm_irqfd, resamplefd)": 12,
    "offsetof(struct kvm_ioeventfd, flags)": 24,
}
# Since 6.1, Debian 12's header: these values are the documentation's (Documentation/virt/kvm/api.rst).
NEWER = {
    "KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG": 64,
    "KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE": 128,
    "KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA": 256,
    "KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG": 5,
    "KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA": 6,
    "KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA": 9,
}


def test_the_numbers_are_the_header_s(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no C compiler, or no <linux/kvm.h>")
    lines = [f"#ifndef {name}\n#define {name} {value}\n#endif" for name, value in NEWER.items()]
    rename = "#define KVM_XEN_HVM_CONFIG_HYPERCALL_MSR (1 << 0)\n"
    checks = {**CALLS, **NUMBERS, **LAYOUT}
    asserts = [f'_Static_assert({name} == {value}u, "{name}");' for name, value in checks.items()]
    program = "#include <stddef.h>\n#include <linux/kvm.h>\n#undef KVM_XEN_HVM_CONFIG_HYPERCALL_MSR\n" + rename
    (tmp_path / "check.c").write_text("\n".join([program, *lines, *asserts, ""]))
    done = subprocess.run(
        [compiler, "-fsyntax-only", str(tmp_path / "check.c")], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert {name: checks[name] for name in NEWER} == NEWER


def test_errors_have_hints() -> None:
    assert "deassign it first" in str(KvmError(errno.EEXIST, "EVTCHN"))
    assert "nothing is pending" in str(KvmError(errno.EINVAL, "KVM_XEN_HVM_EVTCHN_SEND"))
    assert KvmError(errno.EIO, "KVM_IRQFD").errno == errno.EIO
    assert str(KvmError(errno.ENOSPC, "KVM_IRQFD")).endswith("KVM_IRQFD: No space left on device")
    with pytest.raises(OSError, match=r"EVTCHN: this kernel's KVM lacks .*EVTCHN_SEND") as caught:
        kvm.XenVm(-1, XenHvm.SHARED_INFO).assign_eventfd(3, 0)
    assert caught.value.errno == errno.ENOTSUP
    with pytest.raises(KvmError, match="Bad file descriptor"):
        kvm_ioctl.ioctl(-1, kvm_machine._RUN, 0, "KVM_RUN")
    with pytest.raises(HostError, match="no KVM here"):
        kvm_machine.Machine("/dev/null/kvm")


def test_pirq_messages() -> None:
    for pirq in (1, 16, 255, 256, 0x12345):
        assert physdev.pirq_of_msi(*physdev.msi_of_pirq(pirq)) == pirq
    assert physdev.pirq_of_msi(0xFEE01000, 0x31) is None
    assert physdev.pirq_of_msi(0xFEE00000, 0) is None


# ---- a domain on this host's KVM ----------------------------------------------------------------------------------


@pytest.fixture
def other() -> Iterator[Other]:
    other = Other()
    yield other
    other.close()


def test_kicks_of_a_real_guest_do_not_leave_the_kernel(other: Other, daemon: Daemon) -> None:  # noqa: F811
    """A guest's sends are heard by another process, and its vCPU leaves the guest for none of them."""
    count = scaled(100_000, least=1000)
    with KvmVmm(daemon.path, 7, memory=test_soft.MEMORY, code=agent()) as domain:
        port = domain.alloc_unbound(0)
        daemon.bind(port)
        kick = daemon.kick(port)
        os.eventfd_read(kick)
        other.read(kick, count)
        before = domain.exits()
        assert domain.command(Command.SENDS, port, count, 0) == 0
        assert domain.exits() - before == {"io": 1}, "the end of the command is the only exit"
        kicks, wakeups = other.heard()
        assert kicks == count
        assert 1 <= wakeups <= count
        assert domain.forwarded == 0


IO_APIC, PIN, LEVEL, MASKED = 0xFEC00000, 20, 1 << 15, 1 << 16


def set_pin(domain: KvmVmm, entry: int) -> None:
    """As the guest does it: the I/O APIC's select register, then its window."""
    for register, value in ((0x11 + 2 * PIN, 0), (0x10 + 2 * PIN, entry)):
        domain.command(Command.WRITE, IO_APIC, register)
        domain.command(Command.WRITE, IO_APIC + 0x10, value)


def test_a_level_triggered_interrupt_is_told_of_its_end(other: Other, daemon: Daemon) -> None:  # noqa: F811
    """An irqfd with a resample eventfd: the pin is up until the guest has ended the interrupt, then we are told."""
    fd, ended = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    with contextlib.ExitStack() as files, KvmVmm(daemon.path, 7, memory=test_soft.MEMORY, code=agent()) as domain:
        files.callback(os.close, fd)
        files.callback(os.close, ended)
        mailbox, vm = domain.runners[0].mailbox, domain.machine.fd
        set_gsi_routing(vm, [PinRoute(PIN, PIN)])
        irqfd(vm, fd, PIN, resample_fd=ended)
        set_pin(domain, kvm_agent.VECTOR_MSI | LEVEL)
        for i in range(1, 4):
            domain.command(Command.INTERRUPTS, 0)
            other.write(fd, i)
            assert not heard(ended, 0.05), "it has not even begun"
            domain.command(Command.INTERRUPTS, 1)
            assert heard(ended)
            domain.command(Command.NOP)
            assert mailbox.msis == i, "any number of writes is one level, taken down at its end"
        set_pin(domain, kvm_agent.VECTOR_MSI | LEVEL | MASKED)
        other.write(fd)
        domain.command(Command.NOP)
        assert not heard(ended, 0.05)
        # At the unmasking KVM takes the level down and asks whether there is still work, before it interrupts the guest
        # (kvm_ioapic's resampling, Linux 6.3).
        set_pin(domain, kvm_agent.VECTOR_MSI | LEVEL)
        assert heard(ended)
        other.write(fd)
        assert heard(ended)
        domain.command(Command.NOP)
        assert mailbox.msis in (4, 5), "older kernels interrupt it twice"
        irqfd(vm, fd, PIN, resample_fd=ended, assign=False)
        other.write(fd)
        domain.command(Command.NOP)
        assert os.eventfd_read(fd) == 1, "KVM listens no more"


def heard(fd: int, timeout: float = 60) -> bool:
    """Whether the eventfd was written; its count is taken."""
    there = bool(select.select([fd], [], [], timeout)[0])
    if there:
        os.eventfd_read(fd)
    return there


@pytest.mark.timeout(240)
def test_the_worker_hears_a_real_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk: the daemon, its worker process, an image. The VMM sees none of the kicks and none of the events."""
    monkeypatch.setattr(test_control_daemon, "SoftVmm", functools.partial(KvmVmm, code=agent()))
    disk = image(tmp_path)
    content = disk.read_bytes()
    size = 16 * 512
    with DaemonProcess(tmp_path) as process, Guest(process) as guest:
        domain = guest.vm
        assert isinstance(domain, KvmVmm)
        front = guest.connect(process.attach(7, disk))
        assert front.read(0, 16) == content[:size]
        before, forwarded = domain.exits(), domain.forwarded
        for i in range(20):
            front.write(i * 16, bytes([i]) * size)
            assert front.read(i * 16, 16) == bytes([i]) * size
        front.flush()
        assert set(domain.exits() - before) == {"io"}, "the agent says done, or upcall; no send leaves the kernel"
        assert domain.forwarded == forwarded
        front.disconnect()
    assert disk.read_bytes()[: 2 * size] == bytes(size) + b"\1" * size


def test_a_vmm_leaves_nothing(daemon: Daemon) -> None:  # noqa: F811
    fds = eventfds(), len(os.listdir("/proc/self/fd"))
    with KvmVmm(daemon.path, 7, memory=test_soft.MEMORY, vcpus=2, code=agent()):
        pass
    daemon.hang_up()
    daemon.forget()
    assert (eventfds(), len(os.listdir("/proc/self/fd"))) == fds


def test_the_agent_fits() -> None:
    assert len(agent()) <= kvm_agent._COUNTS - kvm_agent._CODE
    assert struct.calcsize("<Q") * 512 == 4096


# A thread that ended, another that got its identity, and a kick of the vCPU that the first one had run.
_LATE_KICK = """
import threading
from evtchnd.vmm.kvm_machine import Machine

machine = Machine()
vcpu = machine.add_vcpu(0)
idents = []
def run():
    with vcpu.entered():
        idents.append(threading.get_ident())
first = threading.Thread(target=run)
first.start()
first.join()
end = threading.Event()
others = [threading.Thread(target=end.wait) for _ in range(50)]
for other in others:
    other.start()
print(idents[0] in {other.ident for other in others})
vcpu.kick()
with vcpu.outside():
    pass
end.set()
for other in others:
    other.join()
print("alive")
"""


def test_a_late_kick_meets_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", _LATE_KICK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\nalive\n"), done.stderr


def test_an_nmi_waits_for_the_vcpu() -> None:
    with kvm_machine.Machine() as machine:
        vcpu = machine.add_vcpu(0)
        for expected in (0, 1):
            events = bytearray(64)
            kvm_ioctl.ioctl(vcpu.fd, kvm_machine._GET_VCPU_EVENTS, events, "KVM_GET_VCPU_EVENTS")
            assert events[12] + events[13] == expected  # nmi.injected, nmi.pending
            vcpu.nmi()
