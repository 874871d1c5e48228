"""evtchnd-bench wakeup: a guest kicks, the worker's handler answers through shared memory, the guest sees the answer.

Three places, in each the same worker-like process (wakeupserver.py) beside a C program on the same eventfds and words:

    soft   the guest is a C program that writes the eventfd
    host   a real guest on this machine's KVM; its kick is a write to an I/O port
    lab    a real guest in the lab; its kick is EVTCHNOP_send

In the last two the kick reaches the eventfd inside the kernel (`eventfd`) or by an exit of the vCPU to the VMM, which
writes it (`exit`: evtchnd's VMM, in Python; `exit_c`: the least that there can be, in C). The worker sleeps between
kicks (`asleep`) or looks at the words for a while (`polling`). Each request is kicked, needed or not, and the guest
looks for the answer. Guest on one CPU, server on another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench import wakeupchannels, wakeupkvm
from evtchnd.bench.lab import run_inside
from evtchnd.bench.program import build
from evtchnd.bench.report import Report, median
from evtchnd.bench.wakeupserved import FRONT_CPU, SOURCE, Channels, Server
from evtchnd.errors import HostError

PLACES = ("soft", "channels", "host", "lab")
SIDES = ("evtchnd", "c")
# A kick there takes about half a millisecond.
LAB_KICKS = 300


@dataclass(frozen=True)
class Sleep:
    """How the server passes its time. gap_us: the guest's pause between an answer and its next request, on average.

    doze: the guest sleeps, too, until it is notified (soft only).
    """

    name: str
    polls: bool
    gap_us: int
    doze: bool = False


POLLING = Sleep("polling", True, 10)
ASLEEP = Sleep("asleep", False, 100)
BOTH_ASLEEP = Sleep("both asleep", False, 100, doze=True)
# name -> what it must reach
BOUNDS = {
    "wakeup.soft.polling.daemon_over_c_p50": ("<=", 1.5),
    "wakeup.soft.asleep.daemon_over_c_p50": ("<=", 1.3),
    "wakeup.host.polling.exit_over_eventfd_p50": (">=", 2.5),
    "wakeup.lab.polling.exit_over_eventfd_p50": (">=", 3),
    "wakeup.lab.asleep.exit_over_eventfd_p50": (">=", 1.3),
    "wakeup.host.polling.exit_c_over_eventfd_p50": (">=", 1),
    "wakeup.lab.polling.exit_c_over_eventfd_p50": (">=", 1),
}
# reading -> (column, digits)
COLUMNS = {
    "p50_us": ("p50 us", 2),
    "p99_us": ("p99 us", 1),
    "p999_us": ("p99.9 us", 1),
    "server_cpu_us": ("CPU us", 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="readings of each cell (%(default)s)")
    parser.add_argument("--kicks", type=int, default=3000, help="kicks of a reading (%(default)s)")
    parser.add_argument("--ms", type=int, default=300, help="length of a reading with many channels (%(default)s)")
    parser.add_argument("--poll-us", type=int, default=50, help="polling window of both servers (%(default)s)")
    parser.add_argument(
        "--places", default=",".join(PLACES), metavar="LIST", help="of %(default)s; lab boots the lab, as root"
    )


def run(arguments: argparse.Namespace) -> Report:
    """All places that are here; the others are `skipped` with the reason."""
    report = Report("wakeup")
    places = arguments.places.split(",")
    if unknown := set(places) - set(PLACES):
        raise HostError(f"--places: no {', '.join(sorted(unknown))}: there are {', '.join(PLACES)}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-")))
        program = folder / "wakeup"
        compiled = build(SOURCE, program)
        for place in PLACES:
            try:
                if place not in places:
                    raise HostError("not asked for (--places)")
                if not compiled:
                    raise HostError("no C compiler for guest and limit: apt-get install gcc libc6-dev")
                run_place(report, place, program, folder, arguments)
            except HostError as exc:
                for name in wakeupchannels.RATIOS if place == "channels" else (f"wakeup.{place}",):
                    report.skipped[name] = str(exc)
    summarise(report)
    return report


def run_place(report: Report, place: str, program: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """HostError: why it cannot run here."""
    if place == "soft":
        soft(report, program, arguments)
    elif place == "channels":
        wakeupchannels.run(report, program, rounds=arguments.rounds, ms=arguments.ms)
    elif place == "host" or wakeupkvm.has_xen():
        wakeupkvm.run(report, place, program, folder, arguments)
    else:
        boot_lab(report, arguments)


def soft(report: Report, program: Path, arguments: argparse.Namespace) -> None:
    """A C program in the guest's place; there is no vCPU that could exit."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for polls in (True, False):
            poll_us = arguments.poll_us if polls else 0
            servers["evtchnd", polls] = stack.enter_context(Server.evtchnd(Channels(1), poll_us))
            servers["c", polls] = stack.enter_context(Server.limit(Channels(1), poll_us, program))
        for number in range(arguments.rounds):
            for sleep in (POLLING, ASLEEP, BOTH_ASLEEP):
                # who goes first changes every round: neither side always meets the warmer machine
                for side in SIDES if number % 2 == 0 else reversed(SIDES):
                    server = servers[side, sleep.polls]
                    reading = kick(program, server, sleep, arguments.kicks)
                    cell = {"place": "soft", "way": "eventfd", "sleep": sleep.name, "side": side}
                    report.rounds.append({"round": number, **cell, **reading})


def kick(program: Path, server: Server, sleep: Sleep, kicks: int) -> dict[str, Any]:
    """One reading: what the guest saw, and what the server's process spent."""
    channels = server.channels
    words = {"ram": channels.ram, "offset": channels.offset, "cpu": FRONT_CPU, "rounds": kicks, "always": 1}
    words |= {"kick": channels.kicks[0], "notify": channels.notifies[0], "gap_us": sleep.gap_us}
    before = server.cpu_us()
    done = subprocess.run(
        [program, "front", *(f"{k}={v}" for k, v in words.items()), f"doze={int(sleep.doze)}"],
        pass_fds=(channels.ram, channels.kicks[0], channels.notifies[0]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError(f"soft, {sleep.name}: {done.stderr.strip() or done.returncode}")
    reading: dict[str, Any] = json.loads(done.stdout)
    reading["server_cpu_us"] = (server.cpu_us() - before) / kicks
    return reading


def boot_lab(report: Report, arguments: argparse.Namespace) -> None:
    """The lab runs this benchmark once more, for itself; its rounds and ratios are added to `report`."""
    kicks = min(arguments.kicks, LAB_KICKS)
    options = f"--rounds {arguments.rounds} --kicks {kicks} --poll-us {arguments.poll_us}"
    lab = run_inside("wakeup", "--places lab", options)
    report.machines["lab"] = lab["machine"]
    report.rounds += lab["rounds"]
    report.skipped |= {name: reason for name, reason in lab["skipped"].items() if name.startswith("wakeup.lab")}


def summarise(report: Report) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`."""
    readings: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for reading in report.rounds:
        if "way" in reading:
            cell = (reading["place"], reading["way"], reading["sleep"], reading["side"])
            readings.setdefault(cell, []).append(reading)

    def over(first: tuple[str, str, str, str], second: tuple[str, str, str, str]) -> float | None:
        pairs = list(zip(readings.get(first, []), readings.get(second, []), strict=True))
        return median([a["p50_us"] / b["p50_us"] for a, b in pairs]) if pairs else None

    for (place, way, sleep, side), taken in readings.items():
        medians = {key: median([reading[key] for reading in taken]) for key in COLUMNS}
        cells = {title: f"{medians[key]:.{digits}f}" for key, (title, digits) in COLUMNS.items()}
        report.rows.append((f"{place} {way}, {sleep}, {side}", cells))
        if sleep != BOTH_ASLEEP.name:
            bars = report.series.setdefault(f"{place}, {sleep}\np50 us", {})
            bars[f"{way}\n{side}"] = medians["p50_us"]
    for name, bound in BOUNDS.items():
        _, place, sleep, what = name.split(".")
        if what.startswith("daemon"):
            value = over((place, "eventfd", sleep, "evtchnd"), (place, "eventfd", sleep, "c"))
        else:
            way = what.partition("_over_")[0]
            value = over((place, way, sleep, "evtchnd"), (place, "eventfd", sleep, "evtchnd"))
        report.ratio(name, value, bound)
    wakeupchannels.summarise(report)
