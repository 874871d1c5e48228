"""evtchnd-bench xenstore: what XenStore's requests take, beside an echo server and beside themselves.

The server's process has evtchnd's XenStore server on uvloop and nothing else, its log included; the echo server is a
uvloop Protocol that sends back what it gets. Both get the same bytes from the same C program (xenstoreload.c), which
runs on the other CPU. With --xenstored Xen's own server in C (xenstored.py) is asked the same. Stores of three sizes
serve at the same time, so that all that is compared is read in turns, each for some tens of milliseconds: a shared
machine's speed changes within a second.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench.program import build
from evtchnd.bench.report import Report, median
from evtchnd.bench.xenstored import Xenstored
from evtchnd.bench.xenstorefill import GUESTS
from evtchnd.bench.xenstoreserved import Load, Server

SOURCE = Path(__file__).with_name("xenstoreload.c")
ECHO, SMALL, MIDDLE, LARGE, PEER = "echo", "1k", "100k", "1m", "xenstored"
NODES = {ECHO: -1, SMALL: 1_000, MIDDLE: 100_000, LARGE: 1_000_000}
STORM = {"op": "write", "clients": 10, "depth": 32, "ms": 60_000}


@dataclass(frozen=True)
class Cell:
    """One reading: the load's words against one server; `share` of --ops; taken in every `every`th round."""

    name: str
    server: str
    words: dict[str, Any]
    share: float = 1.0
    every: int = 1
    stormed: bool = False


def cells() -> Iterator[Cell]:
    """In the order of one round: what is compared lies side by side."""
    for op, share in (("read", 1.0), ("write", 1.0), ("rmw", 0.25), ("mkdirrm", 0.5), ("directory", 0.25)):
        for server in (ECHO, SMALL, PEER):
            yield Cell(f"{op} {server}", server, {"op": op, "nodes": 1000}, share)
    for server in (SMALL, MIDDLE, LARGE):
        # after other servers' turns it takes a thousand reads or so until the tables of a large store are cached again
        yield Cell(f"read random {server}", server, {"op": "read", "nodes": NODES[server]}, share=4.0)
    for siblings in (10, 10_000):
        yield Cell(f"write siblings {siblings}", MIDDLE, {"op": "write", "siblings": siblings})
    for watches in (1, 100, 10_000):
        yield Cell(f"fire watches {watches}", SMALL, {"op": "fire", "watches": watches}, every=3)
    yield Cell("fire watches 100 xenstored", PEER, {"op": "fire", "watches": 100}, every=3)
    for clients in (1, 16, 64):
        for op in ("read", "write"):
            words = {"op": op, "nodes": NODES[MIDDLE], "clients": clients}
            yield Cell(f"{op} clients {clients}", MIDDLE, words, 4 / clients if clients > 1 else 1, every=3)
            words = {**words, "nodes": NODES[SMALL]}
            if clients == 16:
                yield Cell(f"{op} clients {clients} xenstored", PEER, words, 4 / clients, every=3)
    for stormed in (False, True):
        words = {"op": "read", "nodes": NODES[MIDDLE], "gap_us": 200, "fifo": 1}
        yield Cell(f"quiet {'storm' if stormed else 'alone'}", MIDDLE, words, 2, every=3, stormed=stormed)
    yield Cell("boot storm", MIDDLE, {"op": "boot", "clients": GUESTS, "ops": 300}, every=9)


# ratio: what is divided by what, and the most it may be
RATIOS = {
    "xenstore.read_over_echo": ("read 1k", "read echo", "p50_us", 1.4),
    "xenstore.write_over_echo": ("write 1k", "write echo", "p50_us", 1.8),
    "xenstore.transaction_rmw_over_echo6": ("rmw 1k", "rmw echo", "p50_us", 1.8),
    "xenstore.read_1m_nodes_over_1k": ("read random 1m", "read random 1k", "p50_us", 1.2),
    "xenstore.write_10k_siblings_over_10": ("write siblings 10000", "write siblings 10", "p50_us", 1.3),
    "xenstore.fire_10k_watches_over_1": ("fire watches 10000", "fire watches 1", "p50_us", 1.5),
    "xenstore.quiet_p99_storm_over_alone": ("quiet storm", "quiet alone", "p99_us", 3),
}
BYTES = "xenstore.bytes_per_node"
WALK = {"xenstore.walk_120k_nodes_s": ("seconds", 0.5), "xenstore.walk_longest_pause_s": ("longest_s", 0.005)}
# reading -> (column, digits)
COLUMNS = {
    "p50_us": ("p50 us", 1),
    "p99_us": ("p99 us", 1),
    "server_cpu_us": ("CPU us/request", 2),
    "per_second": ("requests/s", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=45, help="readings of each cell (%(default)s)")
    parser.add_argument("--ops", type=int, default=500, help="operations of a reading, about (%(default)s)")
    parser.add_argument(
        "--xenstored",
        metavar="PROGRAM",
        help="Xen's, as a peer: /usr/lib/xen-4.17/bin/xenstored of Debian's xen-utils-4.17",
    )
    parser.add_argument(
        "--nodes", type=int, default=NODES[LARGE], help="of the largest store: for a short run (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> Report:
    """All rounds. HostError if a server or the load cannot be started."""
    report = Report("xenstore")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-")))
        program = folder / "xenstoreload"
        if not build(SOURCE, program):
            report.skipped["xenstore"] = "no C compiler for the load: apt-get install gcc libc6-dev"
            summarise(report)
            return report
        sizes = {name: min(nodes, arguments.nodes) for name, nodes in NODES.items()}
        servers: dict[str, Any] = {name: stack.enter_context(Server(folder / name, n)) for name, n in sizes.items()}
        if arguments.xenstored:
            (folder / PEER).mkdir()
            servers[PEER] = stack.enter_context(Xenstored(arguments.xenstored, folder / PEER))
        for name in (SMALL, MIDDLE, LARGE):
            report.rounds.append({"cell": f"filled {name}", **servers[name].filled})
        for number in range(arguments.rounds):
            # who goes first changes every round: neither side always meets the warmer machine
            for cell in list(cells())[:: 1 if number % 2 == 0 else -1]:
                if number % cell.every or cell.server not in servers:
                    continue
                words = {"ops": max(int(arguments.ops * cell.share), 10), **cell.words, "seed": number + 1}
                if "nodes" in words:
                    words["nodes"] = min(words["nodes"], sizes[SMALL if cell.server in (ECHO, PEER) else cell.server])
                reading = read(program, servers[cell.server], words, stormed=cell.stormed)
                report.rounds.append({"round": number, "cell": cell.name, **reading})
            if number % 9 == 0:
                report.rounds.append({"round": number, "cell": "walk", **servers[MIDDLE].ask("walk")})
    summarise(report)
    return report


def read(program: Path, server: Server, words: dict[str, Any], *, stormed: bool) -> dict[str, Any]:
    """One reading; beside ten others that storm."""
    storm = Load(program, server, STORM | {"nodes": words["nodes"]}) if stormed else None
    try:
        return Load(program, server, words).result()
    finally:
        if storm is not None:
            storm.stop()


def summarise(report: Report) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`."""
    readings: dict[str, list[dict[str, Any]]] = {}
    for reading in report.rounds:
        readings.setdefault(reading["cell"], []).append(reading)
    for name, taken in readings.items():
        if "p50_us" in taken[0]:
            medians = {key: median([reading[key] for reading in taken]) for key in COLUMNS if key in taken[0]}
            cells = {COLUMNS[key][0]: f"{value:.{COLUMNS[key][1]}f}" for key, value in medians.items()}
            report.rows.append((name, cells))
            kind, _, rest = name.partition(" ")
            report.series.setdefault(f"{kind}\np50 us", {})[rest] = medians["p50_us"]
        elif "bytes" in taken[0]:
            report.rows.append((name, {"bytes/node": f"{taken[0]['bytes'] / taken[0]['nodes']:.0f}"}))
    for ratio, (above, below, key, most) in RATIOS.items():
        pairs = list(zip(readings.get(above, []), readings.get(below, []), strict=True))
        value = median([a[key] / b[key] for a, b in pairs]) if pairs else None
        report.ratio(ratio, value, ("<=", most))
    filled = readings.get(f"filled {LARGE}")
    report.ratio(BYTES, filled[0]["bytes"] / filled[0]["nodes"] if filled else None, ("<=", 600))
    for ratio, (key, most) in WALK.items():
        taken = readings.get("walk", [])
        report.ratio(ratio, median([reading[key] for reading in taken]) if taken else None, ("<=", most))
