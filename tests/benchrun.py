"""`evtchnd-bench`, as its tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path, seconds: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """In the project's folder; whatever its exit status is."""
    return subprocess.run(
        [sys.executable, "-m", "evtchnd.bench", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
