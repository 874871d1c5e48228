"""VCPUOP_initialise: what Xen refuses of it, and a vCPU of the host's KVM that starts by it, stops and goes on."""

from __future__ import annotations

import contextlib
import os
import queue
import struct
import threading
from collections.abc import Iterator

import pytest

from evtchnd.memory import map_range
from evtchnd.vmm import vcpu_context
from evtchnd.vmm.kvm_machine import Io, Machine, Vcpu
from kvmguest import why_no_kvm

REGISTERS = "eax ecx edx ebx esp ebp esi edi eip eflags cr0 cr3 cr4".split()  # noqa: SIM905
SEGMENTS = ("cs", "ds", "ss", "es", "tr")
NAMES_32 = ["mode", "head_pad", *REGISTERS, "pad", "efer"]
NAMES_32 += [f"{segment}_{what}" for what in ("base", "limit", "ar") for segment in SEGMENTS] + ["pad2", "pad3", "pad4"]
NAMES_64 = ["mode", "head_pad", *(name.replace("e", "r", 1) for name in REGISTERS[:10]), *REGISTERS[10:], "efer"]


def context_of_32(**fields: int) -> bytes:
    """struct vcpu_hvm_context: flat segments without paging, and these."""
    every = {f"{name}_limit": 0xFFFFFFFF for name in ("cs", "ds", "ss", "es")} | {"tr_limit": 0x67, "cr0": 0x11}
    every |= {"cs_ar": 0xC9B, "ds_ar": 0xC93, "ss_ar": 0xC93, "es_ar": 0xC93, "tr_ar": 0x8B} | fields
    return struct.pack("<16IQ10I8H", *(every.get(name, 0) for name in NAMES_32))


def context_of_64(**fields: int) -> bytes:
    every = {"mode": 1} | fields
    return struct.pack("<2I14Q", *(every.get(name, 0) for name in NAMES_64)).ljust(128, b"\0")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": 2},
        {"eip": 1 << 20, "cs_limit": 0xFFFFF, "cs_ar": 0x49B},
        {"eip": 1 << 20, "cs_limit": 0xFF},
        {"cs_ar": 0},
        {"cs_ar": 0xC93},
        {"ss_ar": 0xC9B},
        {"ss_ar": 0xC90},
        {"ss_ar": 0xCF3},
        {"ds_ar": 0xCF3},
        {"ds_ar": 0xC99},
        {"es_ar": 0xC83},
        {"es_ar": 0xC13},
        {"tr_ar": 0x83},
        {"tr_ar": 0x0B},
        {"tr_ar": 0x108B, "tr_limit": 0x67},
        {"efer": 1 << 10},
    ],
)
def test_registers_that_xen_refuses(wrong: dict[str, int]) -> None:
    assert vcpu_context.parse(context_of_32(eip=0x1000)) is not None
    assert vcpu_context.parse(context_of_32(eip=0x1000, ds_ar=0)) is not None
    assert vcpu_context.parse(context_of_32(**{"eip": 0x1000, **wrong})) is None
    right = {"rip": 0xFFFF800000000000, "cr0": 1 << 31, "cr4": 1 << 5, "efer": 1 << 8}
    parsed = vcpu_context.parse(context_of_64(**right))
    assert parsed is not None
    assert parsed.efer == 0x500
    for name in right:
        value = 1 << 47 if name == "rip" else 0
        assert vcpu_context.parse(context_of_64(**{**right, name: value})) is None


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """Number 1 of a machine, not started; its memory is `outb(al++, 0x80)` for ever, in 64-bit mode al += 2, at 0."""
    if why := why_no_kvm():
        pytest.skip(why)
    with contextlib.ExitStack() as undo:
        fd = os.memfd_create("ram")
        undo.callback(os.close, fd)
        os.ftruncate(fd, 1 << 20)
        region = map_range(fd, 0, 1 << 20, "ram")
        undo.callback(region.area.close)
        undo.callback(region.view.release)
        region.view[0:9] = b"\xe6\x80\xfe\xc0\x48\xff\xc0\xeb\xf7"  # out; inc al; inc rax, or dec and inc eax; jmp
        for at, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83)):  # identity, the first 2 MiB
            region.view[at : at + 8] = struct.pack("<Q", entry)
        machine = undo.enter_context(Machine(split=True))
        machine.add_memory(0, 0, 1 << 20, region.address)
        machine.add_vcpu(0)
        yield machine.add_vcpu(1)


@pytest.mark.parametrize(
    ("data", "step"),
    [
        (context_of_32(eip=0, eax=7), 1),
        (context_of_32(eip=0, eax=7, ds_ar=0, es_ar=0, efer=1 << 8), 1),
        (context_of_64(rip=0, rax=7, cr0=0x80000011, cr3=0x1000, cr4=1 << 5, efer=1 << 8), 2),
    ],
)
def test_a_vcpu_starts_stops_and_goes_on(data: bytes, step: int, vcpu: Vcpu) -> None:
    context = vcpu_context.parse(data)
    assert context is not None
    seen: queue.Queue[int] = queue.Queue(1)
    end = threading.Event()

    def run() -> None:
        with vcpu.entered():
            while not end.is_set():
                if isinstance(stop := vcpu.run(), Io):
                    seen.put(stop.value)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert not vcpu.is_up()
        vcpu.set_context(context)
        assert not vcpu.is_up()
        vcpu.set_up(True)
        assert [seen.get(timeout=10) for _ in range(5)] == [7 + n * step for n in range(5)]
        vcpu.set_up(False)
        assert not vcpu.is_up()
        rest = [7 + 4 * step]  # what it had said before
        with contextlib.suppress(queue.Empty):
            while len(rest) < 10:
                rest.append(seen.get(timeout=0.5))
        assert len(rest) < 4
        vcpu.set_up(True)
        assert seen.get(timeout=10) == rest[-1] + step
    finally:
        end.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                seen.get_nowait()
            vcpu.kick()
            thread.join(0.02)
