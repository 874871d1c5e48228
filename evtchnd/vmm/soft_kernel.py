"""What KVM's Xen support does, without KVM: sends, irqfds and the event bits of one guest.

`SoftKernel` takes the settings of `vmm.settings.Kernel` and refuses what KVM refuses. A thread reads the notify
eventfds and raises their ports, as irqfds do. A port whose eventfd is read by somebody else (`claim`: a waiting
thread of the guest, a C program) is left to that reader, so that an event wakes one thread and not two.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Sequence

from evtchnd.ports import Kind, Setting
from evtchnd.vmm.settings import Route
from evtchnd.vmm.shared_info import SharedInfo

# KVM_MAX_IRQ_ROUTES
MAX_ROUTES = 4096


def signal(fd: int) -> None:
    """Writes an eventfd. One that is full is signalled already."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, 1)


class _Irq:
    """An irqfd. The eventfd is an own duplicate, as the kernel has a reference of its own."""

    def __init__(self, gsi: int, fd: int) -> None:
        self.gsi = gsi
        self.fd = os.dup(fd)
        self.bell = -1  # tells the waiting threads that it is gone; an eventfd once there was one
        self.claimed = False
        self.gone = False
        self.waiters = 0  # threads that poll the descriptors: they are closed after the last

    def drain(self) -> bool:
        """Empties the eventfd; False: there was nothing."""
        try:
            return os.eventfd_read(self.fd) > 0
        except BlockingIOError:
            return False

    def enter(self) -> tuple[int, int]:
        """One more waiting thread; what it polls."""
        if self.bell < 0:
            self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.waiters += 1
        return self.fd, self.bell

    def leave(self) -> None:
        self.waiters -= 1
        if self.gone:
            self.end()

    def end(self) -> None:
        """No irqfd any more: closed, by the last waiting thread if there are any."""
        self.gone = True
        if self.waiters:
            signal(self.bell)
            return
        for fd in (self.fd, self.bell):
            if fd >= 0:
                os.close(fd)


class SoftKernel:
    """One guest's ports as its kernel-side has them. To be called with `lock`, the VMM's; `wait` takes it itself."""

    def __init__(self, lock: threading.Condition, info: SharedInfo, name: str) -> None:
        self._lock = lock
        self._info = info
        self._sends: dict[int, Setting] = {}
        self._routes: dict[int, Route] = {}  # by gsi
        self._gsi: dict[int, int] = {}  # by port
        self._irqs: dict[int, _Irq] = {}  # by gsi
        self._by_fd: dict[int, _Irq] = {}  # what the thread reads
        self._closed = False
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name=f"{name} irqfds", daemon=True)
        self._thread.start()

    # ---- vmm.settings.Kernel -----------------------------------------------------------------------------------

    def set_port(self, setting: Setting) -> None:
        if setting.port in self._sends:
            raise OSError(errno.EEXIST, f"port {setting.port} is set")
        self._sends[setting.port] = setting

    def clear_port(self, port: int) -> None:
        if self._sends.pop(port, None) is None:
            raise OSError(errno.ENOENT, f"port {port} is not set")

    def set_routes(self, routes: Sequence[Route]) -> None:
        if any(not 0 <= route.gsi < MAX_ROUTES for route in routes):
            raise OSError(errno.EINVAL, f"a route's gsi is not in 0..{MAX_ROUTES - 1}")
        table = {route.gsi: route for route in routes}
        if lost := self._irqs.keys() - table.keys():
            raise OSError(errno.EINVAL, f"an irqfd uses gsi {min(lost)}, which has no route")
        self._routes = table
        self._gsi = {route.port: route.gsi for route in routes}

    def set_irq(self, route: Route, fd: int) -> None:
        if self._routes.get(route.gsi) != route:
            raise OSError(errno.EINVAL, f"gsi {route.gsi} has no such route")
        if route.gsi in self._irqs:
            raise OSError(errno.EBUSY, f"gsi {route.gsi} has an irqfd")
        irq = _Irq(route.gsi, fd)
        try:
            self._epoll.register(irq.fd, select.EPOLLIN)
        except OSError:
            os.close(irq.fd)
            raise
        self._irqs[route.gsi] = irq
        self._by_fd[irq.fd] = irq

    def clear_irq(self, route: Route, fd: int) -> None:
        irq = self._irqs.pop(route.gsi, None)
        if irq is None:
            raise OSError(errno.ENOENT, f"gsi {route.gsi} has no irqfd")
        if not irq.claimed:
            self._unwatch(irq)
        if irq.drain():
            self._fire(irq)
        irq.end()

    # ---- events ------------------------------------------------------------------------------------------------

    def send(self, port: int) -> bool:
        """The guest's EVTCHNOP_send; False: not known here, the VMM has to look."""
        setting = self._sends.get(port)
        if setting is None or setting.kind in (Kind.TIMER, Kind.PIRQ):
            return False
        if setting.kind is Kind.EVENTFD:
            signal(setting.kick_fd)
        else:
            self.raise_event(setting.target_port, setting.vcpu)
        return True

    def raise_event(self, port: int, vcpu: int) -> None:
        """Sets `port` pending; where its eventfd has a reader, by way of that one."""
        irq = self._irq_of(port)
        if irq is not None and irq.claimed:
            signal(irq.fd)
            return
        self._info.set_pending(port, vcpu)
        self._lock.notify_all()

    def clear(self, port: int) -> None:
        """The port was freed: nothing is pending on it."""
        self._info.clear(port)

    def unmask(self, port: int, vcpu: int) -> None:
        """EVTCHNOP_unmask; `vcpu` is told where the port is pending."""
        self._info.unmask(port, vcpu)

    def claim(self, port: int) -> bool:
        """Leaves the port's notify eventfd to the caller; False: it has none."""
        irq = self._irq_of(port)
        if irq is None:
            return False
        if not irq.claimed:
            irq.claimed = True
            self._unwatch(irq)
        return True

    def wait(self, port: int, timeout: float) -> bool:
        """Blocks until `port` is pending and clears it; False after `timeout` seconds, or when all has ended."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                irq = None if self._closed else self._irq_of(port)
                if irq is not None and irq.claimed and irq.drain():
                    self._fire(irq)
                if self._closed:
                    return False
                if self._info.take(port):
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if irq is None:
                    self._lock.wait(left)
                    continue
                self.claim(port)
                watched = irq.enter()
            poll = select.poll()
            for fd in watched:
                poll.register(fd, select.POLLIN)
            poll.poll(left * 1000)
            with self._lock:
                irq.leave()

    def close(self) -> None:
        """Ends the thread and every wait. Without the lock. Can be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            signal(self._stop)
        self._thread.join()
        with self._lock:
            for irq in self._irqs.values():
                irq.end()
            self._irqs.clear()
            self._by_fd.clear()
            self._lock.notify_all()
            self._epoll.close()
            os.close(self._stop)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _irq_of(self, port: int) -> _Irq | None:
        gsi = self._gsi.get(port)
        return None if gsi is None else self._irqs.get(gsi)

    def _fire(self, irq: _Irq) -> None:
        route = self._routes[irq.gsi]
        self._info.set_pending(route.port, route.vcpu)
        self._lock.notify_all()

    def _unwatch(self, irq: _Irq) -> None:
        # before the close: other duplicates keep the eventfd alive, and epoll would go on with it
        self._epoll.unregister(irq.fd)
        del self._by_fd[irq.fd]

    def _serve(self) -> None:
        while True:
            ready = self._epoll.poll()
            with self._lock:
                if self._closed:
                    return
                for fd, _ in ready:
                    irq = self._by_fd.get(fd)  # None: claimed or gone since
                    if irq is not None and irq.drain():
                        self._fire(irq)
