"""evtchnd-bench wakeup where KVM knows Xen: the guest's sends stay in the kernel, or all come to the VMM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lab.patience import patient


@pytest.mark.timeout(300)
def test_sends_by_eventfd_and_by_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evtchnd.bench", "wakeup", "--places=lab", "--rounds=1", "--kicks=50", "--json=-"],
        capture_output=True,
        text=True,
        timeout=patient(25),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "wakeup.lab" not in report["skipped"], report["skipped"]
    exits = {(r["way"], r["exits"]) for r in report["rounds"]}
    assert exits == {("eventfd", 0), ("exit", 50), ("exit_c", 50)}
    assert all(value > 0 for name, value in report["ratios"].items() if ".lab." in name)
