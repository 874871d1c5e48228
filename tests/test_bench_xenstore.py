"""evtchnd-bench xenstore, short: all that it reads is there. No figure is judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import benchrun

RATIOS = {
    "xenstore.read_over_echo",
    "xenstore.write_over_echo",
    "xenstore.transaction_rmw_over_echo6",
    "xenstore.read_1m_nodes_over_1k",
    "xenstore.write_10k_siblings_over_10",
    "xenstore.fire_10k_watches_over_1",
    "xenstore.quiet_p99_storm_over_alone",
    "xenstore.bytes_per_node",
    "xenstore.walk_120k_nodes_s",
    "xenstore.walk_longest_pause_s",
}


def bench(*arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    short = ("--rounds", "1", "--ops", "20", "--nodes", "12000", "--json", "-")
    done = benchrun.run("xenstore", *short, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: apt-get install gcc libc6-dev")
def test_everything_is_read_once(tmp_path: Path) -> None:
    picture = tmp_path / "xenstore.svg"
    report, table = bench("--plot", str(picture))
    assert set(report["ratios"]) == RATIOS
    assert all(isinstance(value, float) and value > 0 for value in report["ratios"].values())
    readings = {reading["cell"]: reading for reading in report["rounds"]}
    assert readings["filled 1m"]["nodes"] >= 12_000
    assert readings["walk"]["faults"] == 0
    taken = [reading for reading in readings.values() if "requests" in reading]
    assert len(taken) > 25
    assert all(reading["requests"] > 0 and reading["errors"] == 0 for reading in taken)
    assert readings["boot storm"]["requests"] == 256 * 300
    assert "quiet storm" in table
    assert "<svg" in picture.read_text()


def test_without_a_compiler_it_says_what_was_not_run() -> None:
    report, table = bench(CC="/nonexistent/cc")
    assert report["ratios"] == dict.fromkeys(RATIOS)
    assert "compiler" in report["skipped"]["xenstore"]
    assert "not run" in table
