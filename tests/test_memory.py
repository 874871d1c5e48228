"""Guest memory: slots from memfds, what is refused, what removal waits for."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.errors import GuestError, VmmError
from evtchnd.grants import GrantTable
from evtchnd.memory import GuestMemory, check_memfd, is_hugetlb, map_page


def memfd(pages: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("test", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * 4096)
    return fd


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memfd(64)
    yield fd
    os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_read_write_and_view_across_slots(fd: int) -> None:
    with GuestMemory() as memory:
        memory.add(3, 0x10, 2, fd, 0)
        memory.add(1, 0x12, 2, fd, 32 * 4096)
        memory.write(0x11FFE, b"abcdef")
        assert memory.read(0x11FFE, 6) == b"abcdef"
        assert os.pread(fd, 2, 2 * 4096 - 2) == b"ab"
        assert os.pread(fd, 4, 32 * 4096) == b"cdef"
        with memory.view(0x13) as page:
            assert len(page) == 4096
            page[:2] = b"xy"
        assert memory.read(0x13000, 2) == b"xy"
        assert dict(memory.slots)[3] == (3, 0x10, 2, 0)
        for gfn in (0, 0xF, 0x14, 1 << 60, -1):
            with pytest.raises(GuestError, match="is in no memory slot"):
                memory.view(gfn)
        with pytest.raises(GuestError):
            memory.read(0x13FFF, 2)


def test_no_descriptor_is_kept(fd: int) -> None:
    before = descriptors()
    with GuestMemory() as memory:
        memory.add(0, 0, 64, fd, 0)
        page = map_page(fd, 4096)
        assert descriptors() == before
        page[:3] = b"abc"
        assert memory.read(4096, 3) == b"abc"
        page.close()
    assert descriptors() == before


def test_vmm_memory_is_sealed_and_kept_out_of_core_dumps(fd: int) -> None:
    with GuestMemory() as memory:
        memory.add(0, 0, 64, fd, 0)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        maps = Path("/proc/self/smaps").read_text().split("memfd:test")[1]
        assert "dd" in maps[maps.index("VmFlags") :].splitlines()[0].split()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((9, 10, 0, 0), "empty"),
        ((9, -1, 1, 0), "empty or past"),
        ((9, (1 << 40) - 1, 2, 0), "past 52 address bits"),
        ((9, 1 << 63, 1, 0), "past 52 address bits"),
        ((9, 100, 1, 100), "multiples of 4096"),
        ((9, 100, 1, -4096), "multiples of 4096"),
        ((9, 100, 65, 0), "past the end"),
        ((9, 100, 1, 64 * 4096), "past the end"),
        ((9, 100, 1, (1 << 63) - 4096), "wraps"),
        ((9, 11, 1, 0), r"slot 9 \(frames 0xb-0xb\) overlaps slot 5 \(frames 0xa-0x13\)"),
        ((9, 8, 3, 0), "overlaps slot 5"),
        ((9, 19, 3, 0), "overlaps slot 5"),
        ((5, 100, 1, 0), "there already"),
    ],
)
def test_vmm_a_bad_slot_is_refused_and_changes_nothing(fd: int, args: tuple[int, int, int, int], reason: str) -> None:
    slot, gfn, pages, offset = args
    with GuestMemory() as memory:
        memory.add(5, 10, 10, fd, 0)
        with pytest.raises(VmmError, match=reason):
            memory.add(slot, gfn, pages, fd, offset)
        assert list(memory.slots) == [5]
        memory.add(7, 20, 10, fd, 0)  # right behind it


def test_vmm_wrong_descriptors_are_refused(tmp_path: Path) -> None:
    r, w = os.pipe()
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 4096)
    source = memfd(1)
    read_only = os.open(f"/proc/self/fd/{source}", os.O_RDONLY)
    bad = [r, w, plain, os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "plain", os.O_PATH), os.eventfd(0)]
    bad += [memfd(1, 0), read_only]
    before = descriptors()
    with GuestMemory() as memory:
        for fd in [*bad, 99999]:
            with pytest.raises(VmmError, match="memory slot 0: "):
                memory.add(0, 0, 1, fd, 0)
        assert not memory.slots
    with pytest.raises(VmmError, match="cannot"):
        check_memfd(bad[6], 0, 4096, "xenstore page")
    assert descriptors() == before
    for fd in [*bad, source]:
        os.close(fd)


def test_a_file_may_be_memory_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(b"x" * 8192)
    with (tmp_path / "ram").open("r+b") as file, GuestMemory(foreign_ok=True) as memory:
        memory.add(0, 0, 2, file.fileno(), 0)
        assert memory.read(4096, 3) == b"xxx"
        with pytest.raises(VmmError, match="past the end"):
            memory.add(1, 2, 3, file.fileno(), 0)


def test_a_removed_slot_stays_while_a_pin_holds_it(fd: int) -> None:
    table = memfd(1)
    memory = GuestMemory()
    memory.add(0, 0, 64, fd, 0)
    grants = GrantTable(memory, 7)
    grants.add_frame(0, table, 0)
    os.pwrite(table, (1).to_bytes(4, "little") + (5).to_bytes(4, "little"), 8 * 9)
    page = grants.map(9, write=True)
    memory.remove(0)
    with pytest.raises(GuestError):
        memory.view(5)
    memory.add(0, 0, 32, fd, 32 * 4096)  # other memory at the same frames
    page.view[:3] = b"old"
    assert os.pread(fd, 3, 5 * 4096) == b"old"
    with pytest.raises(RuntimeError, match="1 pins"):
        memory.close()
    page.close()
    grants.close()
    memory.close()
    memory.close()
    os.close(table)


def test_a_view_that_is_alive_is_told(fd: int) -> None:
    memory = GuestMemory()
    memory.add(0, 0, 64, fd, 0)
    page = memory.view(1)
    with pytest.raises(RuntimeError, match="views"):
        memory.close()
    page.release()
    memory.close()


def test_vmm_slots_are_bounded_and_unknown_ones_are_told(fd: int) -> None:
    with GuestMemory(max_slots=4) as memory:
        for slot in range(4):
            memory.add(slot, slot, 1, fd, 0)
        with pytest.raises(VmmError, match="at most 4"):
            memory.add(4, 4, 1, fd, 0)
        with pytest.raises(VmmError, match="not there"):
            memory.remove(4)
        for _ in range(20):
            memory.remove(2)
            memory.add(2, 2, 1, fd, 4096)


def test_huge_pages_are_memory_but_no_control_page() -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        os.ftruncate(fd, 2 << 20)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    assert is_hugetlb(fd)
    with pytest.raises(VmmError, match="huge pages"):
        check_memfd(fd, 0, 4096, "xenstore page")
    check_memfd(fd, 0, 2 << 20, "memory slot 0", hugetlb=True)
    if int(Path("/proc/sys/vm/nr_hugepages").read_text()) == 0:
        os.close(fd)
        pytest.skip("no huge page is reserved here (vm.nr_hugepages is 0)")
    with GuestMemory() as memory:
        memory.add(0, 0, 512, fd, 0)
        memory.write(4096, b"huge")
        assert memory.read(4096, 4) == b"huge"
    os.close(fd)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), max_size=12), st.data())
def test_look_ups_agree_with_a_plain_dict(slots: list[tuple[int, int]], data: st.DataObject) -> None:
    fd = memfd(64)
    model: dict[int, int] = {}  # gfn -> page of the memfd
    live: dict[int, range] = {}
    with GuestMemory() as memory:
        for slot, (gfn, pages) in enumerate(slots):
            if live and data.draw(st.booleans()):
                gone = data.draw(st.sampled_from(sorted(live)))
                memory.remove(gone)
                for frame in live.pop(gone):
                    del model[frame]
            frames = range(gfn, gfn + pages)
            if any(frame in model for frame in frames):
                with pytest.raises(VmmError):
                    memory.add(slot, gfn, pages, fd, 0)
                continue
            memory.add(slot, gfn, pages, fd, slot * 4096)
            live[slot] = frames
            model.update({frame: slot + i for i, frame in enumerate(frames)})
            for frame in range(66):
                assert (memory.row_of(frame) >= 0) == (frame in model)
                if frame in model:
                    with memory.view(frame) as view:
                        at = ctypes.addressof(ctypes.c_char.from_buffer(view))
                        view[:8] = at.to_bytes(8, "little")
                    assert os.pread(fd, 8, 4096 * model[frame]) == at.to_bytes(8, "little")
    os.close(fd)
