"""A guest's page and grant allocators."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.abi import GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY
from evtchnd.guest.domain import FIRST_FREE_GFN, Domain, GuestFault
from oneprocess import LocalVm


@pytest.fixture(scope="module")
def vm() -> Iterator[LocalVm]:
    machine = LocalVm(mib=4, frames=1)
    yield machine
    machine.close()


def test_grants_are_what_the_header_says(vm: LocalVm) -> None:
    domain = Domain(vm)
    gref = domain.grant(0x1234, domid=5, readonly=True)
    assert gref >= 8  # the first eight are the toolstack's
    assert struct.unpack_from("<HHI", vm.grants, 8 * gref) == (GTF_PERMIT_ACCESS | GTF_READONLY, 5, 0x1234)
    assert not domain.in_use(gref)
    domain.end_grant(gref)
    assert struct.unpack_from("<HH", vm.grants, 8 * gref) == (0, 0)
    domain.close()


def test_a_pinned_grant_is_not_taken_back(vm: LocalVm) -> None:
    domain = Domain(vm)
    gref = domain.grant(600)
    struct.pack_into("<H", vm.grants, 8 * gref, GTF_PERMIT_ACCESS | GTF_READING)
    assert domain.in_use(gref)
    with pytest.raises(GuestFault, match=f"grant {gref} is still in use"):
        domain.end_grant(gref)
    struct.pack_into("<H", vm.grants, 8 * gref, GTF_PERMIT_ACCESS)
    domain.end_grant(gref)
    domain.close()


def test_a_full_table(vm: LocalVm) -> None:
    domain = Domain(vm)
    taken = [domain.grant(600) for _ in range(512 - 8)]
    assert len(set(taken)) == 504 and domain.free_grefs == 0
    with pytest.raises(GuestFault, match="no free grant"):
        domain.grant(600)
    for gref in taken:
        domain.end_grant(gref)
    assert domain.free_grefs == 504
    domain.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, 99)), max_size=60))
def test_pages_never_overlap_and_come_back_whole(steps: list[tuple[bool, int, int]]) -> None:
    machine = LocalVm(mib=3, frames=1)
    domain = Domain(machine)
    held: list[tuple[int, int]] = []
    try:
        for take, pages, which in steps:
            if take:
                try:
                    gfn = domain.alloc(pages)
                except GuestFault:
                    continue
                assert gfn >= FIRST_FREE_GFN and gfn + pages <= machine.ram_pages
                assert all(gfn + pages <= other or other + size <= gfn for other, size in held)
                held.append((gfn, pages))
            elif held:
                domain.free(*held.pop(which % len(held)))
        for piece in held:
            domain.free(*piece)
        assert domain.alloc(machine.ram_pages - FIRST_FREE_GFN) == FIRST_FREE_GFN
    finally:
        domain.close()
        machine.close()
