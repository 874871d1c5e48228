"""A worker that dies, whatever of: the next one goes on, more slowly each time; too often, and an operator sees it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from dyingworkers import DEADLY
from evtchnd.guest.console import Console
from evtchnd.vmm.soft import CONSOLE_PORT
from test_control_daemon import Guest, image


class Writing(threading.Thread):
    """Writes around the deadly sector, then to it, then around it once more."""

    def __init__(self, front: object) -> None:
        super().__init__()
        self.front = front
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for sector, byte in ((DEADLY - 8, b"a"), (DEADLY, b"b"), (DEADLY + 8, b"c")):
                self.front.write(sector, byte * 4096)  # type: ignore[attr-defined]
        except BaseException as exc:
            self.error = exc


def written(path: Path) -> bytes:
    at = (DEADLY - 8) * 512
    return path.read_bytes()[at : at + 3 * 4096]


ALL = b"a" * 4096 + b"b" * 4096 + b"c" * 4096


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("SIGKILL", "killed by SIGKILL: starting another"),
        ("SIGBUS", "killed by SIGBUS: starting another"),
        ("MemoryError", "ended by a defect: starting another"),
        ("defect", "ended by a defect: starting another"),
    ],
)
def test_the_next_worker_goes_on(tmp_path: Path, how: str, line: str) -> None:
    path = image(tmp_path)
    (tmp_path / "deaths").write_text(how)
    with DaemonProcess(tmp_path, broken="dyingworkers", sandbox=False) as daemon:
        before = daemon.descriptors()
        with Guest(daemon) as guest:
            front = guest.connect(daemon.attach(7, path))
            worker = daemon.worker(7)
            guests = Writing(front)
            guests.start()
            guests.join(60)
            assert guests.error is None and not guests.is_alive(), daemon.text()
            assert daemon.worker(7) not in (0, worker)
            info = daemon.call("info", 7)
            assert info["worker"]["restarts"] == 1 and info["worker"]["failing"] == ""
            assert info["state"] == "running"
            text = daemon.text()
            assert f"domain 7: worker {worker} {line}" in text
            if "defect" in line:  # whose it is, and where
                assert f"domain 7: vbd 51712: port {front.port}: a defect of evtchnd: its worker ends" in text
                assert "dyingworkers.py" in text
            front.disconnect()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        assert daemon.descriptors() == before
    assert written(path) == ALL


def test_workers_that_die_one_after_the_other(tmp_path: Path) -> None:
    """Marked after three in a row, told once; served, and marked no longer, when one lives."""
    path = image(tmp_path)
    (tmp_path / "deaths").write_text("defect SIGKILL MemoryError SIGBUS SIGKILL")
    limits = {"worker_deaths": 3, "restart_pause_s": 0.1, "restart_pause_max_s": 1.0}
    with DaemonProcess(tmp_path, broken="dyingworkers", sandbox=False, limits=limits) as daemon, Guest(daemon) as guest:
        front = guest.connect(daemon.attach(7, path))
        guests = Writing(front)
        guests.start()
        until(lambda: daemon.call("list")[0]["state"] == "failing", "it is not marked")
        assert "workers died in a row, the last one" in daemon.call("info", 7)["worker"]["failing"]
        guests.join(60)
        assert guests.error is None and not guests.is_alive(), daemon.text()
        until(lambda: daemon.call("list")[0]["state"] == "running", "it is marked still")
        assert daemon.call("info", 7)["worker"] == {"pid": daemon.worker(7), "restarts": 5, "failing": ""}
        text = daemon.text()
        assert text.count("the domain is marked as failing") == 1
        assert text.count("domain 7: worker: lives: the domain is served again") == 1
        assert "domain 7: worker: 3 workers died in a row, the last one ended by a defect: the domain is marked" in text
        pauses = [line.rpartition("starting another")[2] for line in text.splitlines() if "starting another" in line]
        assert pauses == ["", " in 0.1 s", " in 0.2 s", " in 0.4 s", " in 0.8 s"]
        front.disconnect()
    assert written(path) == ALL


def test_every_ring_is_kicked_and_every_guest_told(tmp_path: Path) -> None:
    """Once each, where nothing is in flight: a kick or an event may have been lost with the worker that died."""
    path = image(tmp_path)
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        front = guest.connect(daemon.attach(7, path), queues=2)
        more = daemon.call("attach_console", 7)["devid"]
        console = Console.connect(guest.domain, guest.store, more)
        front.queues[0].read(0, 8)
        front.queues[1].read(0, 8)
        ports = [front.queues[0].port, front.queues[1].port, CONSOLE_PORT, console.port]
        for port in ports:
            while guest.vm.wait(port, 0.1):
                pass
        worker = daemon.worker(7)
        os.kill(worker, signal.SIGKILL)
        for port in ports:
            assert guest.vm.wait(port, 30), port
            assert not guest.vm.wait(port, 0.1), port

        def kicks() -> list[int]:
            info = daemon.call("info", 7)
            counters = [info["devices"][0]["counters"], *(each["counters"] for each in info["consoles"])]
            named = (("queue-0/kicks", "queue-1/kicks"), ("kicks",), ("kicks",))
            return [each.get(name, 0) for each, names in zip(counters, named, strict=True) for name in names]

        until(lambda: kicks() == [1, 1, 1, 1], f"kicks: {kicks()}")
        console.close()
        front.disconnect()
