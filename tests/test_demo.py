"""The demo as a newcomer runs it: real ext4 image, daemon, worker and guest in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATH = os.environ["PATH"] + ":/usr/sbin"
pytestmark = [
    pytest.mark.skipif(not shutil.which("mkfs.ext4", path=PATH), reason="no mkfs.ext4: apt-get install e2fsprogs"),
    pytest.mark.timeout(240),
]


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evtchnd.demo", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("pure", ["0", "1"], ids=["compiled", "python"])
def test_everything_is_equal_at_the_end(tmp_path: Path, pure: str) -> None:
    done = run_demo("--dir", str(tmp_path), EVTCHND_PURE=pure)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"files that the guest read: (\d+) of \1, wrong: 0", done.stdout)
    assert re.search(r"worker: [1-9]\d* requests, [1-9]\d* kicks", done.stdout)
    assert "everything is equal" in done.stdout
    assert not list(tmp_path.iterdir()), "the demo cleans up"


def test_kept_running_it_answers_and_can_be_ended(tmp_path: Path) -> None:
    done = run_demo("--dir", str(tmp_path), "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    ending = re.search(r"kill (\d+) (\d+); rm -r (\S+) (\S+)", done.stdout)
    assert ending, done.stdout
    guest, daemon = int(ending[1]), int(ending[2])
    try:
        socket = re.search(r"^  (\S+/xenstored.sock)$", done.stdout, re.MULTILINE)
        assert socket, done.stdout
        if shutil.which("xenstore-ls"):
            tree = subprocess.run(
                ["xenstore-ls"],
                env=os.environ | {"XENSTORED_PATH": socket[1]},
                capture_output=True,
                text=True,
                check=True,
            )
            assert "51712" in tree.stdout
    finally:
        for pid in (guest, daemon):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in (guest, daemon)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{daemon}/exe").exists()


def test_without_room_it_says_why(tmp_path: Path) -> None:
    done = run_demo("--dir", str(tmp_path / "missing"))
    assert done.returncode != 0
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr
