"""From a kernel's file to the ELF image in it: a bzImage's payload, unpacked once and kept in the user's cache.

    ${XDG_CACHE_HOME:-~/.cache}/evtchnd/kernels/SIZE-MTIME-CTIME-CRC32      of the kernel's file; the CRC is its path's

Unpacking 12 MB of zstd takes seconds where processors are emulated, so the last few are kept. Which one it is is told
by the file's times, not by its content: reading that, and a checksum of it, took longer than all the rest.
Source: Linux, Documentation/arch/x86/boot.rst (the header, from 0x1f1 on); arch/x86/boot/compressed/Makefile (the
payload: packed data, then, except for gzip, its unpacked size in 4 bytes).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from pathlib import Path

from evtchnd.errors import OperatorError

KEPT = 6

_ELF = b"\x7fELF"
_HDRS_AT, _HDRS = 0x202, b"HdrS"
_VERSION_WITH_PAYLOAD = 0x0208  # of the boot protocol: payload_offset and payload_length


def elf_image(path: Path) -> memoryview:
    """The ELF image of a kernel's file: a bzImage, an ELF file, or a packed one. OperatorError in one line."""
    try:
        with path.open("rb") as file:
            kept = _place(path, os.fstat(file.fileno()))
            with contextlib.suppress(OSError, ValueError):
                return _mapped(kept)
            data = file.read()
    except OSError as error:
        raise OperatorError(f"kernel {path}: {error.strerror}") from None
    try:
        image = _image(data)
    except OperatorError as error:
        raise OperatorError(f"kernel {path}: {error}") from None
    if image is not data:
        _keep(kept, image)
    return memoryview(image)


def _image(data: bytes) -> bytes:
    """`data` itself, if it is the image."""
    from evtchnd.vmm import unpack

    if data.startswith(_ELF):
        return data
    if data[_HDRS_AT : _HDRS_AT + 4] == _HDRS:
        payload = bzimage_payload(data)
        return payload if payload.startswith(_ELF) else unpack.unpack(payload, sized=True)
    if data[0x38:0x3C] == b"ARM\x64":
        raise OperatorError("for another machine (arm64): an x86 kernel is wanted")
    if data[0x30:0x34] == b"RISC" or data[0x38:0x3C] == b"RSC\x05":
        raise OperatorError("for another machine (riscv): an x86 kernel is wanted")
    if unpack.packing(data):
        image = unpack.unpack(data, sized=False)
        if image.startswith(_ELF):
            return image
    raise OperatorError("no kernel: neither an ELF file nor a bzImage")


def bzimage_payload(data: bytes) -> bytes:
    """The packed kernel inside of a bzImage. OperatorError."""
    if len(data) < 0x250:
        raise OperatorError("a bzImage that ends in its header")
    version, setup_sectors = int.from_bytes(data[0x206:0x208], "little"), data[0x1F1] or 4
    if version < _VERSION_WITH_PAYLOAD:
        raise OperatorError(f"a bzImage of boot protocol {version >> 8}.{version & 255:02}: older than 2.08 (2008)")
    offset, size = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start : start + size]
    if not size or len(payload) < size:
        raise OperatorError("a bzImage that was cut off: its payload is past the end")
    return payload


# ---- the cache ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evtchnd" / "kernels"


def _place(path: Path, info: os.stat_result) -> Path:
    """Where the image of a file is kept. Whatever changes a file, or puts another in its place, changes its ctime."""
    name = (info.st_size, info.st_mtime_ns, info.st_ctime_ns, zlib.crc32(os.fsencode(path.resolve())))
    return cache_folder() / "-".join(f"{number:x}" for number in name)


def _mapped(kept: Path) -> memoryview:
    """OSError, ValueError (empty): it is not there. Nobody cuts it off under the mapping: it is only replaced."""
    with kept.open("rb") as file:
        with contextlib.suppress(OSError):
            os.utime(file.fileno())  # those that nobody uses go first
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE))


def _keep(kept: Path, image: bytes) -> None:
    """Where it can be written."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.part-{os.getpid()}")
        part.write_bytes(image)
        part.rename(kept)
        for old in sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()
