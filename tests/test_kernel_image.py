"""A kernel's file, in each packing that Linux' build knows, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from evtchnd.errors import OperatorError
from evtchnd.vmm import elf, kernel_image, unpack

# what the kernel's build calls (scripts/Makefile.lib); the last 4 bytes of the payload are the size, but for gzip
PACKINGS = ["plain", "gzip", "bzip2", "xz", "lzma", "lz4", "lzo", "zstd"]


def pvh_elf(
    *, bits: int = 64, machine: int = 62, note: int | None = elf.PHYS32_ENTRY, size: int = 9000, noise: int = 0
) -> bytes:
    """An ELF image with one segment at 1 MiB and Xen's note in a PT_NOTE."""
    header = 64 if bits == 64 else 52
    entry_size = 56 if bits == 64 else 32
    body = random.Random(noise).randbytes(size)
    desc = struct.pack("<Q" if bits == 64 else "<I", 0x100020)
    notes = struct.pack("<III", 4, 4, 1) + b"GNU\0" + bytes(4)
    notes += struct.pack("<III", 4, len(desc), note) + b"Xen\0" + desc if note is not None else b""
    at_body = header + 2 * entry_size
    at_notes = at_body + size
    out = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)).ljust(12, b"\0")
    if bits == 64:
        out += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0x100000, header, 0, 0, 64, 56, 2, 0, 0, 0)
        out += struct.pack("<IIQQQQQQ", 1, 5, at_body, 0xFFFFFFFF80100000, 0x100000, size, size + 4096, 4096)
        out += struct.pack("<IIQQQQQQ", 4, 4, at_notes, 0, 0, len(notes), len(notes), 4)
    else:
        out += struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0x100000, header, 0, 0, 52, 32, 2, 0, 0, 0)
        out += struct.pack("<IIIIIIII", 1, at_body, 0xC0100000, 0x100000, size, size + 4096, 5, 4096)
        out += struct.pack("<IIIIIIII", 4, at_notes, 0, 0, len(notes), len(notes), 4, 4)
    return out + body + notes


def packed(image: bytes, how: str, folder: Path) -> bytes:
    """By the programs that the kernel's build uses."""
    size = len(image).to_bytes(4, "little")
    match how:
        case "plain":
            return image
        case "gzip":
            return gzip.compress(image, 9)
        case "bzip2":
            return bz2.compress(image) + size
        case "xz":
            filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
            return lzma.compress(image, check=lzma.CHECK_CRC32, filters=filters) + size
        case "lzma":
            return lzma.compress(image, format=lzma.FORMAT_ALONE) + size
    commands = {"lz4": ["lz4", "-l", "-9", "-q"], "lzo": ["lzop", "-9"], "zstd": ["zstd", "-q", "-19"]}
    command = commands[how]
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here: apt-get install {command[0]}")
    (folder / "image").write_bytes(image)
    with (folder / "image").open("rb") as file:
        done = subprocess.run([*command, "-c", "-"], stdin=file, stdout=subprocess.PIPE, check=True)
    return done.stdout + size


def bzimage(payload: bytes, *, version: int = 0x020F, setup_sectors: int = 4, offset: int = 0x3A0) -> bytes:
    out = bytearray((setup_sectors + 1) * 512 + offset)
    out[0x1F1] = setup_sectors
    out[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", out, 0x206, version)
    struct.pack_into("<II", out, 0x248, offset, len(payload))
    return bytes(out) + payload + b"after it"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evtchnd" / "kernels"


def written(folder: Path, data: bytes) -> Path:
    (folder / "vmlinuz").write_bytes(data)
    return folder / "vmlinuz"


@pytest.mark.parametrize("how", PACKINGS)
def test_the_elf_image_comes_out_of_a_bzimage(how: str, tmp_path: Path) -> None:
    image = pvh_elf(size=20 << 20 if how == "lz4" else 90000)  # lz4: more than one block
    path = written(tmp_path, bzimage(packed(image, how, tmp_path)))
    assert kernel_image.elf_image(path) == image
    parsed = elf.parse(image)
    assert (parsed.entry, parsed.start, parsed.end) == (
        0x100020,
        0x100000,
        0x100000 + len(parsed.segments[0].data) + 4096,
    )


@pytest.mark.parametrize("how", ["plain", "gzip", "xz"])
def test_an_elf_file_packed_or_not_is_a_kernel_too(how: str, tmp_path: Path) -> None:
    image = pvh_elf(bits=32, machine=3)
    data = packed(image, how, tmp_path)
    assert kernel_image.elf_image(written(tmp_path, data[:-4] if how == "xz" else data)) == image
    assert elf.parse(image).entry == 0x100020


def test_a_boot_sector_count_of_zero_means_four(tmp_path: Path) -> None:
    data = bytearray(bzimage(pvh_elf()))
    data[0x1F1] = 0
    assert kernel_image.elf_image(written(tmp_path, bytes(data))) == pvh_elf()


def test_what_was_unpacked_is_kept_until_the_file_is_another(tmp_path: Path, own_cache: Path) -> None:
    image = pvh_elf()
    path = written(tmp_path, bzimage(gzip.compress(image)))
    kernel_image.elf_image(path)
    (kept,) = own_cache.iterdir()
    # seen to be read: what lies there is what comes
    kept.write_bytes(b"\x7fELF, kept")
    assert kernel_image.elf_image(path) == b"\x7fELF, kept"
    other = pvh_elf(noise=1, size=9001)
    written(tmp_path, bzimage(gzip.compress(other, 0)))
    assert kernel_image.elf_image(path) == other
    # another file with the same size and mtime in its place
    before, new = path.stat(), tmp_path / "new"
    new.write_bytes(bzimage(gzip.compress(pvh_elf(noise=2, size=9001), 0)))
    while new.stat().st_ctime_ns == before.st_ctime_ns or new.stat().st_mtime_ns != before.st_mtime_ns:
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)
    assert path.stat().st_size == before.st_size
    assert kernel_image.elf_image(path) == pvh_elf(noise=2, size=9001)
    # the same content under another name is unpacked for itself
    shutil.copy2(path, tmp_path / "copy")
    assert kernel_image.elf_image(tmp_path / "copy") == pvh_elf(noise=2, size=9001)


def test_the_cache_does_not_grow(tmp_path: Path, own_cache: Path) -> None:
    for i in range(kernel_image.KEPT + 3):
        kernel_image.elf_image(written(tmp_path, bzimage(gzip.compress(pvh_elf(noise=i)))))
        os.utime(max(own_cache.iterdir(), key=lambda path: path.stat().st_mtime_ns), (i, i))
    assert len(list(own_cache.iterdir())) == kernel_image.KEPT


def test_what_is_used_stays_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "used").write_bytes(bzimage(gzip.compress(pvh_elf())))
    kernel_image.elf_image(tmp_path / "used")
    (used,) = own_cache.iterdir()
    for i in range(kernel_image.KEPT + 1):
        os.utime(used, (0, 0))
        kernel_image.elf_image(tmp_path / "used")
        kernel_image.elf_image(written(tmp_path, bzimage(gzip.compress(pvh_elf(noise=i)))))
        assert used.exists()


def test_without_a_cache_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel_image.elf_image(written(tmp_path, bzimage(gzip.compress(pvh_elf())))) == pvh_elf()


GZIP = gzip.compress(pvh_elf())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no kernel: neither an ELF file nor a bzImage"),
        (b"#!/bin/sh\n" * 100, "no kernel: neither"),
        (gzip.compress(b"a text"), "no kernel: neither"),
        (bytes(0x38) + b"ARM\x64" + bytes(100), "for another machine (arm64)"),
        (bzimage(GZIP)[:0x240], "ends in its header"),
        (bzimage(GZIP)[:4000], "cut off"),
        (bzimage(b""), "cut off"),
        (bzimage(GZIP, version=0x0207), "older than 2.08"),
        (bzimage(b"\x89LZO" + bytes(50)), "its lzo payload is damaged: a header of lzop's version 0x0"),
        (bzimage(b"\x89LZO" + bytes(10)), "its lzo payload is damaged"),
        (bzimage(b"what?" + bytes(50)), "no packing that is known"),
        (bzimage(GZIP[:-200] + bytes(200)), "its gzip payload is damaged"),
        (bzimage(GZIP[:-4] + bytes(3) + b"\1"), "its gzip payload is damaged"),
        (bzimage(GZIP[:-4] + b"\xff\xff\xff\xff"), "MiB unpacked: more than"),
        (bzimage(bz2.compress(pvh_elf())[:-100] + bytes(4)), "its bzip2 payload is damaged"),
        (bzimage(b"\x28\xb5\x2f\xfd" + bytes(60) + b"\0\1\0\0"), "its zstd payload is damaged"),
        (bzimage(b"\x02\x21\x4c\x18\x10\0\0\0" + b"\xff" * 16 + b"\0\1\0\0"), "its lz4 payload is damaged"),
    ],
)
def test_refused_with_the_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    with pytest.raises(OperatorError) as refused:
        kernel_image.elf_image(path)
    assert str(refused.value).startswith(f"kernel {path}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [[], ["--crc32"], ["-F"], ["-1", "-n"]])
def test_what_lzop_makes(options: list[str], tmp_path: Path) -> None:
    """Blocks that it packs and such that it leaves as they are; a damaged one is found, where it has a checksum."""
    if not shutil.which("lzop"):
        pytest.skip("no lzop here: apt-get install lzop")
    image = pvh_elf(size=300_000) + b"again and again " * 30_000
    (tmp_path / "image").write_bytes(image)
    command = ["lzop", *options, "-c", tmp_path / "image"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert unpack.unpack(data, sized=False) == image
    if "-F" not in options:
        with pytest.raises(OperatorError, match="its lzo payload is damaged: the checksum of the block at byte"):
            unpack.unpack(data[:1000] + bytes((data[1000] ^ 1,)) + data[1001:], sized=False)
    for end in (20, 30, 36, 1000, len(data) - 5, len(data) - 1):
        with pytest.raises(OperatorError, match="its lzo payload is damaged"):
            unpack.unpack(data[:end], sized=False)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack.ctypes, "CDLL", _no_library)
    for magic, line in (
        (b"\x89LZO", "liblzo2.so.2 is missing: install Debian's liblzo2-2"),
        (b"\x02\x21\x4c\x18", "liblz4.so.1 is missing: install Debian's liblz4-1"),
    ):
        with pytest.raises(OperatorError, match=f"^{line}$"):
            unpack.unpack(magic + bytes(50), sized=False)


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="none: No such file or directory"):
        kernel_image.elf_image(tmp_path / "none")
