"""A benchmark that runs itself once more inside the lab, and what it brings back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from evtchnd.errors import HostError

CHECKOUT = Path(__file__).parents[2]
LAB = CHECKOUT / "tests" / "lab"
INSIDE = os.environ.get("EVTCHND_LAB_INSIDE") == "1"


def run_inside(benchmark: str, *options: str) -> dict[str, Any]:
    """The JSON object of `evtchnd-bench BENCHMARK OPTIONS`, run in one boot of the lab. HostError: why not."""
    _checkout()
    mark = f"evtchnd-bench {benchmark} in the lab:"
    inside = f"{sys.executable} -m evtchnd.bench {benchmark} {' '.join(options)} --json /run/bench.json"
    command = ["sh", "-c", f"{inside} && echo '{mark}' && cat /run/bench.json"]
    done = subprocess.run(
        [sys.executable, str(LAB), "run", "--", *command], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    told, marked, result = done.stdout.partition(mark)
    if done.returncode or not marked:
        lines = (done.stderr + told).strip().splitlines()
        raise HostError(f"the lab: {lines[-1] if lines else done.returncode}")
    lab: dict[str, Any] = json.loads(result)
    return lab


def guests() -> dict[str, Any]:
    """What `tests/lab guests` prints: the trees' programs, and kernel, initramfs and root of each guest. HostError."""
    _checkout()
    done = subprocess.run([sys.executable, str(LAB), "guests"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(done.stderr.strip() or f"tests/lab guests: exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _checkout() -> None:
    if not (LAB / "__main__.py").exists():
        raise HostError("the lab is part of a checkout of evtchnd, and this is none")
