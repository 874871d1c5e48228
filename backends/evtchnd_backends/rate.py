"""What a guest may send: so many bytes in so many microseconds, for all queues of its vif together (xl's `rate`)."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

# As Linux' netback: a frame of any size goes out at some time, however small the rate.
LEAST_BURST = 131072


class Rate:
    """A bucket that is filled once an interval. `rate`: (bytes, microseconds); (0, 0): no limit."""

    def __init__(self, rate: tuple[int, int], clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self.limit(rate)

    def limit(self, rate: tuple[int, int]) -> None:
        """Another rate from now on; what was saved up is kept as far as the new one lets it."""
        bytes_, microseconds = rate
        self.limited = bytes_ > 0 and microseconds > 0
        self._bytes = bytes_
        self._interval = microseconds / 1e6
        self._burst = max(bytes_, LEAST_BURST)
        self._left = bytes_
        self._next = self._clock() + self._interval

    def left(self) -> int:
        """Bytes that may be sent now; -1: any number."""
        if not self.limited:
            return -1
        now = self._clock()
        if now >= self._next:
            intervals = int((now - self._next) / self._interval) + 1
            self._left = min(self._left + intervals * self._bytes, self._burst)
            self._next += intervals * self._interval
        return self._left

    def spent(self, left: int) -> None:
        """So many are left of what `left` said."""
        if self.limited:
            self._left = max(left, 0)

    def wait(self) -> float:
        """Seconds until there is more."""
        return max(self._next - self._clock(), 0.0)
