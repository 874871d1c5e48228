"""evtchnd-bench guest: a real guest's disk, served by evtchnd and by QEMU's own Xen backends, in one boot of the lab.

Both guests are Debian trixie's stock kernel with the same initramfs, command line, root file system (read-only) and
data disk: the same file, through the host's page cache. In each round both boot, one after the other, then both stay up
while the fio jobs alternate between them, who goes first changing with every job and every round. The guest that does
not run a job sleeps: neither side polls for an idle guest. So the two readings of a pair are seconds apart.

What is counted as CPU: all of QEMU; evtchnd's VMM, worker and control plane. Guest code is part of it on both sides,
as it runs on the VMM's threads. It is read when fio says that its job begins and ends (exec_prerun, exec_postrun), so
fio's start is not in it. `machine_cpu` is what all processors were busy with, the kernel's own threads too.
Boot to init: from the start of QEMU, or of evtchnd-micro, to the first line of the guest's first process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench import lab, wakeupkvm
from evtchnd.bench.evtchndguest import EvtchndGuest
from evtchnd.bench.qemuguest import Disk, QemuGuest
from evtchnd.bench.report import Report, median
from evtchnd.bench.served import Daemon
from evtchnd.errors import HostError

SUITE = "trixie"
SIDES = ("evtchnd", "qemu")
IMAGE_BYTES = 256 << 20
MEMORY_MIB = 512
APPEND = "console=hvc0 quiet root=/dev/xvda ro driven"
# The lab is emulated: everything takes about ten times as long, and so does what a polling window has to span.
POLL_US = 500
BOOT_S, JOB_S = 120.0, 120.0
Side = EvtchndGuest | QemuGuest


@dataclass(frozen=True)
class Job:
    """One fio job. `rw`: fio's; `block`: bytes of a request."""

    name: str
    rw: str
    block: int
    depth: int

    def command(self, seconds: float) -> str:
        """Prints JSON, and `@@ begin`, `@@ end` around the job."""
        options = {
            "name": self.name,
            "filename": "/dev/xvdb",
            "rw": self.rw,
            "bs": self.block,
            "iodepth": self.depth,
            "runtime": f"{seconds * 1000:.0f}ms",
            "exec_prerun": "'echo @@ begin | tee /dev/hvc0'",
            "exec_postrun": "'echo @@ end | tee /dev/hvc0'",
        }
        words = " ".join(f"--{name}={value}" for name, value in options.items())
        fixed = "--ioengine=libaio --direct=1 --time_based --norandommap --percentile_list=50:99 --output-format=json"
        return f"cd /tmp && fio {fixed} {words}"


JOBS = (
    Job("rand4k_qd1", "randread", 4096, 1),
    Job("randwrite4k_qd1", "randwrite", 4096, 1),
    Job("rand4k_qd32", "randread", 4096, 32),
    Job("randwrite4k_qd32", "randwrite", 4096, 32),
    Job("seq128k", "read", 128 << 10, 4),
    Job("seq1m", "read", 1 << 20, 4),
)
# name -> (job, reading, what it must reach)
RATIOS: dict[str, tuple[str, str, tuple[str, float]]] = {
    "guest.rand4k_qd1.p50_over_qemu": ("rand4k_qd1", "p50_us", ("<=", 0.8)),
    "guest.randwrite4k_qd1.p50_over_qemu": ("randwrite4k_qd1", "p50_us", ("<=", 0.8)),
    "guest.rand4k_qd32.iops_over_qemu": ("rand4k_qd32", "iops", (">=", 1.5)),
    "guest.randwrite4k_qd32.iops_over_qemu": ("randwrite4k_qd32", "iops", (">=", 1.5)),
    "guest.seq128k.rate_over_qemu": ("seq128k", "iops", (">=", 1.2)),
    "guest.seq1m.rate_over_qemu": ("seq1m", "iops", (">=", 1.2)),
    "guest.rand4k_qd32.cpu_per_io_over_qemu": ("rand4k_qd32", "cpu_us_per_io", ("<=", 1.0)),
    "guest.boot_over_qemu": ("boot", "boot_s", ("<=", 1.0)),
}
# reading -> (column, digits)
COLUMNS = {
    "iops": ("IOPS", 0),
    "mib_s": ("MiB/s", 1),
    "p50_us": ("p50 us", 0),
    "p99_us": ("p99 us", 0),
    "cpu_us_per_io": ("CPU us/io", 0),
    "machine_cpu_us_per_io": ("machine us/io", 0),
    "boot_s": ("boot s", 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="boots of each guest, and runs of each job (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a job (%(default)s)")
    parser.add_argument("--vcpus", type=int, default=1, help="of each guest (%(default)s)")
    parser.add_argument("--poll-us", type=int, default=POLL_US, help="polling window of both backends (%(default)s)")
    parser.add_argument("--sides", default=",".join(SIDES), metavar="LIST", help="of %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    """In the lab, which is booted for it where this machine's KVM does not know Xen."""
    report = Report("guest")
    sides = arguments.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        raise HostError(f"--sides: no {', '.join(sorted(unknown))}: there are {', '.join(SIDES)}")
    try:
        if wakeupkvm.has_xen():
            measure(report, sides, arguments)
        else:
            names = ("rounds", "seconds", "vcpus", "poll_us", "sides")
            options = [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names]
            found = lab.run_inside("guest", *options)
            report.machines["lab"] = found["machine"]
            report.rounds += found["rounds"]
            report.skipped |= found["skipped"]
    except HostError as exc:
        if lab.INSIDE:
            raise
        report.skipped["guest"] = str(exc)
    summarise(report)
    return report


def measure(report: Report, sides: list[str], arguments: argparse.Namespace) -> None:
    """All rounds, here. HostError: why a guest does not run, or what failed in it."""
    found = lab.guests()
    guest = found["guests"][SUITE]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-")))
        root, data = folder / "root", folder / "data"
        copy(Path(guest["root"]), root)
        data.write_bytes(os.urandom(1 << 20) * (IMAGE_BYTES >> 20))
        given: dict[str, Any] = {
            "kernel": Path(guest["kernel"]),
            "initramfs": Path(guest["initramfs"]),
            "append": APPEND,
            "disks": [Disk("xvda", root, readonly=True), Disk("xvdb", data)],
            "memory_mib": MEMORY_MIB,
            "vcpus": arguments.vcpus,
        }
        starts: dict[str, Callable[[], Side]] = {
            "qemu": lambda: QemuGuest(found["qemu"], folder, poll_us=arguments.poll_us, **given),
        }
        if "evtchnd" in sides:
            daemon = Daemon(folder, f"[poll]\nmax_us = {arguments.poll_us}\n")
            stack.callback(daemon.stop)
            starts["evtchnd"] = lambda: EvtchndGuest(daemon, folder, **given)
        for number in range(arguments.rounds):
            try:
                one_round(report, number, {side: starts[side] for side in sides}, arguments.seconds)
            except HostError as exc:  # what the round has measured before counts
                report.skipped[f"guest, the rest of round {number}"] = str(exc)


def one_round(report: Report, number: int, starts: dict[str, Callable[[], Side]], seconds: float) -> None:
    """A boot of each, all jobs, both guests' ends."""
    order = list(starts) if number % 2 == 0 else list(reversed(starts))
    with contextlib.ExitStack() as stack:
        guests: dict[str, Side] = {}
        for side in order:
            guests[side] = starts[side]()
            stack.push(guests[side])
            reading = {"boot_s": guests[side].booted(BOOT_S)}
            report.rounds.append({"round": number, "side": side, "job": "boot", **reading})
        for position, job in enumerate(JOBS):
            for side in order if position % 2 == 0 else reversed(order):
                report.rounds.append(
                    {"round": number, "side": side, "job": job.name, **read(guests[side], job, seconds)}
                )


def read(guest: Side, job: Job, seconds: float) -> dict[str, float]:
    """One reading: what fio saw, and what the host spent from its begin to its end. HostError with the guest's log."""
    try:
        return _read(guest, job, seconds)
    except HostError as exc:
        raise HostError(f"{job.name} on {guest.side}: {str(exc)[-500:]}; its log ends with {guest.said()!r}") from None


def _read(guest: Side, job: Job, seconds: float) -> dict[str, float]:
    pids = guest.pids()
    guest.counters()
    guest.console.send(job.command(seconds))
    guest.console.wait("@@ begin", JOB_S)
    before, busy = cpu_us(pids), busy_us()
    guest.console.wait("@@ end", JOB_S)
    spent, busy = cpu_us(pids) - before, busy_us() - busy
    status, said = guest.console.status(JOB_S)
    if status:
        raise HostError(f"fio: exit status {status}: {said}")
    done = json.loads(said[said.index("{") :])["jobs"][0]
    if done["error"]:
        raise HostError(f"fio: error {done['error']}")
    way = done["write" if "write" in job.rw else "read"]
    percentiles = way["clat_ns"]["percentile"]
    counted = {f"{name}_per_io": count / way["total_ios"] for name, count in guest.counters().items()}
    return {
        "ios": way["total_ios"],
        "iops": way["iops"],
        "mib_s": way["bw_bytes"] / (1 << 20),
        "p50_us": percentiles["50.000000"] / 1000,
        "p99_us": percentiles["99.000000"] / 1000,
        "cpu_us_per_io": spent / way["total_ios"],
        "machine_cpu_us_per_io": busy / way["total_ios"],
        **counted,
    }


def cpu_us(pids: list[int]) -> float:
    """CPU time of whole processes so far, ended threads too: by their clocks, Linux' ~pid << 3 | CPUCLOCK_SCHED."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids) * 1e6


def busy_us() -> float:
    """What all processors have been busy with since the boot."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") * 1e6


def copy(source: Path, target: Path) -> None:
    """A sparse file stays one."""
    with source.open("rb") as old, target.open("wb") as new:
        while block := old.read(1 << 20):
            if block.strip(b"\0"):
                new.write(block)
            else:
                new.seek(len(block), os.SEEK_CUR)
        new.truncate(source.stat().st_size)


def summarise(report: Report) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`."""
    readings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for reading in report.rounds:
        readings.setdefault((reading["side"], reading["job"]), []).append(reading)
    for job in [job.name for job in JOBS] + ["boot"]:
        for side in SIDES:
            taken = readings.get((side, job), [])
            cells = {key: median([r[key] for r in taken]) for key in COLUMNS if taken and key in taken[0]}
            if cells:
                report.rows.append(
                    (f"{job} {side}", {COLUMNS[k][0]: f"{v:.{COLUMNS[k][1]}f}" for k, v in cells.items()})
                )
    for name, (job, key, bound) in RATIOS.items():
        ours, theirs = (readings.get((side, job), []) for side in SIDES)
        pairs = [mine[key] / other[key] for mine, other in zip(ours, theirs, strict=False)]
        report.ratio(name, median(pairs) if pairs else None, bound)
        bars = {side: median([r[key] for r in readings[side, job]]) for side in SIDES if (side, job) in readings}
        if bars:
            report.series[f"{job}\n{COLUMNS[key][0]}"] = bars
    if not all(readings.get((side, "boot")) for side in SIDES):
        report.skipped.setdefault("guest", "not both sides were measured (--sides)")
