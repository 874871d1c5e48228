"""A guest's event ports, 2-level ABI: a pure state machine with Xen's semantics and error numbers.

It runs in the VMM's process, under the VMM's lock. Nothing here touches shared_info, an eventfd or KVM: what a call
wants done is handed to `deliver` in order (`Delivery`), and what the kernel should know is `table()`.

    state        bind_* / alloc / connect                  send                      close
    -----------  ----------------------------------------  ------------------------  ---------------------------
    closed       -> the state asked for                    EINVAL                    EINVAL
    unbound      the named domain may bind to it           dropped, succeeds         -> closed
    interdomain  domain 0 at the other end: an eventfd     SIGNAL                    other end -> unbound, CLOSED
                 own port at the other end: loopback       RAISE the other port      other end -> unbound
    ipi          own vCPU                                  RAISE itself              -> closed
    virq, pirq   raised by the VMM                         EINVAL                    -> closed

Domain 0's end of a channel has a number of its own. It outlives the guest's end: closing one end leaves the other
unbound, and a guest that remembers the number (EVTCHNOP_status) may bind to it again (EVTCHNOP_bind_interdomain).

Two domains exist for a guest: itself and domain 0 (EPERM); any other is ESRCH.
Source: xen/include/public/event_channel.h, xen/common/event_channel.c (4.17).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from evtchnd.abi import (
    DOMID_SELF,
    EVTCHN_2L_PORTS_32,
    EVTCHN_2L_PORTS_64,
    NR_VIRQS,
    PER_VCPU_VIRQS,
    Evtchnstat,
    Virq,
)
from evtchnd.errors import XenError

NR_PIRQS = 256  # Xen gives an HVM guest its GSIs and 256 more, QEMU 256 in all; what a guest was told counts from 0
BACKEND_DOMID = 0


class Effect(Enum):
    """What a call wants done outside of the table."""

    DROP = auto()  # nothing: sent on an unbound port
    RAISE = auto()  # set `port` pending on `vcpu`
    SIGNAL = auto()  # write domain 0's kick eventfd of `port`
    CLEAR = auto()  # clear the pending bit of `port`: it was freed
    UNMASK = auto()  # clear the mask bit of `port`; was it pending, tell `vcpu`
    CLOSED = auto()  # the guest closed its end of what domain 0 connected as `port`: tell the daemon


class Delivery(NamedTuple):
    """One effect on one guest port; `vcpu` is Xen's number."""

    effect: Effect
    port: int
    vcpu: int = 0


class Kind(Enum):
    """Where a send on a port goes without leaving the kernel."""

    EVENTFD = auto()  # interdomain with domain 0: writes `kick_fd`
    LOOPBACK = auto()  # interdomain with an own port: raises `target_port` on `vcpu`
    IPI = auto()  # raises itself on `vcpu`
    TIMER = auto()  # raised by the timer of `vcpu`; a send on it leaves the kernel
    PIRQ = auto()  # raised by a write to `notify_fd`, a device's interrupt; a send on it leaves the kernel


class Setting(NamedTuple):
    """A port as the kernel should have it.

    `vcpu`: Xen's number of the vCPU that is told: of the port itself (EVENTFD: where `notify_fd` raises it, IPI) or
    of the target (LOOPBACK). `kick_fd`, `notify_fd`: -1 where there is none. `serial` tells two descriptors apart
    that had the same number one after the other: equal serial and port, same eventfds.
    """

    port: int
    kind: Kind
    vcpu: int
    target_port: int = 0
    kick_fd: int = -1
    notify_fd: int = -1
    serial: int = 0


class Status(NamedTuple):
    """Answer of EVTCHNOP_status. `dom`, `port`: the other end (unbound: who may bind); `irq`: a virq or pirq."""

    state: Evtchnstat
    vcpu: int = 0
    dom: int = 0
    port: int = 0
    irq: int = 0


class _End(NamedTuple):
    """Domain 0's end: its own `number`, the guest port it was connected as (`home`), and is connected to (0: none)."""

    number: int
    home: int
    port: int
    kick_fd: int
    notify_fd: int
    serial: int


class Saved(NamedTuple):
    """What `PortTable.restore` takes; opaque."""

    ports: dict[int, Status]
    ends: dict[int, _End]
    kept: frozenset[int]


_CLOSED = Status(Evtchnstat.CLOSED)


def _ignore(delivery: Delivery) -> None:
    """For callers that look at return values only."""


class PortTable:
    """One guest's ports. Every refusal is a XenError; a refused call has changed nothing.

    `deliver` is called after a change, still within the call; it must not call back into the table.
    `long_mode`: what KVM latched when the guest filled its hypercall page; 4096 ports, or 1024 of a 32-bit guest.
    `timers`: the kernel has the guest's VIRQ_TIMER, so `table()` names its ports.
    """

    def __init__(
        self,
        domid: int,
        *,
        vcpus: int,
        long_mode: bool = True,
        timers: bool = False,
        deliver: Callable[[Delivery], None] = _ignore,
    ) -> None:
        self.domid = domid
        self.vcpus = vcpus
        self.long_mode = long_mode
        self.timers = timers
        self._pirqs: dict[int, tuple[int, int]] = {}  # a device's eventfd and its serial, by pirq
        self._deliver = deliver
        self._ports: dict[int, Status] = {}
        self._ends: dict[int, _End] = {}  # by home
        self._kept: frozenset[int] = frozenset()
        self._virqs: dict[tuple[int, int], int] = {}  # (virq, vCPU it was bound on) -> port
        self._lowest = 1  # no port below is free
        self._serial = 0
        self._table: tuple[Setting, ...] | None = ()

    @property
    def limit(self) -> int:
        """Ports are 1 .. limit - 1."""
        return EVTCHN_2L_PORTS_64 if self.long_mode else EVTCHN_2L_PORTS_32

    # ---- the guest's hypercalls --------------------------------------------------------------------------------

    def alloc_unbound(self, dom: int, remote_dom: int) -> int:
        """A fresh port to which `remote_dom` may bind; DOMID_SELF for loopback. EPERM, ESRCH, ENOSPC."""
        self._check_self(dom)
        port = self._free_port()
        remote = self.domid if remote_dom == DOMID_SELF else remote_dom
        self._put(port, Status(Evtchnstat.UNBOUND, dom=remote))
        return port

    def bind_interdomain(self, remote_dom: int, remote_port: int) -> int:
        """A fresh port, connected with an unbound one of the own domain or of domain 0. ESRCH, ENOSPC, EINVAL.

        The fresh port is raised: the other end may have sent before there was anyone to hear it.
        """
        if remote_dom == BACKEND_DOMID:
            return self._bind_backend(remote_port)
        if remote_dom not in (DOMID_SELF, self.domid):
            raise XenError(errno.ESRCH, f"domain {self.domid}: there is no domain {remote_dom}")
        port = self._free_port()
        other = self._ports.get(remote_port, _CLOSED)
        if other.state is not Evtchnstat.UNBOUND or other.dom != self.domid:
            raise self._refused(remote_port, "not unbound for the own domain")
        self._put(port, Status(Evtchnstat.INTERDOMAIN, dom=self.domid, port=remote_port))
        self._put(remote_port, Status(Evtchnstat.INTERDOMAIN, other.vcpu, dom=self.domid, port=port))
        self._deliver(Delivery(Effect.RAISE, port))
        return port

    def _bind_backend(self, number: int) -> int:
        end = next((end for end in self._ends.values() if end.number == number and not end.port), None)
        # The store's and the console's number must come back; Xen's order of checks: space first.
        back = end is not None and end.home in self._kept and end.home not in self._ports
        port = end.home if end is not None and back else self._free_port()
        if end is None:
            raise self._refused(number, "domain 0 has no such port that is unbound")
        self._ends[end.home] = end._replace(port=port)
        self._put(port, Status(Evtchnstat.INTERDOMAIN, port=number))
        self._deliver(Delivery(Effect.RAISE, port))
        return port

    def bind_virq(self, virq: int, vcpu: int) -> int:
        """A fresh port for a virtual interrupt; a global one is bound on vCPU 0. EINVAL, ENOENT, EEXIST, ENOSPC."""
        if virq >= NR_VIRQS or (virq not in PER_VCPU_VIRQS and vcpu != 0):
            raise XenError(errno.EINVAL, f"domain {self.domid}: no virq {virq} on vCPU {vcpu}")
        self._check_vcpu(vcpu)
        if (virq, vcpu) in self._virqs:
            raise XenError(errno.EEXIST, f"domain {self.domid}: virq {virq} on vCPU {vcpu} is bound")
        port = self._free_port()
        self._put(port, Status(Evtchnstat.VIRQ, vcpu, irq=virq))
        self._virqs[virq, vcpu] = port
        return port

    def bind_ipi(self, vcpu: int) -> int:
        """A fresh port that raises itself on `vcpu`. ENOENT, ENOSPC."""
        self._check_vcpu(vcpu)
        port = self._free_port()
        self._put(port, Status(Evtchnstat.IPI, vcpu))
        return port

    def bind_pirq(self, pirq: int, flags: int) -> int:
        """A fresh port for a physical interrupt (`flags`: BIND_PIRQ__WILL_SHARE, taken as Xen's HVM does: unread).

        EINVAL, EEXIST, ENOSPC.
        """
        if pirq >= NR_PIRQS:
            raise XenError(errno.EINVAL, f"domain {self.domid}: pirq {pirq} is not in 0..{NR_PIRQS - 1}")
        if any(s.state is Evtchnstat.PIRQ and s.irq == pirq for s in self._ports.values()):
            raise XenError(errno.EEXIST, f"domain {self.domid}: pirq {pirq} is bound")
        port = self._free_port()
        self._put(port, Status(Evtchnstat.PIRQ, irq=pirq))
        return port

    def bind_vcpu(self, port: int, vcpu: int) -> None:
        """Moves a port to another vCPU: not an IPI, not a virq of one vCPU. ENOENT, EINVAL."""
        self._check_vcpu(vcpu)
        status = self._ports.get(port, _CLOSED)
        movable = status.state in (Evtchnstat.UNBOUND, Evtchnstat.INTERDOMAIN, Evtchnstat.PIRQ) or (
            status.state is Evtchnstat.VIRQ and status.irq not in PER_VCPU_VIRQS
        )
        if not movable:
            raise self._refused(port, f"{status.state.name.lower()}: cannot change its vCPU")
        if status.vcpu != vcpu:
            self._put(port, status._replace(vcpu=vcpu))

    def send(self, port: int) -> Delivery:
        """What a send does (also handed to `deliver`). EINVAL where there is nobody to send to."""
        status = self._ports.get(port, _CLOSED)
        match status.state:
            case Evtchnstat.INTERDOMAIN if status.dom == self.domid:
                delivery = Delivery(Effect.RAISE, status.port, self._ports[status.port].vcpu)
            case Evtchnstat.INTERDOMAIN:
                delivery = Delivery(Effect.SIGNAL, port)
            case Evtchnstat.IPI:
                delivery = Delivery(Effect.RAISE, port, status.vcpu)
            case Evtchnstat.UNBOUND:
                delivery = Delivery(Effect.DROP, port)
            case _:
                raise self._refused(port, f"{status.state.name.lower()}: nothing to send to")
        self._deliver(delivery)
        return delivery

    def status(self, dom: int, port: int) -> Status:
        """The state of a port, of a free one too. ESRCH, EPERM, EINVAL for a number that is none."""
        self._check_self(dom)
        self._check_range(port)
        return self._ports.get(port, _CLOSED)

    def close(self, port: int) -> None:
        """Frees a port; the other end of it is unbound then. EINVAL."""
        status = self._ports.get(port, _CLOSED)
        if status.state is Evtchnstat.CLOSED:
            raise self._refused(port, "not open")
        gone = 0
        if status.state is Evtchnstat.INTERDOMAIN and status.dom == self.domid:
            other = self._ports[status.port]
            self._put(status.port, Status(Evtchnstat.UNBOUND, other.vcpu, dom=self.domid))
        elif status.state is Evtchnstat.INTERDOMAIN:
            end = self._end_of(port)
            self._ends[end.home] = end._replace(port=0)
            gone = end.home
        elif status.state is Evtchnstat.VIRQ:
            self._virqs = {key: bound for key, bound in self._virqs.items() if bound != port}
        del self._ports[port]
        self._table = None
        self._lowest = min(self._lowest, port)
        self._deliver(Delivery(Effect.CLEAR, port))  # or a later owner of the number would see it
        if gone:
            self._deliver(Delivery(Effect.CLOSED, gone))

    def unmask(self, port: int) -> None:
        """Unmasks a port, and raises it if it is pending; nothing for a free one. EINVAL for a number that is none."""
        self._check_range(port)
        if port in self._ports:
            self._deliver(Delivery(Effect.UNMASK, port, self._ports[port].vcpu))

    def reset(self, dom: int) -> None:
        """Closes every port, the store's and the console's too. ESRCH, EPERM."""
        self._check_self(dom)
        for port in sorted(self._ports):
            self.close(port)

    # ---- the VMM and domain 0 ----------------------------------------------------------------------------------

    def reserve(self, port: int, remote_dom: int = BACKEND_DOMID) -> None:
        """Opens a port of this number for the store or the console, unbound. EINVAL, EBUSY.

        The number stays theirs when the port is closed: no other call gives it out; reserve it again after a reset.
        """
        self._check_range(port)
        if port in self._ports:
            raise XenError(errno.EBUSY, f"domain {self.domid}: port {port}: in use")
        self._kept |= {port}
        self._put(port, Status(Evtchnstat.UNBOUND, dom=remote_dom))

    def raise_virq(self, virq: int, vcpu: int = 0) -> bool:
        """Raises a virtual interrupt; False: the guest has not bound it."""
        port = self._virqs.get((virq, vcpu))
        if port is not None:
            self._deliver(Delivery(Effect.RAISE, port, self._ports[port].vcpu))
        return port is not None

    def attach_pirq(self, pirq: int, fd: int) -> None:
        """A device's eventfd is the interrupt `pirq`, bound by the guest or not yet; -1: no device. It stays the
        caller's. EINVAL."""
        if not 0 <= pirq < NR_PIRQS:
            raise XenError(errno.EINVAL, f"domain {self.domid}: pirq {pirq} is not in 0..{NR_PIRQS - 1}")
        self._pirqs.pop(pirq, None)
        if fd >= 0:
            self._serial += 1
            self._pirqs[pirq] = (fd, self._serial)
        self._table = None

    def raise_pirq(self, pirq: int) -> bool:
        """Raises a physical interrupt that the VMM emulates; False: the guest has not bound it."""
        for port, status in self._ports.items():
            if status.state is Evtchnstat.PIRQ and status.irq == pirq:
                self._deliver(Delivery(Effect.RAISE, port, status.vcpu))
                return True
        return False

    def connect(self, port: int, kick_fd: int, notify_fd: int = -1) -> None:
        """Domain 0 binds to the guest's `port`, or is connected already and gets other descriptors. EINVAL.

        A send then writes `kick_fd`; a write to `notify_fd` raises the port. They stay the caller's. Xen leaves the
        binder's port pending: the caller writes `kick_fd` once when the kernel has the table, and the backend scans.
        """
        status = self._ports.get(port, _CLOSED)
        connected = status.state is Evtchnstat.INTERDOMAIN and status.dom == BACKEND_DOMID
        if not connected and (status.state is not Evtchnstat.UNBOUND or status.dom != BACKEND_DOMID):
            raise self._refused(port, f"{status.state.name.lower()}, not unbound for domain 0")
        self._serial += 1
        if connected:
            number = status.port
            # known by another port if the guest closed that one and bound to our end again
            del self._ends[self._end_of(port).home]
        if port in self._ends:  # stale: the guest has closed its end and opened another of this number
            self.disconnect(port)
        if not connected:
            used = {end.number for end in self._ends.values()}
            number = next(n for n in range(1, len(used) + 2) if n not in used)
        self._ends[port] = _End(number, port, port, kick_fd, notify_fd, self._serial)
        self._put(port, Status(Evtchnstat.INTERDOMAIN, status.vcpu, port=number))

    def disconnect(self, port: int) -> None:
        """Domain 0 closes the end that it connected as `port`; the guest's end is unbound then. ENOENT."""
        end = self._ends.pop(port, None)
        if end is None:
            raise XenError(errno.ENOENT, f"domain {self.domid}: port {port}: not bound by domain 0")
        if end.port:
            self._put(end.port, Status(Evtchnstat.UNBOUND, self._ports[end.port].vcpu))
        self._table = None

    def bound(self) -> dict[int, bool]:
        """Ports as which domain 0 has connected its ends; False: the guest has closed its end since."""
        return {home: end.port != 0 for home, end in sorted(self._ends.items())}

    def table(self) -> tuple[Setting, ...]:
        """The whole table as the kernel should have it, by port. The same object while nothing changed."""
        if self._table is None:
            settings = (self._setting(port, self._ports[port]) for port in sorted(self._ports))
            self._table = tuple(setting for setting in settings if setting is not None)
        return self._table

    def save(self) -> Saved:
        """The state, to go back to where the kernel refuses the table."""
        return Saved(dict(self._ports), dict(self._ends), self._kept)

    def restore(self, saved: Saved) -> None:
        """Goes back to `saved`. Deliveries that were made since stay made."""
        self._ports, self._ends, self._kept = dict(saved.ports), dict(saved.ends), saved.kept
        # A global virq may have moved since it was bound on vCPU 0; one of a vCPU never moves.
        self._virqs = {
            (s.irq, s.vcpu if s.irq in PER_VCPU_VIRQS else 0): port
            for port, s in self._ports.items()
            if s.state is Evtchnstat.VIRQ
        }
        self._lowest = 1
        self._table = None

    # ---- inside ------------------------------------------------------------------------------------------------

    def _setting(self, port: int, status: Status) -> Setting | None:
        if status.state is Evtchnstat.IPI:
            return Setting(port, Kind.IPI, status.vcpu, port)
        if status.state is Evtchnstat.VIRQ and status.irq == Virq.TIMER and self.timers:
            return Setting(port, Kind.TIMER, status.vcpu)
        if status.state is Evtchnstat.PIRQ and status.irq in self._pirqs:
            fd, serial = self._pirqs[status.irq]
            return Setting(port, Kind.PIRQ, status.vcpu, notify_fd=fd, serial=serial)
        if status.state is not Evtchnstat.INTERDOMAIN:
            return None  # a send on it leaves the kernel, and `send` decides
        if status.dom == self.domid:
            return Setting(port, Kind.LOOPBACK, self._ports[status.port].vcpu, status.port)
        end = self._end_of(port)
        return Setting(port, Kind.EVENTFD, status.vcpu, kick_fd=end.kick_fd, notify_fd=end.notify_fd, serial=end.serial)

    def _end_of(self, port: int) -> _End:
        # nearly always the guest port that domain 0 bound to
        end = self._ends.get(port)
        if end is not None and end.port == port:
            return end
        return next(end for end in self._ends.values() if end.port == port)

    def _put(self, port: int, status: Status) -> None:
        self._ports[port] = status
        self._table = None

    def _free_port(self) -> int:
        """The lowest free number that is kept for nobody; it is not taken yet."""
        while self._lowest in self._ports or self._lowest in self._kept:
            self._lowest += 1
        if self._lowest >= self.limit:
            raise XenError(errno.ENOSPC, f"domain {self.domid}: all {self.limit - 1} ports are in use")
        return self._lowest

    def _check_self(self, dom: int) -> None:
        if dom == BACKEND_DOMID:
            raise XenError(errno.EPERM, f"domain {self.domid}: domain 0's ports are its own")
        if dom not in (DOMID_SELF, self.domid):
            raise XenError(errno.ESRCH, f"domain {self.domid}: there is no domain {dom}")

    def _check_vcpu(self, vcpu: int) -> None:
        if not 0 <= vcpu < self.vcpus:
            raise XenError(errno.ENOENT, f"domain {self.domid}: there is no vCPU {vcpu}")

    def _check_range(self, port: int) -> None:
        if not 0 < port < self.limit:
            raise self._refused(port, f"not in 1..{self.limit - 1}")

    def _refused(self, port: int, reason: str) -> XenError:
        return XenError(errno.EINVAL, f"domain {self.domid}: port {port}: {reason}")
