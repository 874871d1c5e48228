"""VCPUOP_set_periodic_timer: VIRQ_TIMER once a period, which KVM has no timer for. Only old guests have any.

One thread for all vCPUs, there from the first timer on. A tick that comes late is one tick: the next is a whole period
later, as in Xen (vcpu_periodic_timer_work in xen/common/sched/core.c).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class PeriodicTimers:
    """Of one domain. `tick(vcpu)` in the thread; what it raises ends that timer."""

    def __init__(self, tick: Callable[[int], None], name: str) -> None:
        self._tick, self._name = tick, name
        self._changed = threading.Condition()
        self._timers: dict[int, tuple[int, int]] = {}  # by vCPU: when it is due, and its period, in ns
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, vcpu: int, period_ns: int) -> None:
        """0: none."""
        with self._changed:
            self._timers.pop(vcpu, None)
            if period_ns and not self._closed:
                self._timers[vcpu] = time.monotonic_ns() + period_ns, period_ns
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=f"{self._name} timers", daemon=True)
                    self._thread.start()
            self._changed.notify()

    def reset(self) -> None:
        with self._changed:
            self._timers.clear()

    def close(self) -> None:
        """No tick comes any more. Can be called twice."""
        with self._changed:
            self._closed = True
            self._timers.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (vcpu := self._wait()) is not None:
            try:
                self._tick(vcpu)
            except OSError:
                self.set(vcpu, 0)

    def _wait(self) -> int | None:
        """The vCPU whose timer is due, and now is set anew; None: closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic_ns()
                due, vcpu = min(((due, vcpu) for vcpu, (due, _) in self._timers.items()), default=(None, -1))
                if due is not None and due <= now:
                    period = self._timers[vcpu][1]
                    self._timers[vcpu] = now + period, period
                    return vcpu
                self._changed.wait(None if due is None else (due - now) / 1e9)
        return None
