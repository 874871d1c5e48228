"""evtchnctl as a process of its own, for programs: what it prints with `-o json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from evtchnd.errors import HostError


def evtchnctl(runtime: str | os.PathLike[str], *arguments: str) -> Any:
    """The object that it prints, None for nothing. HostError with its message where it refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", runtime, *arguments, "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError(f"evtchnctl {arguments[0]}: {done.stderr.strip()}")
    return json.loads(done.stdout) if done.stdout.strip() else None
