"""How long a test waits: the lab's processors are emulated, every deadline there is EVTCHND_PATIENCE times longer."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("EVTCHND_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """`seconds`, as long as they have to be here."""
    return seconds * PATIENCE
