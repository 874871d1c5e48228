"""A kernel's ELF image: what a compiler makes, and what cannot be started."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from evtchnd.errors import OperatorError
from evtchnd.vmm import elf
from test_kernel_image import pvh_elf

SOURCE = """
        .code32
        .globl start
start:  hlt
        .data
        .long 0x12345678
        .bss
        .space 70000
        .section .note.Xen, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start
"""


@pytest.mark.parametrize("in_segment", [True, False], ids=["PT_NOTE", "section alone"])
def test_what_the_linker_makes(in_segment: bool, tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    (tmp_path / "a.S").write_text(SOURCE)
    script = "PHDRS { text PT_LOAD; data PT_LOAD; " + ("note PT_NOTE; " if in_segment else "") + "}\n"
    script += "SECTIONS { . = 0x200000; .text : { *(.text) } :text  . = 0x201000; .data : { *(.data) } :data\n"
    script += " .note : { *(.note.Xen) } :data" + (" :note" if in_segment else "") + "\n .bss : { *(.bss) } :data }\n"
    (tmp_path / "a.ld").write_text(script)
    out = tmp_path / "a.elf"
    command = ["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-T,a.ld", "-o", str(out), "a.S"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    data = out.read_bytes()
    image = elf.parse(data)
    assert image.entry == 0x200000
    assert image.start == 0x200000
    assert image.end >= 0x201000 + 70000
    assert {segment.address: bytes(segment.data[:4]) for segment in image.segments}[0x201000] == b"\x78\x56\x34\x12"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"\x7fELF", "ends too early|neither 32 nor 64"),
        (pvh_elf()[:100], "ends too early"),
        (pvh_elf()[:5000], "ends too early"),
        (pvh_elf(machine=183), r"for another machine \(arm64\): an x86 kernel is wanted"),
        (pvh_elf(machine=999), r"for another machine \(999\)"),
        (pvh_elf(note=None), r"no PVH entry \(Xen's ELF note 18\)"),
        (pvh_elf(note=6), "no PVH entry"),
        (b"MZ" + bytes(100), "no ELF image"),
    ],
)
def test_refused_with_the_reason(image: bytes, reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        elf.parse(image)


def test_no_byte_of_the_headers_can_do_more_than_refuse() -> None:
    good = pvh_elf(size=64)
    for at in range(len(good)):
        for value in (0, 1, 0x7F, 0xFF):
            bad = bytearray(good)
            bad[at] = value
            try:
                elf.parse(bytes(bad))
            except OperatorError:
                continue
