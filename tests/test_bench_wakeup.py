"""evtchnd-bench wakeup: that every place it is asked for is measured or skipped with a reason. No figure is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import benchrun
from kvmguest import why_no_kvm

RATIOS = {
    "wakeup.soft.polling.daemon_over_c_p50",
    "wakeup.soft.asleep.daemon_over_c_p50",
    "wakeup.host.polling.exit_over_eventfd_p50",
    "wakeup.lab.polling.exit_over_eventfd_p50",
    "wakeup.lab.asleep.exit_over_eventfd_p50",
    "wakeup.host.polling.exit_c_over_eventfd_p50",
    "wakeup.lab.polling.exit_c_over_eventfd_p50",
    "wakeup.cost_4000_over_1_channels",
    "wakeup.idle_256_channels_cpu",
}
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: apt-get install gcc libc6-dev")


def bench(*arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What it writes as JSON, and its table."""
    short = ("--rounds", "2", "--kicks", "50", "--ms", "20", "--json", "-")
    done = benchrun.run("wakeup", *short, *arguments, seconds=300, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def ran(report: dict[str, Any]) -> set[str]:
    """Names of the ratios that were measured; all the others are null, with a reason."""
    assert set(report["ratios"]) == RATIOS
    there = {name for name, value in report["ratios"].items() if value is not None}
    for name in RATIOS - there:
        assert any(name.startswith(part) and reason for part, reason in report["skipped"].items()), name
    return there


@needs_compiler
def test_soft(tmp_path: Path) -> None:
    picture = tmp_path / "wakeup.svg"
    report, table = bench("--places", "soft", "--plot", str(picture))
    assert ran(report) == {name for name in RATIOS if ".soft." in name}
    cells = {(r["way"], r["sleep"], r["side"]) for r in report["rounds"]}
    assert len(report["rounds"]) == 2 * len(cells) == 12
    for reading in report["rounds"]:
        assert reading["kicks"] == reading["rounds"] == 50
        assert 0 < reading["p50_us"] <= reading["p99_us"] <= reading["p999_us"]
    assert "soft eventfd, asleep, evtchnd" in table
    assert "<svg" in picture.read_text()


@needs_compiler
@pytest.mark.timeout(300)
def test_many_channels() -> None:
    report, table = bench("--places", "channels")
    assert ran(report) == {"wakeup.cost_4000_over_1_channels", "wakeup.idle_256_channels_cpu"}
    loads = {(r["load"], r["channels"]) for r in report["rounds"]}
    assert {(load, count) for load in ("one", "turn", "all") for count in (1, 16, 256, 4000)} < loads
    assert all(r["kicks"] > 0 for r in report["rounds"] if r["load"] != "none")
    assert "4000 channels, turn" in table


@needs_compiler
@pytest.mark.skipif(bool(why_no_kvm()), reason=f"no guest on KVM: {why_no_kvm()}")
def test_a_guest_on_kvm() -> None:
    report, _ = bench("--places", "host")
    assert ran(report) == {name for name in RATIOS if ".host." in name}
    exits = {way: {r["exits"] for r in report["rounds"] if r["way"] == way} for way in ("eventfd", "exit", "exit_c")}
    assert exits == {"eventfd": {0}, "exit": {50}, "exit_c": {50}}
    assert {(r["sleep"], r["side"]) for r in report["rounds"]} == {
        (sleep, side) for sleep in ("polling", "asleep") for side in ("evtchnd", "c")
    }


def test_without_a_compiler_it_says_what_was_not_run() -> None:
    report, table = bench(CC="/nonexistent/cc")
    assert ran(report) == set()
    assert "compiler" in report["skipped"]["wakeup.soft"]
    assert "not run" in table


def test_a_place_that_does_not_exist() -> None:
    done = benchrun.run("wakeup", "--places", "moon")
    assert done.returncode == 1
    assert "moon" in done.stderr
