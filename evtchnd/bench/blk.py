"""evtchnd-bench blk: a soft guest's reads from page cache, served by evtchnd and by a backend in C, turn by turn.

The guest's end is the same C program for both (blkload.c, `front`): it keeps a fixed number of reads in flight and
sleeps on its eventfd, as a guest's vCPU would. The limit (`back`) does the same steps on the same layouts with the same
polling window. Guest on one CPU, backend on another. CPU time is the backend process' own, all its threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evtchnd.abi import GTF_PERMIT_ACCESS, PAGE_SIZE
from evtchnd.bench.ends import Ends
from evtchnd.bench.program import build, cpu_us
from evtchnd.bench.report import Report, median
from evtchnd.bench.served import Served
from evtchnd.errors import HostError

SOURCE = Path(__file__).with_name("blkload.c")
IMAGE_BYTES = 128 << 20
# The most that a workload has in flight: 8 x 128 KiB.
DATA_PAGES = 256
FRONT_CPU, BACK_CPU = 0, 1


@dataclass(frozen=True)
class Workload:
    """`depth` reads of `pages` pages each are in flight."""

    name: str
    depth: int
    pages: int
    sequential: bool = False


WORKLOADS = (
    Workload("rand4k_qd1", 1, 1),
    Workload("rand4k_qd32", 32, 1),
    Workload("seq128k_qd8", 8, 32, sequential=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="readings of each side and workload (%(default)s)")
    parser.add_argument("--ms", type=int, default=1000, help="length of a reading (%(default)s)")
    parser.add_argument("--poll-us", type=int, default=50, help="polling window of both backends (%(default)s)")
    parser.add_argument("--dir", default="/var/tmp", help="where the image lies; not a tmpfs (%(default)s)")


def run(arguments: argparse.Namespace) -> Report:
    """All rounds. HostError if the daemon or the load cannot be started."""
    report = Report("blk")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-", dir=arguments.dir)))
        program = folder / "blkload"
        if not build(SOURCE, program):
            report.skipped["blk"] = "no C compiler for the load and the limit: apt-get install gcc libc6-dev"
            summarise(report, {})
            return report
        image = folder / "disk.img"
        image.write_bytes(os.urandom(1 << 20) * (IMAGE_BYTES >> 20))
        served = stack.enter_context(Served(folder, image, poll_us=arguments.poll_us, data_pages=DATA_PAGES))
        served.pin(BACK_CPU)
        limit = stack.enter_context(Limit(program, image, poll_us=arguments.poll_us))
        sides: Sequence[tuple[str, Served | Limit]] = (("evtchnd", served), ("c", limit))
        readings: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for number in range(arguments.rounds):
            for workload in WORKLOADS:
                # who goes first changes every round: neither side always meets the warmer machine
                for side, backend in sides if number % 2 == 0 else reversed(sides):
                    reading = load(program, backend, workload, arguments.ms, seed=number + 1)
                    readings.setdefault((side, workload.name), []).append(reading)
                    report.rounds.append({"round": number, "side": side, "workload": workload.name, **reading})
    summarise(report, readings)
    return report


def load(program: Path, backend: Served | Limit, workload: Workload, ms: int, seed: int) -> dict[str, Any]:
    """One reading: what the guest saw, and what the backend's process spent."""
    ends = backend.ends
    words = {
        **asdict(ends),
        "cpu": FRONT_CPU,
        "ms": ms,
        "depth": workload.depth,
        "pages": workload.pages,
        "sequential": int(workload.sequential),
        "sectors": IMAGE_BYTES // 512,
        "seed": seed,
    }
    before = cpu_us(backend.pid)
    done = subprocess.run(
        [program, "front", *(f"{k}={v}" for k, v in words.items())],
        pass_fds=(ends.ram, ends.kick, ends.notify),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError(f"{workload.name}: the load failed: {done.stderr.strip() or done.stdout.strip()}")
    reading: dict[str, Any] = json.loads(done.stdout)
    reading["iops"] = reading["requests"] / reading["seconds"]
    reading["backend_cpu_us_per_request"] = (cpu_us(backend.pid) - before) / reading["requests"]
    reading["kicks_per_request"] = reading["kicks"] / reading["requests"]
    return reading


class Limit:
    """`blkload back` on a memfd of its own: ring page, grant frame, indirect tables, data pages, in this order."""

    def __init__(self, program: Path, image: Path, *, poll_us: int) -> None:
        ring, grants, tables, data = 0, 1, 2, 2 + 32
        pages = data + DATA_PAGES
        self._files = contextlib.ExitStack()
        ram = os.memfd_create("bench-ram", os.MFD_CLOEXEC)
        kick, notify = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        disk = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        for fd in (ram, kick, notify, disk):
            self._files.callback(os.close, fd)
        os.ftruncate(ram, pages * PAGE_SIZE)
        with mmap.mmap(ram, pages * PAGE_SIZE) as memory:
            for gref, page in enumerate(range(tables, pages), start=8):
                struct.pack_into("<HHI", memory, grants * PAGE_SIZE + 8 * gref, GTF_PERMIT_ACCESS, 0, page)
            # req_event = rsp_event = 1, as SHARED_RING_INIT leaves them
            struct.pack_into("<IIII", memory, ring * PAGE_SIZE, 0, 1, 0, 1)
        self.ends = Ends(ram, kick, notify, ring * PAGE_SIZE, tables * PAGE_SIZE, 8 + 32, 8)
        words = {"ram": ram, "kick": kick, "notify": notify, "image": disk, "poll_us": poll_us, "cpu": BACK_CPU}
        words |= {"ring_offset": ring * PAGE_SIZE, "grants_offset": grants * PAGE_SIZE, "grants": 512}
        self._process = subprocess.Popen(
            [program, "back", *(f"{k}={v}" for k, v in words.items())],
            pass_fds=(ram, kick, notify, disk),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        if self._process.stdout is None or self._process.stdout.readline().strip() != "ready":
            raise HostError("the C backend did not start")

    def __enter__(self) -> Limit:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=10)
        self._files.close()


def summarise(report: Report, readings: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`."""

    def values(side: str, workload: str, key: str) -> list[float]:
        return [reading[key] for reading in readings.get((side, workload), [])]

    def over_c(workload: str, key: str) -> float | None:
        pairs = list(zip(values("evtchnd", workload, key), values("c", workload, key), strict=True))
        return median([ours / theirs for ours, theirs in pairs]) if pairs else None

    for workload in WORKLOADS:
        for side in ("evtchnd", "c"):
            if (side, workload.name) in readings:
                cell = {key: median(values(side, workload.name, key)) for key in COLUMNS}
                label = f"{workload.name} {side}"
                report.rows.append((label, {title: f"{cell[key]:.{d}f}" for key, (title, d) in COLUMNS.items()}))
        for key, (title, _) in COLUMNS.items():
            if key in ("iops", "p50_us", "backend_cpu_us_per_request") and readings:
                bars = {side: median(values(side, workload.name, key)) for side in ("evtchnd", "c")}
                report.series[f"{workload.name}\n{title}"] = bars
    kicks = values("evtchnd", "rand4k_qd32", "kicks_per_request")
    report.ratio("blk.soft.rand4k_qd32.iops_over_c", over_c("rand4k_qd32", "iops"), (">=", 0.8))
    report.ratio("blk.soft.rand4k_qd1.p50_over_c", over_c("rand4k_qd1", "p50_us"), ("<=", 1.5))
    cpu = over_c("rand4k_qd32", "backend_cpu_us_per_request")
    report.ratio("blk.soft.rand4k_qd32.cpu_over_c", cpu, ("<=", 1.5))
    report.ratio("blk.soft.rand4k_qd32.kicks_per_request", median(kicks) if kicks else None, ("<=", 0.05))
    report.ratio("blk.soft.seq128k_qd8.rate_over_c", over_c("seq128k_qd8", "iops"), (">=", 0.85))


# reading -> (column, digits)
COLUMNS = {
    "iops": ("IOPS", 0),
    "p50_us": ("p50 us", 1),
    "p99_us": ("p99 us", 1),
    "backend_cpu_us_per_request": ("CPU us/req", 2),
    "kicks_per_request": ("kicks/req", 4),
}
