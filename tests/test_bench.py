"""evtchnd-bench: what it prints where, and what it says when it cannot run. No figure is judged here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import benchrun

RATIOS = {
    "blk.soft.rand4k_qd32.iops_over_c",
    "blk.soft.rand4k_qd1.p50_over_c",
    "blk.soft.rand4k_qd32.cpu_over_c",
    "blk.soft.rand4k_qd32.kicks_per_request",
    "blk.soft.seq128k_qd8.rate_over_c",
}


def bench(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    short = ("--rounds", "2", "--ms", "50", "--dir", tmp_path)
    return benchrun.run("blk", *short, *arguments, **environment)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: apt-get install gcc libc6-dev")
def test_json_alone_on_standard_output_table_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "blk.svg"
    done = bench(tmp_path, "--json", "-", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["ratios"]) == RATIOS
    assert all(isinstance(value, float) and value >= 0 for value in report["ratios"].values())
    assert report["skipped"] == {}
    assert report["machine"]["kernel"].startswith("Linux")
    sides = {(reading["side"], reading["workload"]) for reading in report["rounds"]}
    assert len(report["rounds"]) == 2 * len(sides) == 12
    assert all(reading["requests"] > 0 and reading["bad"] == 0 for reading in report["rounds"])
    assert "rand4k_qd32 evtchnd" in done.stderr
    assert "<svg" in picture.read_text()


def test_without_a_compiler_it_says_what_was_not_run(tmp_path: Path) -> None:
    file = tmp_path / "blk.json"
    done = bench(tmp_path, "--json", str(file), CC="/nonexistent/cc")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    report = json.loads(file.read_text())
    assert report["ratios"] == dict.fromkeys(RATIOS)
    assert "compiler" in report["skipped"]["blk"]
    assert "not run" in done.stderr
