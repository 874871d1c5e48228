"""Makes the kernel's port table what the port table says: the difference, all of it or nothing.

A port that domain 0 is bound to has two halves in KVM, and three kinds of calls make them:

    guest to backend   KVM_XEN_ATTR_TYPE_EVTCHN {send_port, type, target port | eventfd}      set_port, clear_port
    backend to guest   KVM_SET_GSI_ROUTING {gsi -> port, vcpu}: always the whole list         set_routes
                       KVM_IRQFD {eventfd -> gsi}                                             set_irq, clear_irq

KVM cannot exchange an eventfd and refuses to assign a port twice, so a change is a clear and a set; a send in between
leaves the kernel, and the VMM forwards it (`PortTable.send`). A moved vCPU of an eventfd port is only a new route.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from evtchnd.errors import HostError
from evtchnd.ports import Kind, Setting

log = logging.getLogger(__name__)


class Route(NamedTuple):
    """Interrupt `gsi` raises `port` on Xen's vCPU `vcpu`. `gsi` counts from 0: a kernel adds where its own begin."""

    gsi: int
    port: int
    vcpu: int


class Kernel(Protocol):
    """What takes the settings: one system call each, which has had no effect when it raises (OSError)."""

    def set_port(self, setting: Setting) -> None:
        """A send on `setting.port`, which is not set, goes where the setting says (a TIMER: its timer raises it)."""

    def clear_port(self, port: int) -> None:
        """A send on `port` leaves the kernel again."""

    def set_routes(self, routes: Sequence[Route]) -> None:
        """These are all routes from now on. A gsi that an irqfd uses is never left out."""

    def set_irq(self, route: Route, fd: int) -> None:
        """A write to the eventfd fires the route, which `set_routes` has been given."""

    def clear_irq(self, route: Route, fd: int) -> None:
        """Ends that."""


class _Held(NamedTuple):
    """A setting with the descriptors that are ours, and its route; None: nothing raises the port from outside."""

    setting: Setting
    route: Route | None

    def fds(self) -> list[int]:
        return [fd for fd in (self.setting.kick_fd, self.setting.notify_fd) if fd >= 0]


Step = tuple[Callable[[], None], Callable[[], None]]  # do, undo


class Applier:
    """What the kernel has. Descriptors of settings are duplicated, and closed when the kernel has let go of them.

    Not for two threads at once: the VMM's lock.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._routes: tuple[Route, ...] = ()

    def apply(self, new: Sequence[Setting], kernel: Kernel) -> None:
        """Sets `new`, the whole table, or raises with the kernel as it was.

        HostError where the kernel or a duplicate of a descriptor is refused. A step of the way back that fails too
        is logged: that port's sends go to the VMM, or it is not raised, until it is applied again.
        """
        wanted = {setting.port: setting for setting in new}
        if len(wanted) != len(new):
            raise ValueError("a port is in the table twice")
        fresh: list[_Held] = []
        try:
            held = self._plan(wanted, fresh)
            routes = tuple(sorted((h.route for h in held.values() if h.route is not None), key=lambda r: r.gsi))
            self._run(self._steps(held, routes, kernel))
        except BaseException as error:
            for fd in (fd for each in fresh for fd in each.fds()):
                os.close(fd)
            if isinstance(error, OSError):
                raise HostError(f"event ports: {error.strerror or error}: nothing was changed") from error
            raise
        gone = {fd for h in self._held.values() for fd in h.fds()} - {fd for h in held.values() for fd in h.fds()}
        self._held, self._routes = held, routes
        for fd in gone:
            os.close(fd)

    def _plan(self, wanted: dict[int, Setting], fresh: list[_Held]) -> dict[int, _Held]:
        """The new state; what is unchanged is the same object. Duplicates made go into `fresh` at once."""
        held: dict[int, _Held] = {}
        for port, setting in wanted.items():
            old = self._held.get(port)
            if old is None or not _same_fds(old.setting, setting):
                held[port] = _duplicate(setting)
                fresh.append(held[port])
            else:
                ours = setting._replace(kick_fd=old.setting.kick_fd, notify_fd=old.setting.notify_fd)
                held[port] = old if ours == old.setting else _Held(ours, old.route)
        used = {old.route.gsi for port, old in self._held.items() if old.route is not None and port in held}
        free = iter(gsi for gsi in range(len(held) + len(used)) if gsi not in used)
        for port, each in held.items():
            if each.setting.notify_fd < 0:
                continue
            old = self._held.get(port)
            gsi = old.route.gsi if old is not None and old.route is not None else next(free)
            route = Route(gsi, port, each.setting.vcpu)
            if route != each.route:
                held[port] = _Held(each.setting, route)
        return held

    def _steps(self, held: dict[int, _Held], routes: tuple[Route, ...], kernel: Kernel) -> list[Step]:
        """In an order in which no irqfd is ever without its route."""
        clear: list[Step] = []
        fill: list[Step] = []

        def set_irq(h: _Held) -> None:
            if h.route is not None:
                kernel.set_irq(h.route, h.setting.notify_fd)

        def clear_irq(h: _Held) -> None:
            if h.route is not None:
                kernel.clear_irq(h.route, h.setting.notify_fd)

        def set_port(h: _Held) -> None:
            kernel.set_port(h.setting)

        def clear_port(h: _Held) -> None:
            kernel.clear_port(h.setting.port)

        for port in sorted(self._held.keys() | held.keys()):
            old, new = self._held.get(port), held.get(port)
            if old is new:
                continue
            if old is None or new is None or not _same_send(old.setting, new.setting):
                clear += [_step(clear_port, set_port, old)]
                fill += [_step(set_port, clear_port, new)]
            if old is None or new is None or old.setting.notify_fd != new.setting.notify_fd:
                clear += [_step(clear_irq, set_irq, old)]
                fill += [_step(set_irq, clear_irq, new)]
        before = self._routes
        between: list[Step] = []
        if routes != before:
            between = [(lambda: kernel.set_routes(routes), lambda: kernel.set_routes(before))]
        return [*clear, *between, *fill]

    def _run(self, steps: list[Step]) -> None:
        done: list[Callable[[], None]] = []
        try:
            for do, undo in steps:
                do()
                done.append(undo)
        except BaseException:
            for undo in reversed(done):
                try:
                    undo()
                except OSError as error:
                    log.error("event ports: a step back failed: %s; a port may be dead until it is bound again", error)
            raise

    def kick_fd(self, port: int) -> int:
        """Our descriptor of the eventfd that a send on `port` writes; -1: none."""
        held = self._held.get(port)
        return -1 if held is None else held.setting.kick_fd

    def notify_fd(self, port: int) -> int:
        """Our descriptor of the eventfd that raises `port`; -1: none."""
        held = self._held.get(port)
        return -1 if held is None else held.setting.notify_fd

    def close(self) -> None:
        """Closes the descriptors; the kernel's side goes with the VM. Can be called twice."""
        held, self._held, self._routes = self._held, {}, ()
        for fd in (fd for each in held.values() for fd in each.fds()):
            os.close(fd)


def _step(do: Callable[[_Held], None], undo: Callable[[_Held], None], held: _Held | None) -> Step:
    if held is None:
        return (_nothing, _nothing)
    return (lambda: do(held), lambda: undo(held))


def _nothing() -> None:
    pass


_WITH_FDS = (Kind.EVENTFD, Kind.PIRQ)


def _same_fds(old: Setting, new: Setting) -> bool:
    return (old.kind in _WITH_FDS) == (new.kind in _WITH_FDS) and old.serial == new.serial


def _same_send(old: Setting, new: Setting) -> bool:
    """Whether a send goes the same way; for an eventfd the vCPU is no part of it, only of the route."""
    if old.kind is not new.kind:
        return False
    if new.kind in _WITH_FDS:
        return old.kick_fd == new.kick_fd
    return (old.target_port, old.vcpu) == (new.target_port, new.vcpu)


def _duplicate(setting: Setting) -> _Held:
    kick = _dup(setting.kick_fd)
    try:
        notify = _dup(setting.notify_fd)
    except OSError:
        if kick >= 0:
            os.close(kick)
        raise
    return _Held(setting._replace(kick_fd=kick, notify_fd=notify), None)


def _dup(fd: int) -> int:
    return -1 if fd < 0 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
