"""The port table in KVM: the settings of `vmm.settings` as ioctls, and the events that the VMM raises itself.

Two kernels have the same calls. `KvmKernel` is KVM with Xen support: sends, loopback, IPIs, timers and events never
leave it. `DoorbellKernel` is any KVM: a guest that knows writes port numbers to an I/O port, which eventfds listen at,
and gets events as messages to its local APIC; everything else exits to the VMM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence

from evtchnd.ports import Kind, Setting
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.kvm import INVALID_GFN, XenVcpu, XenVm
from evtchnd.vmm.kvm_agent import PORT_KICK, VECTOR_PORT, VECTOR_PORTS, message
from evtchnd.vmm.kvm_irq import EventRoute, MsiRoute, ioeventfd, irqfd, set_gsi_routing, signal_msi
from evtchnd.vmm.settings import Route


class _Irqs:
    """The irqfds that are set, by gsi; KVM has them while it listens."""

    def __init__(self, vm_fd: int) -> None:
        self._vm_fd = vm_fd
        self._fds: dict[int, tuple[Route, int]] = {}
        self._listens = True

    def set(self, route: Route, fd: int) -> None:
        if self._listens:
            irqfd(self._vm_fd, fd, route.gsi)
        self._fds[route.gsi] = (route, fd)

    def listen(self, on: bool) -> None:
        """What an eventfd counts meanwhile is raised when KVM listens again."""
        if on is not self._listens:
            self._listens = on
            for route, fd in self._fds.values():
                irqfd(self._vm_fd, fd, route.gsi, assign=on)

    def clear(self, route: Route, fd: int) -> None:
        irqfd(self._vm_fd, fd, route.gsi, assign=False)
        self._fds.pop(route.gsi, None)

    def claim(self, port: int) -> bool:
        """Takes the irqfd away, so that somebody else reads the eventfd. KVM takes its end twice."""
        for route, fd in self._fds.values():
            if route.port == port:
                self.clear(route, fd)
                return True
        return False

    def of_vcpu(self, vcpu: int, routes: Mapping[int, Route]) -> list[int]:
        """Ports that eventfds raise on `vcpu`."""
        return [routes[gsi].port for gsi in self._fds if routes[gsi].vcpu == vcpu]


class KvmKernel:
    """One guest's ports in KVM. `vcpus`: by Xen's number; their KVM ids are `ids`. To be called with the VMM's lock.

    An event for a vCPU whose vcpu_info is not registered is refused by older kernels and would be lost (6.12 keeps it):
    it is kept here, and raised by `register`.
    """

    def __init__(self, vm: XenVm, vcpus: Sequence[XenVcpu], ids: Sequence[int], bits: EventBits) -> None:
        self._vm, self._vcpus, self._ids, self._bits = vm, vcpus, ids, bits
        self._set: dict[int, Setting] = {}
        self._routes: dict[int, Route] = {}
        self._irqs = _Irqs(vm.fd)
        self._registered: set[int] = set()
        self._unheard: dict[int, set[int]] = {}  # ports raised on a vCPU that cannot be told yet

    # ---- vmm.settings.Kernel -----------------------------------------------------------------------------------

    def set_port(self, setting: Setting) -> None:
        match setting.kind:
            case Kind.EVENTFD:
                self._vm.assign_eventfd(setting.port, setting.kick_fd)
            case Kind.LOOPBACK:
                self._vm.assign_port(setting.port, setting.target_port, self._ids[setting.vcpu])
            case Kind.IPI:
                self._vm.assign_ipi(setting.port, self._ids[setting.vcpu])
            case Kind.TIMER:
                self._vcpus[setting.vcpu].set_timer(setting.port)
            case Kind.PIRQ:
                pass  # a route and an irqfd are all of it
        self._set[setting.port] = setting

    def clear_port(self, port: int) -> None:
        setting = self._set[port]
        match setting.kind:
            case Kind.TIMER:
                self._vcpus[setting.vcpu].set_timer(0)
            case Kind.PIRQ:
                pass
            case _:
                self._vm.deassign(port)
        del self._set[port]

    def set_routes(self, routes: Sequence[Route]) -> None:
        # A device's MSI routes would be in the same table; this VMM has none, so gsi 0 is the first.
        set_gsi_routing(self._vm.fd, [EventRoute(r.gsi, r.port, self._ids[r.vcpu]) for r in routes])
        self._routes = {route.gsi: route for route in routes}

    def set_irq(self, route: Route, fd: int) -> None:
        self._irqs.set(route, fd)

    def clear_irq(self, route: Route, fd: int) -> None:
        self._irqs.clear(route, fd)

    def listen(self, on: bool) -> None:
        """Whether eventfds raise events: not before there is a shared_info, for which KVM would log a warning."""
        self._irqs.listen(on)

    # ---- events ------------------------------------------------------------------------------------------------

    def send(self, port: int) -> bool:
        """Never: what KVM has, it has sent already."""
        return False

    def raise_event(self, port: int, vcpu: int) -> None:
        if vcpu not in self._registered:
            self._unheard.setdefault(vcpu, set()).add(port)
            return
        self._vm.send(port, self._ids[vcpu])

    def clear(self, port: int) -> None:
        self._bits.clear_pending(port)
        for ports in self._unheard.values():
            ports.discard(port)

    def unmask(self, port: int, vcpu: int) -> None:
        # KVM tells the vCPU when the pending bit becomes set, so it is set once more
        if self._bits.clear_mask(port) and self._bits.clear_pending(port):
            self.raise_event(port, vcpu)

    def claim(self, port: int) -> bool:
        return self._irqs.claim(port)

    def register(self, vcpu: int, gpa: int) -> None:
        """VCPUOP_register_vcpu_info: events reach `vcpu` from now on.

        What was raised before is raised again. Eventfds that fired meanwhile are forgotten by KVM, so their ports are
        raised too: a spurious event, once.
        """
        self._vcpus[vcpu].set_info(gpa)
        if gpa == INVALID_GFN:
            self._registered.discard(vcpu)
            return
        first = vcpu not in self._registered
        self._registered.add(vcpu)
        ports = self._unheard.pop(vcpu, set())
        for port in sorted(ports.union(self._irqs.of_vcpu(vcpu, self._routes)) if first else ports):
            self.raise_event(port, vcpu)


class DoorbellKernel:
    """One guest's ports where KVM knows nothing of Xen. `set_vector_port` tells the guest what a vector raises."""

    def __init__(
        self, vm_fd: int, ids: Sequence[int], bits: EventBits, set_vector_port: Callable[[int, int], None]
    ) -> None:
        self._vm_fd, self._ids, self._bits = vm_fd, ids, bits
        self._set_vector_port = set_vector_port
        self._set: dict[int, Setting] = {}
        self._vectors: dict[int, int] = {}  # by port
        self._irqs = _Irqs(vm_fd)

    def set_port(self, setting: Setting) -> None:
        if setting.kind is Kind.EVENTFD:
            ioeventfd(self._vm_fd, setting.kick_fd, PORT_KICK, 4, match=setting.port)
        self._set[setting.port] = setting

    def clear_port(self, port: int) -> None:
        setting = self._set[port]
        if setting.kind is Kind.EVENTFD:
            ioeventfd(self._vm_fd, setting.kick_fd, PORT_KICK, 4, match=port, assign=False)
        del self._set[port]

    def set_routes(self, routes: Sequence[Route]) -> None:
        table = [MsiRoute(r.gsi, *message(self._ids[r.vcpu], self._vector(r.port))) for r in routes]
        set_gsi_routing(self._vm_fd, table)

    def set_irq(self, route: Route, fd: int) -> None:
        self._irqs.set(route, fd)

    def clear_irq(self, route: Route, fd: int) -> None:
        self._irqs.clear(route, fd)

    def send(self, port: int) -> bool:
        return False

    def raise_event(self, port: int, vcpu: int) -> None:
        signal_msi(self._vm_fd, *message(self._ids[vcpu], self._vector(port)))

    def clear(self, port: int) -> None:
        # the vector stays the port's: a message may be under way, and the number is soon used again
        self._bits.clear_pending(port)

    def unmask(self, port: int, vcpu: int) -> None:
        if self._bits.clear_mask(port) and self._bits.clear_pending(port):
            self.raise_event(port, vcpu)

    def claim(self, port: int) -> bool:
        return self._irqs.claim(port)

    def _vector(self, port: int) -> int:
        if port not in self._vectors:
            if len(self._vectors) == VECTOR_PORTS:
                raise OSError(errno.ENOSPC, f"a guest without Xen support in KVM has {VECTOR_PORTS} ports with events")
            self._vectors[port] = VECTOR_PORT + len(self._vectors)
            self._set_vector_port(self._vectors[port], port)
        return self._vectors[port]
