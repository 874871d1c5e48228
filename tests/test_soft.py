"""The soft VMM: settings applied whole or not at all, event bits, and a domain at a daemon that is the wire alone."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.abi import DOMID_SELF, PAGE_SIZE, Evtchnop
from evtchnd.errors import HostError, VmmError, XenError
from evtchnd.ports import Kind, PortTable, Setting
from evtchnd.vmm.client import Disconnected, Refused
from evtchnd.vmm.settings import Applier, Route
from evtchnd.vmm.shared_info import SharedInfo
from evtchnd.vmm.soft import CONSOLE_GFN, CONSOLE_PORT, STORE_GFN, STORE_PORT, SoftVmm
from evtchnd.vmm.soft_kernel import SoftKernel
from scale import scaled

MEMORY = 4 << 20
TIMEOUT = 20.0


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventfd_id(fd: int) -> int:
    """Which eventfd a descriptor is, whatever its number."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("eventfd-id:"):
            return int(line.split()[1])
    raise AssertionError(f"{fd} is no eventfd")


def counter(fd: int) -> int:
    """Empties an eventfd that does not block."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(TIMEOUT * 1000))


# ---- settings ------------------------------------------------------------------------------------------------


class FailingKernel:
    """KVM's rules in plain dicts, by eventfd and not by number; the call of number `fail` is refused."""

    def __init__(self) -> None:
        self.sends: dict[int, tuple[Any, ...]] = {}
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqs: dict[int, int] = {}
        self.calls = 0
        self.fail = -1

    def state(self) -> object:
        raised = {self.routes[gsi]: fd for gsi, fd in self.irqs.items()}
        return dict(self.sends), dict(self.routes), raised

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.fail:
            raise OSError(errno.ENOMEM, "refused")

    def set_port(self, setting: Setting) -> None:
        self._call()
        assert setting.port not in self.sends, "KVM: EEXIST"
        if setting.kind is Kind.EVENTFD:
            self.sends[setting.port] = (Kind.EVENTFD, eventfd_id(setting.kick_fd))
        else:
            self.sends[setting.port] = (setting.kind, setting.target_port, setting.vcpu)

    def clear_port(self, port: int) -> None:
        self._call()
        del self.sends[port]

    def set_routes(self, routes: Sequence[Route]) -> None:
        self._call()
        table = {route.gsi: (route.port, route.vcpu) for route in routes}
        assert len(table) == len(routes), "one gsi twice"
        assert len({route.port for route in routes}) == len(routes), "one port twice"
        assert self.irqs.keys() <= table.keys(), "an irqfd without its route"
        self.routes = table

    def set_irq(self, route: Route, fd: int) -> None:
        self._call()
        assert self.routes[route.gsi] == (route.port, route.vcpu)
        assert route.gsi not in self.irqs, "KVM: EBUSY"
        self.irqs[route.gsi] = eventfd_id(fd)

    def clear_irq(self, route: Route, fd: int) -> None:
        self._call()
        # KVM finds the irqfd by its eventfd: the descriptor must still be there
        assert self.irqs.pop(route.gsi) == eventfd_id(fd)


@pytest.fixture(scope="module")
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)


settings_of_a_port = st.one_of(
    st.tuples(st.just(Kind.IPI), st.integers(0, 2)),
    st.tuples(st.just(Kind.LOOPBACK), st.integers(0, 2), st.integers(1, 6)),
    st.tuples(st.just(Kind.EVENTFD), st.integers(0, 2), st.integers(0, 7), st.integers(-1, 7)),
)
tables = st.lists(st.dictionaries(st.integers(1, 6), settings_of_a_port), min_size=1, max_size=5)


def wanted_state(table: Sequence[Setting]) -> tuple[Any, ...]:
    sends: dict[int, tuple[Any, ...]] = {}
    raised: dict[tuple[int, int], int] = {}
    for s in table:
        if s.kind is Kind.EVENTFD:
            sends[s.port] = (Kind.EVENTFD, eventfd_id(s.kick_fd))
            if s.notify_fd >= 0:
                raised[s.port, s.vcpu] = eventfd_id(s.notify_fd)
        else:
            sends[s.port] = (s.kind, s.target_port, s.vcpu)
    return sends, raised


@given(script=tables)
def test_a_table_is_applied_whole_or_not_at_all(script: list[dict[int, tuple[Any, ...]]], eventfds: list[int]) -> None:
    """From each table to the next, with each call of the way refused once: what was is there, no descriptor more."""
    kernel, applier = FailingKernel(), Applier()
    baseline = open_fds()
    for entries in script:
        table = []
        for port, (kind, vcpu, *rest) in entries.items():
            if kind is Kind.EVENTFD:
                kick, notify = eventfds[rest[0]], eventfds[rest[1]] if rest[1] >= 0 else -1
                # as the port table does: one serial, one pair
                table.append(Setting(port, kind, vcpu, 0, kick, notify, 1 + rest[0] * 10 + rest[1] + 1))
            else:
                table.append(Setting(port, kind, vcpu, rest[0] if rest else port))
        before, fds = kernel.state(), open_fds()
        kernel.calls, kernel.fail = 0, 1
        while True:
            try:
                applier.apply(table, kernel)
            except HostError as error:
                assert "nothing was changed" in str(error)
                assert kernel.state() == before, f"call {kernel.fail} refused"
                assert open_fds() == fds
                kernel.calls, kernel.fail = 0, kernel.fail + 1
            else:
                break
        kernel.fail = -1
        sends, _, raised = kernel.state()  # type: ignore[misc]
        assert (sends, raised) == wanted_state(table)
        assert len(kernel.routes) == len(raised), "a route that nothing fires"
        assert open_fds() == baseline + sum(fd >= 0 for s in table for fd in (s.kick_fd, s.notify_fd))
        kernel.calls = 0
        applier.apply(table, kernel)
        assert kernel.calls == 0, "nothing to do"
    applier.close()
    applier.close()
    assert open_fds() == baseline


def test_a_moved_vcpu_is_only_a_new_route(eventfds: list[int]) -> None:
    kernel, applier = FailingKernel(), Applier()
    applier.apply([Setting(3, Kind.EVENTFD, 0, 0, eventfds[0], eventfds[1], 1)], kernel)
    kernel.calls = 0
    applier.apply([Setting(3, Kind.EVENTFD, 2, 0, eventfds[0], eventfds[1], 1)], kernel)
    assert kernel.calls == 1
    assert list(kernel.routes.values()) == [(3, 2)]
    applier.close()


def test_another_eventfd_of_the_same_number_is_noticed() -> None:
    kernel, applier = FailingKernel(), Applier()
    table = PortTable(7, vcpus=1)
    port = table.alloc_unbound(DOMID_SELF, 0)
    number = os.eventfd(0)
    for _ in range(3):
        table.connect(port, number)
        applier.apply(table.table(), kernel)
        assert kernel.sends[port] == (Kind.EVENTFD, eventfd_id(number))
        other = os.eventfd(0)
        os.dup2(other, number)  # closed, and its number given out again
        os.close(other)
    os.close(number)
    applier.close()


def test_descriptors_run_out_while_a_table_is_applied(eventfds: list[int]) -> None:
    kernel, applier = FailingKernel(), Applier()
    first = [Setting(1, Kind.EVENTFD, 0, 0, eventfds[0], eventfds[1], 1)]
    applier.apply(first, kernel)
    before, fds = kernel.state(), open_fds()
    second = [Setting(i, Kind.EVENTFD, 0, 0, eventfds[0], eventfds[1], 1 + i) for i in range(2, 7)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    free = top + 1 - fds  # numbers below the highest that a duplicate can take
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1 + max(0, 5 - free), hard))
    filler = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(eventfds[0]))
        for fd in filler[-5:]:
            os.close(fd)
        del filler[-5:]
        with pytest.raises(HostError, match="nothing was changed"):
            applier.apply([*first, *second], kernel)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filler:
            os.close(fd)
    assert kernel.state() == before
    assert open_fds() == fds
    applier.apply([*first, *second], kernel)
    applier.close()


def test_a_port_twice_is_a_defect(eventfds: list[int]) -> None:
    with pytest.raises(ValueError, match="twice"):
        Applier().apply([Setting(1, Kind.IPI, 0, 1), Setting(1, Kind.IPI, 1, 1)], FailingKernel())


def test_a_step_back_that_fails_is_logged(eventfds: list[int], caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FailingKernel):
        def _call(self) -> None:
            self.calls += 1
            if self.calls >= self.fail > 0:
                raise OSError(errno.ENOMEM, "refused")

    kernel, applier = Broken(), Applier()
    applier.apply([Setting(1, Kind.IPI, 0, 1)], kernel)
    kernel.calls, kernel.fail = 0, 2
    with pytest.raises(HostError):
        applier.apply([Setting(1, Kind.IPI, 1, 1)], kernel)
    assert "a step back failed" in caplog.text


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


# ---- at a daemon -----------------------------------------------------------------------------------------------


class Daemon:
    """The daemon's end of the wire, and no more: answers with ACK, remembers what came, asks when told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[p.Message] = []
        self.ports: dict[int, tuple[int, int]] = {}  # kick, notify
        self.refuse: p.Type | None = None
        self.bind_at_start = True
        self._changed = threading.Condition()
        self._endpoint = transport.Endpoint()
        self._answers: dict[int, tuple[p.Body, list[int]]] = {}
        self._sock: Any = None
        self._listener = transport.listen(path)
        self._listener.setblocking(True)
        self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._sock, _ = self._listener.accept()
            except OSError:
                return
            self._endpoint, self._state, self._table = transport.Endpoint(), p.State.NEW, transport.TableAssembly()
            with self._sock:
                while (came := transport.recv(self._sock)) is not None:
                    self._take(*came)
            self._table.drop()

    def _take(self, data: bytes, fds: list[int]) -> None:
        come = self._endpoint.feed(data, len(fds))
        if isinstance(come, transport.Answer):
            with self._changed:
                self._answers[come.id] = (come.message, fds)
                self._changed.notify_all()
            return
        assert come is not None
        message = come.message
        self.messages.append(message)
        reply: p.Body = p.Ack(message.type)
        if message.type == self.refuse:
            reply = p.ErrorReply(message.type, errno.EPERM, f"domain 7: no {message.type.name} today")
        else:
            self._state = p.after(self._state, message.type)
        if isinstance(message, p.Hello):
            reply = p.HelloReply(features=message.features)
        elif isinstance(message, p.TableBegin):
            self._table.begin(message)
        elif isinstance(message, p.TableChunk):
            self._table.chunk(message, fds)
            fds = []
        elif isinstance(message, p.TableCommit):
            entries, fds = self._table.commit(message)
            for entry in entries:
                if isinstance(entry, p.PortEntry):
                    self.ports[entry.port] = (os.dup(fds[entry.kick_fd_index]), os.dup(fds[entry.notify_fd_index]))
        transport.close_all(fds)
        if isinstance(message, p.Start) and self.bind_at_start:
            # asks before it answers, as the real one does: the VMM has to read on
            threading.Thread(target=self._start, args=(come.id, reply)).start()
        else:
            transport.send(self._sock, self._endpoint.answer(come.id, reply))

    def _start(self, id: int, reply: p.Body) -> None:
        if STORE_PORT not in self.ports:
            self.bind(STORE_PORT)
        transport.send(self._sock, self._endpoint.answer(id, reply))

    def ask(self, message: p.Message, fds: Sequence[int] = ()) -> tuple[p.Body, list[int]]:
        id, data = self._endpoint.ask(message)
        transport.send(self._sock, data, fds)
        with self._changed:
            assert self._changed.wait_for(lambda: id in self._answers, TIMEOUT)
            return self._answers.pop(id)

    def bind(self, *ports: int) -> p.Body:
        kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in ports]
        question = p.BindPorts(tuple((port, i) for i, port in enumerate(ports)))
        body, fds = self.ask(question, kicks)
        if not isinstance(body, p.BindPortsReply):
            transport.close_all(kicks)
            return body
        notify = transport.bound(question, body, fds)
        for port, kick in zip(ports, kicks, strict=True):
            transport.close_all(self.ports.pop(port, ()))
            self.ports[port] = (kick, notify[port])
        return body

    def unbind(self, *ports: int) -> None:
        body, _ = self.ask(p.UnbindPorts(ports))
        assert isinstance(body, p.Ack)
        for port in ports:
            transport.close_all(self.ports.pop(port, ()))

    def kick(self, port: int) -> int:
        return self.ports[port][0]

    def notify(self, port: int) -> None:
        os.eventfd_write(self.ports[port][1], 1)

    def closed(self) -> list[int]:
        return [m.port for m in self.messages if isinstance(m, p.PortClosed)]

    def forget(self) -> None:
        for pair in self.ports.values():
            transport.close_all(pair)
        self.ports.clear()
        self.messages.clear()

    def hang_up(self) -> None:
        """Dies as far as the VMM can see."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(2)

    def close(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(2)
        self.hang_up()
        self._thread.join(TIMEOUT)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self.forget()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    before = open_fds()
    daemon = Daemon(tmp_path / "vmm.sock")
    yield daemon
    daemon.close()
    assert open_fds() == before, "a descriptor is left"


@pytest.fixture
def vmm(daemon: Daemon) -> Iterator[SoftVmm]:
    with SoftVmm(daemon.path, 7, memory=MEMORY, vcpus=2, name="web") as vmm:
        yield vmm


def test_it_registers_and_gives_its_tables(daemon: Daemon, vmm: SoftVmm) -> None:
    kinds = [type(m).__name__ for m in daemon.messages if not isinstance(m, p.TableChunk)]
    assert kinds == ["Hello", "Register", *["TableBegin", "TableCommit"] * 2, "XenStore", "Start"]
    register = next(m for m in daemon.messages if isinstance(m, p.Register))
    assert (register.domid, register.vcpus, register.name, register.flags) == (7, 2, "web", p.RegisterFlag.LONG_MODE)
    assert vmm.ram_pages == MEMORY // PAGE_SIZE
    words = vmm.grants.cast("I")
    assert words[:4].tolist() == [1, CONSOLE_GFN, 1, STORE_GFN]
    words.release()
    vmm.ram.write(vmm.store_gfn * PAGE_SIZE, b"page")
    assert vmm.ram.read(vmm.store_gfn * PAGE_SIZE, 5) == b"page\0"
    assert counter(daemon.kick(STORE_PORT)) == 1, "the backend has to look once"


def test_it_conforms(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    arguments = ["--socket", str(path), "--role", "vmm", "--timeout", str(TIMEOUT)]
    suite = subprocess.Popen(
        [sys.executable, "-m", "evtchnd.vmm.conformance", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with suite:
        vmm = None
        while vmm is None and suite.poll() is None:  # until it listens
            with contextlib.suppress(Disconnected):
                vmm = SoftVmm(path, 7, memory=MEMORY)
        text, _ = suite.communicate(timeout=4 * TIMEOUT)
    assert vmm is not None
    vmm.close()
    assert suite.returncode == 0, text


def test_kicks_and_events(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    assert port == 3
    vmm.send(port)
    daemon.bind(port)
    assert counter(daemon.kick(port)) == 1
    vmm.send(port)
    vmm.send(port)
    assert counter(daemon.kick(port)) == 2
    assert vmm.hypercall_evtchn(Evtchnop.SEND, struct.pack("<I", port)) == (0, b"")
    assert counter(daemon.kick(port)) == 1
    assert not vmm.wait(port, 0)
    daemon.notify(port)
    assert vmm.wait(port, TIMEOUT)
    assert not vmm.pending(port)
    assert eventfd_id(vmm.kick_fd(port)) == eventfd_id(daemon.kick(port))
    assert eventfd_id(vmm.irq_fd(port)) == eventfd_id(daemon.ports[port][1])
    daemon.notify(port)
    assert readable(vmm.irq_fd(port))


def test_a_bind_is_all_or_nothing(daemon: Daemon, vmm: SoftVmm) -> None:
    first, second = vmm.alloc_unbound(0), vmm.alloc_unbound(7)
    fds = open_fds()
    answer = daemon.bind(first, second)
    assert isinstance(answer, p.ErrorReply)
    assert answer.errno == errno.EINVAL
    assert f"port {second}: unbound, not unbound for domain 0" in answer.reason
    assert open_fds() == fds
    vmm.alloc_unbound(0)  # the table goes to the kernel again
    with pytest.raises(HostError, match="has not bound it"):
        vmm.kick_fd(first, timeout=0)
    daemon.bind(first)
    assert vmm.kick_fd(first) >= 0


def test_a_closed_port_is_told_before_its_number_is_used_again(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    daemon.bind(port)
    daemon.notify(port)
    vmm.close_port(port)
    assert daemon.closed() == [port]
    assert vmm.alloc_unbound(0) == port
    assert not vmm.wait(port, 0), "the old owner's event"
    daemon.unbind(port)
    fds = open_fds()
    daemon.bind(port)
    daemon.unbind(port)
    assert open_fds() == fds
    with pytest.raises(XenError):
        vmm.send(99)
    vmm.send(port)  # unbound: dropped
    daemon.unbind(port)  # once more: nothing to do
    vmm.close_port(port)
    assert daemon.closed() == [port]


def test_loopback_and_ipis_need_no_daemon(daemon: Daemon, vmm: SoftVmm) -> None:
    first = vmm.alloc_unbound(DOMID_SELF)
    second = vmm.bind_interdomain(DOMID_SELF, first)
    assert vmm.wait(second, 0), "bind_interdomain raises the binder's port"
    vmm.send(first)
    assert vmm.wait(second, 0)
    rc, out = vmm.hypercall_evtchn(Evtchnop.BIND_IPI, struct.pack("<II", 1, 0))
    assert rc == 0
    ipi = struct.unpack("<II", out)[1]
    timer = threading.Timer(0.05, vmm.send, [ipi])
    timer.start()
    assert vmm.wait(ipi, TIMEOUT)
    timer.join()
    vmm.close_port(second)
    vmm.send(first)
    assert not vmm.pending(second)
    assert daemon.closed() == []


def test_unmask_and_wrong_hypercalls(daemon: Daemon, vmm: SoftVmm) -> None:
    assert vmm.hypercall_evtchn(Evtchnop.UNMASK, struct.pack("<I", STORE_PORT)) == (0, b"")
    assert vmm.hypercall_evtchn(Evtchnop.SEND, b"\0") == (-errno.EFAULT, b"")
    assert vmm.hypercall_evtchn(Evtchnop.SEND, struct.pack("<I", 500)) == (-errno.EINVAL, b"")
    assert vmm.hypercall_evtchn(Evtchnop.INIT_CONTROL, bytes(32)) == (-errno.ENOSYS, b"")


def test_reset_and_the_way_back(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    daemon.bind(port, CONSOLE_PORT)
    status = struct.pack("<H2xIII8x", DOMID_SELF, STORE_PORT, 0, 0)
    _, out = vmm.hypercall_evtchn(Evtchnop.STATUS, status)
    *_, dom, number = struct.unpack("<H2xIIIH2xI", out)
    vmm.reset()
    assert daemon.closed() == [p.ALL_PORTS]
    with pytest.raises(XenError):
        vmm.send(STORE_PORT)
    assert vmm.bind_interdomain(dom, number) == STORE_PORT
    counter(daemon.kick(STORE_PORT))
    vmm.send(STORE_PORT)
    assert counter(daemon.kick(STORE_PORT)) == 1
    daemon.notify(STORE_PORT)
    assert vmm.wait(STORE_PORT, TIMEOUT)


def test_reboot_begins_anew(daemon: Daemon, vmm: SoftVmm) -> None:
    fds = open_fds()
    port = vmm.alloc_unbound(0)
    daemon.bind(port)
    vmm.ram.write(0, b"ram stays")
    vmm.ram.write(vmm.store_gfn * PAGE_SIZE, b"ring")
    daemon.forget()
    vmm.reboot()
    assert open_fds() == fds
    assert [type(m).__name__ for m in daemon.messages][:3] == ["Release", "Hello", "Register"]
    assert vmm.ram.read(0, 9) == b"ram stays"
    assert vmm.ram.read(vmm.store_gfn * PAGE_SIZE, 4) == bytes(4)
    assert vmm.alloc_unbound(0) == port
    vmm.send(STORE_PORT)
    assert counter(daemon.kick(STORE_PORT)) == 2


def test_resume_sends_everything_again(daemon: Daemon, vmm: SoftVmm) -> None:
    kept, gone = vmm.alloc_unbound(0), vmm.alloc_unbound(0)
    daemon.bind(kept, gone)
    before = eventfd_id(daemon.kick(kept))
    daemon.hang_up()
    vmm.send(kept)  # while it is down: the eventfd keeps it
    vmm.close_port(gone)  # nobody to tell
    daemon.forget()
    vmm.resume()
    assert [type(m).__name__ for m in daemon.messages][:2] == ["Hello", "Resume"]
    assert sorted(daemon.ports) == [STORE_PORT, kept]
    assert eventfd_id(daemon.kick(kept)) == before
    assert counter(daemon.kick(kept)) == 2
    daemon.notify(kept)
    assert vmm.wait(kept, TIMEOUT)


def test_resume_waits_for_the_daemon(daemon: Daemon, vmm: SoftVmm, tmp_path: Path) -> None:
    daemon.close()
    with pytest.raises(Disconnected):
        vmm.resume(timeout=0)
    with pytest.raises(HostError):
        _ = vmm.client
    second: list[Daemon] = []
    timer = threading.Timer(0.2, lambda: second.append(Daemon(tmp_path / "vmm.sock")))
    timer.start()
    vmm.resume()
    timer.join()
    assert sorted(second[0].ports) == [STORE_PORT]
    vmm.close()
    second[0].close()


def test_a_refused_domain_leaves_nothing(daemon: Daemon) -> None:
    before, threads = open_fds(), threading.active_count()
    daemon.refuse = p.Type.XENSTORE
    with pytest.raises(Refused, match="no XENSTORE today"):
        SoftVmm(daemon.path, 7, memory=MEMORY)
    assert threading.active_count() == threads
    daemon.hang_up()
    assert open_fds() in (before, before + 1)  # the daemon's end closes when it has read that
    with pytest.raises(Disconnected):
        SoftVmm(daemon.path.with_name("nowhere"), 7, memory=MEMORY)
    with pytest.raises(VmmError):
        SoftVmm(daemon.path, 0, memory=MEMORY)
    for wrong in (0, 4097, 1 << 40):
        with pytest.raises(ValueError, match="bytes of memory"):
            SoftVmm(daemon.path, 7, memory=wrong)


def test_the_guest_from_several_threads(daemon: Daemon, vmm: SoftVmm) -> None:
    """Each thread opens a port, has it bound, sends and hears, closes; no number is crossed."""
    rounds = scaled(200, least=10)
    wrong: list[str] = []
    asking = threading.Lock()  # the test's daemon asks one at a time

    def live() -> None:
        for _ in range(rounds):
            port = vmm.alloc_unbound(0)
            with asking:
                daemon.bind(port)
            counter(daemon.kick(port))
            vmm.send(port)
            if counter(daemon.kick(port)) != 1:
                wrong.append(f"port {port}: kick")
            daemon.notify(port)
            if not vmm.wait(port, TIMEOUT):
                wrong.append(f"port {port}: event")
            vmm.close_port(port)

    threads = [threading.Thread(target=live) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert len(daemon.closed()) == 4 * rounds


def test_rebinds_over_the_socket_end_with_the_same_descriptors(daemon: Daemon, vmm: SoftVmm) -> None:
    ports = [vmm.alloc_unbound(0) for _ in range(3)]
    daemon.bind(*ports)
    baseline = open_fds()
    for i in range(scaled(20_000, least=20)):
        daemon.bind(*ports)
        if i % 5 == 0:
            daemon.unbind(ports[0])
            daemon.bind(ports[0])
        if i % 5 == 1:
            vmm.close_port(ports[1])
            assert vmm.alloc_unbound(0) == ports[1]
            daemon.bind(ports[1])
    assert open_fds() == baseline


def test_closing_wakes_who_waits(daemon: Daemon) -> None:
    vmm = SoftVmm(daemon.path, 7, memory=MEMORY)
    free, bound = vmm.alloc_unbound(0), vmm.alloc_unbound(0)
    daemon.bind(bound)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda port=port: results.append(vmm.wait(port, 100 * TIMEOUT)))
        for port in (free, bound)
    ]
    for thread in threads:
        thread.start()
    vmm.close()
    vmm.close()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert results == [False, False]
