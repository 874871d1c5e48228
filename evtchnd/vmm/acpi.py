"""The ACPI tables that a guest gets: which vCPUs there are, how to power off, how to reset. Nothing else is there.

Without a MADT Linux' time stops on KVM, with one CPU even; without a way to S5 a power-off is a HLT that KVM keeps. The
FADT is of the reduced hardware kind: no PIC, no PM timer, no CMOS, no VGA; two I/O ports for sleep, one for reset.
Source: ACPI specification 6.5, chapters 5.2 (tables) and 4.8.3.7 (sleep registers).
"""

from __future__ import annotations

import struct

SLEEP_CONTROL, SLEEP_STATUS = 0x604, 0x605  # I/O ports
RESET_PORT, RESET_VALUE = 0xCF9, 0x06
S5 = 5
# SLP_TYP in bits 4:2, SLP_EN in bit 5
SLEEP_S5 = S5 << 2 | 1 << 5
LOCAL_APIC = 0xFEE00000

_OEM = b"EVTCHN"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")  # signature, length, revision, checksum, OEM id, table id, revision, creator
_FADT_SIZE = 276  # revision 6
_FACP_DSDT_32, _FACP_BOOT_ARCH, _FACP_FLAGS, _FACP_RESET, _FACP_RESET_VALUE = 40, 109, 112, 116, 128
_FACP_DSDT_64, _FACP_SLEEP_CONTROL, _FACP_SLEEP_STATUS = 140, 244, 256
_BOOT_ARCH = 1 << 2 | 1 << 5  # no VGA, no CMOS clock; no 8042, since its bit is not set
_FLAGS = 1 << 0 | 1 << 10 | 1 << 20  # WBINVD works, RESET_REG_SUP, HW_REDUCED_ACPI
_GENERIC_ADDRESS = struct.Struct("<BBBBQ")  # space (1: I/O), bits, offset, access size (1: byte), address


def tables(address: int, vcpus: int) -> tuple[int, bytes]:
    """(where the RSDP is, everything from `address` on). APIC ids and processor ids are 0 .. vcpus-1."""
    # Name (_S5, Package () { 5, 0, 0, 0 })
    aml = b"\x08_S5_" + bytes((0x12, 0x06, 0x04, 0x0A, S5, 0, 0, 0))
    dsdt = _table(b"DSDT", 2, aml)
    madt = _table(b"APIC", 5, struct.pack("<II", LOCAL_APIC, 0) + b"".join(map(_local_apic, range(vcpus))))
    out = bytearray(64)  # the RSDP, 36 bytes
    place: dict[bytes, int] = {}
    for table in (dsdt, madt):
        place[table[:4]] = address + len(out)
        out += table + bytes(-len(table) % 16)
    fadt = _fadt(place[b"DSDT"])
    place[b"FACP"] = address + len(out)
    out += fadt + bytes(-len(fadt) % 16)
    xsdt = address + len(out)
    out += _table(b"XSDT", 1, struct.pack("<QQ", place[b"FACP"], place[b"APIC"]))
    # signature, checksum of the first 20 bytes, OEM id, revision, RSDT, length, XSDT, checksum of all, reserved
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    out[: len(rsdp)] = rsdp
    return address, bytes(out)


def _local_apic(number: int) -> bytes:
    return struct.pack("<BBBBI", 0, 8, number, number, 1)  # type, length, processor, APIC id, enabled


def _fadt(dsdt: int) -> bytes:
    table = bytearray(_FADT_SIZE)
    struct.pack_into("<I", table, _FACP_DSDT_32, dsdt)
    struct.pack_into("<H", table, _FACP_BOOT_ARCH, _BOOT_ARCH)
    struct.pack_into("<I", table, _FACP_FLAGS, _FLAGS)
    table[_FACP_RESET : _FACP_RESET + 12] = _GENERIC_ADDRESS.pack(1, 8, 0, 1, RESET_PORT)
    table[_FACP_RESET_VALUE] = RESET_VALUE
    table[131] = 3  # minor version: 6.3
    struct.pack_into("<Q", table, _FACP_DSDT_64, dsdt)
    table[_FACP_SLEEP_CONTROL : _FACP_SLEEP_CONTROL + 12] = _GENERIC_ADDRESS.pack(1, 8, 0, 1, SLEEP_CONTROL)
    table[_FACP_SLEEP_STATUS : _FACP_SLEEP_STATUS + 12] = _GENERIC_ADDRESS.pack(1, 8, 0, 1, SLEEP_STATUS)
    return _table(b"FACP", 6, bytes(table[_HEADER.size :]))


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    table = bytearray(_HEADER.pack(signature, size, revision, 0, _OEM, b"EVTCHND ", 1, b"EVCH", 1) + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
