"""evtchnd-bench reliability: what workers and daemons that die, and guests that attack, cost the others.

    crash_points   a block worker dies at every step of a request's life, in every order of answers (crashpoints.py)
    kills          workers are killed at random under a checked load (kills.py)
    restarts       the daemon is killed under 1, 10 and 100 guests (restarts.py)
    hostile        a guest attacks, its neighbour's load is read alone and attacked, in turns (hostile.py)
    mutants        each guard is taken away, its test must fail (tests/mutants.py, of a checkout)

What fails is counted, not raised: `ratios` has it, with the limit that it must keep.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from evtchnd.bench import crashpoints, hostile, kills, restarts
from evtchnd.bench.report import Report
from evtchnd.errors import HostError

PARTS = ("crash_points", "kills", "restarts", "hostile", "mutants")
DOMAINS = (1, 10, 100)
MUTANTS = Path(__file__).parents[2] / "tests" / "mutants.py"
# What each ratio must reach; of the counts of what was run: anything at all.
BOUNDS: dict[str, tuple[str, float]] = {
    "crash_points.run": (">=", 1),
    "crash_points.failed": ("<=", 0),
    "kills.run": (">=", 1),
    "kills.bad_blocks": ("<=", 0),
    "kills.duplicates": ("<=", 0),
    "worker_restart_ms_p99": ("<=", 250),
    **{f"restart_ms_p99.{count}": ("<=", 1000) for count in DOMAINS},
    "restarts.bad_blocks": ("<=", 0),
    "hostile.cases": (">=", 1),
    "hostile.not_isolated": ("<=", 0),
    "hostile.neighbour_p99_over_alone": ("<=", 2),
    "leaks.fds": ("<=", 0),
    "leaks.rss_over_baseline": ("<=", 1.05),
    "mutants.run": (">=", 1),
    "mutants.survived": ("<=", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help="of %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (%(default)s)")
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the crash points of more than two requests (%(default)s)",
    )
    parser.add_argument("--kills", type=int, default=2000, help="of workers (%(default)s)")
    parser.add_argument(
        "--restarts", type=int, default=20, help="kills of the daemon, each number of guests (%(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=3, help="readings of a neighbour, each attack (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of such a reading (%(default)s)")


def run(arguments: argparse.Namespace) -> Report:
    """A part that cannot be run is skipped, with the reason. HostError: an unknown part."""
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise HostError(f"--parts: no {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    parts: dict[str, Callable[[argparse.Namespace], Mapping[str, float]]] = {
        "crash_points": lambda a: crashpoints.run(crashpoints.Share(1.0, a.share, a.share), a.seed),
        "kills": lambda a: kills.run(a.kills, a.seed),
        "restarts": _restarts,
        "hostile": _hostile,
        "mutants": _mutants,
    }
    report = Report("reliability")
    readings: dict[str, float] = {}
    for name in PARTS:
        if name not in chosen:
            report.skipped[name] = "--parts"
            continue
        try:
            found = parts[name](arguments)
        except HostError as exc:
            report.skipped[name] = str(exc)
            continue
        readings |= found
        report.rounds.append({"part": name, "seed": arguments.seed, **found})
        report.rows += [(f"{name}: {key}", {"": f"{value:g}"}) for key, value in found.items()]
    for name, bound in BOUNDS.items():
        report.ratio(name, readings.get(name), bound)
    return report


def _restarts(arguments: argparse.Namespace) -> Mapping[str, float]:
    """By the number of guests: `restart_ms_p99.100`."""
    readings: dict[str, float] = {}
    for count in DOMAINS:
        found = restarts.restarts(count, arguments.restarts, seed=arguments.seed)
        readings["restarts.bad_blocks"] = readings.get("restarts.bad_blocks", 0) + found.pop("bad_blocks")
        readings |= {f"{name}.{count}": value for name, value in found.items()}
    return readings


def _hostile(arguments: argparse.Namespace) -> Mapping[str, float]:
    return hostile_readings(hostile.run(pairs=arguments.pairs, seconds=arguments.seconds, seed=arguments.seed))


def hostile_readings(found: Mapping[str, float]) -> dict[str, float]:
    """By the names of `BOUNDS`: `hostile.` and `leaks.` in front."""
    return {
        f"leaks.{name.removeprefix('leaks_')}" if name.startswith("leaks_") else f"hostile.{name}": value
        for name, value in found.items()
    }


def _mutants(_arguments: argparse.Namespace) -> Mapping[str, float]:
    if not MUTANTS.exists():
        raise HostError("the tests are part of a checkout of evtchnd, and this is none")
    done = subprocess.run([sys.executable, str(MUTANTS), "--json", "-"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise HostError(done.stderr.strip() or f"tests/mutants.py: exit status {done.returncode}")
    found = json.loads(done.stdout)
    for survivor in found["survivors"]:
        print(f"survived: {survivor}", file=sys.stderr)
    return {"mutants.run": found["run"], "mutants.survived": found["survived"]}
