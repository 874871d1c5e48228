"""evtchnd-bench netguest: a real guest's network, served by evtchnd and by QEMU's xen-net-device, in one lab's boot.

Both guests are Debian trixie's stock kernel with the same initramfs, command line and root file system; the host's end
of each is a TAP with an address of its own in a network namespace, nothing in between. In each round both boot, then
both stay up while the jobs alternate between them, who goes first changing with every job and every round. The guest
that does not run a job sleeps. `evtchnd-bench net` has this as its half of real guests (`fill`).

iperf3's client is in the guest, its server in the namespace. `rate`: what has arrived. Round trips: ping, the next
one as soon as its answer is there. CPU: as `evtchnd-bench guest` counts it, for each MiB; iperf3's start is in it, its
server is not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evtchnd.bench import guest, lab, wakeupkvm
from evtchnd.bench.evtchndguest import EvtchndGuest
from evtchnd.bench.guest import Side, busy_us, cpu_us
from evtchnd.bench.qemuguest import Disk, Nic, QemuGuest
from evtchnd.bench.report import Report, median
from evtchnd.bench.served import Daemon
from evtchnd.errors import HostError

SIDES = ("evtchnd", "qemu")
MEMORY_MIB = 256
ROUNDS, SECONDS = 3, 3.0
JOB_S = 120.0
BOOTS = 3
PINGS = 300
PORT = 5201
# side -> (TAP, the host's address, the guest's, its MAC address)
PLACES = {
    "evtchnd": ("bench0", "10.89.0.1", "10.89.0.2", "00:16:3e:89:00:02"),
    "qemu": ("bench1", "10.89.1.1", "10.89.1.2", "00:16:3e:89:01:02"),
}
# name -> what iperf3's client is told; None: ping
JOBS: dict[str, str | None] = {
    "tcp_tx": "",
    "tcp_rx": "-R",
    "udp_tx": "-u -b 40M -l 1400",
    "udp_rx": "-R -u -b 40M -l 1400",
    "rtt": None,
}
# name -> (job, reading, what it must reach)
RATIOS: dict[str, tuple[str, str, tuple[str, float]]] = {
    "net.lab.tcp_tx.rate_over_qemu": ("tcp_tx", "mib_s", (">=", 2.0)),
    "net.lab.tcp_rx.rate_over_qemu": ("tcp_rx", "mib_s", (">=", 2.0)),
    "net.lab.rtt_p50_over_qemu": ("rtt", "p50_us", ("<=", 0.8)),
}
# reading -> (column, digits)
COLUMNS = {
    "mib_s": ("MiB/s", 1),
    "lost": ("lost %", 1),
    "p50_us": ("p50 us", 0),
    "p99_us": ("p99 us", 0),
    "cpu_us_per_mib": ("CPU us/MiB", 0),
    "machine_cpu_us_per_mib": ("machine us/MiB", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="boots of each guest, runs of each job (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of an iperf3 job (%(default)s)")
    parser.add_argument("--vcpus", type=int, default=1, help="of each guest, and queues (%(default)s)")
    parser.add_argument("--jobs", default=",".join(JOBS), metavar="LIST", help="of %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    """What the command does."""
    report = Report("netguest")
    fill(report, arguments.rounds, arguments.seconds, arguments.vcpus, arguments.jobs.split(","))
    return report


def fill(
    report: Report, rounds: int = ROUNDS, seconds: float = SECONDS, vcpus: int = 1, jobs: Sequence[str] = tuple(JOBS)
) -> None:
    """Adds readings and ratios, net.lab.*. In the lab, which is booted for it where this machine's KVM has no Xen.

    HostError: there is no such job.
    """
    if unknown := set(jobs) - set(JOBS):
        raise HostError(f"--jobs: no {', '.join(sorted(unknown))}: there are {', '.join(JOBS)}")
    taken = Report("netguest")
    try:
        if wakeupkvm.has_xen():
            measure(taken, rounds, seconds, vcpus, jobs)
        else:
            options = f"--rounds {rounds} --seconds {seconds} --vcpus {vcpus} --jobs {','.join(jobs)}"
            found = lab.run_inside("netguest", options)
            report.machines["lab"] = found["machine"]
            taken.rounds, taken.skipped = found["rounds"], found["skipped"]
    except HostError as exc:
        if lab.INSIDE:
            raise
        taken.skipped["net.lab"] = str(exc)
    summarise(report, taken.rounds)
    report.rounds += taken.rounds
    report.skipped |= taken.skipped


def measure(report: Report, rounds: int, seconds: float, vcpus: int, jobs: Sequence[str]) -> None:
    """All rounds, here. HostError: why a guest does not run, or what failed in it."""
    found = lab.guests()
    image = found["guests"][guest.SUITE]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evtchnd-bench-")))
        netns = stack.enter_context(_namespace())
        root = folder / "root"
        guest.copy(Path(image["root"]), root)
        given: dict[str, Any] = {
            "kernel": Path(image["kernel"]),
            "initramfs": Path(image["initramfs"]),
            "append": guest.APPEND,
            "disks": [Disk("xvda", root, readonly=True)],
            "memory_mib": MEMORY_MIB,
            "vcpus": vcpus,
        }
        daemon = Daemon(folder, f"[poll]\nmax_us = {guest.POLL_US}\n")
        stack.callback(daemon.stop)
        tap, address, _, mac = PLACES["evtchnd"]
        vif = f"mac={mac},script=none,vifname={tap},netns={netns},address={address}/24"
        tap, address, _, mac = PLACES["qemu"]
        _ip(netns, f"tuntap add dev {tap} mode tap")
        _ip(netns, f"address add {address}/24 dev {tap}")
        _ip(netns, f"link set {tap} up")
        nic = Nic(tap, mac, netns)
        starts: dict[str, Callable[[], Side]] = {
            "evtchnd": lambda: EvtchndGuest(daemon, folder, vifs=[vif], **given),
            "qemu": lambda: QemuGuest(found["qemu"], folder, nics=[nic], poll_us=guest.POLL_US, **given),
        }
        server = ["ip", "netns", "exec", netns, *found["iperf3"], "-s", "-1", "-p", str(PORT), "--forceflush"]
        for number in range(rounds):
            try:
                one_round(report, number, starts, jobs, server, seconds)
            except HostError as exc:  # what the round has measured before counts
                report.skipped[f"net.lab, the rest of round {number}"] = str(exc)


def one_round(
    report: Report,
    number: int,
    starts: dict[str, Callable[[], Side]],
    jobs: Sequence[str],
    server: list[str],
    seconds: float,
) -> None:
    """A boot of each, all jobs, both guests' ends."""
    order = list(starts) if number % 2 == 0 else list(reversed(starts))
    with contextlib.ExitStack() as stack:
        guests: dict[str, Side] = {}
        for side in order:
            guests[side] = _booted(starts[side])
            stack.push(guests[side])
            _, far, near, _ = PLACES[side]
            guests[side].console.run(
                f"ip address add {near}/24 dev eth0; ip link set eth0 up; "
                f"for i in $(seq 100); do ping -c1 -W1 -q {far} && break; done",
                JOB_S,
            )
        for position, job in enumerate(jobs):
            for side in order if position % 2 == 0 else reversed(order):
                try:
                    taken = read(guests[side], job, server, seconds)
                    report.rounds.append({"round": number, "side": side, "job": job, **taken})
                except HostError as exc:  # the others count
                    report.skipped[f"net.lab.{job} of {side} in round {number}"] = str(exc)
                    if guests[side].console.over:
                        return


def _booted(start: Callable[[], Side]) -> Side:
    """A guest that is up. On a machine that is busy elsewhere a kernel now and then finds its timer too slow."""
    for boot in range(1, BOOTS + 1):
        one = start()
        try:
            one.booted(guest.BOOT_S)
            return one
        except HostError:
            one.close()
            if boot == BOOTS:
                raise
    raise AssertionError("not reached")


def read(one: Side, job: str, server: list[str], seconds: float) -> dict[str, float]:
    """One reading. HostError with the guest's log."""
    far = PLACES[one.side][1]
    try:
        options = JOBS[job]
        return _round_trips(one, far) if options is None else _iperf(one, far, options, server, seconds)
    except (HostError, ValueError) as exc:  # no JSON: what an earlier job that took too long has said
        raise HostError(f"{str(exc)[-500:]}; its log ends with {one.said()!r}") from None


@dataclass
class Spent:
    """CPU time of a job, in microseconds."""

    side: float = 0.0  # evtchnd's processes, or QEMU
    machine: float = 0.0  # all processors


@contextlib.contextmanager
def _spending(one: Side) -> Iterator[Spent]:
    pids, spent = one.pids(), Spent()
    before, busy = cpu_us(pids), busy_us()
    yield spent
    spent.side, spent.machine = cpu_us(pids) - before, busy_us() - busy


def _iperf(one: Side, far: str, options: str, server: list[str], seconds: float) -> dict[str, float]:
    with _listening(server), _spending(one) as spent:
        done = one.console.run_json(f"iperf3 -J -c {far} -p {PORT} -t {seconds:g} {options}", JOB_S)
    end = done["end"]
    arrived = end.get("sum_received") or end.get("sum") or {"bytes": 0}
    if "error" in done or not arrived["bytes"]:
        raise HostError(f"iperf3: {done.get('error', 'nothing has arrived')}: {end}")
    mib = arrived["bytes"] / (1 << 20)
    return {
        "mib_s": mib / arrived["seconds"],
        **({"lost": end["sum"]["lost_percent"]} if "-u" in options else {}),
        "cpu_us_per_mib": spent.side / mib,
        "machine_cpu_us_per_mib": spent.machine / mib,
    }


@contextlib.contextmanager
def _listening(server: list[str]) -> Iterator[None]:
    """iperf3's server for one job."""
    process = subprocess.Popen(
        server, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "listening" in line:
                break
        else:
            raise HostError(f"iperf3 -s: {said.strip()}")
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _round_trips(one: Side, far: str) -> dict[str, float]:
    said = one.console.run(f"ping -i 0 -c {PINGS} {far}", JOB_S)
    times = sorted(float(found) * 1000 for found in re.findall(r"time=([0-9.]+) ms", said))
    if len(times) < PINGS * 0.9:
        raise HostError(f"{len(times)} answers to {PINGS} pings")
    return {"p50_us": times[len(times) // 2], "p99_us": times[len(times) * 99 // 100]}


@contextlib.contextmanager
def _namespace() -> Iterator[str]:
    """A network namespace by its name, gone afterwards. HostError."""
    name = f"evtchnd-bench-{os.getpid()}"
    _ip("", f"netns add {name}")
    try:
        _ip(name, "link set lo up")
        yield name
    finally:
        _ip("", f"netns del {name}")


def _ip(netns: str, text: str) -> None:
    try:
        command = ["ip", *(["-n", netns] if netns else []), *text.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HostError("no `ip` (iproute2)") from None
    if done.returncode:
        raise HostError(f"ip {text}: {done.stderr.strip()}")


def summarise(report: Report, rounds: list[dict[str, Any]]) -> None:
    """Medians for the table, medians of the rounds' ratios for `ratios`."""
    readings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for reading in rounds:
        readings.setdefault((reading["side"], reading["job"]), []).append(reading)
    for job in JOBS:
        for side in SIDES:
            taken = readings.get((side, job), [])
            cells = {key: median([r[key] for r in taken]) for key in COLUMNS if taken and key in taken[0]}
            if cells:
                row = {COLUMNS[k][0]: f"{v:.{COLUMNS[k][1]}f}" for k, v in cells.items()}
                report.rows.append((f"lab {job} {side}", row))
    for name, (job, key, bound) in RATIOS.items():
        ours, theirs = ({r["round"]: r[key] for r in readings.get((side, job), [])} for side in SIDES)
        pairs = [ours[number] / theirs[number] for number in ours if number in theirs]
        report.ratio(name, median(pairs) if pairs else None, bound)
        bars = {side: median([r[key] for r in readings[side, job]]) for side in SIDES if (side, job) in readings}
        if bars:
            report.series[f"lab {job}\n{COLUMNS[key][0]}"] = bars
