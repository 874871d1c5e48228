"""The agent: a small guest that does what it is told, from agent.c, and the host's side of its mailbox.

With it a test, a benchmark or a demo has a real guest whose hypercalls, interrupts and events it controls one by one.
It lies in a memory slot of its own, so all of the domain's RAM is free.

    0x70000000 + 0x00000  page tables   +0x06000 GDT, TSSs   +0x07000 IDT   +0x08000 hypercall page
               + 0x09000  mailboxes, a page a vCPU           +0x11000 ports of vectors
               + 0x20000  stacks   +0x40000 code   +0x60000 events taken, u32 a port
"""

from __future__ import annotations

import struct
from enum import IntEnum
from pathlib import Path

from evtchnd.errors import HostError
from evtchnd.vmm.kvm_machine import Machine, Vcpu

BASE = 0x70000000
SIZE = 0x80000
MAX_VCPUS = 8
_PAGE_TABLE, _GDT, _TSS, _MAILBOXES, _VECTOR_PORTS = 0x0000, 0x6000, 0x6100, 0x9000, 0x11000
_STACKS, _STACK_SIZE, _CODE, _COUNTS = 0x20000, 0x4000, 0x40000, 0x60000
SCRATCH_SIZE = 0x800

PORT_DONE, PORT_UPCALL, PORT_HCALL, PORT_KICK = 0x510, 0x514, 0x518, 0x51C
VECTOR_WAKE, VECTOR_MSI, VECTOR_PORT, VECTOR_UPCALL, VECTOR_UPCALL_APIC = 0x31, 0x32, 0x40, 0xF3, 0xF4
VECTOR_PORTS = 0x40  # how many ports the doorbell has vectors for: 0x40 .. 0x7f, 0x80 is the way out of user mode
FLAG_DOORBELL, FLAG_TELL, FLAG_COUNT = 1, 2, 4


class Command(IntEnum):
    """What the agent can do; its arguments are in agent.c."""

    NOP = 0
    CALL = 1
    SENDS = 2
    USERCALL = 3
    SPIN = 4
    TAKE = 5
    MASK = 6
    UNMASK = 7
    INTERRUPTS = 8
    OUTS = 9
    READ = 10
    WRITE = 11


# struct mailbox
_SEQ, _DONE, _COMMAND, _NUMBER, _ARGS, _RESULT = 0, 4, 8, 12, 16, 64
_UPCALLS, _MSIS, _FLAGS, _STOP, _HCALL, _HCALL_RESULT, _SEL, _SENT, _SCRATCH = 72, 76, 80, 84, 88, 136, 144, 160, 0x800

_LINKER = "SECTIONS { . = %#x; .text : { *(.entry) *(.text*) *(.rodata*) *(.data*) *(.bss*) } /DISCARD/ : { *(*) } }"
_FLAGS_C = "-O2 -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables"
_FLAGS_C += " -mno-red-zone -mgeneral-regs-only -nostdlib -static -Wl,--build-id=none -Wl,--oformat=binary"


def build(*, long_mode: bool = True) -> bytes:
    """The agent's code, compiled. HostError without a C compiler."""
    import shutil  # these are slow to import, and no guest but the agent needs them
    import subprocess
    import tempfile

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise HostError("the agent guest is built with a C compiler: install gcc")
    with tempfile.TemporaryDirectory() as folder:
        script, image = Path(folder, "agent.ld"), Path(folder, "agent.bin")
        script.write_text(_LINKER % (BASE + _CODE))
        source = Path(__file__).with_name("agent.c")
        mode = "-m64" if long_mode else "-m32"
        line = [compiler, mode, *_FLAGS_C.split(), f"-Wl,-T,{script}", "-o", str(image), str(source)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError(f"the agent guest does not compile: {done.stderr.strip()}")
        return image.read_bytes()


class Mailbox:
    """The host's side of one vCPU's mailbox. One command at a time."""

    def __init__(self, memory: memoryview, number: int) -> None:
        start = _MAILBOXES + number * 0x1000
        self.number = number
        self.gpa = BASE + start
        self._bytes = memory[start : start + 0x1000]
        self._words = self._bytes.cast("I")
        self._longs = self._bytes.cast("Q")
        self._words[_NUMBER // 4] = number

    def post(self, command: Command, *args: int, data: bytes = b"") -> None:
        """Asks for a command; `data` goes to `scratch_gpa` first. Wake the vCPU then."""
        self._bytes[_SCRATCH : _SCRATCH + len(data)] = data
        for i in range(6):
            self._longs[_ARGS // 8 + i] = args[i] & 0xFFFFFFFFFFFFFFFF if i < len(args) else 0
        self._words[_COMMAND // 4] = command
        self._words[_STOP // 4] = 0
        self._words[_SEQ // 4] = self._words[_SEQ // 4] + 1 & 0xFFFFFFFF

    @property
    def done(self) -> bool:
        return self._words[_SEQ // 4] == self._words[_DONE // 4]

    @property
    def result(self) -> int:
        """Signed."""
        value = self._longs[_RESULT // 8]
        return value - (1 << 64) if value >> 63 else value

    @property
    def scratch_gpa(self) -> int:
        return self.gpa + _SCRATCH

    def scratch(self, size: int) -> bytes:
        return bytes(self._bytes[_SCRATCH : _SCRATCH + size])

    def stop(self) -> None:
        """Ends SENDS and SPIN."""
        self._words[_STOP // 4] = 1

    def set_flags(self, flags: int) -> None:
        self._words[_FLAGS // 4] = flags

    @property
    def flags(self) -> int:
        return self._words[_FLAGS // 4]

    @property
    def upcalls(self) -> int:
        return self._words[_UPCALLS // 4]

    @property
    def msis(self) -> int:
        return self._words[_MSIS // 4]

    @property
    def sent(self) -> int:
        """How many of SENDS."""
        return self._longs[_SENT // 8]

    @property
    def doorbell_call(self) -> tuple[int, ...]:
        """A hypercall of a guest whose KVM has no Xen: number and five parameters."""
        return tuple(self._longs[_HCALL // 8 : _HCALL // 8 + 6])

    def answer(self, result: int) -> None:
        self._longs[_HCALL_RESULT // 8] = result & 0xFFFFFFFFFFFFFFFF

    def close(self) -> None:
        self._longs.release()
        self._words.release()
        self._bytes.release()


class Agent:
    """The agent's memory, `SIZE` writable bytes that the machine has at BASE, with all that it needs to start."""

    def __init__(self, memory: memoryview, code: bytes, *, long_mode: bool = True) -> None:
        if len(memory) != SIZE or len(code) > _COUNTS - _CODE:
            raise ValueError(f"the agent needs {SIZE} bytes, and code of at most {_COUNTS - _CODE}")
        self.long_mode = long_mode
        self._memory = memory
        memory[_CODE : _CODE + len(code)] = code
        tables = _page_tables()
        memory[_PAGE_TABLE : _PAGE_TABLE + len(tables)] = tables
        user, system = (0x00AFFA, 0x00AF9A) if long_mode else (0x00CFFA, 0x00CF9A)
        gdt = [0, _flat(system), _flat(0x00CF92), _flat(user), _flat(0x00CFF2)]
        memory[_GDT : _GDT + 40] = struct.pack("<5Q", *gdt)
        self._words = memory.cast("I")

    def start(self, vcpu: Vcpu, mailbox: Mailbox) -> None:
        """Puts a vCPU at its first instruction. Its own APIC id is its number."""
        number = vcpu.number
        stack = BASE + _STACKS + (number + 1) * _STACK_SIZE
        tss = _TSS + number * 0x80
        interrupted = stack - _STACK_SIZE // 2  # where an interrupt of user mode begins
        layout = struct.pack("<IQ", 0, interrupted) if self.long_mode else struct.pack("<III", 0, interrupted, 0x10)
        self._memory[tss : tss + len(layout)] = layout
        vcpu.start(
            BASE + _CODE,
            stack,
            mailbox.gpa,
            gdt=(BASE + _GDT, 0x100),
            tss=BASE + tss,
            page_table=BASE + _PAGE_TABLE if self.long_mode else None,
        )

    def mailbox(self, number: int) -> Mailbox:
        return Mailbox(self._memory, number)

    def set_vector_port(self, vector: int, port: int) -> None:
        self._words[_VECTOR_PORTS // 4 + vector] = port

    def taken(self, port: int) -> int:
        """How many events of `port` the agent's upcall has taken (FLAG_COUNT)."""
        return self._words[_COUNTS // 4 + port]

    def close(self) -> None:
        self._words.release()
        self._memory.release()


def message(vcpu: int, vector: int) -> tuple[int, int]:
    """Address and data of an MSI: a fixed interrupt to one local APIC."""
    return 0xFEE00000 | vcpu << 12, vector


def add_to(machine: Machine, slot: int, address: int) -> None:
    """The agent's memory, at `address` of this process, as a slot of the machine."""
    machine.add_memory(slot, BASE, SIZE, address)


def _flat(access: int) -> int:
    """A segment descriptor from 0 to 4 GiB; `access`: its bytes 5 and 6."""
    return 0xFFFF | (access & 0xFF) << 40 | (access >> 8 & 0xFF) << 48


def _page_tables() -> bytes:
    """4 GiB, identity mapped by pages of 2 MiB, for user mode too."""
    present, large = 7, 0x80
    top = struct.pack("<Q", BASE + 0x1000 | present).ljust(4096, b"\0")
    second = struct.pack("<4Q", *(BASE + 0x2000 + i * 0x1000 | present for i in range(4))).ljust(4096, b"\0")
    third = b"".join(struct.pack("<Q", i << 21 | present | large) for i in range(2048))
    return top + second + third
