"""A storage that keeps a write of a worker that was killed: what the guest wrote after it stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from faultyfs import WRITE, FaultyFs
from test_control_daemon import Guest, MiB

OLD, NEW = b"old!" * 1024, b"new!" * 1024


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[FaultyFs]:
    folder = tmp_path / "slow"
    folder.mkdir()
    try:
        disk = FaultyFs(folder, 16 * MiB)
    except OSError as exc:
        pytest.skip(f"FUSE cannot be mounted here: {exc}")
    with disk:
        yield disk


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_write_of_a_dead_worker_does_not_come_after_a_newer_one(tmp_path: Path, slow: FaultyFs, cache: str) -> None:
    """Kill, replay, overwrite; then the old write ends. The replay waits for that, so it cannot be so late."""
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        devid = daemon.call("attach_block", 7, f"vdev=xvda,cache={cache},target={slow.image}")["devid"]
        front = guest.connect(devid)
        front.write(64, bytes(4096))  # served
        worker = daemon.worker(7)
        slow.held.add(WRITE)
        answered: list[bytes] = []

        def write() -> None:
            for data in (OLD, NEW):
                front.write(64, data)
                answered.append(data)

        guests = threading.Thread(target=write)
        guests.start()
        until(lambda: slow.waiting == 1, "the write has not come to the storage")
        os.kill(worker, signal.SIGKILL)
        slow.held.clear()
        if cache == "none":  # the kernel goes on with it alone; the other one's process ends when its write does
            until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
        # whoever did not wait would be done with both by now
        end = time.monotonic() + 0.5
        while time.monotonic() < end and not answered:
            time.sleep(0.01)
        assert answered == []
        assert slow.waiting == 1
        assert bytes(slow.data[64 * 512 : 64 * 512 + 4096]) == bytes(4096)
        slow.release()
        guests.join(60)
        assert answered == [OLD, NEW]
        assert bytes(slow.data[64 * 512 : 64 * 512 + 4096]) == NEW
        assert front.read(64, 8) == NEW
        assert daemon.call("info", 7)["worker"]["restarts"] == 1
        front.disconnect()
