"""The guest's ACPI tables, as ACPICA's disassembler reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from evtchnd.vmm import acpi

ADDRESS = 0xF0000


def found(vcpus: int) -> dict[str, bytes]:
    """The tables by signature, by the RSDP's and XSDT's pointers; their checksums hold."""
    rsdp, data = acpi.tables(ADDRESS, vcpus)

    def at(address: int, size: int) -> bytes:
        return data[address - ADDRESS : address - ADDRESS + size]

    def table(address: int) -> bytes:
        whole = at(address, int.from_bytes(at(address + 4, 4), "little"))
        assert sum(whole) & 0xFF == 0
        return whole

    root = at(rsdp, 36)
    assert root[:8] == b"RSD PTR "
    assert sum(root[:20]) & 0xFF == sum(root) & 0xFF == 0
    xsdt = table(int.from_bytes(root[24:32], "little"))
    out = {"XSDT": xsdt}
    for i in range(36, len(xsdt), 8):
        each = table(int.from_bytes(xsdt[i : i + 8], "little"))
        out[each[:4].decode()] = each
    out["DSDT"] = table(int.from_bytes(out["FACP"][140:148], "little"))
    assert out["FACP"][40:44] == out["FACP"][140:144]
    return out


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_every_vcpu_is_in_the_madt(vcpus: int) -> None:
    madt = found(vcpus)["APIC"]
    entries = [madt[i : i + 8] for i in range(44, len(madt), 8)]
    assert entries == [bytes((0, 8, n, n, 1, 0, 0, 0)) for n in range(vcpus)]


def test_the_tables_fit_into_their_place() -> None:
    assert len(acpi.tables(ADDRESS, 4)[1]) < 0x10000


def test_acpica_reads_them(tmp_path: Path) -> None:
    if not shutil.which("iasl"):
        pytest.skip("no iasl: apt-get install acpica-tools")
    text = {}
    for name, table in found(2).items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        done = subprocess.run(
            ["iasl", "-d", f"{name}.dat"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        assert "Warning" not in done.stdout, done.stdout
        assert "Error" not in done.stdout, done.stdout
        text[name] = " ".join((tmp_path / f"{name}.dsl").read_text().split())
    assert "Name (_S5, Package (0x04)" in text["DSDT"]
    facp = text["FACP"]
    assert "Hardware Reduced (V5) : 1" in facp
    assert "Reset Register Supported (V2) : 1" in facp
    assert "CMOS RTC Not Present (V5) : 1" in facp
    assert "VGA Not Present (V4) : 1" in facp
    assert "8042 Present on ports 60/64 (V2) : 0" in facp
    for register, port in (
        ("Reset Register", "0CF9"),
        ("Sleep Control Register", "0604"),
        ("Sleep Status Register", "0605"),
    ):
        place = facp[facp.index(f"{register} : ") :][:400]
        assert "Space ID : 01 [SystemIO]" in place
        assert f"Address : 000000000000{port}" in place
    assert text["APIC"].count("Processor Enabled : 1") == 2
