"""evtchnd-bench wakeup, many channels: what a kick costs the worker, and how many it takes, with 1 to 4000 of them.

Each request is kicked, at most one of each channel is on the way, and the worker sleeps in between (no polling: a kick
that is not needed would not be counted). Three loads:

    one    one channel is busy, the others are there: kick, answer, a pause in which the worker falls asleep
    turn   all are busy, one after the other, with the same pauses: each kick wakes the worker, as in `one`
    all    all are busy at once, no pauses: saturation. Wake-ups are shared, so a kick costs less

The cost of a kick is the CPU time of the worker's process. `turn` is the all-busy case of the ratio, because there,
and not in `all`, one channel and four thousand are asked for the same: one wake-up a kick.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

from evtchnd.bench.report import Report, median
from evtchnd.bench.wakeupserved import FRONT_CPU, Channels, Server
from evtchnd.errors import HostError

COUNTS = (1, 16, 256, 4000)
# The two that are compared stand together, and are read often and shortly: less of the machine's moods comes between.
ORDER = (16, 256, 1, 4000)
TURNS = 3
GAP_US = 20
LOADS: dict[str, dict[str, int]] = {
    "one": {"busy": 1, "turn": 1, "gap_us": GAP_US},
    "turn": {"turn": 1, "gap_us": GAP_US},
    "all": {},
}
IDLE_COUNT = 256
IDLE_S = 2.0
COST_KEY = "worker_cpu_us_per_kick"
RATIOS = COST, IDLE = "wakeup.cost_4000_over_1_channels", "wakeup.idle_256_channels_cpu"


def run(report: Report, program: Path, *, rounds: int, ms: int) -> None:
    """Adds its rounds to `report`. HostError where so many descriptors are not to be had."""
    # two descriptors a channel, here and in the worker
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with contextlib.ExitStack() as stack:
            workers = {count: stack.enter_context(Server.evtchnd(Channels(count), 0)) for count in COUNTS}
            for number in range(rounds * TURNS):
                for load in LOADS:
                    for count in ORDER if number % 2 == 0 else reversed(ORDER):
                        what = {"place": "soft", "load": load, "channels": count}
                        reading = _flood(program, workers[count], load, max(1, ms // TURNS))
                        report.rounds.append({"round": number, **what, **reading})
            idle = _idle(workers[IDLE_COUNT])
            report.rounds.append({"place": "soft", "load": "none", "channels": IDLE_COUNT, "cpu": idle})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _flood(program: Path, worker: Server, load: str, ms: int) -> dict[str, Any]:
    channels = worker.channels
    words = {"ram": channels.ram, "channels": channels.count, "cpu": FRONT_CPU, "ms": ms, **LOADS[load]}
    before = worker.cpu_us()
    done = subprocess.run(
        [program, "flood", *(f"{k}={v}" for k, v in words.items())],
        pass_fds=(channels.ram, *channels.kicks),
        input=" ".join(map(str, channels.kicks)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError(f"{channels.count} channels, {load}: {done.stderr.strip()}")
    reading: dict[str, Any] = json.loads(done.stdout)
    reading["kicks_per_second"] = reading["kicks"] / reading["seconds"]
    reading[COST_KEY] = (worker.cpu_us() - before) / reading["kicks"]
    return reading


def _idle(worker: Server) -> float:
    """Part of one CPU that the worker takes while nothing happens."""
    before, began = worker.cpu_us(), time.monotonic()
    time.sleep(IDLE_S)
    return (worker.cpu_us() - before) / 1e6 / (time.monotonic() - began)


def summarise(report: Report) -> None:
    """Rows, series and ratios from the report's rounds; ratios of what was not run are None."""

    def values(load: str, count: int, key: str) -> list[float]:
        cell = (load, count)
        return [r[key] for r in report.rounds if (r.get("load"), r.get("channels")) == cell]

    worse: float | None = None
    for load in LOADS:
        if not values(load, 1, COST_KEY):
            continue
        for count in COUNTS:
            cost, rate = median(values(load, count, COST_KEY)), median(values(load, count, "kicks_per_second"))
            cells = {"CPU us": f"{cost:.2f}", "kicks/s": f"{rate:.0f}"}
            report.rows.append((f"{count} channels, {load}", cells))
        title = f"CPU us a kick\n{load}, channels:"
        report.series[title] = {str(count): median(values(load, count, COST_KEY)) for count in COUNTS}
        if load != "all":
            pairs = zip(values(load, COUNTS[-1], COST_KEY), values(load, COUNTS[0], COST_KEY), strict=True)
            worse = max(worse or 0, median([many / one for many, one in pairs]))
    idle = values("none", IDLE_COUNT, "cpu")
    report.ratio(COST, worse, ("<=", 1.2))
    report.ratio(IDLE, idle[0] if idle else None, ("<=", 0.001))
