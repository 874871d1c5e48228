"""Hypercalls of a 64-bit guest on memory alone: what comes back, what is where afterwards, what is refused.

The same calls from a real 32-bit guest: tests/lab/test_micro.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from evtchnd.abi import PAGE_SIZE, Evtchnop, Evtchnstat
from evtchnd.errors import VmmError
from evtchnd.protocol import ALL_PORTS
from evtchnd.vmm import (
    grant_table_op,
    guest_pointer,
    hvm_op,
    hypercalls,
    memory_op,
    physdev,
    pvh,
    vcpu_context,
    vcpu_op,
    xen_version,
)
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.grant_table_op import Gnttabop, GrantFrames, GrantTableOp
from evtchnd.vmm.guest_pointer import Layout, Pointers
from evtchnd.vmm.hvm_op import HvmOp, Hvmop, HvmParam
from evtchnd.vmm.hypercalls import Hypercalls, Number, Schedop, Shutdown
from evtchnd.vmm.kvm import RunstateTimes
from evtchnd.vmm.memory_op import MemoryOp, Xenmem
from evtchnd.vmm.periodic_timers import PeriodicTimers
from evtchnd.vmm.physmap import Memory, Physmap
from evtchnd.vmm.shared_info import SharedInfo
from evtchnd.vmm.soft_kernel import SoftKernel
from evtchnd.vmm.vcpu_context import VcpuContext
from evtchnd.vmm.vcpu_op import VcpuOp, Vcpuop
from evtchnd.vmm.xen_version import Xenver
from test_vcpu_context import context_of_32

MiB = 1 << 20
RAM = 16 * MiB
BASE = 0xFFFF888000000000  # where the guest has its physical memory
STORE_GFN, CONSOLE_GFN = 0xFEFFA, 0xFEFFC
FRAMES = 4
SELF = 0x7FF0
ABOVE = 0x107FFF  # where Linux 6.12 wants its grant table
ARG = BASE + 0x5FF8  # a struct there lies in two pages


@dataclass
class KvmVcpu:
    """What KVM keeps of a vCPU."""

    time_info: int = 0
    runstate: int = 0
    port: int = 0
    expires: int = 0

    def set_time_info(self, gpa: int) -> None:
        self.time_info = gpa

    def set_runstate_address(self, gpa: int) -> None:
        self.runstate = gpa

    def runstate_times(self) -> RunstateTimes:
        return RunstateTimes(0, 1000, 600, 100, 300, 0)

    def set_timer(self, port: int, expires_ns: int = 0) -> None:
        self.port, self.expires = port, expires_ns

    def timer(self) -> tuple[int, int]:
        return self.port, self.expires


@dataclass
class Cpu:
    """The vCPU itself."""

    up: bool
    context: VcpuContext | None = None
    nmis: int = 0

    def is_up(self) -> bool:
        return self.up

    def set_up(self, up: bool) -> None:
        self.up = up

    def set_context(self, context: VcpuContext) -> None:
        self.context = context

    def nmi(self) -> None:
        self.nmis += 1


@dataclass
class Told:
    """What the hypercalls asked of their VMM."""

    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    shared_info: list[int | None] = field(default_factory=list)
    registered: list[tuple[int, int]] = field(default_factory=list)
    vectors: list[tuple[int, ...]] = field(default_factory=list)
    latched: list[bool] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    flags: list[bool] = field(default_factory=list)
    periods: list[tuple[int, int]] = field(default_factory=list)
    text: bytes = b""


class Guest:
    """A domain of two vCPUs whose virtual addresses are physical ones plus BASE, but for `holes`."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self.told = told = Told()
        self.holes: set[int] = set()
        self.ram = Memory("ram", RAM, undo)
        self.special = Memory("special", pvh.SPECIAL_SIZE, undo)
        self.grants = Memory("grants", FRAMES * PAGE_SIZE, undo)

        def set_slot(slot: int, gpa: int, size: int, address: int) -> None:
            if size:
                told.slots[slot] = (gpa, size)
            else:
                del told.slots[slot]

        self.physmap = Physmap(set_slot)
        self.physmap.add(0, RAM // PAGE_SIZE, self.ram)
        self.physmap.add(pvh.SPECIAL // PAGE_SIZE, 8, self.special)
        self.channels = Channels(1, vcpus=2)
        undo.callback(self.channels.close)
        self.info = SharedInfo(self.ram.view[0x10000:0x11000], vcpus=2)
        undo.callback(self.info.close)
        kernel = SoftKernel(self.channels.lock, self.info, "g1")
        undo.callback(kernel.close)
        self.channels.kernel = kernel
        self.channels.ports.reserve(1)
        self.frames = GrantFrames(self.grants, self.ram, self.physmap, told.moved.append)
        self.frames.reserve(CONSOLE_GFN, STORE_GFN)
        self.vcpus = [KvmVcpu(), KvmVcpu()]
        self.cpus = [Cpu(up=True), Cpu(up=False)]
        self.calls = Hypercalls(
            "domain 1 (g1)",
            self.channels,
            MemoryOp(1, self.physmap, self.ram, self.frames, pvh.memory_map(RAM), self._shared_info),
            GrantTableOp(1, self.frames),
            HvmOp(
                1,
                2,
                {HvmParam.STORE_PFN: STORE_GFN, HvmParam.STORE_EVTCHN: 1},
                lambda vector: told.vectors.append((vector,)),
                lambda vcpu, vector: told.vectors.append((vcpu, vector)),
                told.latched.append,
            ),
            VcpuOp(
                self.vcpus,
                self.cpus,
                lambda vcpu, gpa: told.registered.append((vcpu, gpa)),
                periodic=lambda vcpu, period: told.periods.append((vcpu, period)),
                power_off=lambda: told.ended.append(Shutdown.POWEROFF),
            ),
            ended=self._ended,
            write=self._write,
            runstate_flag=told.flags.append,
            handle=bytes(range(16)),
        )

    def _shared_info(self, gfn: int | None) -> int:
        self.told.shared_info.append(gfn)
        return 0

    def _ended(self, reason: int) -> int:
        self.told.ended.append(reason)
        return 0

    def _write(self, text: bytes) -> None:
        self.told.text += text

    def translate(self, page: int) -> int | None:
        gpa = page - BASE
        return gpa if 0 <= gpa < 8 << 30 and page not in self.holes else None

    def call(self, number: int, *params: int, vcpu: int = 0, cpl: int = 0, long_mode: bool = True) -> int:
        pointers = Pointers(self.physmap, self.translate, vcpu=vcpu, long_mode=long_mode)
        return self.calls.answer(pointers, number, (*params, *[0] * (6 - len(params))), cpl)

    def put(self, form: str, *fields: int, at: int = ARG) -> int:
        self.physmap.write(at - BASE, struct.pack("<" + form, *fields))
        return at

    def get(self, form: str, at: int = ARG) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.physmap.read(at - BASE, struct.calcsize("<" + form)))


@pytest.fixture
def guest() -> Iterator[Guest]:
    with contextlib.ExitStack() as undo:
        yield Guest(undo)


# ---- the dispatch ------------------------------------------------------------------------------------------------


def test_unknown_ones_are_counted_by_name_and_said_once(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert guest.call(44) == -errno.ENOSYS
        assert guest.call(Number.HVM_OP, 99) == -errno.ENOSYS
        assert guest.call(Number.MMU_UPDATE) == -errno.ENOSYS
        assert guest.call(Number.EVENT_CHANNEL_OP, Evtchnop.INIT_CONTROL) == -errno.ENOSYS
        assert guest.call(1 << 40) == -errno.ENOSYS
    assert guest.calls.counts == {
        "hypercall.44": 3,
        "hvm_op.99": 3,
        "mmu_update": 3,
        "event_channel_op.init_control": 3,
        f"hypercall.{1 << 40}": 3,
    }
    assert sorted(caplog.messages) == [
        "domain 1 (g1): hvm_op.99: is not there (ENOSYS)",
        f"domain 1 (g1): hypercall.{1 << 40}: is not there (ENOSYS)",
        "domain 1 (g1): hypercall.44: is not there (ENOSYS)",
        "domain 1 (g1): mmu_update: is not there (ENOSYS)",
    ]


def test_a_guest_that_tries_every_number_costs_little(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(5000):
        assert guest.call(1000 + n) == -errno.ENOSYS
        assert guest.call(Number.HVM_OP, 1000 + n) == -errno.ENOSYS
    assert guest.call(Number.XEN_VERSION, Xenver.VERSION) == 0x40011
    assert len(guest.calls.counts) == 257
    assert guest.calls.counts.total() == 10001
    assert len(caplog.messages) == 257
    assert caplog.messages[-1] == "domain 1 (g1): others: is not there (ENOSYS)"


def test_user_mode_may_not(guest: Guest) -> None:
    assert guest.call(Number.XEN_VERSION, Xenver.PAGESIZE) == 4096
    assert guest.call(Number.XEN_VERSION, Xenver.PAGESIZE, cpl=3) == -errno.EPERM


@pytest.mark.parametrize("at", [0, BASE - 1, BASE + RAM - 2, BASE + RAM, (1 << 64) - 3, BASE + (6 << 30)])
def test_a_bad_pointer_is_efault(at: int, guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    for number, op in (
        (Number.MEMORY_OP, Xenmem.ADD_TO_PHYSMAP),
        (Number.HVM_OP, Hvmop.GET_PARAM),
        (Number.XEN_VERSION, Xenver.EXTRAVERSION),
        (Number.SCHED_OP, Schedop.SHUTDOWN),
        (Number.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND),
    ):
        assert guest.call(number, op, at) == -errno.EFAULT, (number, op)
    assert guest.call(Number.GRANT_TABLE_OP, Gnttabop.QUERY_SIZE, at, 1) == -errno.EFAULT
    assert guest.call(Number.VCPU_OP, Vcpuop.REGISTER_VCPU_INFO, 0, at) == -errno.EFAULT
    assert guest.call(Number.MULTICALL, at, 1) == -errno.EFAULT
    assert len(caplog.messages) == 8
    assert all("bad pointer: " in line for line in caplog.messages)
    assert not guest.told.ended


def test_a_struct_in_two_pages_is_read_and_written(guest: Guest) -> None:
    guest.put("HHIQ", SELF, 0, HvmParam.STORE_PFN, 0)
    assert guest.call(Number.HVM_OP, Hvmop.GET_PARAM, ARG) == 0
    assert guest.get("HHIQ") == (SELF, 0, HvmParam.STORE_PFN, STORE_GFN)
    guest.holes = {BASE + 0x6000}
    assert guest.call(Number.HVM_OP, Hvmop.GET_PARAM, ARG) == -errno.EFAULT


def test_a_list_of_calls(guest: Guest) -> None:
    entry = "8Q"
    at = BASE + 0x8000
    guest.put(entry, Number.XEN_VERSION, 7, Xenver.PAGESIZE, 0, 0, 0, 0, 0, at=at)
    guest.put(entry, Number.MULTICALL, 7, at, 1, 0, 0, 0, 0, at=at + 64)
    guest.put(entry, Number.XEN_VERSION, 7, Xenver.EXTRAVERSION, 0, 0, 0, 0, 0, at=at + 128)
    assert guest.call(Number.MULTICALL, at, 3) == 0
    results = [guest.get("q", at + i * 64 + 8)[0] for i in range(3)]
    assert results == [4096, -errno.EINVAL, -errno.EFAULT]
    assert guest.call(Number.MULTICALL, at, 1 << 30) == -errno.EINVAL


# ---- xen_version -------------------------------------------------------------------------------------------------


def test_what_the_hypervisor_says_of_itself(guest: Guest) -> None:
    assert guest.call(Number.XEN_VERSION, Xenver.VERSION) == 0x40011
    assert guest.call(Number.XEN_VERSION, Xenver.BUILD_ID) == -errno.ENODATA
    assert guest.call(Number.XEN_VERSION, Xenver.CAPABILITIES, ARG) == 0
    assert b"hvm-3.0-x86_64" in guest.physmap.read(ARG - BASE, 1024).split(b"\0")[0].split()
    assert guest.call(Number.XEN_VERSION, Xenver.GUEST_HANDLE, ARG) == 0
    assert guest.physmap.read(ARG - BASE, 16) == bytes(range(16))
    guest.put("II", 0, 0)
    assert guest.call(Number.XEN_VERSION, Xenver.GET_FEATURES, ARG) == 0
    assert guest.get("II") == (0, 0x30F)
    guest.put("II", 1, 0)
    assert guest.call(Number.XEN_VERSION, Xenver.GET_FEATURES, ARG) == -errno.EINVAL
    for op, size in ((Xenver.EXTRAVERSION, 16), (Xenver.CHANGESET, 64), (Xenver.COMPILE_INFO, 144)):
        guest.put("200s", b"\xff" * 200)  # type: ignore[arg-type]
        assert guest.call(Number.XEN_VERSION, op, ARG) == 0
        after = guest.physmap.read(ARG - BASE, 200)
        assert after[size - 1] == 0, op
        assert after[size:] == b"\xff" * (200 - size), op


# ---- memory_op ---------------------------------------------------------------------------------------------------


def test_the_memory_map_as_e820(guest: Guest) -> None:
    guest.put("IIQ", 3, 0, BASE + 0x9000)
    assert guest.call(Number.MEMORY_OP, Xenmem.MEMORY_MAP, ARG) == 0
    assert guest.get("I") == (3,)
    assert guest.get("QQI", BASE + 0x9000) == (0, 0x9FC00, 1)
    assert guest.get("QQI", BASE + 0x9000 + 60) == (0, 0, 0)  # no more than there was room for


def add(guest: Guest, space: int, index: int, gfn: int, dom: int = SELF) -> int:
    return guest.call(Number.MEMORY_OP, Xenmem.ADD_TO_PHYSMAP, guest.put("HHIQQ", dom, 0, space, index, gfn))


def remove(guest: Guest, gfn: int) -> int:
    return guest.call(Number.MEMORY_OP, Xenmem.REMOVE_FROM_PHYSMAP, guest.put("H6xQ", SELF, gfn))


def test_a_grant_frame_above_ram_is_a_slot_of_its_own(guest: Guest) -> None:
    assert add(guest, 1, 0, ABOVE) == 0
    assert guest.told.slots[2] == (ABOVE * PAGE_SIZE, PAGE_SIZE)
    assert guest.get("HHI", BASE + ABOVE * PAGE_SIZE + 8) == (1, 0, STORE_GFN)
    assert not guest.told.moved  # the daemon has it where it was
    assert add(guest, 1, 1, ABOVE) == -errno.EBUSY
    assert add(guest, 1, 0, ABOVE + 1) == 0  # it moves
    assert guest.told.slots[2] == ((ABOVE + 1) * PAGE_SIZE, PAGE_SIZE)
    assert remove(guest, ABOVE + 1) == 0
    assert 2 not in guest.told.slots
    assert remove(guest, ABOVE + 1) == -errno.ENOENT


def test_a_grant_frame_over_ram_takes_its_entries_along(guest: Guest) -> None:
    guest.put("HHI", 1, 0, 0x77, at=BASE + 0x20000 + 80)  # what lay there is gone
    assert add(guest, 1, 0, 0x20) == 0
    assert guest.told.moved == [0]
    assert guest.frames.place(0) == (guest.ram.fd, 0x20000)
    assert guest.frames.entry(1) == (1, 0, STORE_GFN)
    assert guest.get("HHI", BASE + 0x20000 + 80) == (0, 0, 0)
    guest.put("HHI", 5, 1, 0x99, at=BASE + 0x20000 + 80)
    assert add(guest, 1, 0, ABOVE) == 0
    assert guest.told.moved == [0, 0]
    assert guest.frames.place(0) == (guest.grants.fd, 0)
    assert guest.frames.entry(10) == (5, 1, 0x99)


def test_a_frame_that_moves_holds_nobody_up(guest: Guest) -> None:
    """The daemon is told of it under a lock that a soft reset takes before the table's."""
    placed: list[tuple[int, int] | None] = []

    def moved(index: int) -> None:
        found: list[tuple[int, int]] = []
        other = threading.Thread(target=lambda: found.append(guest.frames.place(index)), daemon=True)
        other.start()
        other.join(5)
        placed.append(found[0] if found else None)

    guest.frames._moved = moved
    assert add(guest, 1, 0, 0x20) == 0
    assert remove(guest, 0x20) == 0
    assert placed == [(guest.ram.fd, 0x20000), (guest.grants.fd, 0)]


def test_a_frame_that_the_daemon_refuses_is_where_it_was(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    refused = [VmmError("grant frame 0: no", errno.ENOSPC)]

    def moved(index: int) -> None:
        guest.told.moved.append(index)
        if refused:
            raise refused.pop()

    guest.frames._moved = moved
    assert add(guest, 1, 0, ABOVE) == 0
    assert add(guest, 1, 0, 0x20) == -errno.ENOSPC
    assert guest.told.moved == [0, 0]
    assert guest.frames.place(0) == (guest.grants.fd, 0)
    assert guest.told.slots[2] == (ABOVE * PAGE_SIZE, PAGE_SIZE)
    assert guest.frames.entry(1) == (1, 0, STORE_GFN)
    assert caplog.messages == ["domain 1 (g1): memory_op.add_to_physmap: grant frame 0: no"]


@pytest.mark.parametrize(
    ("space", "index", "gfn", "error"),
    [
        (1, FRAMES, ABOVE, errno.EINVAL),
        (1, 1 << 31, ABOVE, errno.EINVAL),  # status frames, of version 2
        (1, 0, 1 << 60, errno.EINVAL),
        (1, 0, STORE_GFN, errno.EINVAL),
        (0, 1, 0x10, errno.EINVAL),
        (2, 0, 0x10, errno.EINVAL),
        (4, 0, 0x10, errno.EPERM),
        (5, 0, 0x10, errno.EPERM),
    ],
)
def test_what_cannot_be_added(space: int, index: int, gfn: int, error: int, guest: Guest) -> None:
    assert add(guest, space, index, gfn) == -error
    assert guest.told == Told(slots=guest.told.slots)
    assert len(guest.told.slots) == 2
    assert add(guest, space, index, gfn, dom=7) == -errno.ESRCH


def test_frames_in_a_batch_each_with_its_error(guest: Guest) -> None:
    guest.put("3Q", 0, FRAMES, 1, at=BASE + 0x9000)
    guest.put("3Q", ABOVE, ABOVE + 1, ABOVE + 2, at=BASE + 0x9100)
    arg = guest.put("HHHHQQQ", SELF, 1, 3, 0, BASE + 0x9000, BASE + 0x9100, BASE + 0x9200)
    assert guest.call(Number.MEMORY_OP, Xenmem.ADD_TO_PHYSMAP_BATCH, arg) == 0
    assert guest.get("3i", BASE + 0x9200) == (0, -errno.EINVAL, 0)
    assert guest.frames.used == 2


def test_shared_info_goes_where_the_guest_says(guest: Guest) -> None:
    assert add(guest, 0, 0, 0x10) == 0
    assert remove(guest, 0x10) == 0
    assert guest.told.shared_info == [0x10, None]


def reservation(guest: Guest, op: Xenmem, gfns: list[int], order: int = 0, start: int = 0) -> int:
    guest.put(f"{len(gfns)}Q", *gfns, at=BASE + 0x9000)
    arg = guest.put("QQIIH", BASE + 0x9000, len(gfns), order, 0, SELF)
    return guest.call(Number.MEMORY_OP, op | start << 6, arg)


def test_ram_that_is_given_back_is_the_hosts(guest: Guest) -> None:
    guest.ram.view[0x100000:0x200000] = b"\xaa" * MiB
    assert reservation(guest, Xenmem.POPULATE_PHYSMAP, [0x100, 0x110], order=4) == 2
    before = Path(f"/proc/self/fd/{guest.ram.fd}").stat().st_blocks
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [0x100, 0x110], order=4) == 2
    assert before - Path(f"/proc/self/fd/{guest.ram.fd}").stat().st_blocks == 32 * 8
    assert not any(guest.ram.view[0x100000:0x120000])
    assert guest.ram.view[0x120000] == 0xAA
    assert reservation(guest, Xenmem.POPULATE_PHYSMAP, [0x100, 0x110], order=4) == 2
    # how far it got: these are no RAM
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [0x100, ABOVE, 0x101]) == 1
    assert reservation(guest, Xenmem.POPULATE_PHYSMAP, [0x100, 0x101, STORE_GFN]) == 2
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [ABOVE, 0x101], start=1) == 2
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [0], order=10) == -errno.EINVAL
    # all of an extent or nothing: its end is past RAM
    guest.ram.view[RAM - PAGE_SIZE :] = b"\xaa" * PAGE_SIZE
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [RAM // PAGE_SIZE - 1], order=1) == 0
    assert guest.ram.view[RAM - 1] == 0xAA
    add(guest, 0, 0, 0x107)
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [0x100], order=3) == 0
    assert reservation(guest, Xenmem.DECREASE_RESERVATION, [0x100, 0x108], order=2) == 2


def test_a_long_list_is_done_in_parts(guest: Guest) -> None:
    """Of the longest list that can be written down, whose extents are as large as they may be."""
    arg = guest.put("QQIIH", BASE + 0x100000, (1 << 58) - 1, 9, 0, SELF)
    guest.ram.view[0x100000:0x200000] = struct.pack("<Q", 0x400) * (MiB // 8)  # that frame, again and again
    for op in (Xenmem.POPULATE_PHYSMAP, Xenmem.DECREASE_RESERVATION):
        done = guest.call(Number.MEMORY_OP, op, arg)
        assert 512 <= done < 10000
        assert guest.call(Number.MEMORY_OP, op | done << 6, arg) == 2 * done
    arg = guest.put("HHHHQQQ", SELF, 1, 0xFFFF, 0, BASE + 0x9000, BASE + 0x9000, BASE + 0x9000)
    assert guest.call(Number.MEMORY_OP, Xenmem.ADD_TO_PHYSMAP_BATCH, arg) == -errno.E2BIG


def test_how_much_memory_there_is(guest: Guest) -> None:
    guest.put("H", SELF)
    assert guest.call(Number.MEMORY_OP, Xenmem.CURRENT_RESERVATION, ARG) == RAM // PAGE_SIZE
    assert guest.call(Number.MEMORY_OP, Xenmem.MAXIMUM_RAM_PAGE, 0) == pvh.SPECIAL // PAGE_SIZE + 7
    guest.put("H", 3)
    assert guest.call(Number.MEMORY_OP, Xenmem.CURRENT_RESERVATION, ARG) == -errno.ESRCH


# ---- grant_table_op ----------------------------------------------------------------------------------------------


def grant(guest: Guest, op: Gnttabop, count: int = 1) -> int:
    return guest.call(Number.GRANT_TABLE_OP, op, ARG, count)


def test_version_1_and_no_other(guest: Guest) -> None:
    for version, result in ((1, 0), (2, -errno.ENOSYS), (3, -errno.EINVAL)):
        guest.put("I", version)
        assert grant(guest, Gnttabop.SET_VERSION) == result
    guest.put("HHI", SELF, 0, 9)
    assert grant(guest, Gnttabop.GET_VERSION) == 0
    assert guest.get("HHI") == (SELF, 0, 1)


def test_the_tables_size_and_frames(guest: Guest) -> None:
    guest.put("H2xIIh", SELF, 0, 0, 5)
    assert grant(guest, Gnttabop.QUERY_SIZE) == 0
    assert guest.get("H2xIIh") == (SELF, 1, FRAMES, 0)
    assert add(guest, 1, 1, ABOVE) == 0
    guest.put("H2xIh6xQ", SELF, 3, 5, BASE + 0x9000)
    assert grant(guest, Gnttabop.SETUP_TABLE) == 0
    assert guest.get("H2xIh6xQ") == (SELF, 3, 0, BASE + 0x9000)
    assert guest.get("3q", BASE + 0x9000) == (-1, ABOVE, -1)
    guest.put("H2xIh6xQ", SELF, FRAMES + 1, 5, BASE + 0x9000)
    assert grant(guest, Gnttabop.SETUP_TABLE) == 0
    assert guest.get("h", ARG + 8) == (-1,)  # GNTST_general_error
    guest.put("H2xIIh", 4, 0, 0, 5)
    assert grant(guest, Gnttabop.QUERY_SIZE) == 0
    assert guest.get("h", ARG + 12) == (-2,)  # GNTST_bad_domain
    guest.put("IHhQ", 1, SELF, 5, 0)
    assert grant(guest, Gnttabop.GET_STATUS_FRAMES) == 0
    assert guest.get("h", ARG + 6) == (-1,)
    assert grant(guest, Gnttabop.MAP_GRANT_REF) == -errno.ENOSYS
    assert grant(guest, Gnttabop.QUERY_SIZE, 2) == -errno.EINVAL


@pytest.mark.parametrize(
    ("source", "dest", "size", "flags", "status"),
    [
        ((0x30, SELF, 100), (0x31, SELF, 200), 50, 0, 0),
        ((8, SELF, 100), (0x31, 1, 200), 50, 1, 0),
        ((8, SELF, 100), (9, SELF, 200), 50, 3, 0),
        ((0x30, SELF, 100), (8, SELF, 200), 50, 2, -8),  # read-only
        ((10, SELF, 100), (0x31, SELF, 200), 50, 1, -3),  # granted to domain 0
        ((11, SELF, 100), (0x31, SELF, 200), 50, 1, -3),  # not granted
        ((100000, SELF, 100), (0x31, SELF, 200), 50, 1, -3),  # past the table
        ((0x30, 0, 100), (0x31, SELF, 200), 50, 0, -2),
        ((0x30, SELF, 4090), (0x31, SELF, 200), 50, 0, -10),
        ((0x30, SELF, 100), (0x31, SELF, 4090), 50, 0, -10),
        ((ABOVE, SELF, 100), (0x31, SELF, 200), 50, 0, -9),
        ((0x30, SELF, 100), (ABOVE, SELF, 200), 50, 0, -9),
    ],
)
def test_copies_between_own_pages(
    source: tuple[int, int, int], dest: tuple[int, int, int], size: int, flags: int, status: int, guest: Guest
) -> None:
    table = guest.grants.view
    for gref, entry in ((8, (5, 1, 0x30)), (9, (1, 1, 0x31)), (10, (1, 0, 0x30)), (11, (0, 1, 0x30))):
        table[gref * 8 : gref * 8 + 8] = struct.pack("<HHI", *entry)
    guest.ram.view[0x30000 + 100 : 0x30000 + 150] = bytes(range(50))
    guest.put("QHH4xQHH4xHHh", *source, *dest, size, flags, 5)
    assert grant(guest, Gnttabop.COPY) == 0
    assert guest.get("h", ARG + 36) == (status,)
    copied = bytes(guest.ram.view[0x31000 + 200 : 0x31000 + 250])
    assert copied == (bytes(50) if status else bytes(range(50)))


# ---- hvm_op ------------------------------------------------------------------------------------------------------


def param(guest: Guest, op: Hvmop, index: int, value: int = 0, dom: int = SELF) -> int:
    return guest.call(Number.HVM_OP, op, guest.put("HHIQ", dom, 0, index, value))


@pytest.mark.parametrize(
    ("value", "result", "vectors"),
    [
        (2 << 56 | 0xF3, 0, [(0xF3,)]),
        (2 << 56 | 0x0F, -errno.EINVAL, []),
        (0, 0, [(0,)]),
        (1, 0, []),  # Linux: every vCPU has its own
        (9, -errno.EINVAL, []),  # a GSI
        (1 << 56 | 3, -errno.EINVAL, []),  # PCI's INTx
    ],
)
def test_how_events_interrupt(value: int, result: int, vectors: list[tuple[int, ...]], guest: Guest) -> None:
    assert param(guest, Hvmop.SET_PARAM, HvmParam.CALLBACK_IRQ, value) == result
    assert guest.told.vectors == vectors
    assert param(guest, Hvmop.GET_PARAM, HvmParam.CALLBACK_IRQ) == 0
    assert guest.get("Q", ARG + 8) == (0 if result else value,)
    assert guest.told.latched == ([] if result else [True])  # the width of shared_info, as Xen does


def test_the_toolstacks_parameters_are_the_toolstacks(guest: Guest) -> None:
    for index in (HvmParam.STORE_PFN, HvmParam.STORE_EVTCHN, HvmParam.CONSOLE_PFN):
        assert param(guest, Hvmop.SET_PARAM, index, 5) == -errno.EPERM
    assert param(guest, Hvmop.GET_PARAM, 39) == -errno.EINVAL
    assert param(guest, Hvmop.GET_PARAM, HvmParam.STORE_PFN, dom=3) == -errno.ESRCH
    assert param(guest, Hvmop.GET_PARAM, HvmParam.CONSOLE_PFN) == 0
    assert guest.get("Q", ARG + 8) == (0,)  # nobody serves one


def test_a_vcpus_own_vector(guest: Guest) -> None:
    for vcpu, vector, result in ((1, 0x31, 0), (2, 0x31, -errno.ENOENT), (0, 0x0F, -errno.EINVAL)):
        assert guest.call(Number.HVM_OP, Hvmop.SET_EVTCHN_UPCALL_VECTOR, guest.put("IB3x", vcpu, vector)) == result
    assert guest.told.vectors == [(1, 0x31)]


# ---- vcpu_op -----------------------------------------------------------------------------------------------------


def test_a_vcpus_places(guest: Guest) -> None:
    def call(op: Vcpuop, vcpu: int) -> int:
        return guest.call(Number.VCPU_OP, op, vcpu, ARG)

    guest.put("QI4x", 0x40, 0x80)
    assert call(Vcpuop.REGISTER_VCPU_INFO, 1) == 0
    assert guest.told.registered == [(1, 0x40080)]
    # whatever was pending is looked for
    assert guest.get("BxxxxxxxQ", BASE + 0x40080) == (1, (1 << 64) - 1)
    assert call(Vcpuop.REGISTER_VCPU_INFO, 1) == -errno.EINVAL  # once
    assert call(Vcpuop.REGISTER_VCPU_INFO, 2) == -errno.ENOENT
    for mfn, offset in ((0x40, 4033), (0x40, 12), (ABOVE, 0)):
        guest.put("QI4x", mfn, offset)
        assert call(Vcpuop.REGISTER_VCPU_INFO, 0) == -errno.EINVAL
    guest.put("Q", BASE + 0x50040)
    assert call(Vcpuop.REGISTER_VCPU_TIME_MEMORY_AREA, 0) == 0
    assert call(Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA, 1) == 0
    assert (guest.vcpus[0].time_info, guest.vcpus[1].runstate) == (0x50040, 0x50040)
    guest.put("Q", BASE + RAM - 8)
    assert call(Vcpuop.REGISTER_RUNSTATE_MEMORY_AREA, 1) == -errno.EFAULT
    assert call(Vcpuop.IS_UP, 0) == 1
    assert call(Vcpuop.IS_UP, 1) == 0
    assert call(Vcpuop.GET_RUNSTATE_INFO, 0) == 0
    assert guest.get("i4x5Q") == (0, 1000, 600, 100, 300, 0)


def test_a_vcpus_start_its_ticks_and_its_nmi(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    def call(op: Vcpuop, vcpu: int, arg: int = 0) -> int:
        return guest.call(Number.VCPU_OP, op, vcpu, arg)

    # vCPU 0 is up
    assert [call(Vcpuop.UP, n) for n in (0, 1, 2)] == [0, -errno.EINVAL, -errno.ENOENT]
    guest.physmap.write(ARG - BASE, context_of_32(eip=0x200000, pad=1))
    assert [call(Vcpuop.INITIALISE, n, ARG) for n in (0, 1)] == [-errno.EEXIST, -errno.EINVAL]
    guest.physmap.write(ARG - BASE, context_of_32(eip=0x200000))
    assert [call(Vcpuop.INITIALISE, 1, at) for at in (0, ARG, ARG)] == [-errno.EFAULT, 0, -errno.EEXIST]
    context = guest.cpus[1].context
    assert context is not None
    assert context.general[8] == 0x200000
    assert (call(Vcpuop.IS_UP, 1), call(Vcpuop.UP, 1), call(Vcpuop.IS_UP, 1)) == (0, 0, 1)
    assert (call(Vcpuop.DOWN, 0), call(Vcpuop.IS_UP, 0)) == (0, 0)
    assert not guest.told.ended
    assert call(Vcpuop.DOWN, 1) == 0  # the last
    assert guest.told.ended == [Shutdown.POWEROFF]
    assert (call(Vcpuop.UP, 0), call(Vcpuop.IS_UP, 0)) == (0, 1)
    caplog.clear()
    for period, result in ((999_999, -errno.EINVAL), (10_000_000, 0), (1 << 62, -errno.EINVAL)):
        assert call(Vcpuop.SET_PERIODIC_TIMER, 1, guest.put("Q", period)) == result
    assert call(Vcpuop.STOP_PERIODIC_TIMER, 1) == 0
    assert guest.told.periods == [(1, 10_000_000), (1, 0)]
    assert call(Vcpuop.SEND_NMI, 1) == 0
    assert call(Vcpuop.SEND_NMI, 1, ARG) == -errno.EINVAL
    assert [cpu.nmis for cpu in guest.cpus] == [0, 1]
    assert call(Vcpuop.GET_PHYSID, 0, ARG) == -errno.EINVAL
    assert not caplog.messages


def test_ticks_come_until_they_are_stopped() -> None:
    ticks: queue.Queue[int] = queue.Queue()
    timers = PeriodicTimers(ticks.put, "g1")
    try:
        timers.set(0, 1_000_000)
        timers.set(1, 1_000_000)
        seen = Counter(ticks.get(timeout=10) for _ in range(20))
        assert seen[0] >= 2
        assert seen[1] >= 2
        for period in (0, 3600 * 10**9):
            timers.set(0, 1_000_000)
            timers.set(0, period)
            while not ticks.empty():
                ticks.get()
            ticks.get(timeout=10)  # one may have been under way
            assert {ticks.get(timeout=10) for _ in range(10)} == {1}
    finally:
        timers.close()
    assert timers._thread is not None
    assert not timers._thread.is_alive()


def test_a_timer_is_kvms_once_the_guest_hears_it(guest: Guest) -> None:
    def timer(vcpu: int, expires: int, flags: int = 0) -> int:
        at = guest.put("QI4x", expires, flags)
        return guest.call(Number.VCPU_OP, Vcpuop.SET_SINGLESHOT_TIMER, vcpu, at)

    assert timer(0, 5000) == 0
    assert guest.vcpus[0].expires == 0
    guest.vcpus[0].port = 7
    assert timer(0, 5000) == 0
    assert (guest.vcpus[0].port, guest.vcpus[0].expires) == (7, 5000)
    assert timer(1, 5000) == -errno.EINVAL  # another's
    assert timer(0, 10, 1) == -errno.ETIME  # VCPU_SSHOTTMR_future
    assert guest.call(Number.SET_TIMER_OP, 6000) == 0
    assert guest.vcpus[0].expires == 6000
    assert guest.call(Number.SET_TIMER_OP, 1, 2, long_mode=False) == 0
    assert guest.vcpus[0].expires == 2 << 32 | 1
    assert guest.call(Number.VCPU_OP, Vcpuop.STOP_SINGLESHOT_TIMER, 0, 0) == 0
    assert guest.vcpus[0].expires == 0


# ---- the rest ----------------------------------------------------------------------------------------------------


def test_event_channels_by_pointer(guest: Guest) -> None:
    def call(op: Evtchnop, form: str, *fields: int) -> tuple[int, ...]:
        result = guest.call(Number.EVENT_CHANNEL_OP, op, guest.put(form, *fields))
        return (result, *guest.get(form))

    assert call(Evtchnop.ALLOC_UNBOUND, "HHI", SELF, SELF, 0) == (0, SELF, SELF, 2)
    assert call(Evtchnop.BIND_INTERDOMAIN, "H2xII", SELF, 2, 0) == (0, SELF, 2, 3)
    assert guest.info.pending(3)
    assert not guest.info.pending(2)
    assert call(Evtchnop.SEND, "I", 3) == (0, 3)
    assert guest.info.pending(2)
    assert call(Evtchnop.STATUS, "H2xIII8x", SELF, 1, 0, 0)[:4] == (0, SELF, 1, Evtchnstat.UNBOUND)
    assert call(Evtchnop.CLOSE, "I", 9) == (-errno.EINVAL, 9)
    assert guest.calls.counts["event_channel_op.send"] == 1


def test_what_the_kernel_refuses_of_a_call_leaves_the_rest(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[int] = []
    guest.channels.client = SimpleNamespace(port_closed=closed.append)  # type: ignore[assignment]

    def refused(*_: int) -> None:
        raise OSError(errno.EINVAL, "no vcpu_info")

    for port in (1, 2):
        if port == 2:
            guest.channels.ports.reserve(2)
        (notify,) = guest.channels.bind([(port, os.eventfd(0))])
        assert notify >= 0
    for name in ("clear", "raise_event"):
        monkeypatch.setattr(guest.channels.kernel, name, refused)
    assert guest.call(Number.EVENT_CHANNEL_OP, Evtchnop.RESET, guest.put("H", SELF)) == 0
    assert closed == [ALL_PORTS]
    assert caplog.messages[0] == "domain 1: port 1: clear: no vcpu_info"
    assert guest.call(Number.EVENT_CHANNEL_OP, Evtchnop.BIND_IPI, guest.put("II", 0, 0)) == 0


def test_shutting_down(guest: Guest) -> None:
    for reason in (0, 1, 3, 5):
        assert guest.call(Number.SCHED_OP, Schedop.SHUTDOWN, guest.put("I", reason)) == 0
    assert guest.told.ended == [0, 1, 3, 5]
    assert guest.call(Number.SCHED_OP, Schedop.SHUTDOWN, guest.put("I", 6)) == -errno.EINVAL
    assert guest.call(Number.SCHED_OP, Schedop.REMOTE_SHUTDOWN, guest.put("H2xI", 5, 0)) == -errno.EPERM
    assert guest.call(Number.SCHED_OP, Schedop.YIELD) == 0
    assert guest.call(Number.SCHED_OP, Schedop.POLL, ARG) == 0
    assert guest.call(Number.SCHED_OP, Schedop.WATCHDOG, ARG) == -errno.ENOSYS
    assert guest.told.ended == [0, 1, 3, 5]


def test_a_shutdown_code_is_the_reason_of_what_follows(guest: Guest) -> None:
    def call(op: Schedop, reason: int) -> int:
        return guest.call(Number.SCHED_OP, op, guest.put("I", reason))

    assert guest.calls.reason(Shutdown.REBOOT) is Shutdown.REBOOT
    assert call(Schedop.SHUTDOWN_CODE, 9) == -errno.EINVAL
    assert call(Schedop.SHUTDOWN_CODE, Shutdown.CRASH) == 0
    assert call(Schedop.SHUTDOWN_CODE, Shutdown.POWEROFF) == 0  # the first stays
    assert guest.calls.reason(Shutdown.REBOOT) is Shutdown.CRASH
    assert call(Schedop.SHUTDOWN, Shutdown.REBOOT) == 0
    assert guest.told.ended == [Shutdown.CRASH]
    assert call(Schedop.SHUTDOWN, Shutdown.SUSPEND) == 0  # it has gone on
    assert guest.told.ended == [Shutdown.CRASH, Shutdown.SUSPEND]
    assert guest.call(Number.SCHED_OP, Schedop.SHUTDOWN_CODE, 0) == -errno.EFAULT


def test_what_the_guest_says(guest: Guest) -> None:
    guest.ram.view[0x6000:0x6005] = b"hello"
    assert guest.call(Number.CONSOLE_IO, 0, 5, BASE + 0x6000) == 0
    assert guest.told.text == b"hello"
    assert guest.call(Number.CONSOLE_IO, 1, 5, BASE + 0x6000) == 0
    assert guest.call(Number.CONSOLE_IO, 0, 1 << 31, BASE) == 0
    assert len(guest.told.text) == 5 + guest_pointer.MAX_READ


def test_assists(guest: Guest) -> None:
    assert guest.call(Number.VM_ASSIST, 0, 5) == 0
    assert guest.call(Number.VM_ASSIST, 1, 5) == 0
    assert guest.told.flags == [True, False]
    assert guest.call(Number.VM_ASSIST, 0, 2) == -errno.EINVAL
    assert guest.call(Number.VM_ASSIST, 7, 5) == -errno.ENOSYS


def test_pirqs(guest: Guest) -> None:
    assert guest.call(Number.PHYSDEV_OP, 23, guest.put("iI", 1, 0)) == 0  # get_free_pirq
    assert guest.get("iI") == (1, 16)
    assert guest.call(Number.PHYSDEV_OP, 12, ARG) == -errno.ENOSYS
    for wide, form in ((True, "H2x6i4xQ"), (False, "H2x6iQ")):
        last = BASE + RAM - struct.calcsize("<" + form)  # nothing behind it is read or written
        guest.put(form, SELF, 0, -1, -1, 0, 8, 3, 0xFEE00000, at=last)
        assert guest.call(Number.PHYSDEV_OP, 13, last, long_mode=wide) == 0  # map_pirq
        assert guest.get(form, last) == (SELF, 0, -1, 17 + (not wide), 0, 8, 3, 0xFEE00000)


# ---- layouts -----------------------------------------------------------------------------------------------------

# struct, its layout here, and fields whose place matters: where they are in it
STRUCTS: list[tuple[str, Layout]] = [
    ("struct xen_feature_info", xen_version._FEATURE_INFO),
    ("struct xen_memory_map", memory_op._MEMORY_MAP),
    ("struct xen_add_to_physmap", memory_op._ADD),
    ("struct xen_add_to_physmap_batch", memory_op._BATCH),
    ("struct xen_remove_from_physmap", memory_op._REMOVE),
    ("struct xen_memory_reservation", memory_op._RESERVATION),
    ("struct gnttab_setup_table", grant_table_op._SETUP_TABLE),
    ("struct gnttab_query_size", grant_table_op._QUERY_SIZE),
    ("struct gnttab_set_version", grant_table_op._SET_VERSION),
    ("struct gnttab_get_status_frames", grant_table_op._GET_STATUS_FRAMES),
    ("struct gnttab_get_version", grant_table_op._GET_VERSION),
    ("struct gnttab_copy", grant_table_op._COPY),
    ("struct xen_hvm_param", hvm_op._PARAM),
    ("struct xen_hvm_evtchn_upcall_vector", hvm_op._UPCALL_VECTOR),
    ("struct vcpu_register_vcpu_info", vcpu_op._REGISTER_INFO),
    ("struct vcpu_set_singleshot_timer", vcpu_op._SINGLESHOT),
    ("struct vcpu_set_periodic_timer", vcpu_op._PERIODIC),
    ("struct vcpu_runstate_info", vcpu_op._RUNSTATE),
    ("struct physdev_map_pirq", physdev._MAP),
    ("struct physdev_unmap_pirq", physdev._UNMAP),
    ("struct physdev_get_free_pirq", physdev._FREE),
    ("struct vcpu_hvm_context", Layout(f"{vcpu_context.CONTEXT_SIZE}s")),
    ("struct sched_shutdown", hypercalls._SHUTDOWN),
    ("struct sched_remote_shutdown", hypercalls._REMOTE_SHUTDOWN),
    ("struct multicall_entry", hypercalls._MULTICALL),
]
OFFSETS = [
    ("struct vcpu_hvm_context", "cpu_regs.x86_32.cr0", 48, 48),
    ("struct vcpu_hvm_context", "cpu_regs.x86_32.efer", 64, 64),
    ("struct vcpu_hvm_context", "cpu_regs.x86_32.tr_ar", 120, 120),
    ("struct vcpu_hvm_context", "cpu_regs.x86_64.efer", 112, 112),
    ("struct xen_memory_map", "buffer", 8, 4),
    ("struct xen_add_to_physmap", "gpfn", 16, 12),
    ("struct xen_add_to_physmap_batch", "idxs", 8, 8),
    ("struct xen_add_to_physmap_batch", "errs", 24, 16),
    ("struct xen_remove_from_physmap", "gpfn", 8, 4),
    ("struct xen_memory_reservation", "domid", 24, 16),
    ("struct gnttab_setup_table", "status", grant_table_op._SETUP_STATUS, grant_table_op._SETUP_STATUS),
    ("struct gnttab_setup_table", "frame_list", 16, 12),
    ("struct gnttab_query_size", "status", 12, 12),
    ("struct gnttab_get_status_frames", "frame_list", 8, 8),
    ("struct gnttab_copy", "source.domid", 8, 4),
    ("struct gnttab_copy", "dest", 16, 8),
    ("struct gnttab_copy", "status", grant_table_op._COPY_STATUS[True], grant_table_op._COPY_STATUS[False]),
    ("struct xen_hvm_param", "value", 8, 8),
    ("struct vcpu_register_vcpu_info", "offset", 8, 8),
    ("struct vcpu_runstate_info", "state_entry_time", 8, 4),
    ("struct physdev_map_pirq", "entry_nr", 24, 24),
    ("struct physdev_map_pirq", "table_base", 32, 28),
    ("struct multicall_entry", "args", 16, 8),
]


@pytest.mark.parametrize("bits", [64, 32])
def test_layouts_are_those_of_xens_headers(bits: int, tmp_path: Path) -> None:
    if not shutil.which("gcc") or not Path("/usr/include/xen/memory.h").exists():
        pytest.skip("no gcc or no libxen-dev")
    wide = bits == 64
    headers = [
        "xen",
        "version",
        "memory",
        "grant_table",
        "vcpu",
        "sched",
        "physdev",
        "hvm/hvm_op",
        "hvm/params",
        "hvm/hvm_vcpu",
    ]
    lines = ["#define __XEN_INTERFACE_VERSION__ 0x00040e00", "#include <stdint.h>", "#include <stddef.h>"]
    lines += [f"#include <xen/{header}.h>" for header in headers]
    sizes = {name: layout.of(wide).size for name, layout in STRUCTS}
    lines += [f'_Static_assert(sizeof({name}) == {size}, "{name}");' for name, size in sizes.items()]
    for name, member, at_64, at_32 in OFFSETS:
        lines.append(f'_Static_assert(offsetof({name}, {member}) == {at_64 if wide else at_32}, "{name} {member}");')
    (tmp_path / "a.c").write_text("\n".join(lines) + "\n")
    command = ["gcc", f"-m{bits}", "-ffreestanding", "-fsyntax-only", "a.c"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
