"""Log lines that a guest can cause as often as it likes: the first few are said, then one in a while.

Journald drops what comes too fast for the whole unit, so that one guest's lines would hide another's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

# A guest boots, is kexec'ed, reloads a driver: each of them connects once or twice.
BURST = 8
PAUSE_S = 60.0


class Seldom:
    """Of each kind of line `burst`, then one in `pause_s` seconds. One for each device."""

    def __init__(self, *, burst: int = BURST, pause_s: float = PAUSE_S, clock: Callable[[], float] = monotonic) -> None:
        self._burst = burst
        self._pause_s = pause_s
        self._clock = clock
        self._kinds: dict[str, tuple[int, int, float]] = {}  # said at once, left out since, when last said

    def due(self, kind: str) -> str | None:
        """None: not now. Else say it, with this at the line's end: "", or how many were left out before it."""
        now = self._clock()
        said, left_out, last = self._kinds.get(kind, (0, 0, now))
        if now - last >= self._pause_s:
            said = 0 if not left_out else self._burst - 1
        if said >= self._burst:
            self._kinds[kind] = said, left_out + 1, last
            return None
        self._kinds[kind] = said + 1, 0, now
        return f" ({left_out} more since the last such line)" if left_out else ""
