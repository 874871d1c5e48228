"""What a PVH guest finds in its memory, read by a C program that has Xen's own structs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from evtchnd.errors import OperatorError
from evtchnd.vmm import elf, pvh
from test_kernel_image import pvh_elf

MiB = 1 << 20

# prints what a guest would follow from the address of its start_info
READER = """
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <xen/xen.h>
#include <xen/arch-x86/hvm/start_info.h>
int main(int argc, char **argv) {
    FILE *file = fopen(argv[1], "rb");
    char *memory = malloc(64 << 20);
    if (!file || fread(memory, 1, 64 << 20, file) == 0) return 1;
    struct hvm_start_info *info = (void *)(memory + strtoul(argv[2], 0, 0));
    struct hvm_modlist_entry *module = (void *)(memory + info->modlist_paddr);
    struct hvm_memmap_table_entry *map = (void *)(memory + info->memmap_paddr);
    printf("%d %u %u %u\\n", info->magic == XEN_HVM_START_MAGIC_VALUE, info->version, info->flags, info->nr_modules);
    printf("%s\\n%.8s\\n", memory + info->cmdline_paddr, memory + info->rsdp_paddr);
    for (unsigned i = 0; i < info->nr_modules; i++)
        printf("%.5s %lu %s %lu\\n", memory + module[i].paddr, module[i].size,
               module[i].cmdline_paddr ? memory + module[i].cmdline_paddr : "-", module[i].paddr % 4096);
    for (unsigned i = 0; i < info->memmap_entries; i++)
        printf("%lx %lx %u\\n", map[i].addr, map[i].size, map[i].type);
    return 0;
}
"""


def loaded(size: int, image: bytes, line: str = "", modules: list[pvh.Module] | None = None) -> tuple[bytearray, int]:
    memory = bytearray(size)

    def write(address: int, data: bytes | memoryview) -> None:
        assert address + len(data) <= size
        memory[address : address + len(data)] = data

    return memory, pvh.load(write, size, 2, elf.parse(image), line, modules or [])


def test_xens_own_structs_find_everything(tmp_path: Path) -> None:
    if not shutil.which("gcc") or not Path("/usr/include/xen/arch-x86/hvm/start_info.h").exists():
        pytest.skip("no gcc or no libxen-dev")
    modules = [pvh.Module(b"first" + bytes(10000), "its line"), pvh.Module(b"next!" * 1000)]
    memory, at = loaded(64 * MiB, pvh_elf(), "root=/dev/xvda quiet", modules)
    (tmp_path / "memory").write_bytes(memory)
    (tmp_path / "reader.c").write_text(READER)
    subprocess.run(["gcc", "-o", tmp_path / "reader", tmp_path / "reader.c"], check=True)
    out = subprocess.run([tmp_path / "reader", tmp_path / "memory", hex(at)], stdout=subprocess.PIPE, check=True)
    assert out.stdout.decode().splitlines() == [
        "1 1 0 2",
        "root=/dev/xvda quiet",
        "RSD PTR ",
        "first 10005 its line 0",
        "next! 5000 - 0",
        "0 9fc00 1",
        "9fc00 400 2",
        "f0000 10000 2",
        "100000 3f00000 1",
        "feff8000 8000 2",
    ]


def test_the_kernel_is_where_its_image_says() -> None:
    image = pvh_elf()
    memory, _ = loaded(64 * MiB, image)
    segment = elf.parse(image).segments[0]
    assert memory[segment.address : segment.address + len(segment.data)] == segment.data


def test_memory_above_3_gib_goes_on_at_4() -> None:
    assert pvh.memory_map(5 << 30)[3:] == [
        (MiB, (3 << 30) - MiB, 1),
        (pvh.SPECIAL, pvh.SPECIAL_SIZE, 2),
        (4 << 30, 2 << 30, 1),
    ]
    assert pvh.low_ram(5 << 30) == 3 << 30


@pytest.mark.parametrize(
    ("size", "line", "modules", "reason"),
    [
        (1 * MiB, "", [], "the kernel wants 0x100000 to .*: give it more memory"),
        (4 * MiB, "", [pvh.Module(bytes(4 * MiB))], "do not fit beside the kernel in 4 MiB"),
        (4 * MiB, "x" * 700_000, [], "a command line of 700000 bytes is too long"),
        (4 * MiB, "a\0b", [], "has a NUL"),
        (4 * MiB, "", [pvh.Module(b"")] * 200, "200 modules: at most"),
    ],
)
def test_refused_with_the_reason(size: int, line: str, modules: list[pvh.Module], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        loaded(size, pvh_elf(), line, modules)
