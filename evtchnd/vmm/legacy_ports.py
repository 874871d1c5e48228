"""What a guest finds at I/O ports and at addresses that are no memory: nothing, but for the ways to end.

A read gives all ones, as on an empty bus, except where Linux would wait for a device that is not there: ones in the
timer's ports cost it half a minute of calibration, a busy keyboard controller 65,536 reads before a reset.
"""

from __future__ import annotations

import threading
from collections import Counter

from evtchnd.vmm import acpi
from evtchnd.vmm.hypercalls import Shutdown
from evtchnd.vmm.kvm_machine import Io, Mmio

_KEYBOARD = 0x64
_KEYBOARD_RESET = 0xFE
_ZERO = frozenset({0x40, 0x41, 0x42, 0x43, _KEYBOARD, 0x71, acpi.SLEEP_STATUS})  # timer, keyboard, CMOS, sleep


def read(access: Io | Mmio) -> int:
    """The byte that the read gives, in each of its bytes."""
    return 0 if isinstance(access, Io) and access.port in _ZERO else 0xFF


def write(access: Io) -> tuple[Shutdown, str] | None:
    """What the write asks for, and by which way; None: nothing."""
    match access.port:
        case acpi.SLEEP_CONTROL if access.value & 0xFF == acpi.SLEEP_S5:
            return Shutdown.POWEROFF, "ACPI"
        case acpi.RESET_PORT if access.value & 4:
            return Shutdown.REBOOT, "the reset port"
        case 0x64 if access.value & 0xFF == _KEYBOARD_RESET:
            return Shutdown.REBOOT, "the keyboard controller"
        case 0x92 if access.value & 1:
            return Shutdown.REBOOT, "port 0x92"
    return None


class Accesses:
    """How often each port and page was accessed. A guest has many addresses: the first few hundred are told apart."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def count(self, access: Io | Mmio) -> None:
        name = f"port {access.port:#x}" if isinstance(access, Io) else f"address {access.address & ~0xFFF:#x}"
        with self._lock:
            self.counts[name if name in self.counts or len(self.counts) < self._most else "others"] += 1
