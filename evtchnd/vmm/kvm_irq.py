"""KVM's interrupt calls that event channels and doorbells need: routes, irqfds, ioeventfds, messages.

They belong to the process that made the VM; the eventfds may be anybody's.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from evtchnd.vmm.kvm import PRIO_2LEVEL
from evtchnd.vmm.kvm_ioctl import KvmError, ioctl, iow

MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES; a route's gsi is below it, too

_SET_GSI_ROUTING = iow(0x6A, 8)
_IRQFD = iow(0x76, 32)
_IOEVENTFD = iow(0x79, 64)
_SIGNAL_MSI = iow(0xA5, 32)

_IRQFD_DEASSIGN, _IRQFD_RESAMPLE = 1, 2
_IOEVENTFD_DATAMATCH, _IOEVENTFD_PIO, _IOEVENTFD_DEASSIGN = 1, 2, 4
_ROUTE_IRQCHIP, _ROUTE_MSI, _ROUTE_XEN_EVTCHN = 1, 2, 5
_IOAPIC = 2  # KVM_IRQCHIP_IOAPIC
_ROUTE = struct.Struct("<IIII32s")  # kvm_irq_routing_entry: gsi, type, flags, pad, the union


class EventRoute(NamedTuple):
    """A gsi that raises an event port (KVM_IRQ_ROUTING_XEN_EVTCHN); `vcpu` is KVM's id."""

    gsi: int
    port: int
    vcpu: int


class MsiRoute(NamedTuple):
    """A gsi that is a message (KVM_IRQ_ROUTING_MSI)."""

    gsi: int
    address: int
    data: int


class PinRoute(NamedTuple):
    """A gsi that is a pin of the I/O APIC (KVM_IRQ_ROUTING_IRQCHIP), the only kind that is level triggered."""

    gsi: int
    pin: int


def set_gsi_routing(vm_fd: int, routes: Sequence[EventRoute | MsiRoute | PinRoute]) -> None:
    """The whole table in one call: what is not in it is gone. EINVAL above MAX_ROUTES.

    6.12 takes a route to a port past the limit, and drops its events: ports come from a PortTable, which has it.
    """
    if len(routes) > MAX_ROUTES:
        raise KvmError(errno.EINVAL, "KVM_SET_GSI_ROUTING")
    table = bytearray(struct.pack("<II", len(routes), 0))
    for route in routes:
        if isinstance(route, EventRoute):
            kind, union = _ROUTE_XEN_EVTCHN, struct.pack("<III", route.port, route.vcpu, PRIO_2LEVEL)
        elif isinstance(route, PinRoute):
            kind, union = _ROUTE_IRQCHIP, struct.pack("<II", _IOAPIC, route.pin)
        else:
            low, high = route.address & 0xFFFFFFFF, route.address >> 32
            kind, union = _ROUTE_MSI, struct.pack("<III", low, high, route.data)
        table += _ROUTE.pack(route.gsi, kind, 0, 0, union)
    ioctl(vm_fd, _SET_GSI_ROUTING, bytes(table), "KVM_SET_GSI_ROUTING")


def irqfd(vm_fd: int, fd: int, gsi: int, *, resample_fd: int = -1, assign: bool = True) -> None:
    """KVM_IRQFD: a write to the eventfd fires `gsi`, whoever writes. KVM holds a reference of its own.

    `resample_fd`: the gsi is level triggered (a pin): it stays up until the guest's end-of-interrupt, when KVM takes it
    down and writes this eventfd. Whoever still has work then writes `fd` again.
    """
    flags = (0 if assign else _IRQFD_DEASSIGN) | (_IRQFD_RESAMPLE if resample_fd >= 0 else 0)
    data = struct.pack("<IIII", fd, gsi, flags, max(resample_fd, 0)).ljust(32, b"\0")
    ioctl(vm_fd, _IRQFD, data, "KVM_IRQFD")


def ioeventfd(
    vm_fd: int, fd: int, address: int, size: int, *, match: int | None = None, port: bool = True, assign: bool = True
) -> None:
    """KVM_IOEVENTFD: a guest's write of `size` bytes to I/O port (or memory) `address` writes the eventfd and no more.

    `match`: only of that value.
    """
    flags = (0 if match is None else _IOEVENTFD_DATAMATCH) | (_IOEVENTFD_PIO if port else 0)
    flags |= 0 if assign else _IOEVENTFD_DEASSIGN
    data = struct.pack("<QQIiI", match or 0, address, size, fd, flags).ljust(64, b"\0")
    ioctl(vm_fd, _IOEVENTFD, data, "KVM_IOEVENTFD")


def signal_msi(vm_fd: int, address: int, data: int) -> None:
    """KVM_SIGNAL_MSI: one message to a local APIC, without a route."""
    message = struct.pack("<IIII", address & 0xFFFFFFFF, address >> 32, data, 0).ljust(32, b"\0")
    ioctl(vm_fd, _SIGNAL_MSI, message, "KVM_SIGNAL_MSI")
