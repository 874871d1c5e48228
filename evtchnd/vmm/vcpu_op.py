"""HYPERVISOR_vcpu_op, and HYPERVISOR_set_timer_op where the kernel leaves them to the VMM.

Source: xen/include/public/vcpu.h; xen/common/domain.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE, VCPU_INFO_SIZE
from evtchnd.errors import GuestError
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


class VcpuCalls(Protocol):
    """What KVM keeps of one vCPU (`vmm.kvm.XenVcpu`)."""

    def set_time_info(self, gpa: int) -> None: ...
    def set_runstate_address(self, gpa: int) -> None: ...
    def runstate_times(self) -> RunstateTimes: ...
    def set_timer(self, port: int, expires_ns: int = 0) -> None: ...
    def timer(self) -> tuple[int, int]: ...


class VcpuOp:
    """The calls of one domain. `call` raises GuestError for bad pointers, OSError where KVM refuses.

    `register(vcpu, gpa)`: its vcpu_info lies there from now on; `is_up(vcpu)`: it has been started.
    """

    def __init__(
        self, vcpus: Sequence[VcpuCalls], register: Callable[[int, int], None], is_up: Callable[[int], bool]
    ) -> None:
        self._vcpus, self._register, self._is_up = vcpus, register, is_up
        self.registered: set[int] = set()

    def reset(self) -> None:
        """As before the guest's first call."""
        self.registered.clear()

    def call(self, guest: Pointers, op: int, number: int, arg: int) -> int:
        """0 or 1, or a negated error number. `number`: the vCPU that it is about."""
        if number >= len(self._vcpus):
            return -errno.ENOENT
        vcpu = self._vcpus[number]
        match op:
            case Vcpuop.IS_UP:
                return int(self._is_up(number))
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
            case Vcpuop.STOP_PERIODIC_TIMER:
                return 0  # none is ever set
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
