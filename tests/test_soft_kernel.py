"""Event bits where Xen has them; sends and irqfds without KVM."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eventfds import TIMEOUT, counter, open_fds, readable
from evtchnd.abi import DOMID_SELF, PAGE_SIZE
from evtchnd.ports import Kind, PortTable, Setting
from evtchnd.vmm.settings import Applier, Route
from evtchnd.vmm.shared_info import SharedInfo
from evtchnd.vmm.soft_kernel import SoftKernel
from scale import scaled


@pytest.fixture(scope="module")
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)


# ---- event bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("long_mode", "top"), [(True, 4095), (False, 1023)])
def test_event_bits_lie_where_xen_puts_them(long_mode: bool, top: int) -> None:
    page = bytearray(PAGE_SIZE)
    info = SharedInfo(memoryview(page), vcpus=2, long_mode=long_mode)
    size = 8 if long_mode else 4
    vcpu, sel = 64, 8 if long_mode else 4
    pending, mask = 2048, 2560 if long_mode else 2176
    assert info.set_pending(top, 1), "the vCPU has to be told"
    assert page[pending + top // 8] == 1 << top % 8
    assert page[vcpu + sel + size - 1] == 0x80
    assert page[vcpu] == 1
    assert sum(map(bool, page)) == 3
    assert not info.set_pending(top, 1)
    info.mask(5)
    assert page[mask] == 1 << 5
    assert not info.set_pending(5, 0)
    assert info.pending(5)
    assert not info.upcall_pending(0), "masked"
    assert info.unmask(5, 0)
    assert page[0] == 1
    assert page[sel] == 1
    assert not info.unmask(5, 0)
    assert info.take(5)
    assert not info.take(5)
    assert not page[0]
    assert info.take(top)
    assert not any(page)
    info.set_pending(7, 0)
    info.wipe()
    assert not any(page)
    info.close()
    info.close()


def test_event_bits_like_a_set(eventfds: list[int]) -> None:
    rng = random.Random(5)
    info = SharedInfo(memoryview(bytearray(PAGE_SIZE)), vcpus=1)
    pending: set[int] = set()
    masked: set[int] = set()
    for _ in range(scaled(20_000)):
        port = rng.choice((1, 2, 63, 64, 65, 4095))
        match rng.randrange(4):
            case 0:
                info.set_pending(port, 0)
                pending.add(port)
            case 1:
                assert info.take(port) == (port in pending)
                pending.discard(port)
            case 2:
                info.mask(port)
                masked.add(port)
            case _:
                info.unmask(port, 0)
                masked.discard(port)
        assert info.pending(port) == (port in pending)
        assert info.masked(port) == (port in masked)
        if pending - masked:
            assert info.upcall_pending(0), "an event that nobody hears of"
    info.close()


def test_offsets_are_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/xen/xen.h").exists():
        pytest.skip("needs a C compiler and Debian's libxen-dev")
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <xen/xen.h>\nint main(void) {\n"
        'printf("%zu %zu %zu %zu %zu\\n", offsetof(struct shared_info, evtchn_pending),'
        " offsetof(struct shared_info, evtchn_mask), sizeof(struct vcpu_info),"
        " offsetof(struct vcpu_info, evtchn_upcall_pending), offsetof(struct vcpu_info, evtchn_pending_sel));\n}\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "offsets", source], check=True)
    out = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout
    assert [int(word) for word in out.split()] == [2048, 2560, 64, 0, 8]


# ---- irqfds ----------------------------------------------------------------------------------------------------


class Machine:
    """Table, applier and kernel put together, without a socket."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.info = SharedInfo(memoryview(bytearray(PAGE_SIZE)), vcpus=2)
        self.kernel = SoftKernel(self.lock, self.info, "test")
        self.table = PortTable(7, vcpus=2)
        self.applier = Applier()

    def apply(self) -> None:
        with self.lock:
            self.applier.apply(self.table.table(), self.kernel)

    def close(self) -> None:
        self.kernel.close()
        self.applier.close()
        self.info.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    before = open_fds()
    machine = Machine()
    yield machine
    machine.close()
    machine.close()
    assert open_fds() == before


def test_an_irqfd_raises_its_port(machine: Machine, eventfds: list[int]) -> None:
    port = machine.table.alloc_unbound(DOMID_SELF, 0)
    machine.table.bind_vcpu(port, 1)
    machine.table.connect(port, eventfds[0], eventfds[1])
    machine.apply()
    os.eventfd_write(eventfds[1], 1)
    assert machine.kernel.wait(port, TIMEOUT)
    assert not machine.kernel.wait(port, 0)
    assert machine.kernel.send(port)
    assert counter(eventfds[0]) == 1
    assert not machine.kernel.send(port + 1)


def test_the_thread_raises_a_port_nobody_waits_for(machine: Machine, eventfds: list[int]) -> None:
    ports = [machine.table.alloc_unbound(DOMID_SELF, 0) for _ in range(2)]
    for i, port in enumerate(ports):
        machine.table.connect(port, eventfds[0], eventfds[1 + i])
    machine.table.bind_vcpu(ports[1], 1)
    machine.apply()
    for i in range(2):
        os.eventfd_write(eventfds[1 + i], 1)
    with machine.lock:
        assert machine.lock.wait_for(lambda: all(map(machine.info.pending, ports)), TIMEOUT)
        assert machine.info.upcall_pending(0)
        assert machine.info.upcall_pending(1)


def test_odd_eventfds_do_not_stall(machine: Machine) -> None:
    """A count near 2^64, and EFD_SEMAPHORE, which gives one at a time."""
    full, semaphore = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    port = machine.table.alloc_unbound(DOMID_SELF, 0)
    machine.table.connect(port, full, semaphore)
    machine.apply()
    os.eventfd_write(full, 2**64 - 2)
    with machine.lock:
        assert machine.kernel.send(port)
    os.eventfd_write(semaphore, 3)
    assert machine.kernel.wait(port, TIMEOUT)
    assert counter(full) == 2**64 - 2
    machine.table.disconnect(port)
    machine.apply()
    os.close(full)
    os.close(semaphore)


def test_a_port_that_moves_under_its_waiter(machine: Machine, eventfds: list[int]) -> None:
    """Unbound, bound, bound again to another eventfd, closed: a waiting thread follows and hears the right one."""
    port = machine.table.alloc_unbound(DOMID_SELF, 0)
    heard = threading.Semaphore(0)
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            if machine.kernel.wait(port, TIMEOUT):
                heard.release()

    threads = [threading.Thread(target=listen) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(scaled(200, least=20)):
        notify = eventfds[1 + i % 4]
        with machine.lock:
            machine.table.connect(port, eventfds[0], notify)
        machine.apply()
        os.eventfd_write(notify, 1)
        assert heard.acquire(timeout=TIMEOUT), f"round {i}"
        if i % 3 == 0:
            with machine.lock:
                machine.table.disconnect(port)
            machine.apply()
            with machine.lock:
                machine.kernel.raise_event(port, 0)  # as an own port would
            assert heard.acquire(timeout=TIMEOUT), f"round {i}, unbound"
    stop.set()
    machine.kernel.close()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_a_claimed_port_is_left_to_its_reader(machine: Machine, eventfds: list[int]) -> None:
    port = machine.table.alloc_unbound(DOMID_SELF, 0)
    assert not machine.kernel.claim(port)
    machine.table.connect(port, eventfds[0], eventfds[1])
    machine.apply()
    with machine.lock:
        assert machine.kernel.claim(port)
        machine.kernel.raise_event(port, 0)
    os.eventfd_write(eventfds[1], 1)
    assert readable(eventfds[1])
    assert counter(eventfds[1]) == 2
    assert not machine.info.pending(port)


def test_the_soft_kernel_refuses_what_kvm_refuses(machine: Machine, eventfds: list[int]) -> None:
    kernel, route = machine.kernel, Route(0, 3, 0)

    def refused(call: Callable[[], object]) -> int:
        with pytest.raises(OSError) as caught:
            call()
        return caught.value.errno or 0

    assert refused(lambda: kernel.clear_port(3)) == errno.ENOENT
    kernel.set_port(Setting(3, Kind.IPI, 0, 3))
    assert refused(lambda: kernel.set_port(Setting(3, Kind.IPI, 1, 3))) == errno.EEXIST
    kernel.clear_port(3)
    assert refused(lambda: kernel.set_irq(route, eventfds[0])) == errno.EINVAL
    assert refused(lambda: kernel.set_routes([Route(4096, 3, 0)])) == errno.EINVAL
    with machine.lock:
        kernel.set_routes([route])
        kernel.set_irq(route, eventfds[0])
        assert refused(lambda: kernel.set_irq(route, eventfds[0])) == errno.EBUSY
        assert refused(lambda: kernel.set_routes([])) == errno.EINVAL
        kernel.clear_irq(route, eventfds[0])
        assert refused(lambda: kernel.clear_irq(route, eventfds[0])) == errno.ENOENT


def test_100_000_rebinds_end_with_the_same_descriptors(machine: Machine) -> None:
    rng = random.Random(2)
    ports = [machine.table.alloc_unbound(DOMID_SELF, 0) for _ in range(4)]
    machine.table.bind_interdomain(DOMID_SELF, machine.table.alloc_unbound(DOMID_SELF, DOMID_SELF))
    machine.apply()
    baseline = open_fds()
    for i in range(scaled(100_000)):
        port = rng.choice(ports)
        kick, notify = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        machine.table.connect(port, kick, notify)
        machine.apply()
        os.close(kick)
        os.close(notify)
        if i % 7 == 0:
            machine.table.disconnect(port)
        elif i % 7 == 1:
            machine.table.close(port)
            assert machine.table.alloc_unbound(DOMID_SELF, 0) == port
        assert open_fds() <= baseline + 3 * 2 * len(ports)
    for port in ports:
        if port in machine.table.bound():
            machine.table.disconnect(port)
    machine.apply()
    assert open_fds() == baseline
