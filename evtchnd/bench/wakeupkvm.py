"""evtchnd-bench wakeup on KVM: a guest of one vCPU kicks by instruction (wakeupguest.c).

For each server there are two ports: one that KVM turns into the server's eventfd, and one that it does not know, so
that the vCPU exits and the VMM writes the same eventfd. The VMM of `exit` is evtchnd's own (kvm_machine.py, Python);
that of `exit_c` is the least that there can be, in C (wakeupvcpu.c).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evtchnd.bench.program import build
from evtchnd.bench.report import Report
from evtchnd.bench.wakeupserved import FRONT_CPU, Channels, Server
from evtchnd.errors import HostError
from evtchnd.vmm.kvm import XenHvm
from evtchnd.vmm.kvm_agent import BASE, PORT_DONE, PORT_KICK, SIZE, Agent
from evtchnd.vmm.kvm_irq import ioeventfd
from evtchnd.vmm.kvm_machine import Hypercall, Io, Machine

if TYPE_CHECKING:
    from evtchnd.bench.wakeup import Sleep

GUEST = Path(__file__).with_name("wakeupguest.c")
VCPU = Path(__file__).with_name("wakeupvcpu.c")
WAYS = ("eventfd", "exit", "exit_c")
# Guest memory from 0: a page of words for each server, then the samples.
PAGE, SAMPLES, RAM_BYTES = 4096, 0x10000, 0x100000
MOST_KICKS = (RAM_BYTES - SAMPLES) // 4
PATIENCE_S = 20
# A port that KVM does not know: the vCPU exits.
UNKNOWN_PORT = 500
# struct order
_ORDER = struct.Struct("<6Q")
_ORDER_AT, _BEGAN, _PATIENCE = 16, 64, 88
_CODE = 0x40000
_LINKER = "SECTIONS { . = %#x; .text : { *(.entry) *(.text*) *(.rodata*) *(.data*) *(.bss*) } /DISCARD/ : { *(*) } }"
_FREESTANDING = (
    "-m64 -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables "
    "-mno-red-zone -mgeneral-regs-only -nostdlib -static -Wl,--build-id=none -Wl,--oformat=binary"
)


def has_xen() -> bool:
    """Whether this machine's KVM sends event channels itself."""
    try:
        with Machine() as machine:
            return XenHvm.EVTCHN_SEND in machine.has
    except (HostError, OSError):
        return False


def run(report: Report, place: str, program: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Adds the rounds of `place` to `report`. HostError: why no guest runs here."""
    from evtchnd.bench.wakeup import ASLEEP, POLLING, SIDES

    kicks = min(arguments.kicks, MOST_KICKS)
    with contextlib.ExitStack() as stack:
        try:
            guest = stack.enter_context(Guest(folder, xen=place == "lab"))
        except OSError as error:
            raise HostError(f"no guest on /dev/kvm: {error}") from None
        servers = {}
        for number, (side, polls) in enumerate((side, polls) for side in SIDES for polls in (True, False)):
            channels = Channels(1, ram=guest.ram, offset=number * PAGE)
            poll_us = arguments.poll_us if polls else 0
            if side == "evtchnd":
                server = stack.enter_context(Server.evtchnd(channels, poll_us))
            else:
                server = stack.enter_context(Server.limit(channels, poll_us, program))
            servers[side, polls] = (number + 1, server)
            guest.connect(number + 1, channels.kicks[0])
        cells = [(way, sleep, side) for sleep in (POLLING, ASLEEP) for way in WAYS for side in SIDES]
        for number in range(arguments.rounds):
            for way, sleep, side in cells if number % 2 == 0 else reversed(cells):
                port, server = servers[side, sleep.polls]
                before = server.cpu_us()
                reading = guest.kick(way, port, server.channels, sleep, kicks)
                reading["server_cpu_us"] = (server.cpu_us() - before) / kicks
                cell = {"place": place, "way": way, "sleep": sleep.name, "side": side}
                report.rounds.append({"round": number, **cell, **reading})


class Guest:
    """A virtual machine with the guest in it; its vCPU runs in the calling thread. `ram`: its memory's memfd.

    xen: it kicks by hypercall, otherwise by I/O port. HostError, KvmError.
    """

    def __init__(self, folder: Path, *, xen: bool) -> None:
        self._xen = xen
        with contextlib.ExitStack() as stack:
            self._run_vcpu = _library(folder)
            code = _code(folder)
            self._machine = stack.enter_context(Machine())
            self.ram = os.memfd_create("bench-ram", os.MFD_CLOEXEC)
            stack.callback(os.close, self.ram)
            os.ftruncate(self.ram, RAM_BYTES + SIZE)
            self._memory = mmap.mmap(self.ram, RAM_BYTES + SIZE)
            stack.callback(self._memory.close)
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._machine.add_memory(0, 0, RAM_BYTES, address)
            self._machine.add_memory(1, BASE, SIZE, address + RAM_BYTES)
            self._agent = Agent(memoryview(self._memory)[RAM_BYTES:], code)
            stack.callback(self._agent.close)
            if xen:
                self._machine.xen.config()
                self._machine.xen.set_long_mode(True)
            self._vcpu = self._machine.add_vcpu(0)
            self._state = mmap.mmap(self._vcpu.fd, self._machine.run_size)
            stack.callback(self._state.close)
            mailbox = self._agent.mailbox(0)
            self._order = RAM_BYTES + mailbox.gpa - BASE
            self._agent.start(self._vcpu, mailbox)
            mailbox.close()
            cpus = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {FRONT_CPU})
            stack.callback(os.sched_setaffinity, 0, cpus)
            self._cycles_us = 0.0
            self._files = stack.pop_all()

    def connect(self, port: int, kick: int) -> None:
        """From now on KVM itself writes the eventfd when the guest kicks `port`."""
        if self._xen:
            self._machine.xen.assign_eventfd(port, kick)
        else:
            ioeventfd(self._machine.fd, kick, PORT_KICK, 4, match=port)

    def kick(self, way: str, port: int, channels: Channels, sleep: Sleep, kicks: int) -> dict[str, Any]:
        """One reading of `kicks` kicks, one of WAYS."""
        if not self._cycles_us:
            self._cycles_us = 1000.0
            self._go(way, port, channels, 0, min(kicks, 500))
        gap = int(sleep.gap_us * self._cycles_us)
        seconds, exits = self._go(way, port, channels, gap, kicks)
        cycles = sorted(memoryview(self._memory)[SAMPLES : SAMPLES + 4 * kicks].cast("I").tolist())
        p50, p99, p999 = (cycles[kicks * part // 1000] / self._cycles_us for part in (500, 990, 999))
        return {"rounds": kicks, "seconds": seconds, "exits": exits, "p50_us": p50, "p99_us": p99, "p999_us": p999}

    def _go(self, way: str, port: int, channels: Channels, gap: int, kicks: int) -> tuple[float, int]:
        """-> seconds, and how many kicks came to the VMM. Notes how fast the guest's clock runs."""
        port += UNKNOWN_PORT if way != "eventfd" else 0
        order = (channels.offset, SAMPLES, kicks, gap, port, self._xen)
        _ORDER.pack_into(self._memory, self._order + _ORDER_AT, *order)
        patience = int(PATIENCE_S * 1e6 * max(self._cycles_us, 1000))
        struct.pack_into("<Q", self._memory, self._order + _PATIENCE, patience)
        began = time.perf_counter()
        exits = self._in_c(channels.kicks[0]) if way == "exit_c" else self._in_python(channels.kicks[0])
        seconds = time.perf_counter() - began
        start, end, failed = struct.unpack_from("<3Q", self._memory, self._order + _BEGAN)
        if failed:
            raise HostError(f"the guest's kick of port {port} failed, or was not answered within {PATIENCE_S} s")
        self._cycles_us = (end - start) / seconds / 1e6
        return seconds, exits

    def _in_python(self, kick: int) -> int:
        exits = 0
        while True:
            left = self._vcpu.run()
            match left:
                case Io(port=port) if port == PORT_DONE:
                    return exits
                case Io(port=port) if port == PORT_KICK:
                    pass
                case Hypercall():
                    self._vcpu.answer(0)
                case _:
                    raise HostError(f"the guest ended: {left}")
            os.eventfd_write(kick, 1)
            exits += 1

    def _in_c(self, kick: int) -> int:
        exits = ctypes.c_uint64()
        state = ctypes.addressof(ctypes.c_char.from_buffer(self._state))
        result = self._run_vcpu(self._vcpu.fd, state, kick, ctypes.byref(exits))
        if result:
            what = os.strerror(-result) if result < 0 else f"exit {result}"
            raise HostError(f"the guest ended: {what}")
        return exits.value

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _code(folder: Path) -> bytes:
    """The guest's code, compiled for where `Agent` puts it."""
    script, image = folder / "guest.ld", folder / "guest.bin"
    script.write_text(_LINKER % (BASE + _CODE))
    build(GUEST, image, *_FREESTANDING.split(), f"-Wl,-T,{script}")
    return image.read_bytes()


def _library(folder: Path) -> Any:
    """run_vcpu() of wakeupvcpu.c."""
    library = folder / "wakeupvcpu.so"
    build(VCPU, library, "-shared", "-fPIC")
    run_vcpu = ctypes.CDLL(str(library)).run_vcpu
    run_vcpu.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    return run_vcpu
