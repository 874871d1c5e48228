"""What a test of the lab comes to where the emulated processors, not evtchnd, brought its guest down."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab import outside
from lab.machine import BOOTS, LabDied

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


class Dying:
    """A boot in which `outlived` tests of those that are left end well, and the machine dies in the next one."""

    outlived: list[int]

    def __init__(self, lab: object, command: object, *, files: dict[str, bytes], **rest: object) -> None:
        self._tests = files["tests"].decode().split()
        self._ends = self.outlived.pop(0)
        lines = [line for test in self._tests[: self._ends] for line in ({"start": test}, {"finish": test})]
        lines += [{"start": test} for test in self._tests[self._ends :][:1]]
        self._said = {"reports": "".join(json.dumps(line) + "\n" for line in lines).encode()}

    def look(self) -> int:
        if self._ends < len(self._tests):
            raise LabDied("the machine died", "", came_up=True)
        return 0

    def new(self, name: str) -> bytes:
        return self._said.pop(name, b"")

    def tail(self) -> str:
        return "its last words"

    def close(self) -> None:
        pass


@pytest.fixture
def lab_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    def ran(*outlived: int) -> dict[str, str]:
        """What five tests come to: "" or the text of the failure."""
        Dying.outlived = list(outlived)
        monkeypatch.setattr(outside, "Machine", Dying)
        monkeypatch.setattr(outside.prepare, "find", lambda: None)
        items: list[Any] = [
            SimpleNamespace(nodeid=name, location=(name, 0, name), keywords={}) for name in ("a", "b", "c", "d", "e")
        ]
        run = outside.LabRun(request.config, items)
        return {item.nodeid: "".join(str(r.longrepr or "") for r in run.reports(item)) for item in items}

    return ran


def test_a_machine_that_dies_is_started_again(lab_run: Callable[..., dict[str, str]]) -> None:
    assert lab_run(2, 1, 9) == dict.fromkeys("abcde", "")


def test_a_test_that_kills_it_twice_has_failed_and_the_others_run(lab_run: Callable[..., dict[str, str]]) -> None:
    found = lab_run(1, 0, 9)
    assert "its last words" in found.pop("b")
    assert found == dict.fromkeys("acde", "")


def test_a_machine_that_dies_always_leaves_failures(lab_run: Callable[..., dict[str, str]]) -> None:
    found = lab_run(0, 1, *[1] * (BOOTS - 2))
    assert [name for name, text in found.items() if not text] == ["a", "b", "c"]
    assert "not run: the machine died in d" in found["e"]
