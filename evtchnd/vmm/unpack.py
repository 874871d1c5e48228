"""The packings that Linux' build knows: one packed kernel to its ELF image.

gzip, bzip2, xz and lzma by Python; lz4, lzo and zstd by their libraries. Imported where something is unpacked: most
starts find it in the cache, and each of these modules takes its time.
"""

from __future__ import annotations

import bz2
import ctypes
import lzma
import struct
import zlib
from typing import Protocol

from evtchnd.errors import OperatorError

# A distribution's kernel has 60 MB unpacked, one with all debugging built in some hundreds.
MAX_UNPACKED = 1 << 30


def packing(data: bytes) -> str:
    """How data is packed, by its first bytes; "" for what is not known."""
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")


_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x89LZO": "lzo",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def unpack(data: bytes, *, sized: bool) -> bytes:
    """`sized`: the last 4 bytes are the unpacked size, as the kernel's build appends it (gzip has it by itself).

    OperatorError.
    """
    name = packing(data)
    size = int.from_bytes(data[-4:], "little") if sized or name == "gzip" else 0
    if size > MAX_UNPACKED:
        raise OperatorError(f"{size >> 20} MiB unpacked: more than {MAX_UNPACKED >> 20}")
    packed = data[:-4] if sized and name != "gzip" else data
    try:
        match name:
            case "gzip":
                image = _whole(zlib.decompressobj(31), packed)
            case "bzip2":
                image = _whole(bz2.BZ2Decompressor(), packed)
            case "xz" | "lzma":
                image = _whole(lzma.LZMADecompressor(), packed)
            case "lz4":
                image = _lz4(packed)
            case "lzo":
                image = _lzo(packed)
            case "zstd":
                image = _zstd(packed, size)
            case _:
                raise OperatorError(f"its payload begins with {data[:4].hex()}: no packing that is known")
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise OperatorError(f"its {name} payload is damaged: {error}") from None
    if size and len(image) != size:
        raise OperatorError(f"its {name} payload is damaged: {len(image)} bytes came out of it, {size} expected")
    return image


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _whole(unpacker: _Unpacker, data: bytes) -> bytes:
    image = unpacker.decompress(data, MAX_UNPACKED)
    if not unpacker.eof:
        raise ValueError("it ends too early, or does not end")
    return image


def _library(name: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise OperatorError(f"{name} is missing: install Debian's {package}") from None


def _zstd(data: bytes, size: int) -> bytes:
    """One frame (libzstd: zstd.h)."""
    library = _library("libzstd.so.1", "libzstd1")
    for function in (library.ZSTD_decompress, library.ZSTD_getErrorName, library.ZSTD_getFrameContentSize):
        function.restype = ctypes.c_size_t
    library.ZSTD_getFrameContentSize.restype = ctypes.c_uint64
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    library.ZSTD_getErrorName.argtypes = (ctypes.c_size_t,)
    library.ZSTD_decompress.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
    if not size:
        size = library.ZSTD_getFrameContentSize(data, ctypes.c_size_t(len(data)))
        if size > MAX_UNPACKED:  # also its "unknown" and "error"
            raise ValueError("a frame without its size")
    out = ctypes.create_string_buffer(max(size, 1))
    got = library.ZSTD_decompress(out, size, data, len(data))
    if library.ZSTD_isError(got):
        raise ValueError(library.ZSTD_getErrorName(got).decode())
    return ctypes.string_at(out, got)


def _lz4(data: bytes) -> bytes:
    """The legacy frame, which the kernel's build makes: magic, then blocks {u32 size, data} of 8 MiB unpacked."""
    library = _library("liblz4.so.1", "liblz4-1")
    block = 8 << 20
    out = ctypes.create_string_buffer(block)
    image, at = bytearray(), 4
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        packed = data[at + 4 : at + 4 + size]
        got = library.LZ4_decompress_safe(packed, out, len(packed), block)
        if got < 0 or len(packed) < size:
            raise ValueError(f"the block at byte {at}")
        image += ctypes.string_at(out, got)
        if len(image) > MAX_UNPACKED:
            raise ValueError(f"more than {MAX_UNPACKED >> 20} MiB")
        at += 4 + size
    return bytes(image)


# lzop's flags: which checksums a block has, of its unpacked data and of its packed data; more fields of the header
_LZOP_ADLER32_D, _LZOP_ADLER32_C, _LZOP_CRC32_D, _LZOP_CRC32_C = 0x1, 0x2, 0x100, 0x200
_LZOP_EXTRA_FIELD, _LZOP_FILTER = 0x40, 0x800
_LZOP_BLOCK = 256 << 10  # unpacked, at most: lzop's own, and all that the kernel unpacks


def _lzo(data: bytes) -> bytes:
    """What lzop makes (lib/decompress_unlzo.c; liblzo2: lzo1x.h). Everything is big-endian:

    magic (9), version (2), of the library (2), needed (2), method (1), level (1), flags (4), mode (4), mtime (8),
    length of the name (1), name, checksum (4); then blocks {unpacked (4), packed size (4), checksums (4 each), data}
    up to one of 0 bytes. A block that is as long as its data is not packed.
    """
    library = _library("liblzo2.so.2", "liblzo2-2")
    unpack_block = library.lzo1x_decompress_safe
    unpack_block.argtypes = (ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    version, flags = struct.unpack_from(">9xH", data)[0], struct.unpack_from(">17xI", data)[0]
    if version < 0x0940 or flags & (_LZOP_EXTRA_FIELD | _LZOP_FILTER):
        raise ValueError(f"a header of lzop's version {version:#x} with flags {flags:#x}")
    at = 34 + data[33] + 4
    of_data = [flag for flag in (_LZOP_ADLER32_D, _LZOP_CRC32_D) if flags & flag]
    of_packed = [flag for flag in (_LZOP_ADLER32_C, _LZOP_CRC32_C) if flags & flag]
    out, got = ctypes.create_string_buffer(_LZOP_BLOCK), ctypes.c_ulong()
    image = bytearray()
    while size := struct.unpack_from(">I", data, at)[0]:
        (packed_size,) = struct.unpack_from(">I", data, at + 4)
        sums = at + 8
        start = sums + 4 * (len(of_data) + (len(of_packed) if packed_size < size else 0))
        packed = data[start : start + packed_size]
        if not 0 < packed_size <= size <= _LZOP_BLOCK or len(packed) < packed_size:
            raise ValueError(f"the block at byte {at}")
        block = packed
        if packed_size < size:
            got.value = size
            failed = unpack_block(packed, packed_size, out, ctypes.byref(got), None)
            if failed or got.value != size:
                raise ValueError(f"the block at byte {at}")
            block = ctypes.string_at(out, size)
        for n, flag in enumerate(of_data):
            check = zlib.adler32(block) if flag == _LZOP_ADLER32_D else zlib.crc32(block)
            if check != int.from_bytes(data[sums + 4 * n : sums + 4 * n + 4], "big"):
                raise ValueError(f"the checksum of the block at byte {at}")
        image += block
        if len(image) > MAX_UNPACKED:
            raise ValueError(f"more than {MAX_UNPACKED >> 20} MiB")
        at = start + packed_size
    return bytes(image)
