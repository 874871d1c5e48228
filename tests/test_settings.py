"""The kernel's port table is set whole or stays as it was, and no descriptor is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventfds import eventfd_id, open_fds
from evtchnd.abi import DOMID_SELF
from evtchnd.errors import HostError
from evtchnd.ports import Kind, PortTable, Setting
from evtchnd.vmm.settings import Applier, Route


@pytest.fixture(scope="module")
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)


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
