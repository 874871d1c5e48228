"""What a guest finds at I/O ports and at addresses that are no memory: nothing, but for the ways to end.

A read gives all ones, as on an empty bus, except where Linux would wait for a device that is not there: ones in the
timer's ports cost it half a minute of calibration, a busy keyboard controller 65,536 reads before a reset. Port 0x61
says that the timer's channel 2 has run out, for which a calibration waits, and that no NMI was for a parity error.
"""

from __future__ import annotations

from evtchnd.vmm import acpi
from evtchnd.vmm.hypercalls import Shutdown
from evtchnd.vmm.kvm_machine import Io, Mmio

_SYSTEM_CONTROL, _TIMER_2_OUT = 0x61, 0x20
_KEYBOARD = 0x64
_KEYBOARD_RESET = 0xFE
_ZERO = frozenset({0x40, 0x41, 0x42, 0x43, _KEYBOARD, 0x71, acpi.SLEEP_STATUS})  # timer, keyboard, CMOS, sleep


def read(access: Io | Mmio) -> int:
    """The byte that the read gives, in each of its bytes."""
    if not isinstance(access, Io):
        return 0xFF
    if access.port == _SYSTEM_CONTROL:
        return _TIMER_2_OUT
    return 0 if access.port in _ZERO else 0xFF


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


def name_of(access: Io | Mmio) -> str:
    """The port, or the page."""
    return f"port {access.port:#x}" if isinstance(access, Io) else f"address {access.address & ~0xFFF:#x}"
