"""EVENT_CHANNEL_OP as a guest calls it: an operation number and a struct in guest memory, for a PortTable."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from evtchnd.abi import Evtchnop, Evtchnstat
from evtchnd.errors import XenError
from evtchnd.ports import PortTable


def event_channel_op(table: PortTable, op: int, arg: bytes | bytearray) -> tuple[int, bytes]:
    """(0 or a negated error number, the struct as it goes back to the guest or b"").

    `arg` begins with the struct of `op`; too short is EFAULT, as is a guest address that cannot be read.
    FIFO operations and unknown ones: ENOSYS, at which Linux falls back to 2-level.
    """
    call = CALLS.get(op)
    if call is None:
        return -errno.ENOSYS, b""
    layout, run = call
    if len(arg) < layout.size:
        return -errno.EFAULT, b""
    try:
        out = run(table, *layout.unpack_from(arg))
    except XenError as error:
        return -error.errno, b""
    return 0, b"" if out is None else layout.pack(*out)


def _status(table: PortTable, dom: int, port: int, _state: int, _vcpu: int, union: bytes) -> tuple[object, ...]:
    """struct evtchn_status: the union's bytes that the state does not use stay the guest's, as in Xen."""
    status = table.status(dom, port)
    out = bytearray(union)
    match status.state:
        case Evtchnstat.UNBOUND:
            struct.pack_into("<H", out, 0, status.dom)
        case Evtchnstat.INTERDOMAIN:
            struct.pack_into("<H", out, 0, status.dom)
            struct.pack_into("<I", out, 4, status.port)
        case Evtchnstat.PIRQ | Evtchnstat.VIRQ:
            struct.pack_into("<I", out, 0, status.irq)
    return dom, port, status.state, status.vcpu, bytes(out)


_Call = tuple[struct.Struct, Callable[..., tuple[object, ...] | None]]

# EVTCHNOP_*: the struct (event_channel.h; domid_t u16, evtchn_port_t u32; the same in 32 and 64 bits) and what runs;
# what it returns goes back to the guest. RESET_CONT is Xen's own continuation.
CALLS: dict[int, _Call] = {
    Evtchnop.BIND_INTERDOMAIN: (
        struct.Struct("<H2xII"),  # remote_dom, remote_port, local_port
        lambda table, dom, port, _: (dom, port, table.bind_interdomain(dom, port)),
    ),
    Evtchnop.BIND_VIRQ: (
        struct.Struct("<III"),  # virq, vcpu, port
        lambda table, virq, vcpu, _: (virq, vcpu, table.bind_virq(virq, vcpu)),
    ),
    Evtchnop.BIND_PIRQ: (
        struct.Struct("<III"),  # pirq, flags, port
        lambda table, pirq, flags, _: (pirq, flags, table.bind_pirq(pirq, flags)),
    ),
    Evtchnop.CLOSE: (struct.Struct("<I"), PortTable.close),
    Evtchnop.SEND: (struct.Struct("<I"), lambda table, port: table.send(port) and None),
    Evtchnop.STATUS: (struct.Struct("<H2xIII8s"), _status),  # dom, port, status, vcpu, union
    Evtchnop.ALLOC_UNBOUND: (
        struct.Struct("<HHI"),  # dom, remote_dom, port
        lambda table, dom, remote, _: (dom, remote, table.alloc_unbound(dom, remote)),
    ),
    Evtchnop.BIND_IPI: (struct.Struct("<II"), lambda table, vcpu, _: (vcpu, table.bind_ipi(vcpu))),
    Evtchnop.BIND_VCPU: (struct.Struct("<II"), PortTable.bind_vcpu),
    Evtchnop.UNMASK: (struct.Struct("<I"), PortTable.unmask),
    Evtchnop.RESET: (struct.Struct("<H"), PortTable.reset),
}
