"""Every Xen call of KVM (Linux 6.12), one small method a call.

KVM takes them only from the process that made the VM. Each method looks first whether the kernel has the capability
that the call needs (KVM_CAP_XEN_HVM, a mask) and says so (OSError ENOTSUP) instead of KVM's EINVAL or ENOENT.

    XenVm    KVM_XEN_HVM_CONFIG, _SET_ATTR/_GET_ATTR, _EVTCHN_SEND      vCPUs are KVM's ids, not Xen's numbers
    XenVcpu  KVM_XEN_VCPU_SET_ATTR/_GET_ATTR

Source: <linux/kvm.h> and Documentation/virt/kvm/api.rst, 4.59, 4.126 and on.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from evtchnd.abi import Evtchnstat
from evtchnd.vmm.kvm_ioctl import io, ioctl, iow, iowr

CAP_XEN_HVM = 38
PRIO_2LEVEL = 0xFFFFFFFF  # KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
INVALID_GFN = (1 << 64) - 1  # KVM_XEN_INVALID_GFN, _GPA: takes the page back

_CHECK_EXTENSION = io(0x03)
_XEN_HVM_CONFIG = iow(0x7A, 56)
_XEN_HVM_GET_ATTR = iowr(0xC8, 72)
_XEN_HVM_SET_ATTR = iow(0xC9, 72)
_XEN_VCPU_GET_ATTR = iowr(0xCA, 72)
_XEN_VCPU_SET_ATTR = iow(0xCB, 72)
_XEN_HVM_EVTCHN_SEND = iow(0xD0, 12)

_EVTCHN_DEASSIGN, _EVTCHN_UPDATE, _EVTCHN_RESET = 1, 2, 4


Outside = Callable[[], contextlib.AbstractContextManager[None]]


class XenHvm(IntFlag):
    """KVM_XEN_HVM_CONFIG_*: what the kernel has; the ones in `ENABLE` are switched on by `XenVm.config`."""

    HYPERCALL_MSR = 1 << 0
    INTERCEPT_HCALL = 1 << 1
    SHARED_INFO = 1 << 2
    RUNSTATE = 1 << 3
    EVTCHN_2LEVEL = 1 << 4
    EVTCHN_SEND = 1 << 5
    RUNSTATE_UPDATE_FLAG = 1 << 6
    PVCLOCK_TSC_UNSTABLE = 1 << 7
    SHARED_INFO_HVA = 1 << 8


ENABLE = XenHvm.INTERCEPT_HCALL | XenHvm.EVTCHN_SEND | XenHvm.PVCLOCK_TSC_UNSTABLE


class _Attr(IntEnum):
    """KVM_XEN_ATTR_TYPE_*."""

    LONG_MODE = 0
    SHARED_INFO = 1
    UPCALL_VECTOR = 2
    EVTCHN = 3
    XEN_VERSION = 4
    RUNSTATE_UPDATE_FLAG = 5
    SHARED_INFO_HVA = 6


class _VcpuAttr(IntEnum):
    """KVM_XEN_VCPU_ATTR_TYPE_*."""

    VCPU_INFO = 0
    VCPU_TIME_INFO = 1
    RUNSTATE_ADDR = 2
    RUNSTATE_CURRENT = 3
    RUNSTATE_DATA = 4
    RUNSTATE_ADJUST = 5
    VCPU_ID = 6
    TIMER = 7
    UPCALL_VECTOR = 8
    VCPU_INFO_HVA = 9


class Runstate(IntEnum):
    """RUNSTATE_* of xen/include/public/vcpu.h."""

    RUNNING = 0
    RUNNABLE = 1
    BLOCKED = 2
    OFFLINE = 3


@dataclass(frozen=True, slots=True)
class RunstateTimes:
    """Nanoseconds in each state; they add up to `entry`, when the present state was entered (guest's clock)."""

    state: int
    entry: int
    running: int
    runnable: int
    blocked: int
    offline: int


_ATTR = struct.Struct("<H6x64s")  # kvm_xen_hvm_attr, kvm_xen_vcpu_attr: u16 type, u16 pad[3], the union
_EVTCHN_PORT = struct.Struct("<III III")  # send_port, type, flags, {port, vcpu, priority}
_EVTCHN_EVENTFD = struct.Struct("<III Ii")  # send_port, type, flags, {0, fd}
_RUNSTATE = struct.Struct("<6Q")
_TIMER = struct.Struct("<IIQ")  # port, priority, expires_ns


def xen_capability(kvm_fd: int) -> XenHvm:
    """What this kernel's KVM has of Xen; 0: nothing (CONFIG_KVM_XEN is off)."""
    return XenHvm(ioctl(kvm_fd, _CHECK_EXTENSION, CAP_XEN_HVM, "KVM_CHECK_EXTENSION"))


class _Attributes:
    """Sets and gets the two attribute structs, of the same form."""

    def __init__(
        self, fd: int, has: XenHvm, set_request: int, get_request: int, outside: Outside = contextlib.nullcontext
    ) -> None:
        self.fd, self.has, self._outside = fd, has, outside
        self._set_request, self._get_request = set_request, get_request

    def need(self, wanted: XenHvm, call: str) -> None:
        """OSError ENOTSUP where the kernel lacks one of `wanted`."""
        if missing := wanted & ~self.has:
            raise OSError(errno.ENOTSUP, f"{call}: this kernel's KVM lacks {missing!r} of KVM_CAP_XEN_HVM")

    def set(self, which: IntEnum, value: bytes, wanted: XenHvm) -> None:
        self.need(wanted, which.name)
        with self._outside():
            ioctl(self.fd, self._set_request, _ATTR.pack(which, value), which.name)

    def get(self, which: IntEnum, wanted: XenHvm) -> bytes:
        self.need(wanted, which.name)
        data = bytearray(_ATTR.pack(which, b""))
        with self._outside():
            ioctl(self.fd, self._get_request, data, which.name)
        return bytes(data[8:])

    def set_int(self, which: IntEnum, value: int, size: int, wanted: XenHvm) -> None:
        self.set(which, value.to_bytes(size, "little"), wanted)

    def get_int(self, which: IntEnum, size: int, wanted: XenHvm) -> int:
        return int.from_bytes(self.get(which, wanted)[:size], "little")


class XenVm:
    """The Xen calls of a VM's descriptor, which stays the caller's."""

    def __init__(self, vm_fd: int, has: XenHvm) -> None:
        self.fd, self.has = vm_fd, has
        self._attr = _Attributes(vm_fd, has, _XEN_HVM_SET_ATTR, _XEN_HVM_GET_ATTR)

    def config(self, flags: XenHvm = XenHvm.INTERCEPT_HCALL | XenHvm.EVTCHN_SEND, msr: int = 0x40000000) -> None:
        """KVM_XEN_HVM_CONFIG: hypercalls come to the kernel; a guest's write to `msr` fills its hypercall page."""
        self._attr.need(flags | XenHvm.HYPERCALL_MSR, "KVM_XEN_HVM_CONFIG")
        if flags & ~ENABLE:
            raise OSError(errno.EINVAL, f"KVM_XEN_HVM_CONFIG: {flags & ~ENABLE!r} are not for switching on")
        ioctl(self.fd, _XEN_HVM_CONFIG, struct.pack("<II", flags, msr).ljust(56, b"\0"), "KVM_XEN_HVM_CONFIG")

    # ---- attributes --------------------------------------------------------------------------------------------

    def set_long_mode(self, on: bool) -> None:
        """64-bit shared_info and 4096 ports, or 32-bit and 1024. The guest's hypercall page sets it too."""
        self._attr.set_int(_Attr.LONG_MODE, on, 1, XenHvm.SHARED_INFO)

    def long_mode(self) -> bool:
        return bool(self._attr.get_int(_Attr.LONG_MODE, 1, XenHvm.SHARED_INFO))

    def set_shared_info(self, gfn: int) -> None:
        """Where shared_info lies in guest memory; INVALID_GFN: nowhere."""
        self._attr.set_int(_Attr.SHARED_INFO, gfn, 8, XenHvm.SHARED_INFO)

    def shared_info(self) -> int:
        return self._attr.get_int(_Attr.SHARED_INFO, 8, XenHvm.SHARED_INFO)

    def set_shared_info_hva(self, address: int) -> None:
        """The same by this process' own address of the page, which stays when the guest moves it; 0: nowhere."""
        self._attr.set_int(_Attr.SHARED_INFO_HVA, address, 8, XenHvm.SHARED_INFO_HVA)

    def shared_info_hva(self) -> int:
        return self._attr.get_int(_Attr.SHARED_INFO_HVA, 8, XenHvm.SHARED_INFO_HVA)

    def set_upcall_vector(self, vector: int) -> None:
        """The interrupt that says "an event is pending" on any vCPU, without its local APIC; 0: none."""
        self._attr.set_int(_Attr.UPCALL_VECTOR, vector, 1, XenHvm.SHARED_INFO)

    def upcall_vector(self) -> int:
        return self._attr.get_int(_Attr.UPCALL_VECTOR, 1, XenHvm.SHARED_INFO)

    def set_version(self, version: int) -> None:
        """What the kernel answers to XENVER_version (0x40011: 4.17); 0: the VMM answers."""
        self._attr.set_int(_Attr.XEN_VERSION, version, 4, XenHvm.EVTCHN_SEND)

    def version(self) -> int:
        return self._attr.get_int(_Attr.XEN_VERSION, 4, XenHvm.EVTCHN_SEND)

    def set_runstate_update_flag(self, on: bool) -> None:
        """Whether the guest sees XEN_RUNSTATE_UPDATE while its runstate is written (a VMASST)."""
        self._attr.set_int(_Attr.RUNSTATE_UPDATE_FLAG, on, 1, XenHvm.RUNSTATE_UPDATE_FLAG)

    def runstate_update_flag(self) -> bool:
        return bool(self._attr.get_int(_Attr.RUNSTATE_UPDATE_FLAG, 1, XenHvm.RUNSTATE_UPDATE_FLAG))

    # ---- ports that the guest sends on -------------------------------------------------------------------------

    def assign_eventfd(self, port: int, fd: int) -> None:
        """A send on `port` writes the eventfd. KVM holds a reference of its own; EEXIST if the port is assigned."""
        self._evtchn(_EVTCHN_EVENTFD.pack(port, Evtchnstat.INTERDOMAIN, 0, 0, fd))

    def assign_port(self, port: int, target: int, vcpu: int) -> None:
        """A send on `port` raises the guest's own port `target` on `vcpu`."""
        self._evtchn(_EVTCHN_PORT.pack(port, Evtchnstat.INTERDOMAIN, 0, target, vcpu, PRIO_2LEVEL))

    def assign_ipi(self, port: int, vcpu: int) -> None:
        """A send on `port` raises it on `vcpu`."""
        self._evtchn(_EVTCHN_PORT.pack(port, Evtchnstat.IPI, 0, port, vcpu, PRIO_2LEVEL))

    def update_port(self, port: int, target: int, vcpu: int, *, ipi: bool = False) -> None:
        """Moves what `assign_port` or `assign_ipi` has set to another vCPU; nothing else can change, no eventfd."""
        kind = Evtchnstat.IPI if ipi else Evtchnstat.INTERDOMAIN
        self._evtchn(_EVTCHN_PORT.pack(port, kind, _EVTCHN_UPDATE, target, vcpu, PRIO_2LEVEL))

    def deassign(self, port: int) -> None:
        """Sends on `port` leave the kernel from now on; returns when none is on its way any more."""
        self._evtchn(_EVTCHN_PORT.pack(port, 0, _EVTCHN_DEASSIGN, 0, 0, 0))

    def reset_ports(self) -> None:
        """Deassigns every port (a soft reset)."""
        self._evtchn(_EVTCHN_PORT.pack(0, 0, _EVTCHN_RESET, 0, 0, 0))

    def _evtchn(self, value: bytes) -> None:
        self._attr.set(_Attr.EVTCHN, value, XenHvm.EVTCHN_SEND)

    def send(self, port: int, vcpu: int) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND: raises the guest's `port` on `vcpu`; a masked one is pending then.

        Where the vCPU's vcpu_info is not registered, older kernels answer EINVAL and nothing is pending: raise it again
        later. 6.12 keeps it until then.
        """
        self._attr.need(XenHvm.EVTCHN_SEND, "KVM_XEN_HVM_EVTCHN_SEND")
        ioctl(self.fd, _XEN_HVM_EVTCHN_SEND, struct.pack("<III", port, vcpu, PRIO_2LEVEL), "KVM_XEN_HVM_EVTCHN_SEND")


class XenVcpu:
    """The Xen calls of a vCPU's descriptor, which stays the caller's. Addresses are the guest's physical ones.

    KVM makes a call on a vCPU wait as long as another thread runs it, a sleeping guest's for ever. `outside` holds
    it out of the guest meanwhile.
    """

    def __init__(self, vcpu_fd: int, has: XenHvm, outside: Outside = contextlib.nullcontext) -> None:
        self.fd, self.has = vcpu_fd, has
        self._attr = _Attributes(vcpu_fd, has, _XEN_VCPU_SET_ATTR, _XEN_VCPU_GET_ATTR, outside)

    def set_info(self, gpa: int) -> None:
        """Where its vcpu_info lies, in shared_info too; INVALID_GFN: nowhere, and no event reaches it."""
        self._attr.set_int(_VcpuAttr.VCPU_INFO, gpa, 8, XenHvm.SHARED_INFO)

    def info(self) -> int:
        return self._attr.get_int(_VcpuAttr.VCPU_INFO, 8, XenHvm.SHARED_INFO)

    def set_info_hva(self, address: int) -> None:
        """The same by this process' own address; 0: nowhere."""
        self._attr.set_int(_VcpuAttr.VCPU_INFO_HVA, address, 8, XenHvm.SHARED_INFO_HVA)

    def info_hva(self) -> int:
        return self._attr.get_int(_VcpuAttr.VCPU_INFO_HVA, 8, XenHvm.SHARED_INFO_HVA)

    def set_time_info(self, gpa: int) -> None:
        """A second place for its clock (pvclock_vcpu_time_info)."""
        self._attr.set_int(_VcpuAttr.VCPU_TIME_INFO, gpa, 8, XenHvm.SHARED_INFO)

    def time_info(self) -> int:
        return self._attr.get_int(_VcpuAttr.VCPU_TIME_INFO, 8, XenHvm.SHARED_INFO)

    def set_runstate_address(self, gpa: int) -> None:
        self._attr.set_int(_VcpuAttr.RUNSTATE_ADDR, gpa, 8, XenHvm.RUNSTATE)

    def runstate_address(self) -> int:
        """ENOENT where none is set."""
        return self._attr.get_int(_VcpuAttr.RUNSTATE_ADDR, 8, XenHvm.RUNSTATE)

    def set_runstate(self, state: int) -> None:
        """Enters `state` now. In the vCPU's own thread: KVM takes the time that the caller waited for a CPU off."""
        self._attr.set(_VcpuAttr.RUNSTATE_CURRENT, _RUNSTATE.pack(state, 0, 0, 0, 0, 0), XenHvm.RUNSTATE)

    def runstate(self) -> Runstate:
        return Runstate(self._attr.get_int(_VcpuAttr.RUNSTATE_CURRENT, 8, XenHvm.RUNSTATE))

    def set_runstate_times(self, times: RunstateTimes) -> None:
        """All of them, as after a migration. EINVAL where they do not add up or lie in the future."""
        self._attr.set(_VcpuAttr.RUNSTATE_DATA, _pack_times(times), XenHvm.RUNSTATE)

    def runstate_times(self) -> RunstateTimes:
        return RunstateTimes(*_RUNSTATE.unpack_from(self._attr.get(_VcpuAttr.RUNSTATE_DATA, XenHvm.RUNSTATE)))

    def adjust_runstate(self, times: RunstateTimes) -> None:
        """Adds to each (signed); `state` -1: stays."""
        self._attr.set(_VcpuAttr.RUNSTATE_ADJUST, _pack_times(times), XenHvm.RUNSTATE)

    def set_id(self, number: int) -> None:
        """Xen's number of this vCPU, as VCPUOP_* name it."""
        self._attr.set_int(_VcpuAttr.VCPU_ID, number, 4, XenHvm.EVTCHN_SEND)

    def id(self) -> int:
        return self._attr.get_int(_VcpuAttr.VCPU_ID, 4, XenHvm.EVTCHN_SEND)

    def set_timer(self, port: int, expires_ns: int = 0) -> None:
        """Its VIRQ_TIMER raises `port` (0: the VMM's timer), at `expires_ns` of the guest's clock (0: not set)."""
        self._attr.set(_VcpuAttr.TIMER, _TIMER.pack(port, PRIO_2LEVEL, expires_ns), XenHvm.EVTCHN_SEND)

    def timer(self) -> tuple[int, int]:
        """(port, expires_ns); 0 when it has fired."""
        port, _, expires = _TIMER.unpack_from(self._attr.get(_VcpuAttr.TIMER, XenHvm.EVTCHN_SEND))
        return port, expires

    def set_upcall_vector(self, vector: int) -> None:
        """Its own upcall through its local APIC (HVMOP_set_evtchn_upcall_vector); 0: none."""
        self._attr.set_int(_VcpuAttr.UPCALL_VECTOR, vector, 1, XenHvm.EVTCHN_SEND)

    def upcall_vector(self) -> int:
        return self._attr.get_int(_VcpuAttr.UPCALL_VECTOR, 1, XenHvm.EVTCHN_SEND)


def _pack_times(times: RunstateTimes) -> bytes:
    values = (times.state, times.entry, times.running, times.runnable, times.blocked, times.offline)
    return _RUNSTATE.pack(*(value & 0xFFFFFFFFFFFFFFFF for value in values))
