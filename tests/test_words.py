"""Raw words: loads, stores, compare-and-swap, pages that follow one another."""

from __future__ import annotations

import mmap

import pytest

from evtchnd._core import Area, Mem, full_fence


def test_words_are_little_endian_and_whole() -> None:
    with mmap.mmap(-1, 4096) as area:
        mem = Mem(area)
        mem.store(4, 0xFFFFFFFF)
        mem.store(8, 0x01020304)
        assert area[:16] == b"\0\0\0\0\xff\xff\xff\xff\x04\x03\x02\x01\0\0\0\0"
        assert (mem.load(4), mem.load(8)) == (0xFFFFFFFF, 0x01020304)
        full_fence()
        mem.close()


def test_compare_and_swap_only_from_the_expected_word() -> None:
    buffer = bytearray(8)
    mem = Mem(buffer)
    assert mem.swap(0, 0, 5) == 0
    assert mem.swap(0, 4, 6) == 5
    assert mem.load(0) == 5
    mem.store(0, 0xABCD_FFFF)
    mem.keep16(0, 0xFFE7)
    assert mem.load(0) == 0xABCD_FFE7


def test_offsets_are_checked_and_close_gives_the_buffer_back() -> None:
    area = mmap.mmap(-1, 4096)
    mem = Mem(area)
    for call in (
        lambda: mem.load(4096),
        lambda: mem.load(-4),
        lambda: mem.read(4090, 7),
        lambda: mem.write(4095, b"12"),
    ):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(BufferError):
        area.close()
    mem.close()
    mem.close()
    area.close()
    with pytest.raises(IndexError):
        mem.load(0)


def test_only_writable_memory_of_whole_words() -> None:
    with pytest.raises(ValueError, match="writable"):
        Mem(bytes(8))
    with pytest.raises(ValueError, match="multiple of 8"):
        Mem(bytearray(12))
    with pytest.raises(ValueError, match="4096"):
        Area([bytearray(4096), bytearray(4088)])
    with pytest.raises(ValueError, match="at least one"):
        Area([])


def test_an_area_copies_across_pages() -> None:
    pages = [bytearray(4096) for _ in range(3)]
    area = Area(pages)
    data = bytes(range(1, 201))
    for at in (0, 3996, 4000, 4095, 8100, 12088):
        area.write(at, data)
        assert area.read(at, 200) == data
        assert (b"".join(pages))[at : at + 200] == data
    for at, n in ((12089, 200), (-1, 2), (0, 4097)):
        with pytest.raises(IndexError):
            area.read(at, n)
    with pytest.raises(IndexError):
        area.load(4096)
    area.close()
