"""Grants: who may, who may not, what the guest sees in its entry, and what is left at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bareguest import Ram
from evtchnd._core import COMPILED, pins
from evtchnd.errors import GuestError, VmmError
from evtchnd.grants import refuse_version
from scale import scaled

READING, WRITING, READONLY = 8, 16, 4


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


def test_flags_tell_the_guest_and_go_with_the_last_pin(ram: Ram) -> None:
    ram.grant(9, 0x100003)
    assert ram.grants.pin(9, write=True) == 0x100003
    assert ram.flags(9) == 1 | READING | WRITING
    ram.grants.pin(9, write=False)
    ram.grants.unpin(9, write=True)
    assert ram.flags(9) == 1 | READING
    ram.grants.unpin(9, write=False)
    assert ram.flags(9) == 1
    assert ram.grants.pinned == 0
    for write in (True, False):
        with pytest.raises(ValueError, match="grant 9 is not pinned"):
            ram.grants.unpin(9, write=write)


def test_a_reader_first_then_a_writer(ram: Ram) -> None:
    ram.grant(9, 3)
    ram.grants.pin(9, write=False)
    assert ram.flags(9) == 1 | READING
    ram.grants.pin(9, write=True)
    assert ram.flags(9) == 1 | READING | WRITING
    ram.grants.unpin(9, write=False)
    assert ram.flags(9) == 1 | READING | WRITING
    ram.grants.unpin(9, write=True)
    assert ram.flags(9) == 1


@pytest.mark.parametrize(
    ("gref", "write", "reason"),
    [
        (20, False, "grant 20: is not granted"),
        (21, False, "grant 21: is granted to domain 3, not to 0"),
        (22, True, "grant 22: is read-only"),
        (23, False, "grant 23: frame 0x3ff is in no memory slot"),
        (24, False, "grant 24: frame 0xffffffff is in no memory slot"),
        (25, False, "grant 25: flags 0x101 are no plain access grant"),
        (26, False, "grant 26: flags 0x2 are no plain access grant"),
        (27, False, "grant 27: frame 0x100200 is in no memory slot"),
        (1024, False, "frame 2 of the grant table is not there"),
        (32767, False, "frame 63 of the grant table is not there"),
        (32768, True, "outside the table"),
        (0xFFFFFFFF, True, "outside the table"),
        (1 << 32, True, "no 32-bit reference"),
        (-1, True, "no 32-bit reference"),
    ],
)
def test_grants_what_is_refused_leaves_nothing_behind(ram: Ram, gref: int, write: bool, reason: str) -> None:
    ram.grant(21, 3, domid=3)
    ram.grant(22, 3, flags=1 | READONLY)
    ram.grant(23, 0x3FF)
    ram.grant(24, 0xFFFFFFFF)
    ram.grant(25, 3, flags=0x101)
    ram.grant(26, 3, flags=2)
    ram.grant(27, 0x100200)  # one past the last
    before = bytes(ram.table)
    with pytest.raises(GuestError, match=reason):
        ram.grants.pin(gref, write=write)
    assert bytes(ram.table) == before
    assert ram.grants.pinned == ram.memory.held == 0


def test_a_pinned_entry_is_not_believed_again(ram: Ram) -> None:
    ram.grant(9, 3)
    ram.grants.pin(9, write=False)
    ram.grant(9, 0x3FF, flags=0, domid=5)
    assert ram.grants.pin(9, write=False) == 3
    ram.grant(9, 3, flags=1 | READONLY | READING)
    with pytest.raises(GuestError, match="read-only"):
        ram.grants.pin(9, write=True)
    ram.grants.unpin(9, write=False)
    ram.grants.unpin(9, write=False)
    assert ram.flags(9) == 1 | READONLY


def test_a_mapped_page(ram: Ram) -> None:
    ram.grant(9, 0x100001)
    page = ram.grants.map(9, write=True)
    page.view[:4] = b"ring"
    assert (page.gref, page.gfn) == (9, 0x100001)
    assert ram.memory.read(0x100001 << 12, 4) == b"ring"
    with pytest.raises(RuntimeError, match="1 grants are pinned"):
        ram.grants.close()
    page.close()
    page.close()
    assert ram.flags(9) == 1


def test_xsa_382_frames_come_and_go(ram: Ram) -> None:
    for index, reason in ((0, "there already"), (64, "at most 64"), (-1, "at most 64")):
        with pytest.raises(VmmError, match=reason):
            ram.grants.add_frame(index, ram.table_fd, 0)
    with pytest.raises(VmmError, match="past the end"):
        ram.grants.add_frame(5, ram.table_fd, 8192)
    with pytest.raises(VmmError, match="not there"):
        ram.grants.remove_frame(5)
    ram.grant(9, 3)
    ram.grants.pin(9, write=True)
    ram.grants.remove_frame(0)
    with pytest.raises(GuestError, match="frame 0 of the grant table is not there"):
        ram.grants.pin(9, write=True)
    ram.grants.unpin(9, write=True)  # nowhere to clear the flags
    assert ram.flags(9) == 1 | READING | WRITING
    before = len(os.listdir("/proc/self/fd"))
    ram.grants.add_frame(0, ram.table_fd, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    ram.grants.pin(9, write=True)
    ram.grants.unpin(9, write=True)
    assert ram.flags(9) == 1


def test_version_2_is_refused() -> None:
    refuse_version(1)
    with pytest.raises(VmmError, match="version 2 are not supported"):
        refuse_version(2)
    with pytest.raises(VmmError, match="unknown"):
        refuse_version(3)


FLIP = """
import mmap, os, sys
table = mmap.mmap(int(sys.argv[1]), 4096)
words = memoryview(table).cast("I")
print("on", flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(1000):
        words[18] = 1
        words[18] = 0
        words[18] = 5
        words[18] = 3 << 16 | 1
"""


def test_xsa_295_a_guest_that_flips_its_entry_gets_either_answer(ram: Ram) -> None:
    """XSA-295: pins end after five tries, and no pin is ever left over."""
    ram.grant(9, 3)
    child = subprocess.Popen(
        [sys.executable, "-c", FLIP, str(ram.table_fd), str(os.getpid())],
        pass_fds=[ram.table_fd],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        reasons = set()
        for _ in range(scaled(100_000)):
            try:
                assert ram.grants.pin(9, write=True) == 3
            except GuestError as error:
                reasons.add(str(error))
            else:
                ram.grants.unpin(9, write=True)
        assert len(reasons) <= 4 + 1 + 64  # what the entry can say, with our own flags in between
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    assert ram.grants.pinned == ram.memory.held == 0


@pytest.mark.skipif(COMPILED, reason="the compiled form has nothing to put in between; test_core_forms.py runs this")
@pytest.mark.parametrize("changes", [0, 4, 5])
def test_xsa_295_five_tries(ram: Ram, monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """The entry changes under each of so many tries, and stays a good one."""
    ram.grant(9, 3)
    left = changes
    swap = pins.cas32

    def cas32(p: Any, at: int, old: int, new: int) -> int:
        nonlocal left
        if left:
            left -= 1
            ram.grant(9, 3, flags=1 | (0x20 if left % 2 else 0x40))  # cache attributes: nobody minds them
        return swap(p, at, old, new)

    monkeypatch.setattr(pins, "cas32", cas32)
    if changes < 5:
        assert ram.grants.pin(9, write=True) == 3
        assert ram.flags(9) & (READING | WRITING) == READING | WRITING
        ram.grants.unpin(9, write=True)
    else:
        with pytest.raises(GuestError, match=r"keeps changing \(5 tries\)"):
            ram.grants.pin(9, write=True)
    assert ram.flags(9) & (READING | WRITING) == 0
    assert ram.grants.pinned == 0


class GrantModel(RuleBasedStateMachine):
    """Pins against a plain model: a list of what is held, entry by entry."""

    grefs = st.integers(8, 12)

    def __init__(self) -> None:
        super().__init__()
        self.ram = Ram()
        self.entries = dict.fromkeys(range(8, 13), (0, 0, 0))  # type and read-only, domid, gfn
        self.held: list[tuple[int, bool, int]] = []

    def pins(self, gref: int) -> list[bool]:
        return [write for held, write, _ in self.held if held == gref]

    @rule(
        gref=grefs,
        flags=st.sampled_from([0, 1, 1, 1, 5, 2]),
        domid=st.sampled_from([0, 0, 4]),
        gfn=st.integers(508, 513),
    )
    def grant(self, gref: int, flags: int, domid: int, gfn: int) -> None:
        if not self.pins(gref):  # an honest guest: it sees the flags
            self.entries[gref] = (flags, domid, gfn)
            self.ram.grant(gref, gfn, flags=flags, domid=domid)

    @rule(gref=grefs, write=st.booleans())
    def pin(self, gref: int, write: bool) -> None:
        flags, domid, gfn = self.entries[gref]
        if flags in (1, 5) and domid == 0 and gfn < 512 and not (write and flags == 5):
            assert self.ram.grants.pin(gref, write=write) == gfn
            self.held.append((gref, write, gfn))
        else:
            with pytest.raises(GuestError, match=f"grant {gref}: "):
                self.ram.grants.pin(gref, write=write)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.held:
            gref, write, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.ram.grants.unpin(gref, write=write)

    @rule(gref=grefs, write=st.booleans())
    def unpin_what_is_not(self, gref: int, write: bool) -> None:
        if write not in self.pins(gref):
            with pytest.raises(ValueError, match="not pinned"):
                self.ram.grants.unpin(gref, write=write)

    @invariant()
    def flags_and_counts(self) -> None:
        for gref, (flags, _, _) in self.entries.items():
            pins = self.pins(gref)
            expected = flags | (READING if pins else 0) | (WRITING if True in pins else 0)
            assert self.ram.flags(gref) == expected
            assert self.ram.grants.pins_of(gref) == (pins.count(False), pins.count(True))
        assert self.ram.grants.pinned == self.ram.memory.held == len(self.held)

    def teardown(self) -> None:
        for gref, write, _ in self.held:
            self.ram.grants.unpin(gref, write=write)
        self.ram.close()


# named after what Xen's own counts got wrong
TestXsa_226_230_218_224_316_380 = GrantModel.TestCase
