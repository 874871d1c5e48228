"""HYPERVISOR_vcpu_op, and HYPERVISOR_set_timer_op where the kernel leaves them to the VMM.

    operation                                 answer, as Xen has it for an HVM guest
    ----------------------------------------  ---------------------------------------------------------------------
    initialise                                a vCPU's first registers (`vcpu_context`); EEXIST where it has started.
                                              Linux, FreeBSD and OVMF start theirs by INIT and SIPI instead
    up, down                                  KVM's; one that is down can be started by INIT and SIPI, too. The last one
                                              that goes down powers the guest off
    is_up                                     1 or 0
    get_runstate_info, register_runstate,     KVM's
    register_time, register_info
    set_periodic_timer, stop_periodic_timer   the VMM's (`periodic_timers`)
    set_singleshot_timer, stop_...            KVM's; only a vCPU's own
    send_nmi                                  KVM's
    get_physid                                EINVAL: only a vCPU of dom0 that is pinned has one

Source: xen/include/public/vcpu.h; xen/common/domain.c, xen/arch/x86/domain.c.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE, VCPU_INFO_SIZE
from evtchnd.errors import GuestError
from evtchnd.vmm import vcpu_context
from evtchnd.vmm.guest_pointer import Layout, Pointers
from evtchnd.vmm.kvm import RunstateTimes


class Vcpuop(IntEnum):
    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    GET_PHYSID = 12
    REGISTER_VCPU_TIME_MEMORY_AREA = 13


_REGISTER_INFO = Layout("QI4x")  # mfn, offset, rsvd
_AREA = Layout("Q", "I")  # a virtual address, in a union with a u64
_SINGLESHOT = Layout("QI4x", "QI")  # timeout_abs_ns, flags
_RUNSTATE = Layout("i4xQ4Q", "iQ4Q")  # state, state_entry_time, time[4]
_TIME_INFO_SIZE = 32
_SSHOTTMR_FUTURE = 1
_PERIODIC = Layout("Q")  # period_ns
_SHORTEST_NS, _LONGEST_NS = 1_000_000, (1 << 62) - 1  # STIME_DELTA_MAX


class VcpuCalls(Protocol):
    """What KVM keeps of one vCPU (`vmm.kvm.XenVcpu`)."""

    def set_time_info(self, gpa: int) -> None: ...
    def set_runstate_address(self, gpa: int) -> None: ...
    def runstate_times(self) -> RunstateTimes: ...
    def set_timer(self, port: int, expires_ns: int = 0) -> None: ...
    def timer(self) -> tuple[int, int]: ...


class Cpu(Protocol):
    """The vCPU itself (`vmm.kvm_machine.Vcpu`)."""

    def is_up(self) -> bool: ...
    def set_up(self, up: bool) -> None: ...
    def set_context(self, context: vcpu_context.VcpuContext) -> None: ...
    def nmi(self) -> None: ...


class VcpuOp:
    """The calls of one domain. `call` raises GuestError for bad pointers, OSError where KVM refuses.

    `register(vcpu, gpa)`: its vcpu_info lies there from now on; `periodic(vcpu, period_ns)`: VIRQ_TIMER so often, 0:
    not; `power_off()`: no vCPU is up any more.
    """

    def __init__(
        self,
        vcpus: Sequence[VcpuCalls],
        cpus: Sequence[Cpu],
        register: Callable[[int, int], None],
        *,
        periodic: Callable[[int, int], None],
        power_off: Callable[[], None],
    ) -> None:
        self._vcpus, self._cpus, self._register = vcpus, cpus, register
        self._periodic, self._power_off = periodic, power_off
        self._life = threading.Lock()
        self._initialised: set[int] = set()  # and not by INIT and SIPI, or down since
        self.registered: set[int] = set()

    def reset(self) -> None:
        """As before the guest's first call."""
        self.registered.clear()

    def call(self, guest: Pointers, op: int, number: int, arg: int) -> int:
        """0 or 1, or a negated error number. `number`: the vCPU that it is about."""
        if number >= len(self._vcpus):
            return -errno.ENOENT
        vcpu, cpu = self._vcpus[number], self._cpus[number]
        match op:
            case Vcpuop.INITIALISE:
                context = vcpu_context.parse(guest.read(arg, vcpu_context.CONTEXT_SIZE))
                return self._initialise(number, context)
            case Vcpuop.UP:
                with self._life:
                    if cpu.is_up():
                        return 0
                    if number not in self._initialised:
                        return -errno.EINVAL
                    cpu.set_up(True)
                    return 0
            case Vcpuop.DOWN:
                return self._down(number)
            case Vcpuop.IS_UP:
                return int(cpu.is_up())
            case Vcpuop.GET_RUNSTATE_INFO:
                guest.put(_RUNSTATE, arg, *_fields(vcpu.runstate_times()))
                return 0
            case Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA:
                (address,) = guest.take(_AREA, arg)
                vcpu.set_runstate_address(guest.contiguous(address, _RUNSTATE.of(guest.long_mode).size))
                return 0
            case Vcpuop.REGISTER_VCPU_TIME_MEMORY_AREA:
                (address,) = guest.take(_AREA, arg)
                vcpu.set_time_info(guest.contiguous(address, _TIME_INFO_SIZE))
                return 0
            case Vcpuop.REGISTER_VCPU_INFO:
                return self._register_info(guest, number, *guest.take(_REGISTER_INFO, arg))
            case Vcpuop.SET_PERIODIC_TIMER:
                (period,) = guest.take(_PERIODIC, arg)
                if not _SHORTEST_NS <= period <= _LONGEST_NS:
                    return -errno.EINVAL
                self._periodic(number, period)
                return 0
            case Vcpuop.STOP_PERIODIC_TIMER:
                self._periodic(number, 0)
                return 0
            case Vcpuop.SEND_NMI:
                if arg:
                    return -errno.EINVAL
                cpu.nmi()
                return 0
            case Vcpuop.GET_PHYSID:
                return -errno.EINVAL
            case Vcpuop.SET_SINGLESHOT_TIMER | Vcpuop.STOP_SINGLESHOT_TIMER:
                if number != guest.vcpu:
                    return -errno.EINVAL
                if op == Vcpuop.STOP_SINGLESHOT_TIMER:
                    return self.set_timer(number, 0)
                expires, flags = guest.take(_SINGLESHOT, arg)
                if flags & _SSHOTTMR_FUTURE and expires <= vcpu.runstate_times().entry:
                    return -errno.ETIME
                return self.set_timer(number, expires)
        return -errno.ENOSYS

    def _initialise(self, number: int, context: vcpu_context.VcpuContext | None) -> int:
        with self._life:
            if number in self._initialised or self._cpus[number].is_up():
                return -errno.EEXIST
            if context is None:
                return -errno.EINVAL
            self._cpus[number].set_context(context)
            self._initialised.add(number)
            return 0

    def _down(self, number: int) -> int:
        with self._life:
            if not any(cpu.is_up() for n, cpu in enumerate(self._cpus) if n != number):
                self._power_off()
            elif self._cpus[number].is_up():
                self._cpus[number].set_up(False)
                self._initialised.add(number)
            return 0

    def set_timer(self, number: int, expires_ns: int) -> int:
        """The kernel has it as soon as the guest has bound VIRQ_TIMER; before, nobody would hear it."""
        port, _ = self._vcpus[number].timer()
        if port:
            self._vcpus[number].set_timer(port, expires_ns)
        return 0

    def _register_info(self, guest: Pointers, number: int, gfn: int, offset: int) -> int:
        """Once a vCPU. What is pending was told to the old place: the guest looks at every port once."""
        if number in self.registered:
            return -errno.EINVAL
        if offset > PAGE_SIZE - VCPU_INFO_SIZE or offset % 8:
            return -errno.EINVAL
        gpa = (gfn << PAGE_SHIFT) + offset
        word = guest.word
        try:
            guest.memory.write(gpa, b"\1")  # evtchn_upcall_pending
            guest.memory.write(gpa + word, b"\xff" * word)  # evtchn_pending_sel
        except GuestError:
            return -errno.EINVAL
        self._register(number, gpa)
        self.registered.add(number)
        return 0


def _fields(times: RunstateTimes) -> tuple[int, ...]:
    return times.state, times.entry, times.running, times.runnable, times.blocked, times.offline
