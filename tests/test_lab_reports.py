"""What a test of the lab comes to where the emulated processors, not evtchnd, brought its guest down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFTEST = """
from pathlib import Path
from lab.inside import Reporter

def pytest_configure(config):
    config.pluginmanager.register(Reporter(config, Path("reports")))
"""
TESTS = """
import pytest

FAULT = "the console ended; the log ends with 'domain 1 (g1): vCPU 0: rip 0xf000:0xfff0, rsp 0x0'"
runs = []

def attempt(name, failures, text):
    runs.append(name)
    assert runs.count(name) > failures, text

@pytest.fixture
def booted():
    attempt("boot", 1, FAULT)

def test_once():
    attempt("once", 1, FAULT)

def test_boots(booted):
    pass

def test_a_third():
    attempt("third", 1, FAULT)

def test_other():
    attempt("other", 1, "wrong data")
"""
TWICE = """
def test_always():
    assert False, "vCPU 1: triple fault"
"""


def reported(folder: Path, tests: str) -> dict[str, list[dict[str, Any]]]:
    """Node id -> the reports of its phases."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "test_it.py"]
    here = str(Path(__file__).parent)
    subprocess.run(command, cwd=folder, env={"PYTHONPATH": here}, capture_output=True, check=False)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "reports").read_text().splitlines():
        if report := json.loads(line).get("report"):
            found.setdefault(report["nodeid"].split("::")[1], []).append(report)
    return found


def outcomes(reports: list[dict[str, Any]]) -> dict[str, str]:
    return {report["when"]: report["outcome"] for report in reports}


PASSED = {"setup": "passed", "call": "passed", "teardown": "passed"}


def test_a_guests_triple_fault_is_repeated_twice_a_run_and_told(tmp_path: Path) -> None:
    found = reported(tmp_path, TESTS)
    for name in ("test_once", "test_boots"):
        assert outcomes(found[name]) == PASSED
        assert len(found[name]) == 3
        ((what, why),) = found[name][0]["user_properties"]
        assert what == "repeated"
        assert "0xf000:0xfff0" in why
    assert outcomes(found["test_a_third"])["call"] == "failed"
    assert outcomes(found["test_other"])["call"] == "failed"


def test_one_that_faults_again_has_failed(tmp_path: Path) -> None:
    found = reported(tmp_path, TWICE)
    assert outcomes(found["test_always"])["call"] == "failed"
    assert len(found["test_always"]) == 3
