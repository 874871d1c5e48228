"""evtchnd-bench net: packets between a soft guest and a TAP, served by evtchnd, and by a C program on such a TAP.

Both TAPs are in a network namespace that is made for it, with the same offloads; what the host does with a packet, and
what it sends, is the same for both (netload.c). The limit (`c`) has no guest: it writes and reads the same packets
itself, one write or read each, from and to memory in one piece. Guest and host share one CPU; the backend, or the
limit, has another. CPU time is the backend process' own, all its threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench import netguest
from evtchnd.bench.netns import ECHO_PORT, Link, Namespace
from evtchnd.bench.netserved import MAC, Served
from evtchnd.bench.program import build, cpu_us
from evtchnd.bench.report import Report, median
from evtchnd.errors import HostError

SOURCE = Path(__file__).with_name("netload.c")
GUEST_CPU, BACK_CPU = 0, 1
PLACES = ("soft", "lab")
# 44 segments of 1460 bytes behind 54 bytes of headers: 16 pages
GSO_BYTES, GSO_SEGMENT = 54 + 44 * 1460, 1460


@dataclass(frozen=True)
class Workload:
    """`mode`: netload.c's, of a guest: send, receive, ping. `size`: bytes of a frame."""

    name: str
    mode: str
    size: int
    gso: int = 0


WORKLOADS = (
    Workload("tx64", "send", 64),
    Workload("tx1500", "send", 1514),
    Workload("tx_gso", "send", GSO_BYTES, GSO_SEGMENT),
    Workload("rx64", "receive", 64),
    Workload("rx1500", "receive", 1514),
    Workload("rx_gso", "receive", GSO_BYTES, GSO_SEGMENT),
    Workload("rtt", "ping", 64),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="readings of each side and workload (%(default)s)")
    parser.add_argument("--ms", type=int, default=1000, help="length of a reading (%(default)s)")
    parser.add_argument("--poll-us", type=int, default=50, help="polling window of the worker (%(default)s)")
    parser.add_argument("--dir", default="/var/tmp", help="where log and programs lie (%(default)s)")
    parser.add_argument("--only", default="", help="workloads, by comma (all)")
    parser.add_argument(
        "--places",
        default=",".join(PLACES),
        metavar="LIST",
        help="of %(default)s; lab: `evtchnd-bench netguest` with its own rounds",
    )


def run(arguments: argparse.Namespace) -> Report:
    """All places. HostError if the daemon or the load cannot be started."""
    report = Report("net")
    places = arguments.places.split(",")
    if unknown := set(places) - set(PLACES):
        raise HostError(f"--places: no {', '.join(sorted(unknown))}: there are {', '.join(PLACES)}")
    if "soft" in places:
        measure(report, arguments)
    if "lab" in places:
        netguest.fill(report)
    return report


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """All rounds of the soft guest."""
    chosen = [work for work in WORKLOADS if not arguments.only or work.name in arguments.only.split(",")]
    readings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-", dir=arguments.dir)))
        program = folder / "netload"
        if not build(SOURCE, program):
            report.skipped["net"] = "no C compiler for the load and the limit: apt-get install gcc libc6-dev"
            summarise(report, {})
            return
        try:
            netns = stack.enter_context(Namespace())
        except HostError as exc:
            report.skipped["net"] = str(exc)
            summarise(report, {})
            return
        served = stack.enter_context(Served(folder, netns, poll_us=arguments.poll_us))
        served.pin(BACK_CPU)
        load = Load(program, netns, served, arguments.ms)
        stack.enter_context(load.echoing())
        for number in range(arguments.rounds):
            for work in chosen:
                # who goes first changes every round: neither side always meets the warmer machine
                for side in ("evtchnd", "c") if number % 2 == 0 else ("c", "evtchnd"):
                    reading = load.evtchnd(work) if side == "evtchnd" else load.limit(work)
                    readings.setdefault((side, work.name), []).append(reading)
                    report.rounds.append({"round": number, "side": side, "workload": work.name, **reading})
    summarise(report, readings)


class Load:
    """Runs netload for either side, one reading at a time."""

    def __init__(self, program: Path, netns: Namespace, served: Served, ms: int) -> None:
        self._program = program
        self._served = served
        self._ms = ms
        self._tap = netns.tap("limit0")
        self._link = netns.link("limit0", 2, MAC)
        self._packets = {link: netns.packet_socket(link) for link in (served.link, self._link)}
        self._echo = netns.udp_sockets()

    @contextlib.contextmanager
    def echoing(self) -> Iterator[None]:
        """The host answers meanwhile."""
        process = self._start("echo", {"sock": self._echo, "cpu": GUEST_CPU}, (self._echo,))
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()

    def evtchnd(self, work: Workload) -> dict[str, Any]:
        """One reading: what the guest saw, and what the worker spent."""
        served, before = self._served, cpu_us(self._served.pid)
        sock = self._packets[served.link]
        words = {**served.words, **self._words(work, served.link), "sock": sock, "cpu": GUEST_CPU}
        reading = self._finished(work, self._start(work.mode, words, (*served.fds, sock)))
        return _figures(work, reading, cpu_us(served.pid) - before)

    def limit(self, work: Workload) -> dict[str, Any]:
        """The same without evtchnd."""
        words = {**self._words(work, self._link), "tap": self._tap, "cpu": BACK_CPU}
        process = self._start(f"tap{work.mode}", words, (self._tap,))
        if work.mode == "receive":
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise HostError("the C program did not start")
            sock = self._packets[self._link]
            self._finished(work, self._start("generate", {**words, "sock": sock, "cpu": GUEST_CPU}, (sock,)))
            process.send_signal(signal.SIGTERM)  # it reads what is there still
        reading = self._finished(work, process)
        return _figures(work, reading, reading.pop("cpu_us", 0.0))

    def _words(self, work: Workload, link: Link) -> dict[str, int]:
        mac, host_mac = (int(text.replace(":", ""), 16) for text in (link.mac, link.host_mac))
        words = {"ms": self._ms, "size": work.size, "gso": work.gso, "to_port": ECHO_PORT if work.mode == "ping" else 9}
        if work.mode == "receive":
            return {**words, "from": link.host, "to": link.guest, "from_mac": host_mac, "to_mac": mac}
        return {**words, "from": link.guest, "to": link.host, "from_mac": mac, "to_mac": host_mac}

    def _start(self, mode: str, words: dict[str, int], fds: tuple[int, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._program, mode, *(f"{key}={value}" for key, value in words.items())],
            pass_fds=fds,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _finished(self, work: Workload, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, error = process.communicate()
        if process.returncode:
            raise HostError(f"{work.name}: the load failed: {error.strip() or out.strip()}")
        reading: dict[str, Any] = json.loads(out)
        return reading


def _figures(work: Workload, reading: dict[str, Any], cpu: float) -> dict[str, Any]:
    packets = reading["packets"]
    if not packets or reading["bad"]:
        raise HostError(f"{work.name}: {reading}")
    rate = packets / reading["seconds"]
    return {**reading, "pps": rate, "gbit": rate * work.size * 8 / 1e9, "cpu_us_per_packet": cpu / packets}


def summarise(report: Report, readings: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`: of two directions the worse one."""

    def values(side: str, workload: str, key: str) -> list[float]:
        return [reading[key] for reading in readings.get((side, workload), []) if key in reading]

    def over_c(*workloads: str) -> float | None:
        found = []
        for workload in workloads:
            pairs = list(zip(values("evtchnd", workload, "pps"), values("c", workload, "pps"), strict=True))
            if not pairs:
                return None
            found.append(median([ours / theirs for ours, theirs in pairs]))
        return min(found)

    for work in WORKLOADS:
        ping = work.mode == "ping"
        columns = {key: title for key, title in COLUMNS.items() if ping or key not in TIMES}
        for side in ("evtchnd", "c"):
            if (side, work.name) in readings:
                cell = {key: median(values(side, work.name, key)) for key in columns if values(side, work.name, key)}
                shown = {columns[key][0]: f"{value:.{columns[key][1]}f}" for key, value in cell.items()}
                report.rows.append((f"{work.name} {side}", shown))
        main = "p50_us" if ping else "gbit" if work.gso else "pps"
        if readings.get(("c", work.name)):
            bars = {side: median(values(side, work.name, main)) for side in ("evtchnd", "c")}
            report.series[f"{work.name}\n{COLUMNS[main][0]}"] = bars
    report.ratio("net.soft.gso.rate_over_c", over_c("tx_gso", "rx_gso"), (">=", 0.9))
    report.ratio("net.soft.pps64_over_c", over_c("tx64", "rx64"), (">=", 0.7))


# reading -> (column, digits)
COLUMNS = {
    "pps": ("packets/s", 0),
    "gbit": ("Gbit/s", 2),
    "p50_us": ("p50 us", 1),
    "p99_us": ("p99 us", 1),
    "cpu_us_per_packet": ("CPU us/packet", 3),
}
TIMES = ("p50_us", "p99_us")
