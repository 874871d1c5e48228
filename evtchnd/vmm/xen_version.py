"""HYPERVISOR_xen_version: what the hypervisor calls itself, and what it can do.

Source: xen/include/public/version.h, features.h. XENVER_version is answered in the kernel once KVM knows it.
"""

from __future__ import annotations

import errno
from enum import IntEnum

from evtchnd.abi import PAGE_SIZE
from evtchnd.vmm.guest_pointer import Layout, Pointers

VERSION = 0x40011  # Xen 4.17


class Xenver(IntEnum):
    VERSION = 0
    EXTRAVERSION = 1
    COMPILE_INFO = 2
    CAPABILITIES = 3
    CHANGESET = 4
    PLATFORM_PARAMETERS = 5
    GET_FEATURES = 6
    PAGESIZE = 7
    GUEST_HANDLE = 8
    COMMANDLINE = 9
    BUILD_ID = 10


# XENFEAT_*: writable_page_tables, writable_descriptor_tables, auto_translated_physmap, supervisor_mode_kernel,
# hvm_callback_vector, hvm_safe_pvclock. Not hvm_pirqs: there are no devices with interrupts.
FEATURES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 9

_FEATURE_INFO = Layout("II")  # submap_idx, submap
_CAPABILITIES = b"xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 "
# fixed text and the size of its buffer
_TEXTS = {
    Xenver.EXTRAVERSION: (b".0", 16),
    Xenver.CAPABILITIES: (_CAPABILITIES, 1024),
    Xenver.CHANGESET: (b"unavailable", 64),
    Xenver.COMMANDLINE: (b"", 1024),
}
_COMPILE_INFO = b"".join(text.ljust(size, b"\0") for text, size in ((b"", 64), (b"evtchnd", 16), (b"", 32), (b"", 32)))


def xen_version(guest: Pointers, op: int, arg: int, *, handle: bytes) -> int:
    """`handle`: the guest's UUID. GuestError for a bad pointer."""
    match op:
        case Xenver.VERSION:
            return VERSION
        case Xenver.PAGESIZE:
            return PAGE_SIZE
        case Xenver.EXTRAVERSION | Xenver.CAPABILITIES | Xenver.CHANGESET | Xenver.COMMANDLINE:
            text, size = _TEXTS[Xenver(op)]
            guest.write(arg, text.ljust(size, b"\0"))
            return 0
        case Xenver.COMPILE_INFO:
            guest.write(arg, _COMPILE_INFO)
            return 0
        case Xenver.PLATFORM_PARAMETERS:
            guest.put_word(arg, 0, 0)  # virt_start: where a PV guest would find the hypervisor
            return 0
        case Xenver.GET_FEATURES:
            submap, _ = guest.take(_FEATURE_INFO, arg)
            if submap:
                return -errno.EINVAL
            guest.put(_FEATURE_INFO, arg, submap, FEATURES)
            return 0
        case Xenver.GUEST_HANDLE:
            guest.write(arg, handle)
            return 0
        case Xenver.BUILD_ID:
            return -errno.ENODATA
    return -errno.ENOSYS
