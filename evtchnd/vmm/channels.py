"""One guest's event channels in its VMM: the port table, what the kernel has of it, and the daemon's ends.

A hypercall changes the table, the kernel gets the difference, then what the call caused happens: a port is raised, an
eventfd is written, the daemon is told of a port that has gone. The daemon's BIND_PORTS and UNBIND_PORTS come in from
the other side (`bind`, `unbind`: a Client's callbacks).

Two locks. Who tells the daemon of closed ports goes first through `turn`: a number is not given out again before the
daemon knows. The daemon's questions take only `lock`, so a guest that waits for an answer blocks nobody.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Container, Sequence
from typing import Protocol, TypeVar

from evtchnd.abi import Evtchnop
from evtchnd.errors import EvtchndError, HostError
from evtchnd.ports import Delivery, Effect, PortTable, Setting
from evtchnd.protocol import ALL_PORTS
from evtchnd.seldom import Seldom
from evtchnd.vmm.client import BoundPort, Client
from evtchnd.vmm.hypercall import event_channel_op
from evtchnd.vmm.settings import Applier, Kernel
from evtchnd.vmm.soft_kernel import signal

log = logging.getLogger(__name__)
T = TypeVar("T")


class EventKernel(Kernel, Protocol):
    """What keeps the event bits of one guest; to be called with the VMM's lock."""

    def send(self, port: int) -> bool:
        """The guest's EVTCHNOP_send; False: not known here, the VMM has to look."""

    def raise_event(self, port: int, vcpu: int) -> None:
        """Sets `port` pending on `vcpu`."""

    def clear(self, port: int) -> None:
        """The port was freed: nothing is pending on it."""

    def unmask(self, port: int, vcpu: int) -> None:
        """EVTCHNOP_unmask; `vcpu` is told where the port is pending."""

    def claim(self, port: int) -> bool:
        """Leaves the port's notify eventfd to the caller; False: it has none."""


class Channels:
    """`kernel` and `client` are the VMM's to set: the one before the first call, the other when it is connected."""

    kernel: EventKernel

    def __init__(self, domid: int, *, vcpus: int, long_mode: bool = True, timers: bool = False) -> None:
        self.domid = domid
        self.turn = threading.RLock()
        self.lock = threading.Condition()
        self.client: Client | None = None
        self._seldom = Seldom()
        self._effects: list[Delivery] = []  # of the call that runs; carried out once the kernel has the table
        self.ports = PortTable(
            domid,
            vcpus=vcpus,
            long_mode=long_mode,
            timers=timers,
            deliver=lambda delivery: self._effects.append(delivery),
        )
        self.applier = Applier()
        self._applied: tuple[Setting, ...] = ()
        self._backend: dict[int, tuple[int, int]] = {}  # port as the daemon bound it: its kick, our notify eventfd

    # ---- the guest's side --------------------------------------------------------------------------------------

    def hypercall(self, op: int, arg: bytes | bytearray) -> tuple[int, bytes]:
        """HYPERVISOR_event_channel_op: (0 or a negated error number, the struct as it comes back)."""
        if op == Evtchnop.SEND and len(arg) >= 4:
            with self.lock:
                if self.kernel.send(int.from_bytes(arg[:4], "little")):
                    return 0, b""
        try:
            return self.change(lambda: event_channel_op(self.ports, op, arg))
        except HostError as error:
            log.warning("domain %d: event channel operation %d: %s", self.domid, op, error)
            return -errno.ENOMEM, b""

    def change(self, call: Callable[[], T]) -> T:
        """A guest's call that may change the table: the kernel gets it, then its effects happen.

        What `call` raises, or HostError where the kernel refuses the table: nothing has changed then.
        """
        with self.turn:
            with self.lock:
                saved = self.ports.save()
                try:
                    result = call()
                    self.apply()
                except BaseException:
                    self.ports.restore(saved)
                    self._effects.clear()
                    raise
                closed = self.happen()
            self._tell(closed)
        return result

    def raise_virq(self, virq: int, vcpu: int) -> None:
        """A virtual interrupt, where the guest has bound it."""
        with self.lock:
            self.ports.raise_virq(virq, vcpu)
            self.happen()

    def apply(self) -> None:
        """The kernel gets what the table says. With `lock`."""
        table = self.ports.table()
        if table is not self._applied:
            self.applier.apply(table, self.kernel)
            self._applied = table

    def happen(self) -> list[int]:
        """Carries out what the last calls caused; the ports that domain 0 had bound and the guest has closed.
        With `lock`. The calls have succeeded: what the kernel refuses is logged, and the rest is carried out."""
        effects, self._effects = self._effects, []
        for each in effects:
            try:
                self._carry_out(each)
            except OSError as error:
                if (more := self._seldom.due("")) is not None:
                    text = f"{each.effect.name.lower()}: {error.strerror or error}{more}"
                    log.warning("domain %d: port %d: %s", self.domid, each.port, text)
        return [each.port for each in effects if each.effect is Effect.CLOSED]

    def _carry_out(self, delivery: Delivery) -> None:
        match delivery.effect:
            case Effect.RAISE:
                self.kernel.raise_event(delivery.port, delivery.vcpu)
            case Effect.SIGNAL:
                signal(self.applier.kick_fd(delivery.port))
            case Effect.CLEAR:
                self.kernel.clear(delivery.port)
            case Effect.UNMASK:
                self.kernel.unmask(delivery.port, delivery.vcpu)
            case Effect.CLOSED | Effect.DROP:
                pass

    def _tell(self, closed: Sequence[int]) -> None:
        client = self.client
        if not closed or client is None:
            return
        try:
            for port in closed if any(self.ports.bound().values()) else [closed[0] if len(closed) == 1 else ALL_PORTS]:
                client.port_closed(port)
        except EvtchndError as error:  # the guest's call has succeeded all the same
            log.warning("domain %d: the daemon was not told of a closed port: %s", self.domid, error)

    # ---- the daemon's side -------------------------------------------------------------------------------------

    def bind(self, wanted: list[tuple[int, int]]) -> Sequence[int]:
        """BIND_PORTS: ports with the daemon's kick eventfds; our notify eventfds. All of them or none."""
        made: list[int] = []
        with self.lock:
            saved = self.ports.save()
            try:
                for port, kick in wanted:
                    made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                    self.ports.connect(port, kick, made[-1])
                self.apply()
            except BaseException:
                self.ports.restore(saved)
                for fd in made:
                    os.close(fd)
                raise
            # Kept until the daemon unbinds: the guest may close its end and bind to ours again. An older pair is
            # closed here, in the thread that has sent it off by now.
            for (port, kick), notify in zip(wanted, made, strict=True):
                _close_pair(self._backend.pop(port, None))
                self._backend[port] = (kick, notify)
                signal(kick)  # the guest may have sent before
            self._drop_backend(keep=self.ports.bound())
            self.lock.notify_all()
        return made

    def unbind(self, ports: list[int]) -> None:
        """UNBIND_PORTS."""
        with self.lock:
            saved = self.ports.save()
            try:
                for port in ports:
                    if port in self.ports.bound():  # or bound anew by the guest under another number
                        self.ports.disconnect(port)
                self.apply()
            except BaseException:
                self.ports.restore(saved)
                raise
            self._drop_backend(keep=self.ports.bound())

    def bound(self) -> list[BoundPort]:
        """What a new daemon has to know of (RESUME); it has never heard of an end whose guest port was closed
        meanwhile."""
        with self.lock:
            for port in [port for port, connected in self.ports.bound().items() if not connected]:
                self.ports.disconnect(port)
            self._drop_backend(keep=self.ports.bound())
            return [BoundPort(port, *pair) for port, pair in sorted(self._backend.items())]

    def reset(self) -> None:
        """As before the guest's first call, domain 0's ends too; `kernel` has no port any more."""
        with self.lock:
            for port in self.ports.bound():
                self.ports.disconnect(port)
            self.ports.reset(self.domid)
            self.apply()
            self._effects.clear()
            self._drop_backend()

    def close(self) -> None:
        """Closes every descriptor; the kernel's side goes with the VM. Can be called twice."""
        self.applier.close()
        self._drop_backend()

    def _drop_backend(self, keep: Container[int] = ()) -> None:
        for port in [port for port in self._backend if port not in keep]:
            _close_pair(self._backend.pop(port))


def _close_pair(pair: tuple[int, int] | None) -> None:
    for fd in pair or ():
        os.close(fd)
