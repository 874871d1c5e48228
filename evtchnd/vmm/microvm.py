"""One unmodified guest on KVM at the daemon: the whole of a small real VMM, without a device of its own.

    RAM, special pages, grant table      three memfds; the daemon has them all      physmap, pvh
    vCPUs                                one thread each; APs wait for INIT and SIPI in KVM
    event ports                          in the kernel: sends, IPIs, timers, polls  channels, kvm_kernel
    disks, XenStore, console             the daemon's
    hypercalls that exit                 hypercalls

After the start the VMM has nothing to do but to answer what the guest sets up. What the guest has set up of it moves
by its own calls: shared_info to a page of RAM, vcpu_info to per-CPU memory, grant frames above RAM.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE, Virq
from evtchnd.errors import EvtchndError, HostError
from evtchnd.protocol import Feature
from evtchnd.vmm import cpuid, legacy_ports, pvh
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.client import Client, Disconnected, GrantFrame, MemorySlot, Refused
from evtchnd.vmm.daemon_link import DaemonLink
from evtchnd.vmm.elf import Image
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.grant_table_op import GrantFrames, GrantTableOp
from evtchnd.vmm.guest_pointer import Pointers
from evtchnd.vmm.hvm_op import HvmOp, HvmParam
from evtchnd.vmm.hypercalls import Hypercalls, Shutdown
from evtchnd.vmm.kvm import INVALID_GFN, XenHvm
from evtchnd.vmm.kvm_kernel import KvmKernel
from evtchnd.vmm.kvm_machine import Exit, Hypercall, Io, Machine, Mmio, Vcpu
from evtchnd.vmm.loading import Loading
from evtchnd.vmm.memory_op import MemoryOp
from evtchnd.vmm.periodic_timers import PeriodicTimers
from evtchnd.vmm.physmap import Memory, Physmap
from evtchnd.vmm.shared_info_page import SharedInfoPage
from evtchnd.vmm.tally import Tally
from evtchnd.vmm.vcpu_op import VcpuOp
from evtchnd.vmm.xen_version import VERSION

log = logging.getLogger(__name__)

MAX_VCPUS = 4
STORE_PORT, CONSOLE_PORT = 1, 2  # xl's order
# libxl's places in the special pages: the store's is the third, the console's the fifth
STORE_GFN = (pvh.SPECIAL >> PAGE_SHIFT) + 2
CONSOLE_GFN = (pvh.SPECIAL >> PAGE_SHIFT) + 4
_NEEDED = XenHvm.INTERCEPT_HCALL | XenHvm.SHARED_INFO | XenHvm.RUNSTATE | XenHvm.EVTCHN_2LEVEL | XenHvm.EVTCHN_SEND
_JOIN_S = 0.05


class Disk(NamedTuple):
    """An image that was opened for the guest."""

    devid: int
    vdev: str
    path: Path
    fd: int
    readonly: bool
    cdrom: bool


@dataclass(frozen=True, slots=True)
class Guest:
    """What is to run, and for how long a daemon that has gone is waited for.

    attach_vif: attaches one of `vifs` to the domain, which is introduced and not started; EvtchndError
    """

    socket: Path
    domid: int
    name: str
    image: Image
    command_line: str = ""
    modules: tuple[pvh.Module, ...] = ()
    memory: int = 512 << 20
    vcpus: int = 1
    disks: tuple[Disk, ...] = ()
    vifs: tuple[str, ...] = ()
    attach_vif: Callable[[str], None] = lambda _: None
    grant_frames: int = 32
    uuid: bytes = bytes(16)
    timeout: float = 30.0
    resume: float = 60.0


class Ended(NamedTuple):
    """Why a guest has ended, and how it is known. `fault`: not as it should, whatever follows."""

    reason: Shutdown
    text: str
    fault: bool = False


class MicroVm:
    """A guest from its first instruction to its end. HostError, VmmError, OperatorError where it cannot begin.

    `write`: takes what the guest says by console_io, and does not wait. `patience`: for so many seconds a daemon is
    waited for that is being restarted, or still clears the last domain of this number away, unless it is `stopped`.
    A context manager that ends with the domain released.
    """

    def __init__(
        self,
        guest: Guest,
        write: Callable[[bytes], None],
        *,
        patience: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.guest = guest
        self._label = f"domain {guest.domid} ({guest.name})"
        self.accesses = Tally()
        self._over = threading.Event()
        self._ended: Ended | None = None
        self._threads: list[threading.Thread] = []
        with contextlib.ExitStack() as undo:
            self._build(undo, write)
            self._reserve()
            # the daemon, which starts a worker meanwhile, does not look at what lies in RAM yet
            loading = Loading(self._load)
            undo.callback(loading.join)
            undo.callback(lambda: self.link.release((self._ended or Ended(Shutdown.CRASH, "")).reason))
            undo.callback(self._stop)
            self.link.connect(patience, stopped)
            loading.result()
            self._undo = undo.pop_all()

    def _build(self, undo: contextlib.ExitStack, write: Callable[[bytes], None]) -> None:
        guest = self.guest
        self._ram = Memory(f"{guest.name} ram", guest.memory, undo)
        self._special = Memory(f"{guest.name} special", pvh.SPECIAL_SIZE, undo)
        grants = Memory(f"{guest.name} grants", guest.grant_frames * PAGE_SIZE, undo)
        self.channels = Channels(guest.domid, vcpus=guest.vcpus, timers=True)
        undo.callback(self.channels.close)
        self.machine = undo.enter_context(Machine(split=True))
        if missing := _NEEDED & ~self.machine.has:
            raise HostError(f"/dev/kvm: no Xen support (KVM_CAP_XEN_HVM lacks {missing!r}): CONFIG_KVM_XEN is off")
        self.physmap = Physmap(self.machine.add_memory)
        low = pvh.low_ram(guest.memory)
        self.physmap.add(0, low >> PAGE_SHIFT, self._ram)
        if low < guest.memory:
            self.physmap.add(pvh.HIGH_RAM >> PAGE_SHIFT, guest.memory - low >> PAGE_SHIFT, self._ram, low)
        self.physmap.add(pvh.SPECIAL >> PAGE_SHIFT, pvh.SPECIAL_SIZE >> PAGE_SHIFT, self._special)
        xen = self.machine.xen
        xen.config()
        xen.set_long_mode(True)  # without it a guest's time stops at its first timer
        xen.set_version(VERSION)
        self.vcpus = [
            self.machine.add_vcpu(n, cpuid.of_guest(self.machine.cpuid, vcpu=n, vcpus=guest.vcpus, version=VERSION))
            for n in range(guest.vcpus)
        ]
        for vcpu in self.vcpus:
            vcpu.xen.set_id(vcpu.number)
        self._bits = EventBits(long_mode=True)
        self._kernel = KvmKernel(xen, [vcpu.xen for vcpu in self.vcpus], range(guest.vcpus), self._bits)
        self._kernel.listen(False)  # until there is a shared_info
        self.channels.kernel = self._kernel
        self._frames = GrantFrames(grants, self._ram, self.physmap, self._frame_moved)
        self._memory_op = MemoryOp(
            guest.domid,
            self.physmap,
            self._ram,
            self._frames,
            pvh.memory_map(guest.memory),
            lambda gfn: self._shared_info.place(gfn),
        )
        params: dict[int, int] = {
            HvmParam.STORE_PFN: STORE_GFN,
            HvmParam.STORE_EVTCHN: STORE_PORT,
        }
        self._hvm_op = HvmOp(
            guest.domid,
            guest.vcpus,
            params,
            xen.set_upcall_vector,
            lambda n, vector: self.vcpus[n].xen.set_upcall_vector(vector),
            lambda long_mode: self._shared_info.latch(long_mode),
        )
        self._timers = PeriodicTimers(lambda n: self.channels.raise_virq(Virq.TIMER, n), guest.name)
        undo.callback(self._timers.close)
        self._vcpu_op = VcpuOp(
            [vcpu.xen for vcpu in self.vcpus],
            self.vcpus,
            self._register,
            periodic=self._timers.set,
            power_off=lambda: self._ends(Shutdown.POWEROFF, "its last vCPU has gone down"),
        )
        self._shared_info = SharedInfoPage(
            xen,
            self._kernel,
            self._bits,
            self.channels,
            self.physmap,
            self._ram,
            guest.vcpus,
            self._vcpu_op.registered,
            Memory(f"{guest.name} shared_info", PAGE_SIZE, undo),
        )
        self.hypercalls = Hypercalls(
            self._label,
            self.channels,
            self._memory_op,
            GrantTableOp(guest.domid, self._frames),
            self._hvm_op,
            self._vcpu_op,
            ended=self._shut_down,
            write=write,
            runstate_flag=xen.set_runstate_update_flag,
            over=self._over.is_set,
            handle=guest.uuid,
        )
        self.link = DaemonLink(
            guest.socket, self.channels, self._introduce, timeout=guest.timeout, lost=self._daemon_lost
        )

    def _load(self) -> None:
        guest = self.guest
        start = pvh.load(self.physmap.write, guest.memory, guest.vcpus, guest.image, guest.command_line, guest.modules)
        self.vcpus[0].start_pvh(guest.image.entry, start)
        for segment in guest.image.segments:
            first, end = segment.address & -PAGE_SIZE, segment.address + segment.size + PAGE_SIZE - 1 & -PAGE_SIZE
            self.vcpus[0].pre_fault(first, end - first)

    # ---- its life ----------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        """Lets the guest run until it ends. In the main thread: signals are handled meanwhile."""
        for vcpu in self.vcpus:
            thread = threading.Thread(
                target=self._run, args=(vcpu,), name=f"{self.guest.name} vcpu {vcpu.number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._over.wait()
        assert self._ended is not None
        return self._ended

    def end(self, reason: Shutdown, text: str, *, fault: bool = False) -> None:
        """The guest runs no further; from any thread, and from a signal's handler. The first reason stays."""
        if self._ended is None:
            self._ended = Ended(reason, text, fault)
        self._over.set()

    def close(self) -> None:
        """Releases the domain. Can be called twice."""
        self._undo.close()

    def __enter__(self) -> MicroVm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def has_console(self) -> bool:
        """Whether the daemon serves the guest's console."""
        return HvmParam.CONSOLE_PFN in self._hvm_op.params

    def exits(self) -> Counter[str]:
        """Why vCPUs left the guest, all of them."""
        return sum((vcpu.exits for vcpu in self.vcpus), Counter())

    def _stop(self) -> None:
        self.end(Shutdown.POWEROFF, "closed")
        for thread, vcpu in zip(self._threads, self.vcpus, strict=False):
            while thread.is_alive():
                vcpu.kick()
                thread.join(_JOIN_S)

    # ---- vCPU threads ------------------------------------------------------------------------------------------

    def _run(self, vcpu: Vcpu) -> None:
        try:
            with vcpu.entered():
                while not self._over.is_set():
                    self._exited(vcpu, vcpu.run())
        except Exception as error:
            if not isinstance(error, OSError):
                log.exception("%s: vCPU %d has stopped", self._label, vcpu.number)
            self.end(Shutdown.CRASH, f"vCPU {vcpu.number}: {error}")

    def _exited(self, vcpu: Vcpu, stop: Exit) -> None:
        match stop:
            case Hypercall(number, params, long_mode, cpl):
                pointers = Pointers(self.physmap, vcpu.translate, vcpu=vcpu.number, long_mode=long_mode)
                vcpu.answer(self.hypercalls.answer(pointers, number, params, cpl))
            case Io() | Mmio():
                self.accesses.count(legacy_ports.name_of(stop))
                if stop.read:
                    vcpu.answer_read(stop, legacy_ports.read(stop))
                elif isinstance(stop, Io) and (asked := legacy_ports.write(stop)):
                    self._ends(asked[0], f"by {asked[1]}")
            case _ if stop.reason == "kicked":
                pass
            case _ if stop.reason == "shutdown":
                # AMD's hardware leaves no registers of it. It is a reset, as HVM_PARAM_TRIPLE_FAULT_REASON says where a
                # toolstack says nothing else; but a guest that has not come as far as to hear of events would do it
                # again and again.
                up = self._hvm_op.params.get(HvmParam.CALLBACK_IRQ)
                self._log_registers()
                reason = Shutdown.REBOOT if up else Shutdown.CRASH
                self._ends(reason, f"vCPU {vcpu.number}: triple fault", fault=True)
            case _:
                self._log_registers()
                self.end(Shutdown.CRASH, f"vCPU {vcpu.number}: KVM gave up: {stop.reason}")

    def _log_registers(self) -> None:
        for vcpu in self.vcpus:
            log.error("%s: vCPU %d: %s", self._label, vcpu.number, vcpu.registers())

    def _ends(self, reason: Shutdown, text: str, *, fault: bool = False) -> None:
        """By other means than SCHEDOP_shutdown, for which the guest may have left another reason."""
        announced = self.hypercalls.reason(reason)
        # the vCPU has nothing that it could go on with
        self.end(reason if announced in (Shutdown.SUSPEND, Shutdown.SOFT_RESET) else announced, text, fault=fault)

    def _shut_down(self, reason: int) -> int:
        """SCHEDOP_shutdown."""
        match reason:
            case Shutdown.SUSPEND:
                return 1  # nobody has asked for it: cancelled
            case Shutdown.SOFT_RESET:
                self._soft_reset()
            case _:
                self.end(Shutdown(reason), "by SCHEDOP_shutdown")
        return 0

    # ---- what the guest moves ----------------------------------------------------------------------------------

    def _register(self, vcpu: int, gpa: int) -> None:
        with self.channels.lock:
            self._kernel.register(vcpu, gpa)

    def _frame_moved(self, index: int) -> None:
        with self.channels.turn:
            client = self.channels.client
            if client is None or client.lost:
                return  # RESUME tells where it is
            try:
                with contextlib.suppress(Refused):  # not there: an earlier one was refused
                    client.grant_frame_remove(index)
                client.grant_frame_add(GrantFrame(index, *self._frames.place(index)))
            except Disconnected:
                if not client.lost:
                    raise  # it does not answer

    # ---- the daemon --------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """What a toolstack prepares: two ports, their pages, the two grants for domain 0."""
        with self.channels.lock:
            for port in (STORE_PORT, CONSOLE_PORT):
                self.channels.ports.reserve(port)
        self._special.view[:] = bytes(self._special.size)
        self._frames.reserve(CONSOLE_GFN, STORE_GFN)

    def _introduce(self, client: Client, *, resumed: bool) -> None:
        guest = self.guest
        enter = client.resume if resumed else client.register
        enter(guest.domid, vcpus=guest.vcpus, name=guest.name, uuid=guest.uuid)
        # a grant frame's slot is the guest's affair: the daemon reads the table by its frames
        lasting = [slot for slot in self.physmap.slots if slot.memory in (self._ram, self._special)]
        client.memory([MemorySlot(slot.number, slot.gfn, slot.pages, slot.memory.fd, slot.offset) for slot in lasting])
        client.grant_frames([GrantFrame(i, *self._frames.place(i)) for i in range(self._frames.count)])
        if resumed:
            client.ports(self.channels.bound())
        client.xenstore(STORE_PORT, self._special.fd, STORE_GFN - (pvh.SPECIAL >> PAGE_SHIFT) << PAGE_SHIFT)
        if Feature.CONSOLE in client.features:
            client.console(CONSOLE_PORT, CONSOLE_GFN)
            # a guest that finds these would wait for a console that nobody serves
            self._hvm_op.offer({HvmParam.CONSOLE_PFN: CONSOLE_GFN, HvmParam.CONSOLE_EVTCHN: CONSOLE_PORT})
        for disk in guest.disks:
            client.disk(disk.devid, disk.vdev, disk.fd, readonly=disk.readonly, cdrom=disk.cdrom)
        for vif in guest.vifs if not resumed else ():
            guest.attach_vif(vif)
        client.start()

    def _soft_reset(self) -> None:
        """The guest begins anew by itself (kexec): nothing of Xen's is left; its memory stays, and its vCPUs go on.

        Meanwhile they are paused, as Xen has them (domain_soft_reset). Linux has stopped the others before
        (native_machine_shutdown), and starts them by INIT and SIPI again.
        """
        log.info("%s: soft reset", self._label)
        with self.channels.turn, contextlib.ExitStack() as paused:
            for vcpu in self.vcpus:
                paused.enter_context(vcpu.outside())
            self.link.release(Shutdown.SOFT_RESET)
            self._timers.reset()
            self.channels.reset()
            with self.channels.lock:
                self._vcpu_op.reset()
                self._shared_info.forget()
                for vcpu in self.vcpus:
                    vcpu.xen.set_runstate_address(INVALID_GFN)
                    vcpu.xen.set_time_info(INVALID_GFN)
                    vcpu.xen.set_upcall_vector(0)
            if XenHvm.RUNSTATE_UPDATE_FLAG in self.machine.has:
                self.machine.xen.set_runstate_update_flag(False)
            self._memory_op.reset()
            self._hvm_op.reset()
            self._frames.reset()
            self._reserve()
            try:
                self.link.connect(self.guest.resume, self._over.is_set)
            except EvtchndError as error:
                self.end(Shutdown.CRASH, f"after a soft reset: {error}")

    def _daemon_lost(self) -> None:
        """The guest goes on; its kicks stay in their eventfds."""
        if not self._over.is_set():
            log.warning("%s: the daemon has gone: waiting for it", self._label)
            threading.Thread(target=self._come_back, name=f"{self.guest.name} resume", daemon=True).start()

    def _come_back(self) -> None:
        try:
            if self.link.resume(self.guest.resume):
                log.info("%s: the daemon is back", self._label)
        except (EvtchndError, OSError) as error:
            self.end(Shutdown.CRASH, f"the daemon has not come back: {error}")
