"""The lab's QEMU: Debian's, with one store less.

QEMU's emulation of SVM delivers the interrupt that KVM injects at VMRUN itself, but has noted it as an exception before
(helper_vmrun, SVM_EVTINJ_TYPE_INTR: cs->exception_index), and the note stays. Where another thread kicks the processor
before its next exit, the guest gets the same interrupt once more, whether it has interrupts off or not: with two CPUs
under load once a minute or so, which then wait for a spin lock for ever, panic, or fault three times. QEMU 10.0 to 11.0
have it (docs/decisions.md). Without the store there is nothing to deliver twice.
"""

from __future__ import annotations

import re
import struct

_DYNSYM = 11  # SHT_DYNSYM
_CALL = 0xE8
_NOP6 = bytes.fromhex("660f1f440000")
# mov %r32, disp32(%r64), the displacement negative: CPUState lies below CPUX86State, which is in a register
_STORE = re.compile(rb"(?<![\x40-\x4f])\x89[\x80-\xbf][\x00-\xff]{2}\xff\xff")
_NEAR = 64  # bytes of code from the store to the call


def mended(qemu: bytes) -> bytes | None:
    """The program without the store; None where it is not found, exactly once (another QEMU: look at it again)."""
    begin, size = _symbol(qemu, b"helper_vmrun")
    target, _ = _symbol(qemu, b"do_interrupt_x86_hardirq")
    body = qemu[begin : begin + size]
    calls = [
        at
        for at in range(len(body) - 4)
        if body[at] == _CALL and begin + at + 5 + struct.unpack_from("<i", body, at + 1)[0] == target
    ]
    if len(calls) != 1:
        return None
    near = max(calls[0] - _NEAR, 0)
    stores = list(_STORE.finditer(body[near : calls[0]]))
    if len(stores) != 1:
        return None
    at = begin + near + stores[0].start()
    return qemu[:at] + _NOP6 + qemu[at + len(_NOP6) :]


def _symbol(elf: bytes, name: bytes) -> tuple[int, int]:
    """Address and size of a function that the program exports to its plugins; (0, 0): it does not.

    Addresses of code are offsets in the file too, as Debian links it; where they are not, nothing is found.
    """
    (sections,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + n * size) for n in range(count)]
    for _, kind, _, _, offset, length, link, *_ in headers:
        if kind == _DYNSYM:
            names = headers[link][4]
            for at in range(offset, offset + length, 24):
                text, _, _, _, value, extent = struct.unpack_from("<IBBHQQ", elf, at)
                if elf.startswith(name + b"\0", names + text):
                    return value, extent
    return 0, 0
