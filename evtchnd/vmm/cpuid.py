"""What CPUID tells a guest of this VMM: KVM's own list, its APIC id, and Xen's leaves instead of KVM's.

Source: xen/include/public/arch-x86/cpuid.h; struct kvm_cpuid_entry2 of <linux/kvm.h>.
"""

from __future__ import annotations

import struct

XEN = 0x40000000
_LEAF_HYPERVISORS = range(0x40000000, 0x40010000)

_ENTRY = struct.Struct("<IIIIIII12x")  # function, index, flags, eax, ebx, ecx, edx, padding
_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_HYPERVISOR, _TSC_DEADLINE, _X2APIC = 1 << 31, 1 << 24, 1 << 21  # of leaf 1, ecx
_VCPU_ID_PRESENT = 1 << 3


def of_guest(supported: bytes, *, vcpu: int, vcpus: int, version: int) -> bytes:
    """A struct kvm_cpuid2 for KVM_SET_CPUID2, from the one of KVM_GET_SUPPORTED_CPUID.

    `vcpu`: its number, Xen's and the APIC's; `version` as of XENVER_version. The hypercall page is filled by a write
    to MSR 0x40000000.
    """
    count = int.from_bytes(supported[:4], "little")
    entries: list[tuple[int, ...]] = []
    for i in range(count):
        function, index, flags, eax, ebx, ecx, edx = _ENTRY.unpack_from(supported, 8 + i * _ENTRY.size)
        match function:
            case _ if function in _LEAF_HYPERVISORS:
                continue
            case 0x1:
                ebx = ebx & 0x0000FFFF | vcpu << 24 | vcpus << 16
                ecx |= _HYPERVISOR | _TSC_DEADLINE | _X2APIC
            case 0xB | 0x1F:
                edx = vcpu
            case 0x80000008:
                ecx = ecx & ~0xFFFF | vcpus - 1
            case 0x8000001E:
                eax = vcpu
        entries.append((function, index, flags, eax, ebx, ecx, edx))
    vendor = struct.unpack("<III", b"XenVMMXenVMM")
    entries += [
        (XEN, 0, 0, XEN + 4, *vendor),
        (XEN + 1, 0, 0, version, 0, 0, 0),
        (XEN + 2, 0, 0, 1, XEN, 0, 0),  # one hypercall page, the MSR that fills it
        *((XEN + 3, index, _SIGNIFICANT_INDEX, 0, 0, 0, 0) for index in range(3)),  # KVM writes the clock's scale
        (XEN + 4, 0, 0, _VCPU_ID_PRESENT, vcpu, 0, 0),
    ]
    return struct.pack("<II", len(entries), 0) + b"".join(_ENTRY.pack(*entry) for entry in entries)
