"""How much of a counted loop a test runs: EVTCHND_SCALE, a fraction (a twentieth unless told; 1 is all)."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("EVTCHND_SCALE", "0.05"))


def scaled(count: int, *, least: int = 1) -> int:
    """`count` times EVTCHND_SCALE, at least `least`."""
    return max(least, int(count * SCALE))
