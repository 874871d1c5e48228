"""A benchmark's programs in C, and what a process has spent."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from evtchnd.errors import HostError


def build(source: Path, target: Path, *options: str) -> bool:
    """Compiles; False where there is no compiler. HostError with its message."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return False
    command = [compiler, "-O2", *options, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{compiler} does not build {source.name}: {done.stderr.strip().splitlines()[-1]}")
    return True


def cpu_us(pid: int) -> float:
    """CPU time of every thread of a process so far, in microseconds (the scheduler's own nanoseconds)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1000
