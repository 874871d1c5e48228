"""Every hypercall that leaves the kernel, by number: whose it is, and how often it came.

    who answers                      hypercalls
    -------------------------------  ----------------------------------------------------------------------------
    the kernel (no exit)             sends on bound ports, timers, polls, yield, XENVER_version
    event_channel_op                 the port table (`channels`), its ports then in the kernel
    memory_op, grant_table_op,       a file of the same name each
    hvm_op, vcpu_op, xen_version
    sched_op, console_io, vm_assist,
    multicall, physdev_op            here
    anything else                    ENOSYS, counted by its name

A send that exits is counted as `event_channel_op.send`.
Source: xen/include/public/xen.h, sched.h.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from enum import IntEnum

from evtchnd.abi import Evtchnop
from evtchnd.errors import GuestError, HostError, VmmError
from evtchnd.vmm import physdev
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.grant_table_op import Gnttabop, GrantTableOp
from evtchnd.vmm.guest_pointer import Layout, Pointers
from evtchnd.vmm.hvm_op import HvmOp, Hvmop
from evtchnd.vmm.hypercall import CALLS
from evtchnd.vmm.memory_op import OPERATION_MASK, MemoryOp, Xenmem
from evtchnd.vmm.tally import OTHERS, Tally
from evtchnd.vmm.vcpu_op import VcpuOp, Vcpuop
from evtchnd.vmm.xen_version import Xenver, xen_version

log = logging.getLogger(__name__)


class Number(IntEnum):
    """__HYPERVISOR_*."""

    SET_TRAP_TABLE = 0
    MMU_UPDATE = 1
    SET_GDT = 2
    STACK_SWITCH = 3
    SET_CALLBACKS = 4
    FPU_TASKSWITCH = 5
    PLATFORM_OP = 7
    SET_DEBUGREG = 8
    GET_DEBUGREG = 9
    UPDATE_DESCRIPTOR = 10
    MEMORY_OP = 12
    MULTICALL = 13
    UPDATE_VA_MAPPING = 14
    SET_TIMER_OP = 15
    XEN_VERSION = 17
    CONSOLE_IO = 18
    GRANT_TABLE_OP = 20
    VM_ASSIST = 21
    IRET = 23
    VCPU_OP = 24
    SET_SEGMENT_BASE = 25
    MMUEXT_OP = 26
    XSM_OP = 27
    NMI_OP = 28
    SCHED_OP = 29
    CALLBACK_OP = 30
    XENOPROF_OP = 31
    EVENT_CHANNEL_OP = 32
    PHYSDEV_OP = 33
    HVM_OP = 34
    SYSCTL = 35
    DOMCTL = 36
    KEXEC_OP = 37
    TMEM_OP = 38
    ARGO_OP = 39
    XENPMU_OP = 40
    DM_OP = 41
    HYPFS_OP = 42


class Schedop(IntEnum):
    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5
    WATCHDOG = 6
    PIN_OVERRIDE = 7


class Shutdown(IntEnum):
    """SHUTDOWN_*: why a guest ended; the reason in RELEASE."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class Consoleio(IntEnum):
    WRITE = 0
    READ = 1


_OPERATIONS: dict[int, type[IntEnum]] = {
    Number.MEMORY_OP: Xenmem,
    Number.XEN_VERSION: Xenver,
    Number.CONSOLE_IO: Consoleio,
    Number.GRANT_TABLE_OP: Gnttabop,
    Number.VCPU_OP: Vcpuop,
    Number.SCHED_OP: Schedop,
    Number.EVENT_CHANNEL_OP: Evtchnop,
    Number.PHYSDEV_OP: physdev.Physdevop,
    Number.HVM_OP: Hvmop,
}
_VMASST_RUNSTATE_UPDATE_FLAG = 5
# Xen cuts a long list into pieces; the longest that Linux makes has 32 calls.
_MAX_CALLS = 256
_NAP_S = 0.001

_SHUTDOWN = Layout("I")
_REMOTE_SHUTDOWN = Layout("H2xI")  # domid, reason
_MULTICALL = Layout("8Q", "8I")  # op, result, args[6]

Op = Callable[[Pointers, tuple[int, ...]], int]


def name_of(number: int, params: tuple[int, ...]) -> str:
    """`memory_op.add_to_physmap`, `multicall`, `hypercall.44`, `hvm_op.99`."""
    try:
        name = Number(number).name.lower()
    except ValueError:
        return f"hypercall.{number}"
    operations = _OPERATIONS.get(number)
    if operations is None:
        return name
    op = params[0] & OPERATION_MASK if number == Number.MEMORY_OP else params[0]
    try:
        return f"{name}.{operations(op).name.lower()}"
    except ValueError:
        return f"{name}.{op}"


class Hypercalls:
    """One domain's. `ended(reason)`: the guest has shut down; `write(text)`: what it says by console_io.

    `runstate_flag(on)`: KVM's. `over()`: the guest runs no further. Calls come from the vCPUs' threads.
    """

    def __init__(
        self,
        name: str,
        channels: Channels,
        memory: MemoryOp,
        grants: GrantTableOp,
        hvm: HvmOp,
        vcpu: VcpuOp,
        *,
        ended: Callable[[int], int],
        write: Callable[[bytes], None],
        runstate_flag: Callable[[bool], None],
        over: Callable[[], bool] = lambda: False,
        handle: bytes = bytes(16),
    ) -> None:
        self._name, self._channels = name, channels
        self._memory, self._grants, self._hvm, self._vcpu = memory, grants, hvm, vcpu
        self._ended, self._write, self._runstate_flag = ended, write, runstate_flag
        self._over, self._handle = over, handle
        self._pirqs = physdev.Pirqs()
        self._code: Shutdown | None = None
        self._said: set[str] = set()
        self._calls = Tally()
        self.counts = self._calls.counts
        self._ops: Mapping[int, Op] = {
            Number.EVENT_CHANNEL_OP: lambda guest, p: self._event_channel_op(guest, p[0], p[1]),
            Number.MEMORY_OP: lambda guest, p: self._memory.call(guest, p[0], p[1]),
            Number.GRANT_TABLE_OP: lambda guest, p: self._grants.call(guest, p[0], p[1], p[2]),
            Number.HVM_OP: lambda guest, p: self._hvm.call(guest, p[0], p[1]),
            Number.VCPU_OP: lambda guest, p: self._vcpu.call(guest, p[0], p[1], p[2]),
            Number.XEN_VERSION: lambda guest, p: xen_version(guest, p[0], p[1], handle=self._handle),
            Number.SCHED_OP: lambda guest, p: self._sched_op(guest, p[0], p[1]),
            Number.SET_TIMER_OP: self._set_timer_op,
            Number.CONSOLE_IO: lambda guest, p: self._console_io(guest, p[0], p[1], p[2]),
            Number.VM_ASSIST: lambda _, p: self._vm_assist(p[0], p[1]),
            Number.PHYSDEV_OP: lambda guest, p: self._physdev_op(guest, p[0], p[1]),
            Number.MULTICALL: lambda guest, p: self._multicall(guest, p[0], p[1]),
        }

    def answer(self, guest: Pointers, number: int, params: tuple[int, ...], cpl: int) -> int:
        """What the guest gets back: a result, or a negated error number. Never raises what a guest can cause."""
        name = self._calls.count(name_of(number, params))
        if cpl:
            return -errno.EPERM
        op = self._ops.get(number)
        if op is None:
            self._say(name, "is not there (ENOSYS)")
            return -errno.ENOSYS
        try:
            result = op(guest, params)
        except GuestError as error:
            self._say(name, f"bad pointer: {error}")
            return -errno.EFAULT
        except VmmError as error:  # the daemon says no
            self._say(name, str(error))
            return -error.errno
        except HostError as error:
            self._say(name, str(error))
            return -errno.ENOMEM
        except OSError as error:
            self._say(name, error.strerror or str(error))
            return -(error.errno or errno.EINVAL)
        if result == -errno.ENOSYS and (name == OTHERS or name.rpartition(".")[2].isdigit()):
            self._say(name, "is not there (ENOSYS)")
        return result

    def _say(self, name: str, reason: str) -> None:
        """Once a name that it is counted by: a guest can repeat it for ever."""
        if name not in self._said:
            self._said.add(name)
            log.warning("%s: %s: %s", self._name, name, reason)

    def _event_channel_op(self, guest: Pointers, op: int, arg: int) -> int:
        if op not in CALLS:
            return -errno.ENOSYS
        result, out = self._channels.hypercall(op, guest.read(arg, CALLS[op][0].size))
        if out:
            guest.write(arg, out)
        return result

    def _physdev_op(self, guest: Pointers, op: int, arg: int) -> int:
        layout = physdev.LAYOUTS.get(op)
        if layout is None:
            return -errno.ENOSYS
        result, out = self._pirqs.call(op, guest.take(layout, arg))
        if out:
            guest.put(layout, arg, *out)
        return result

    def _sched_op(self, guest: Pointers, op: int, arg: int) -> int:
        match op:
            case Schedop.YIELD:
                return 0
            case Schedop.BLOCK | Schedop.POLL:
                # Of a 32-bit guest, or before it has event channels: a wake-up for no reason is allowed.
                time.sleep(_NAP_S)
                return 0
            case Schedop.SHUTDOWN | Schedop.SHUTDOWN_CODE:
                (reason,) = guest.take(_SHUTDOWN, arg)
                if reason > Shutdown.SOFT_RESET:
                    return -errno.EINVAL
                if op == Schedop.SHUTDOWN:
                    return self._shut_down(self.reason(reason))
                if self._code is None:
                    self._code = Shutdown(reason)
                return 0
            case Schedop.REMOTE_SHUTDOWN:
                dom, _ = guest.take(_REMOTE_SHUTDOWN, arg)
                return -errno.EPERM if dom != self._channels.domid else -errno.EINVAL
        return -errno.ENOSYS

    def reason(self, reason: int) -> Shutdown:
        """Why the guest ends that shuts down for `reason`: what it has announced by SHUTDOWN_CODE comes first, the
        first of them, as in Xen."""
        return Shutdown(reason) if self._code is None else self._code

    def _shut_down(self, reason: Shutdown) -> int:
        result = self._ended(reason)
        self._code = None  # where the guest goes on: suspended, reset
        return result

    def _set_timer_op(self, guest: Pointers, params: tuple[int, ...]) -> int:
        expires = params[0] if guest.long_mode else params[0] & 0xFFFFFFFF | (params[1] & 0xFFFFFFFF) << 32
        return self._vcpu.set_timer(guest.vcpu, expires)

    def _console_io(self, guest: Pointers, op: int, count: int, buffer: int) -> int:
        count &= 0xFFFFFFFF
        match op:
            case Consoleio.WRITE:
                data = guest.read(buffer, count)
                self._write(data)
                return 0
            case Consoleio.READ:
                return 0
        return -errno.ENOSYS

    def _vm_assist(self, command: int, kind: int) -> int:
        if command not in (0, 1):
            return -errno.ENOSYS
        if kind != _VMASST_RUNSTATE_UPDATE_FLAG:
            return -errno.EINVAL
        self._runstate_flag(command == 0)
        return 0

    def _multicall(self, guest: Pointers, calls: int, count: int) -> int:
        """Each call's result is in its entry; a call list in a call list is EINVAL, as in Xen."""
        if count > _MAX_CALLS:
            return -errno.EINVAL
        size = _MULTICALL.of(guest.long_mode).size
        for at in range(calls, calls + count * size, size):
            if self._over():  # a list can be long work
                break
            number, _, *params = guest.take(_MULTICALL, at)
            nested = number == Number.MULTICALL
            result = -errno.EINVAL if nested else self.answer(guest, number, tuple(params), 0)
            guest.put_word(at, 1, result)
        return 0
