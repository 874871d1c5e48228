"""evtchnd-bench net: what it prints, and what it says when it cannot run. No figure is judged here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import benchrun
from evtchnd.bench import net
from netns import possible

RATIOS = {"net.soft.gso.rate_over_c", "net.soft.pps64_over_c"}


def bench(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    short = ("--rounds", "2", "--ms", "50", "--dir", tmp_path, "--places", "soft")
    return benchrun.run("net", *short, *arguments, **environment)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: apt-get install gcc libc6-dev")
@pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")
def test_every_workload_on_both_sides(tmp_path: Path) -> None:
    done = bench(tmp_path, "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["ratios"]) == RATIOS
    assert all(isinstance(value, float) and value > 0 for value in report["ratios"].values())
    assert report["skipped"] == {}
    sides = {(reading["side"], reading["workload"]) for reading in report["rounds"]}
    assert sides == {(side, work.name) for side in ("evtchnd", "c") for work in net.WORKLOADS}
    assert len(report["rounds"]) == 2 * len(sides)
    for reading in report["rounds"]:
        assert reading["packets"] > 0 and reading["bad"] == 0
        if "bytes" in reading:
            (work,) = (work for work in net.WORKLOADS if work.name == reading["workload"])
            assert reading["bytes"] == reading["packets"] * work.size  # none is cut, none is another's
    assert "tx_gso evtchnd" in done.stderr


def test_without_a_compiler_it_says_what_was_not_run(tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    done = bench(tmp_path, "--json", str(file), CC="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["ratios"] == dict.fromkeys(RATIOS)
    assert "compiler" in report["skipped"]["net"]
    assert "not run" in done.stderr
