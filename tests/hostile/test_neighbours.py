"""A guest attacks, its neighbour at the same daemon notices nothing, and nothing is left of it.

Each case of evtchnd/bench/attacks.py: the neighbour's load is answered and right throughout, one line (and no flood of
them) says which domain, device and why, and when the attacker has gone the control plane and the neighbour's worker
hold what they held before: descriptors, maps, tasks, memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from neighbour import DOMID as NEIGHBOUR
from neighbour import Neighbour

from daemonprocess import DaemonProcess, until
from evtchnd.bench.attacker import Attacker, disks
from evtchnd.bench.attacks import CASES, Case
from scale import scaled

ATTACKER = 9
DISKS = 4
# What the kernel and the allocators keep of what was freed: pages here and there, the same after a hundred rounds.
RSS_SLACK = 1.05
# A line for each thing that happens, not for each time that it happens.
MOST_LINES = 60


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    descriptors: int
    maps: int
    rss: int

    @classmethod
    def of(cls, pid: int) -> Held:
        proc = Path(f"/proc/{pid}")
        names = [line.split(maxsplit=5)[5:] for line in (proc / "maps").read_text().splitlines()]
        # anonymous ones come and go with the allocator's arenas
        maps = sum(bool(name) and not name[0].startswith(("[heap", "[anon")) for name in names)
        return cls(len(list((proc / "fd").iterdir())), maps, int((proc / "statm").read_text().split()[1]))


@dataclass
class Host:
    daemon: DaemonProcess
    neighbour: Neighbour

    def held(self) -> dict[str, Held]:
        return {"control plane": Held.of(self.daemon.process.pid), "neighbour": Held.of(self.neighbour.worker)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("hostile")
    domains = [{"domid": ATTACKER, "disks": disks(folder, DISKS)}]
    with DaemonProcess(folder, domains=domains) as daemon, Neighbour(daemon, folder / "neighbour.img") as neighbour:
        yield Host(daemon, neighbour)


def attack(host: Host, case: Case, rounds: int) -> None:
    """The attacker's whole life."""
    with Attacker(host.daemon.vmm_socket, ATTACKER) as attacker:
        for _ in range(rounds):
            before = host.neighbour.requests
            case.attack(attacker)
            host.neighbour.check(before)
    until(lambda: [each["domid"] for each in host.daemon.call("list")] == [NEIGHBOUR], "the attacker is still there")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_neighbour_notices_nothing(host: Host, case: Case) -> None:
    attack(host, case, 1)  # what is there once and for all is there now
    begin, tasks, held = len(host.daemon.text()), host.daemon.call("tasks"), host.held()
    worker = host.daemon.call("info", NEIGHBOUR)["worker"]
    attack(host, case, scaled(100, least=3))
    lines = host.daemon.text()[begin:].splitlines()
    if case.log:
        pattern = re.compile(case.log.format(domid=ATTACKER))
        assert any(pattern.search(line) for line in lines), "\n".join(lines)
    assert not [line for line in lines if f"domain {NEIGHBOUR}:" in line or "defect" in line or "Traceback" in line]
    attaching = re.compile(r"registered|started|connected|attached|released|closed|ended|gone|running")
    others = [line for line in lines if not attaching.search(line)]
    assert len(others) <= MOST_LINES, "\n".join(others[:80])
    info = host.daemon.call("info", NEIGHBOUR)
    counters = info["devices"][0]["counters"]
    assert info["worker"] == worker
    assert (counters["errors"], counters["refused"]) == (0, 0)
    until(lambda: host.daemon.call("tasks") <= tasks, "tasks are left")
    for what, then in held.items():
        until(lambda: host.held()[what].descriptors == then.descriptors, f"{what}: descriptors are left")  # noqa: B023
        now = host.held()[what]
        assert now.maps <= then.maps, what
        assert now.rss <= then.rss * RSS_SLACK + 256, what
