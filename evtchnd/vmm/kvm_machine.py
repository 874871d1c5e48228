"""A virtual machine of KVM: memory slots, virtual CPUs and why they stop running.

Enough of KVM to run a guest: interrupt controllers in the kernel, no device. A vCPU belongs to the thread that
runs it; `Vcpu.kick` takes it out of the guest from another thread.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from evtchnd.errors import HostError
from evtchnd.vmm.kvm import XenHvm, XenVcpu, XenVm, xen_capability
from evtchnd.vmm.kvm_ioctl import KvmError, io, ioctl, ior, iow, iowr
from evtchnd.vmm.vcpu_context import Descriptor, VcpuContext

_GET_API_VERSION = io(0x00)
_CREATE_VM = io(0x01)
_GET_VCPU_MMAP_SIZE = io(0x04)
_GET_SUPPORTED_CPUID = iowr(0x05, 8)
_CREATE_VCPU = io(0x41)
_SET_USER_MEMORY_REGION = iow(0x46, 32)
_SET_TSS_ADDR = io(0x47)
_CREATE_IRQCHIP = io(0x60)
_RUN = io(0x80)
_GET_REGS = ior(0x81, 144)
_SET_REGS = iow(0x82, 144)
_GET_SREGS = ior(0x83, 312)
_SET_SREGS = iow(0x84, 312)
_SET_SIGNAL_MASK = iow(0x8B, 4)
_TRANSLATE = iowr(0x85, 24)
_SET_CPUID2 = iow(0x90, 8)
_GET_MP_STATE = ior(0x98, 4)
_SET_MP_STATE = iow(0x99, 4)
_NMI = io(0x9A)
_GET_VCPU_EVENTS = ior(0x9F, 64)
_ENABLE_CAP = iow(0xA3, 104)
_PRE_FAULT_MEMORY = iowr(0xD5, 64)

_TSS_ADDRESS = 0xFFFBD000  # three pages that Intel's virtual real mode needs: below 4 GiB, no RAM there
_MAX_CPUID = 256
_CAP_SPLIT_IRQCHIP, _IOAPIC_PINS = 121, 24
_RUNNABLE, _UNINITIALIZED, _INIT_RECEIVED = 0, 1, 2  # KVM_MP_STATE_*; the latter two: not started yet
# Blocked in a vCPU's thread and let in only by KVM_RUN: it ends the run and is never delivered.
_KICK = signal.SIGRTMIN + 5
_KICK_AGAIN_S = 0.5

EXIT_IO = 2
EXIT_MMIO = 6
EXIT_XEN = 34
EXIT_NAMES = {
    0: "unknown",
    EXIT_IO: "io",
    5: "hlt",
    EXIT_MMIO: "mmio",
    7: "irq window",
    8: "shutdown",
    9: "entry failed",
    10: "signal",
    17: "internal error",
    24: "system event",
    EXIT_XEN: "xen",
}

# struct kvm_run: u8 request_interrupt_window, immediate_exit @1, u32 exit_reason @8, the exit's union @32
_IMMEDIATE_EXIT, _EXIT_REASON, _UNION = 1, 8, 32
_IO = struct.Struct("<BBHIQ")  # direction (1: out), size, port, count, offset of the data in kvm_run
_MMIO = struct.Struct("<Q8sIB")  # address, data, size, is_write
_MMIO_DATA = _UNION + 8
_XEN = struct.Struct("<I4xII Q Q 6Q")  # type (1: hypercall), pad; longmode, cpl, input, result, params
_XEN_RESULT = _UNION + 24

# struct kvm_sregs: cs ds es fs gs ss tr ldt (kvm_segment), gdt idt (kvm_dtable), cr0 cr2 cr3 cr4 cr8 efer ...
_SEGMENT = struct.Struct("<QIH 8B 2x")  # base, limit, selector, type, present, dpl, db, s, l, g, avl
_SEGMENT_SELECTOR = 12
_EXCEPTION = struct.Struct("<BBBBI")  # kvm_vcpu_events: injected, nr, has_error_code, pending, error_code
_SREGS_TR, _SREGS_GDT, _SREGS_CR0, _SREGS_CR3, _SREGS_CR4, _SREGS_EFER = 6 * 24, 192, 224, 240, 248, 264
_CR0_PE, _CR0_ET, _CR0_NE, _CR0_PG, _CR4_PAE, _EFER_LME, _EFER_LMA = 1, 16, 32, 1 << 31, 32, 1 << 8, 1 << 10


@dataclass(frozen=True, slots=True)
class Io:
    """A guest's access to an I/O port. `value`: what it wrote; `read`: it waits for a value instead."""

    port: int
    size: int
    value: int
    read: bool
    count: int = 1  # of a string instruction; `value` is the first


class Mmio(NamedTuple):
    """A guest's access to an address that is no memory."""

    address: int
    size: int
    value: int
    read: bool


class Hypercall(NamedTuple):
    """A hypercall that the kernel did not answer; `Vcpu.answer` does. `params` as the guest's mode passes them."""

    number: int
    params: tuple[int, ...]
    long_mode: bool
    cpl: int


class Stop(NamedTuple):
    """Any other end of a run, by its name in EXIT_NAMES; "kicked": `Vcpu.kick`."""

    reason: str


Exit = Io | Mmio | Hypercall | Stop


class Vcpu:
    """One virtual CPU. `exits` counts why it left the guest, since it was made."""

    def __init__(self, machine: Machine, number: int, cpuid: bytes) -> None:
        self.number = number
        self.fd = ioctl(machine.fd, _CREATE_VCPU, number, "KVM_CREATE_VCPU")
        self.xen = XenVcpu(self.fd, machine.has, self.outside)
        self.exits: Counter[str] = Counter()
        self._thread: int | None = None
        self._gate = threading.Condition()
        self._inside = False
        self._wanted = 0  # threads that want it to be outside
        try:
            ioctl(self.fd, _SET_CPUID2, cpuid, "KVM_SET_CPUID2")
            self._run = mmap.mmap(self.fd, machine.run_size)
        except BaseException:
            os.close(self.fd)
            raise

    def start(
        self, entry: int, stack: int, argument: int, *, gdt: tuple[int, int], tss: int, page_table: int | None
    ) -> None:
        """Registers of a flat guest at `entry`: in long mode with `page_table`, without it 32-bit protected mode.

        `gdt` (address, bytes) has code at 8 and data at 16, a TSS of 104 bytes at 0x28. `argument` is in rdi and rsi
        as long mode passes it, and in eax.
        """
        sregs = bytearray(312)
        ioctl(self.fd, _GET_SREGS, sregs, "KVM_GET_SREGS")
        long_mode = page_table is not None
        code = _SEGMENT.pack(0, 0xFFFFFFFF, 0x08, 11, 1, 0, not long_mode, 1, long_mode, 1, 0)
        data = _SEGMENT.pack(0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0)
        sregs[0:_SREGS_TR] = code + data * 5
        sregs[_SREGS_TR : _SREGS_TR + 24] = _SEGMENT.pack(tss, 103, 0x28, 11, 1, 0, 0, 0, 0, 0, 0)
        struct.pack_into("<QH", sregs, _SREGS_GDT, gdt[0], gdt[1] - 1)
        cr0 = _CR0_PE | _CR0_ET | _CR0_NE
        struct.pack_into("<Q", sregs, _SREGS_CR0, cr0 | (_CR0_PG if long_mode else 0))
        struct.pack_into("<QQ", sregs, _SREGS_CR3, page_table or 0, _CR4_PAE if long_mode else 0)
        struct.pack_into("<Q", sregs, _SREGS_EFER, _EFER_LME | _EFER_LMA if long_mode else 0)
        ioctl(self.fd, _SET_SREGS, bytes(sregs), "KVM_SET_SREGS")
        regs = [argument, 0, 0, 0, argument, argument, stack, 0, *[0] * 8, entry, 2]  # rax rbx rcx rdx rsi rdi rsp rbp
        ioctl(self.fd, _SET_REGS, struct.pack("<18Q", *regs), "KVM_SET_REGS")
        ioctl(self.fd, _SET_MP_STATE, struct.pack("<I", _RUNNABLE), "KVM_SET_MP_STATE")

    def start_pvh(self, entry: int, start_info: int) -> None:
        """Registers of a PVH guest's first vCPU: 32-bit protected mode, no paging, rbx = hvm_start_info.

        Source: docs/misc/pvh.pandoc. The others wait for INIT and SIPI, as KVM makes them.
        """
        sregs = bytearray(312)
        ioctl(self.fd, _GET_SREGS, sregs, "KVM_GET_SREGS")
        code = _SEGMENT.pack(0, 0xFFFFFFFF, 0x08, 11, 1, 0, 1, 1, 0, 1, 0)
        data = _SEGMENT.pack(0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0)
        sregs[0:_SREGS_TR] = code + data * 5
        sregs[_SREGS_TR : _SREGS_TR + 24] = _SEGMENT.pack(0, 0x67, 0x18, 11, 1, 0, 0, 0, 0, 0, 0)
        struct.pack_into("<Q", sregs, _SREGS_CR0, _CR0_PE | _CR0_ET)
        struct.pack_into("<QQ", sregs, _SREGS_CR3, 0, 0)
        struct.pack_into("<Q", sregs, _SREGS_EFER, 0)
        ioctl(self.fd, _SET_SREGS, bytes(sregs), "KVM_SET_SREGS")
        regs = [0, start_info, *[0] * 14, entry, 2]  # rax rbx ... r15 rip rflags
        ioctl(self.fd, _SET_REGS, struct.pack("<18Q", *regs), "KVM_SET_REGS")

    def pre_fault(self, address: int, size: int) -> None:
        """Has KVM map guest memory before the vCPU runs: each page of it is no exit then. Whole pages.

        A hint: KVM before Linux 6.11 does not know it. Source: Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY.
        """
        left = bytearray(struct.pack("<QQ48x", address, size))  # gpa, size: what is left of it
        with contextlib.suppress(KvmError):
            while int.from_bytes(left[8:16], "little"):
                ioctl(self.fd, _PRE_FAULT_MEMORY, left, "KVM_PRE_FAULT_MEMORY")

    def set_context(self, context: VcpuContext) -> None:
        """VCPUOP_initialise: its registers when it is brought up. KvmError EINVAL."""
        sregs = bytearray(312)
        with self.outside():
            ioctl(self.fd, _GET_SREGS, sregs, "KVM_GET_SREGS")
            segments = (context.cs, context.ds, context.es, context.ds, context.ds, context.ss, context.tr)
            sregs[: 7 * 24] = b"".join(_segment(each) for each in segments)
            struct.pack_into("<Q", sregs, _SREGS_CR0, context.cr0)
            struct.pack_into("<QQ", sregs, _SREGS_CR3, context.cr3, context.cr4)
            struct.pack_into("<Q", sregs, _SREGS_EFER, context.efer)
            ioctl(self.fd, _SET_SREGS, bytes(sregs), "KVM_SET_SREGS")
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, rip, rflags = context.general
            regs = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *[0] * 8, rip, rflags]
            ioctl(self.fd, _SET_REGS, struct.pack("<18Q", *regs), "KVM_SET_REGS")

    def set_up(self, up: bool) -> None:
        """Starts it, or stops it until it is started again: by this, or by INIT and SIPI."""
        with self.outside():
            state = _RUNNABLE if up else _UNINITIALIZED
            ioctl(self.fd, _SET_MP_STATE, struct.pack("<I", state), "KVM_SET_MP_STATE")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """To be held in the thread that runs it, as long as it does."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
        mask = ((1 << 64) - 1) & ~(1 << (_KICK - 1))
        ioctl(self.fd, _SET_SIGNAL_MASK, struct.pack("<IQ", 8, mask), "KVM_SET_SIGNAL_MASK")
        with self._gate:
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            with self._gate:
                self._thread = None

    def run(self) -> Exit:
        """Runs the guest until it stops for us. KvmError."""
        with self._gate:
            while self._wanted:
                self._gate.wait()
            self._inside = True
        try:
            ioctl(self.fd, _RUN, 0, "KVM_RUN")
        except KvmError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN):
                raise
            signal.sigtimedwait({_KICK}, 0)
            return Stop("kicked")  # our doing, so not counted
        finally:
            with self._gate:
                self._inside = False
                self._gate.notify_all()
        reason = int.from_bytes(self._run[_EXIT_REASON : _EXIT_REASON + 4], "little")
        name = EXIT_NAMES.get(reason, str(reason))
        self.exits[name] += 1
        if reason == EXIT_IO:
            direction, size, port, count, offset = _IO.unpack_from(self._run, _UNION)
            return Io(port, size, int.from_bytes(self._run[offset : offset + size], "little"), direction == 0, count)
        if reason == EXIT_MMIO:
            address, data, size, write = _MMIO.unpack_from(self._run, _UNION)
            return Mmio(address, size, int.from_bytes(data[:size], "little"), not write)
        if reason == EXIT_XEN:
            _, long_mode, cpl, number, _, *params = _XEN.unpack_from(self._run, _UNION)
            return Hypercall(number, tuple(params), bool(long_mode), cpl)
        return Stop(name)

    def answer(self, result: int) -> None:
        """The result of the hypercall that the last run ended with (negative: an error number)."""
        self._run[_XEN_RESULT : _XEN_RESULT + 8] = (result & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")

    def answer_read(self, access: Io | Mmio, byte: int) -> None:
        """The value of the read that the last run ended with: `byte` in all of its bytes."""
        if isinstance(access, Mmio):
            self._run[_MMIO_DATA : _MMIO_DATA + 8] = bytes((byte,)) * 8
            return
        *_, count, offset = _IO.unpack_from(self._run, _UNION)
        size = access.size * count
        self._run[offset : offset + size] = bytes((byte,)) * size

    def translate(self, address: int) -> int | None:
        """The physical address of a virtual one, None where nothing is mapped. In the vCPU's own thread."""
        data = bytearray(struct.pack("<Q16x", address & 0xFFFFFFFFFFFFFFFF))
        ioctl(self.fd, _TRANSLATE, data, "KVM_TRANSLATE")
        physical, valid = struct.unpack_from("<QB", data, 8)
        return int(physical) if valid else None

    def registers(self) -> str:
        """One line about a guest that has died. AMD's processors leave nothing of a vCPU that triple-faulted: it is as
        after a reset then, at 0xfff0."""
        if not self.is_up():
            return "not up"
        regs, sregs, events = bytearray(144), bytearray(312), bytearray(64)
        with self.outside():
            ioctl(self.fd, _GET_REGS, regs, "KVM_GET_REGS")
            ioctl(self.fd, _GET_SREGS, sregs, "KVM_GET_SREGS")
            ioctl(self.fd, _GET_VCPU_EVENTS, events, "KVM_GET_VCPU_EVENTS")
        rax, *_, rsp, _, _, _, _, _, _, _, _, _, rip, rflags = struct.unpack("<18Q", regs)
        cr0, cr2, cr3, cr4 = struct.unpack_from("<4Q", sregs, _SREGS_CR0)
        (efer,) = struct.unpack_from("<Q", sregs, _SREGS_EFER)
        cs = int.from_bytes(sregs[_SEGMENT_SELECTOR : _SEGMENT_SELECTOR + 2], "little")
        line = f"rip {cs:#x}:{rip:#x}, rsp {rsp:#x}, rax {rax:#x}, rflags {rflags:#x}"
        line += f", cr0 {cr0:#x}, cr2 {cr2:#x}, cr3 {cr3:#x}, cr4 {cr4:#x}, efer {efer:#x}"
        injected, vector, has_code, pending, code = _EXCEPTION.unpack_from(events)
        if injected or pending:
            line += f", exception {vector}" + (f" ({code:#x})" if has_code else "")
        return line

    def is_up(self) -> bool:
        """Whether it has been started: by the VMM, or by INIT and SIPI."""
        state = bytearray(4)
        with self.outside():
            ioctl(self.fd, _GET_MP_STATE, state, "KVM_GET_MP_STATE")
        return state[0] not in (_UNINITIALIZED, _INIT_RECEIVED)

    def nmi(self) -> None:
        """A non-maskable interrupt; one that is pending already is the same."""
        with self.outside():
            ioctl(self.fd, _NMI, 0, "KVM_NMI")

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """The vCPU is not in the guest, and does not go there. Its own thread may ask for it between runs."""
        with self._gate:
            self._wanted += 1
            while self._inside:
                self.kick()
                self._gate.wait(_KICK_AGAIN_S)  # a kick before KVM_RUN has begun to listen is not lost, but be sure
        try:
            yield
        finally:
            with self._gate:
                self._wanted -= 1
                self._gate.notify_all()

    def kick(self) -> None:
        """Ends `run`, the one that goes on or the next; from any thread."""
        with self._gate:  # its thread stays: an ended one's identity is soon another's, whom the signal would kill
            if self._thread is not None:
                signal.pthread_kill(self._thread, _KICK)

    def close(self) -> None:
        """After its thread has ended."""
        self._run.close()
        os.close(self.fd)


def _segment(each: Descriptor) -> bytes:
    flags = each.attributes
    kind, s, dpl, present = flags & 15, flags >> 4 & 1, flags >> 5 & 3, flags >> 7 & 1
    avl, long, db, granularity = flags >> 8 & 1, flags >> 9 & 1, flags >> 10 & 1, flags >> 11 & 1
    packed = _SEGMENT.pack(each.base, each.limit, 0, kind, present, dpl, db, s, long, granularity, avl)
    return packed[:-2] + bytes((not present, 0))  # unusable


class Machine:
    """A VM with its interrupt controllers. `xen` has the Xen calls; `has` is empty where this KVM has none.

    `split`: only the local APICs are in the kernel; there is no IOAPIC, no PIC.
    """

    def __init__(self, device: str = "/dev/kvm", *, split: bool = False) -> None:
        try:
            kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{device}: {error.strerror}: no KVM here, or no right to it (group kvm)") from None
        self.fd = -1
        self.vcpus: list[Vcpu] = []
        try:
            self.has: XenHvm = xen_capability(kvm)
            self.run_size = ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
            cpuid = bytearray(struct.pack("<II", _MAX_CPUID, 0)) + bytearray(40 * _MAX_CPUID)
            ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
            self.cpuid = bytes(cpuid)
            self.fd = ioctl(kvm, _CREATE_VM, 0, "KVM_CREATE_VM")
            with contextlib.suppress(KvmError):  # AMD needs none
                ioctl(self.fd, _SET_TSS_ADDR, _TSS_ADDRESS, "KVM_SET_TSS_ADDR")
            if split:
                enable = struct.pack("<IIQ", _CAP_SPLIT_IRQCHIP, 0, _IOAPIC_PINS).ljust(104, b"\0")
                ioctl(self.fd, _ENABLE_CAP, enable, "KVM_ENABLE_CAP")
            else:
                ioctl(self.fd, _CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
            self.xen = XenVm(self.fd, self.has)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(kvm)

    def add_memory(self, slot: int, gpa: int, size: int, address: int) -> None:
        """Guest memory from `gpa` is this process' memory from `address`, which has to stay; `size` 0: taken back."""
        region = struct.pack("<IIQQQ", slot, 0, gpa, size, address)
        ioctl(self.fd, _SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")

    def add_vcpu(self, number: int, cpuid: bytes = b"") -> Vcpu:
        """`number` is KVM's id, and the local APIC's; `cpuid` a struct kvm_cpuid2, else all that KVM has."""
        vcpu = Vcpu(self, number, cpuid or self.cpuid)
        self.vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """Can be called twice."""
        while self.vcpus:
            self.vcpus.pop().close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
