"""A system call to KVM, and what its refusal means.

Every KVM call of this program goes through `ioctl`: fcntl.ioctl refuses integers above 2^31 - 1 (KVM_SET_TSS_ADDR has
one) and copies its buffers. ctypes lets go of the GIL, so a virtual CPU that runs stops no other thread.
"""

from __future__ import annotations

import ctypes
import errno
import os

KVMIO = 0xAE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def io(number: int) -> int:
    """_IO: no argument, or a plain integer."""
    return KVMIO << 8 | number


def iow(number: int, size: int) -> int:
    """_IOW: the kernel reads a struct of `size` bytes."""
    return 1 << 30 | size << 16 | KVMIO << 8 | number


def ior(number: int, size: int) -> int:
    """_IOR: the kernel writes one."""
    return 2 << 30 | size << 16 | KVMIO << 8 | number


def iowr(number: int, size: int) -> int:
    """_IOWR: both."""
    return 3 << 30 | size << 16 | KVMIO << 8 | number


# What KVM means by an error number; a row of a call before the row of all calls. Where a call has several reasons for
# one number, they are all named: the kernel says no more.
HINTS: dict[tuple[str, int], str] = {
    ("", errno.EACCES): "no right to /dev/kvm: its group is kvm",
    ("", errno.EIO): "KVM takes calls only from the process that made the VM",
    ("", errno.EMFILE): "out of descriptors (RLIMIT_NOFILE)",
    ("", errno.ENOTTY): "this kernel's KVM does not know the call",
    ("/dev/kvm", errno.ENOENT): "no KVM here: load kvm_intel or kvm_amd, or switch virtualization on",
    ("KVM_XEN_HVM_CONFIG", errno.EINVAL): "a flag that this kernel lacks, or its KVM has no Xen (CONFIG_KVM_XEN)",
    ("EVTCHN", errno.EEXIST): "the port is assigned: deassign it first",
    ("EVTCHN", errno.ENOENT): "the port is not assigned",
    ("EVTCHN", errno.EINVAL): "port 0 or past the limit (1024 until the guest is in long mode, then 4096), an IPI to "
    "another port, or an eventfd that was to be updated",
    ("EVTCHN", errno.EBADF): "no eventfd",
    ("KVM_XEN_HVM_EVTCHN_SEND", errno.EINVAL): "no such port or vCPU, or its vcpu_info is not registered: "
    "nothing is pending",
    ("KVM_SET_GSI_ROUTING", errno.EINVAL): "more than 4096 routes, or a gsi past 4095",
    ("KVM_IRQFD", errno.EBUSY): "the eventfd is bound to an interrupt already",
    ("KVM_IRQFD", errno.EINVAL): "no such gsi, or no interrupt controller in the kernel",
    ("KVM_IOEVENTFD", errno.EEXIST): "an eventfd listens at this address and value",
    ("KVM_IOEVENTFD", errno.ENOENT): "no such eventfd listens there",
    ("UPCALL_VECTOR", errno.EINVAL): "vectors below 0x10 belong to the processor",
    ("RUNSTATE_ADDR", errno.EOPNOTSUPP): "the host counts no run delay (CONFIG_SCHED_INFO)",
    ("RUNSTATE_DATA", errno.EINVAL): "the times do not add up to the entry time, or lie in the future",
    ("RUNSTATE_ADJUST", errno.EINVAL): "the times do not add up to the entry time, or lie in the future",
    ("SHARED_INFO", errno.EFAULT): "no memory slot there",
    ("VCPU_INFO", errno.EFAULT): "no memory slot there",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "overlaps another slot",
}


class KvmError(OSError):
    """KVM refused `call`; the text says what that means."""

    def __init__(self, code: int, call: str) -> None:
        hint = HINTS.get((call, code)) or HINTS.get(("", code), "")
        super().__init__(code, f"{call}: {os.strerror(code)}" + (f": {hint}" if hint else ""))
        self.call = call


def ioctl(fd: int, request: int, argument: int | bytes | bytearray, call: str) -> int:
    """The call's result. `argument`: an integer, a struct, or a bytearray that the kernel may write to. KvmError."""
    if isinstance(argument, int):
        result = _libc.ioctl(fd, request, argument)
    elif isinstance(argument, bytearray):
        result = _libc.ioctl(fd, request, ctypes.byref((ctypes.c_char * len(argument)).from_buffer(argument)))
    else:
        result = _libc.ioctl(fd, request, argument)
    if result < 0:
        raise KvmError(ctypes.get_errno(), call)
    return int(result)
