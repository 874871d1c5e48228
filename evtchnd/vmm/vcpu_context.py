"""VCPUOP_initialise: the registers that an HVM guest gives a vCPU which has not been started, checked as Xen does.

    struct vcpu_hvm_context   u32 mode, pad; then of 32 bits (mode 0) or of 64 (mode 1)
    of 32 bits                u32 eax ecx edx ebx esp ebp esi edi eip eflags, cr0 cr3 cr4, pad; u64 efer;
                              u32 base of cs ds ss es tr, limit of the same; u16 attributes of the same, pad[3]
    of 64 bits                u64 rax rcx rdx rbx rsp rbp rsi rdi rip rflags, cr0 cr3 cr4 efer; flat segments

Attributes: type 3:0, s 4, dpl 6:5, present 7, avl 8, l 9, db 10, g 11.
Source: xen/include/public/hvm/hvm_vcpu.h; arch_set_info_hvm_guest in xen/arch/x86/hvm/domain.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT_SIZE = 128
_HEAD = struct.Struct("<II")
_OF_32 = struct.Struct("<14IQ 5I 5I 5H 3H")
_OF_64 = struct.Struct("<14Q")
_CR0_PG, _CR4_PAE, _EFER_LME, _EFER_LMA = 1 << 31, 1 << 5, 1 << 8, 1 << 10
_FLAGS, _ALWAYS_SET = 0x3F7FD5, 2  # X86_EFLAGS_ALL, X86_EFLAGS_MBS
_BUSY_TSS = 0xB


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A segment register's hidden part; `attributes` as above."""

    base: int
    limit: int
    attributes: int

    @property
    def type(self) -> int:
        return self.attributes & 0xF

    @property
    def system(self) -> bool:
        return not self.attributes & 0x10

    @property
    def dpl(self) -> int:
        return self.attributes >> 5 & 3

    @property
    def present(self) -> bool:
        return bool(self.attributes & 0x80)


@dataclass(frozen=True, slots=True)
class VcpuContext:
    """`general`: rax rcx rdx rbx rsp rbp rsi rdi rip rflags."""

    general: tuple[int, ...]
    cr0: int
    cr3: int
    cr4: int
    efer: int
    cs: Descriptor
    ds: Descriptor
    ss: Descriptor
    es: Descriptor
    tr: Descriptor


def parse(data: bytes) -> VcpuContext | None:
    """None where Xen answers EINVAL; what only a processor can tell (reserved bits) is found when it is entered."""
    mode, pad = _HEAD.unpack_from(data)
    if pad:
        return None
    match mode:
        case 0:
            return _of_32(_OF_32.unpack_from(data, _HEAD.size))
        case 1:
            return _of_64(_OF_64.unpack_from(data, _HEAD.size))
    return None


def _of_32(fields: Sequence[int]) -> VcpuContext | None:
    (*general, cr0, cr3, cr4, pad), efer, rest = fields[:14], fields[14], fields[15:]
    bases, limits, attributes, pads = rest[:5], rest[5:10], list(rest[10:15]), rest[15:]
    if pad or any(pads) or any(each >> 12 for each in attributes):
        return None
    attributes[4] |= 2  # busy
    attributes[:4] = [each | bool(each & 0x80) for each in attributes[:4]]  # accessed
    cs, ds, ss, es, tr = (Descriptor(*each) for each in zip(bases, limits, attributes, strict=True))
    if not (tr.system and tr.type == _BUSY_TSS and tr.present):
        return None
    for each in (cs, ds, ss, es):
        if each.attributes and (each.system or not each.present):
            return None
    # bit 3 is code; bit 1: data can be written, code can be read
    if not cs.type & 8 or ss.type & 0xA != 2 or any(each.type & 0xA == 8 for each in (ds, es)):
        return None
    limit = (cs.limit << 12 | 0xFFF) & 0xFFFFFFFF if cs.attributes >> 11 & 1 else cs.limit
    if general[8] > limit or ss.dpl != cs.dpl or any(each.present and each.dpl > cs.dpl for each in (ds, es)):
        return None
    if efer & _EFER_LMA and not efer & _EFER_LME:
        return None
    return VcpuContext(_general(general), cr0, cr3, cr4, _efer(efer, cr0), cs, ds, ss, es, tr)


def _of_64(fields: Sequence[int]) -> VcpuContext | None:
    *general, cr0, cr3, cr4, efer = fields
    canonical = general[8] >> 47 in (0, (1 << 17) - 1)
    if not (canonical and cr0 & _CR0_PG and cr4 & _CR4_PAE and efer & _EFER_LME):
        return None
    code, data, tss = (Descriptor(0, *each) for each in ((0xFFFFFFFF, 0xA9B), (0xFFFFFFFF, 0xC93), (0x67, 0x8B)))
    return VcpuContext(_general(general), cr0, cr3, cr4, _efer(efer, cr0), code, data, data, data, tss)


def _general(values: Sequence[int]) -> tuple[int, ...]:
    return *values[:9], values[9] & _FLAGS | _ALWAYS_SET


def _efer(efer: int, cr0: int) -> int:
    """With LMA as the processor has it, and KVM wants it."""
    return efer | _EFER_LMA if efer & _EFER_LME and cr0 & _CR0_PG else efer & ~_EFER_LMA
