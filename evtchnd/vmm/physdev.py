"""PIRQs as an HVM guest uses them: HYPERVISOR_physdev_op, and messages of devices that mean a pirq.

A guest maps a device's MSI to a pirq, programs the device with vector 0 and the pirq in place of the destination, and
binds the pirq to an event port. Who delivers the device's message translates it back.

Source: xen/include/public/physdev.h; the message as Linux composes it (arch/x86/pci/xen.c).
"""

from __future__ import annotations

import errno
from enum import IntEnum

from evtchnd.abi import DOMID_SELF
from evtchnd.ports import NR_PIRQS
from evtchnd.vmm.guest_pointer import Layout


class Physdevop(IntEnum):
    """PHYSDEVOP_*."""

    MAP_PIRQ = 13
    UNMAP_PIRQ = 14
    GET_FREE_PIRQ = 23


_MAP = Layout("H2xiiiiii4xQ", "H2xiiiiiiQ")  # domid, type, index, pirq, bus, devfn, entry_nr, table_base
_UNMAP = Layout("H2xi")  # domid, pirq
_FREE = Layout("iI")  # type, pirq
LAYOUTS = {
    int(Physdevop.MAP_PIRQ): _MAP,
    int(Physdevop.UNMAP_PIRQ): _UNMAP,
    int(Physdevop.GET_FREE_PIRQ): _FREE,
}

_FIRST_MSI_PIRQ = 16  # below are the legacy interrupts, whose pirq is their gsi


def pirq_of_msi(address: int, data: int) -> int | None:
    """The pirq that a message means; None: it is an interrupt of a local APIC.

    Vector 0 in `data`; the pirq's low 8 bits where the destination is (address 19:12), the rest in address 63:40.
    """
    if data & 0xFF:
        return None
    pirq = address >> 12 & 0xFF | address >> 32 & 0xFFFFFF00
    return pirq or None


def msi_of_pirq(pirq: int) -> tuple[int, int]:
    """The message that a guest programs: address, data."""
    return 0xFEE00000 | (pirq & 0xFF) << 12 | (pirq & 0xFFFFFF00) << 32, 0


class Pirqs:
    """The pirqs that a guest has mapped."""

    def __init__(self) -> None:
        self._mapped: set[int] = set()

    def call(self, op: int, fields: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """HYPERVISOR_physdev_op with the struct of LAYOUTS: (0 or a negated error number, the struct as it goes back
        or nothing)."""
        match op:
            case Physdevop.MAP_PIRQ:
                dom, kind, index, pirq, *rest = fields
                if dom != DOMID_SELF:
                    return -errno.EPERM, ()
                if pirq < 0:
                    pirq = self._free()
                if not 0 <= pirq < NR_PIRQS:
                    return -errno.ENOSPC, ()
                self._mapped.add(pirq)
                return 0, (dom, kind, index, pirq, *rest)
            case Physdevop.UNMAP_PIRQ:
                dom, pirq = fields
                if dom != DOMID_SELF or pirq not in self._mapped:
                    return -errno.EINVAL, ()
                self._mapped.discard(pirq)
                return 0, ()
            case Physdevop.GET_FREE_PIRQ:
                kind, _ = fields
                pirq = self._free()
                if pirq >= NR_PIRQS:
                    return -errno.ENOSPC, ()
                self._mapped.add(pirq)
                return 0, (kind, pirq)
        return -errno.ENOSYS, ()

    def _free(self) -> int:
        """NR_PIRQS: there is none."""
        return next((n for n in range(_FIRST_MSI_PIRQ, NR_PIRQS) if n not in self._mapped), NR_PIRQS)
