"""A domain on KVM: the soft one, but its ports are in the kernel and its guest is real.

The guest is the agent (`kvm_agent`), which makes every call of the guest's side as a hypercall from its own vCPU. Where
KVM has Xen support (KVM_CAP_XEN_HVM) a send stays in the kernel; elsewhere it writes a doorbell that an ioeventfd
listens at. To the daemon it is a domain like any other.

A vCPU thread runs the guest and answers its exits; a command is posted into a mailbox, and an interrupt wakes the vCPU.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

from evtchnd.abi import DOMID_SELF, PAGE_SIZE, SHARED_INFO_VCPUS, VCPU_INFO_SIZE, Evtchnop
from evtchnd.errors import GuestError, HostError, XenError
from evtchnd.memory import Region, map_range
from evtchnd.vmm import kvm_agent, physdev
from evtchnd.vmm.channels import Channels, EventKernel
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.hypercall import CALLS
from evtchnd.vmm.kvm_agent import Agent, Command, Mailbox
from evtchnd.vmm.kvm_irq import signal_msi
from evtchnd.vmm.kvm_kernel import DoorbellKernel, KvmKernel
from evtchnd.vmm.kvm_machine import Exit, Hypercall, Io, Machine, Stop, Vcpu
from evtchnd.vmm.soft import (
    RAM_SLOT,
    SHARED_INFO_GFN,
    SPECIAL_GFN,
    SPECIAL_PAGES,
    SPECIAL_SLOT,
    MiB,
    SoftVmm,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

AGENT_SLOT = 2
VERSION = 0x40011  # Xen 4.17
# A guest tells of each upcall; a masked port has none, so who waits for one looks this often.
_LOOK_S = 0.02

_VCPUOP_REGISTER_VCPU_INFO, _HVMOP_SET_UPCALL_VECTOR, _XENVER_VERSION = 10, 23, 0


class Xen(IntEnum):
    """__HYPERVISOR_*."""

    SET_TIMER_OP = 15
    XEN_VERSION = 17
    VCPU_OP = 24
    SCHED_OP = 29
    EVENT_CHANNEL_OP = 32
    PHYSDEV_OP = 33
    HVM_OP = 34


class _Runner:
    """One vCPU's thread and mailbox."""

    def __init__(self, vmm: KvmVmm, vcpu: Vcpu, mailbox: Mailbox) -> None:
        self.vcpu, self.mailbox = vcpu, mailbox
        self.turn = threading.RLock()
        self.done = threading.Event()
        self.failed = ""
        self.leaving = False
        self.tasks: deque[Callable[[], None]] = deque()
        self._vmm = vmm
        self.thread = threading.Thread(target=self._run, name=f"{vmm.name} vcpu {vcpu.number}", daemon=True)

    def _run(self) -> None:
        try:
            with self.vcpu.entered():
                while not self.leaving:
                    stop = self.vcpu.run()
                    if not (isinstance(stop, Stop) and stop.reason == "kicked"):
                        self._vmm.exited(self, stop)
                    while self.tasks:
                        self.tasks.popleft()()
        except Exception as error:
            self.failed = self.failed or str(error)
            log.exception("%s: vCPU %d has stopped", self._vmm.name, self.vcpu.number)
        self.done.set()


class KvmVmm(SoftVmm):
    """As SoftVmm; HostError also where there is no KVM or no C compiler for the agent.

    `xen`: whether KVM has Xen support (then `machine.xen` has its calls). `long_mode`: a 32-bit guest has 1024 ports.
    `own_info`: vCPUs have no vcpu_info until the guest registers one.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        domid: int,
        *,
        memory: int = 64 * MiB,
        vcpus: int = 1,
        name: str = "",
        grant_frames: int = 4,
        timeout: float = 10.0,
        code: bytes | None = None,
        long_mode: bool = True,
        own_info: bool = False,
    ) -> None:
        if memory > kvm_agent.BASE or not 0 < vcpus <= kvm_agent.MAX_VCPUS:
            raise ValueError(f"domain {domid}: {memory} bytes of memory, {vcpus} vCPUs: too much for the agent")
        self._code = code if code is not None else kvm_agent.build(long_mode=long_mode)
        self.long_mode, self._own_info = long_mode, own_info
        self.forwarded = 0  # sends that left the kernel and were carried out here
        self.runners: list[_Runner] = []
        self._ended = False
        super().__init__(
            socket_path, domid, memory=memory, vcpus=vcpus, name=name, grant_frames=grant_frames, timeout=timeout
        )

    # ---- the guest's side --------------------------------------------------------------------------------------

    def hypercall_evtchn(self, op: int, arg: bytes | bytearray) -> tuple[int, bytes]:
        needed = CALLS[op][0].size if op in CALLS else 0
        if len(arg) < needed and not self.xen:
            return -errno.EFAULT, b""  # the doorbell's guest reads the struct itself, and would fault
        with self.runners[0].turn:
            mailbox = self.runners[0].mailbox
            # a struct that is too short ends where the guest's memory does
            at = mailbox.scratch_gpa if len(arg) >= needed else kvm_agent.BASE + kvm_agent.SIZE - len(arg)
            data = bytes(arg) if len(arg) >= needed else b""
            result = self.command(Command.CALL, Xen.EVENT_CHANNEL_OP, op, at, data=data)
            silent = result or op in (
                Evtchnop.SEND,
                Evtchnop.CLOSE,
                Evtchnop.BIND_VCPU,
                Evtchnop.UNMASK,
                Evtchnop.RESET,
            )
            return result, b"" if silent else mailbox.scratch(needed)

    def _evtchn(self, op: Evtchnop, *fields: int) -> tuple[int, ...]:
        layout = CALLS[op][0]
        result, out = self.hypercall_evtchn(op, layout.pack(*fields))
        if result:
            raise XenError(-result, f"domain {self.domid}: {op.name.lower()}")
        return layout.unpack(out) if out else ()

    def alloc_unbound(self, remote: int) -> int:
        return self._evtchn(Evtchnop.ALLOC_UNBOUND, DOMID_SELF, remote, 0)[2]

    def bind_interdomain(self, remote: int, port: int) -> int:
        return self._evtchn(Evtchnop.BIND_INTERDOMAIN, remote, port, 0)[2]

    def bind_ipi(self, vcpu: int) -> int:
        """A port that raises itself on `vcpu`. XenError."""
        return self._evtchn(Evtchnop.BIND_IPI, vcpu, 0)[1]

    def bind_virq(self, virq: int, vcpu: int) -> int:
        """A port of a virtual interrupt; the timer's is KVM's. XenError."""
        return self._evtchn(Evtchnop.BIND_VIRQ, virq, vcpu, 0)[2]

    def bind_vcpu(self, port: int, vcpu: int) -> None:
        """Moves a port. XenError."""
        self._evtchn(Evtchnop.BIND_VCPU, port, vcpu)

    def close_port(self, port: int) -> None:
        self._evtchn(Evtchnop.CLOSE, port)

    def send(self, port: int) -> None:
        self._evtchn(Evtchnop.SEND, port)

    def reset(self) -> None:
        self._evtchn(Evtchnop.RESET, DOMID_SELF)

    def wait(self, port: int, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                if self._ended:
                    return False
                pending = self._info.pending(port)
                left = deadline - time.monotonic()
                if not pending:
                    if left <= 0:
                        return False
                    self._lock.wait(min(left, _LOOK_S))
                    continue
            # the guest takes it: KVM writes the same words
            with contextlib.suppress(HostError):
                if self.command(Command.TAKE, port):
                    return True

    def command(self, command: Command, *args: int, vcpu: int = 0, data: bytes = b"", timeout: float = 600.0) -> int:
        """Has the guest's `vcpu` do one thing; its result. One at a time for each vCPU. HostError when it cannot."""
        runner = self.runners[vcpu]
        with runner.turn:
            self.post(command, *args, vcpu=vcpu, data=data)
            return self.finish(vcpu, timeout)

    def post(self, command: Command, *args: int, vcpu: int = 0, data: bytes = b"") -> None:
        """Begins a command; `finish` waits for it. The caller sees to it that the vCPU has no other."""
        runner = self.runners[vcpu]
        if self._ended:
            raise HostError(f"domain {self.domid}: has ended")
        runner.done.clear()
        runner.mailbox.post(command, *args, data=data)
        self.wake(vcpu)

    def wake(self, vcpu: int) -> None:
        """An interrupt that says no more than that."""
        signal_msi(self.machine.fd, *kvm_agent.message(vcpu, kvm_agent.VECTOR_WAKE))

    def finish(self, vcpu: int = 0, timeout: float = 600.0) -> int:
        """The result of the command that was posted."""
        runner = self.runners[vcpu]
        if not runner.done.wait(timeout):
            runner.mailbox.stop()
            raise HostError(f"domain {self.domid}: vCPU {vcpu} has not answered in {timeout} s")
        if runner.failed or not runner.mailbox.done:
            raise HostError(f"domain {self.domid}: vCPU {vcpu} has stopped: {runner.failed or 'ended'}")
        return runner.mailbox.result

    def in_vcpu(self, vcpu: int, call: Callable[[], T]) -> T:
        """Has the vCPU's own thread make a call, out of the guest: for what KVM reckons by the calling thread."""
        results: list[T] = []
        made = threading.Event()

        def task() -> None:
            try:
                results.append(call())
            finally:
                made.set()

        runner = self.runners[vcpu]
        runner.tasks.append(task)
        runner.vcpu.kick()
        if not made.wait(60) or not results:
            raise HostError(f"domain {self.domid}: vCPU {vcpu} has not made a call: {runner.failed or 'too slow'}")
        return results[0]

    def exits(self) -> Counter[str]:
        """Why vCPUs left the guest, all of them."""
        return sum((runner.vcpu.exits for runner in self.runners), Counter())

    # ---- devices that the VMM emulates -------------------------------------------------------------------------

    def attach_pirq(self, pirq: int, fd: int) -> None:
        """A write to a device's eventfd raises what the guest has bound to `pirq`, without the VMM; -1: no more."""
        with self._lock:
            self._ports.attach_pirq(pirq, fd)
            self.channels.apply()

    def device_msi(self, address: int, data: int) -> None:
        """A device writes a message; one to a pirq (vector 0) raises its port, any other goes to a local APIC."""
        pirq = physdev.pirq_of_msi(address, data)
        if pirq is None:
            signal_msi(self.machine.fd, address, data)
            return
        with self._lock:
            self._ports.raise_pirq(pirq)
            self.channels.happen()

    # ---- exits -------------------------------------------------------------------------------------------------

    def exited(self, runner: _Runner, stop: Exit) -> None:
        """In the vCPU's thread. HostError for what the agent never does."""
        if isinstance(stop, Hypercall):
            runner.vcpu.answer(self._answer(stop.number, stop.params, stop.cpl, stop.long_mode))
        elif isinstance(stop, Io) and stop.port == kvm_agent.PORT_DONE:
            runner.done.set()
        elif isinstance(stop, Io) and stop.port == kvm_agent.PORT_UPCALL:
            with self._lock:
                self._lock.notify_all()
        elif isinstance(stop, Io) and stop.port == kvm_agent.PORT_HCALL:
            number, *params = runner.mailbox.doorbell_call
            runner.mailbox.answer(self._answer(number, tuple(params), 0, self.long_mode))
        elif isinstance(stop, Io) and stop.port == kvm_agent.PORT_KICK:
            runner.mailbox.answer(self._event_channel_op(Evtchnop.SEND, stop.value.to_bytes(4, "little"))[0])
        else:
            raise HostError(f"unexpected exit {stop}")

    def _answer(self, number: int, params: tuple[int, ...], cpl: int, long_mode: bool) -> int:
        if cpl:
            return -errno.EPERM
        try:
            match number:
                case Xen.EVENT_CHANNEL_OP:
                    return self._guest_evtchn(params[0], params[1])
                case Xen.XEN_VERSION if params[0] == _XENVER_VERSION:
                    return VERSION
                case Xen.VCPU_OP if params[0] == _VCPUOP_REGISTER_VCPU_INFO:
                    return self._register_info(params[1], params[2])
                case Xen.PHYSDEV_OP:
                    return self._guest_physdev(params[0], params[1])
                case Xen.HVM_OP if params[0] == _HVMOP_SET_UPCALL_VECTOR:
                    vcpu, vector = struct.unpack("<IB", self._read(params[1], 5))
                    if vcpu >= self.vcpus or not isinstance(self._kernel, KvmKernel):
                        return -errno.EINVAL
                    self.runners[vcpu].vcpu.xen.set_upcall_vector(vector)
                    return 0
        except GuestError:
            return -errno.EFAULT
        except OSError as error:
            log.warning("domain %d: hypercall %d: %s", self.domid, number, error)
            return -(error.errno or errno.EINVAL)
        return -errno.ENOSYS

    def _event_channel_op(self, op: int, arg: bytes) -> tuple[int, bytes]:
        result, out = SoftVmm.hypercall_evtchn(self, op, arg)
        if op == Evtchnop.SEND and not result:
            self.forwarded += 1
        return result, out

    def _guest_evtchn(self, op: int, gpa: int) -> int:
        if op not in CALLS:
            return -errno.ENOSYS
        result, out = self._event_channel_op(op, self._read(gpa, CALLS[op][0].size))
        if out:
            self._write(gpa, out)
        return result

    def _guest_physdev(self, op: int, gpa: int) -> int:
        if op not in physdev.LAYOUTS:
            return -errno.ENOSYS
        form = physdev.LAYOUTS[op].of(self.long_mode)
        result, out = self._pirqs.call(op, form.unpack(self._read(gpa, form.size)))
        if out:
            self._write(gpa, form.pack(*out))
        return result

    def _register_info(self, vcpu: int, gpa: int) -> int:
        """struct vcpu_register_vcpu_info: u64 mfn, u32 offset, u32 rsvd."""
        mfn, offset = struct.unpack("<QI4x", self._read(gpa, 16))
        if vcpu >= self.vcpus:
            return -errno.ENOENT
        if offset > PAGE_SIZE - VCPU_INFO_SIZE or not isinstance(self._kernel, KvmKernel):
            return -errno.EINVAL
        with self._lock:
            self._kernel.register(vcpu, mfn * PAGE_SIZE + offset)
        return 0

    def _read(self, gpa: int, size: int) -> bytes:
        start = gpa - kvm_agent.BASE
        if 0 <= start < kvm_agent.SIZE:
            if start + size > kvm_agent.SIZE:
                raise GuestError(f"{gpa:#x} + {size} is no memory")
            return bytes(self._agent_memory.view[start : start + size])
        return self.ram.read(gpa, size)

    def _write(self, gpa: int, data: bytes) -> None:
        start = gpa - kvm_agent.BASE
        if 0 <= start < kvm_agent.SIZE:
            self._agent_memory.view[start : start + len(data)] = data
        else:
            self.ram.write(gpa, data)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _new_channels(self) -> Channels:
        return Channels(self.domid, vcpus=self.vcpus, long_mode=self.long_mode)

    def _start_kernel(self, undo: contextlib.ExitStack) -> EventKernel:
        self.machine = machine = Machine()
        undo.callback(machine.close)
        self.xen = self._ports.timers = bool(machine.has)
        self._pirqs = physdev.Pirqs()
        ram = map_range(self.ram_fd, 0, self.ram_pages * PAGE_SIZE, "RAM")
        undo.callback(_unmap, ram)
        special = map_range(self._special_fd, 0, SPECIAL_PAGES * PAGE_SIZE, "special pages")
        undo.callback(_unmap, special)
        self.special_address, self.special_gfn = special.address, SPECIAL_GFN
        fd = os.memfd_create(f"{self.name} agent", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, kvm_agent.SIZE)
            self._agent_memory = map_range(fd, 0, kvm_agent.SIZE, "agent")
        finally:
            os.close(fd)
        undo.callback(_unmap, self._agent_memory)
        machine.add_memory(RAM_SLOT, 0, self.ram_pages * PAGE_SIZE, ram.address)
        machine.add_memory(SPECIAL_SLOT, SPECIAL_GFN * PAGE_SIZE, SPECIAL_PAGES * PAGE_SIZE, special.address)
        kvm_agent.add_to(machine, AGENT_SLOT, self._agent_memory.address)
        self.agent = Agent(self._agent_memory.view[:], self._code, long_mode=self.long_mode)
        undo.callback(self.agent.close)
        vcpus = [machine.add_vcpu(i) for i in range(self.vcpus)]
        bits = EventBits(special.address + (SHARED_INFO_GFN - SPECIAL_GFN) * PAGE_SIZE, long_mode=self.long_mode)
        kernel: KvmKernel | DoorbellKernel
        ids = range(self.vcpus)
        if self.xen:
            machine.xen.config()
            machine.xen.set_long_mode(self.long_mode)
            machine.xen.set_shared_info(SHARED_INFO_GFN)
            machine.xen.set_version(VERSION)
            machine.xen.set_upcall_vector(kvm_agent.VECTOR_UPCALL)
            kernel = KvmKernel(machine.xen, [vcpu.xen for vcpu in vcpus], ids, bits)
            for i, vcpu in enumerate(vcpus):
                vcpu.xen.set_id(i)
                if not self._own_info and i < SHARED_INFO_VCPUS:
                    kernel.register(i, SHARED_INFO_GFN * PAGE_SIZE + i * VCPU_INFO_SIZE)
        else:
            kernel = DoorbellKernel(machine.fd, ids, bits, self.agent.set_vector_port)
        for vcpu in vcpus:
            mailbox = self.agent.mailbox(vcpu.number)
            undo.callback(mailbox.close)
            mailbox.set_flags(kvm_agent.FLAG_TELL | (0 if self.xen else kvm_agent.FLAG_DOORBELL))
            self.agent.start(vcpu, mailbox)
            self.runners.append(_Runner(self, vcpu, mailbox))
        undo.callback(self._end)
        for runner in self.runners:
            runner.thread.start()
        return kernel

    def _end(self) -> None:
        """Takes the vCPUs out of the guest, and ends every wait."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        for runner in self.runners:
            runner.leaving = True
            runner.mailbox.stop()
        for runner in self.runners:
            while runner.thread.is_alive():
                runner.vcpu.kick()
                runner.thread.join(0.05)

    def close(self, *, release: bool = True) -> None:
        with contextlib.ExitStack() as turns:
            for runner in self.runners:
                if not self._ended:
                    runner.mailbox.stop()
                turns.enter_context(runner.turn)  # no vCPU is in a hypercall, which would wait for us
            super().close(release=release)


def _unmap(region: Region) -> None:
    region.view.release()
    region.area.close()
