"""Core constants of Xen's public ABI (xen/include/public/*.h, Xen 4.17, package libxen-dev).

Only numbers that more than one module needs; a ring's layout is in its backend's own file.
"""

from __future__ import annotations

from enum import IntEnum

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

# xen.h: domain identifiers, 16 bits
DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
DOMID_INVALID = 0x7FF4

# grant_table.h: version 1 entry = {u16 flags; u16 domid; u32 frame}
GRANT_ENTRY_SIZE = 8
GRANTS_PER_FRAME = PAGE_SIZE // GRANT_ENTRY_SIZE
GTF_INVALID = 0
GTF_PERMIT_ACCESS = 1
GTF_TYPE_MASK = 3
GTF_READONLY = 1 << 2
GTF_READING = 1 << 3
GTF_WRITING = 1 << 4
GTF_SUB_PAGE = 1 << 8
GNTTAB_RESERVED_CONSOLE = 0
GNTTAB_RESERVED_XENSTORE = 1
GNTTAB_NR_RESERVED_ENTRIES = 8


class Evtchnop(IntEnum):
    """event_channel.h: EVTCHNOP_*."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    BIND_PIRQ = 2
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9
    RESET = 10
    INIT_CONTROL = 11
    EXPAND_ARRAY = 12
    SET_PRIORITY = 13
    RESET_CONT = 14


class Evtchnstat(IntEnum):
    """event_channel.h: EVTCHNSTAT_*."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


# 2-level ABI: number of ports a domain can have (bits in a word, squared)
EVTCHN_2L_PORTS_32 = 1024
EVTCHN_2L_PORTS_64 = 4096

# xen.h, struct shared_info: 32 vcpu_info of 64 bytes, then pending and mask bitmaps of ports/8 bytes each
SHARED_INFO_VCPUS = 32
VCPU_INFO_SIZE = 64
SHARED_INFO_PENDING = SHARED_INFO_VCPUS * VCPU_INFO_SIZE
SHARED_INFO_MASK_64 = SHARED_INFO_PENDING + EVTCHN_2L_PORTS_64 // 8
SHARED_INFO_MASK_32 = SHARED_INFO_PENDING + EVTCHN_2L_PORTS_32 // 8
# struct vcpu_info: upcall_pending u8, upcall_mask u8, pending_sel (unsigned long, aligned)
VCPU_INFO_UPCALL_PENDING = 0
VCPU_INFO_UPCALL_MASK = 1
VCPU_INFO_PENDING_SEL_64 = 8
VCPU_INFO_PENDING_SEL_32 = 4


class Virq(IntEnum):
    """xen.h: VIRQ_*."""

    TIMER = 0
    DEBUG = 1
    CONSOLE = 2
    DOM_EXC = 3
    TBUF = 4
    DEBUGGER = 6
    XENOPROF = 7
    CON_RING = 8
    PCPU_STATE = 9
    MEM_EVENT = 10
    ARGO = 11
    ENOMEM = 12
    XENPMU = 13


NR_VIRQS = 24
# Virtual interrupts that exist once a vCPU; every other one is global (vCPU 0 only at bind time).
PER_VCPU_VIRQS = frozenset({Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU})


class XenbusState(IntEnum):
    """io/xenbus.h: XenbusState*."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


# io/xs_wire.h: struct xenstore_domain_interface
XENSTORE_RING_SIZE = 1024
XENSTORE_PAYLOAD_MAX = 4096
