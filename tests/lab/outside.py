"""The lab's tests as the host's pytest sees them: collected here, run in one boot, their reports replayed as ours.

The first lab test boots the machine with the node ids of all that were selected; each test then waits for its own
reports. A machine that dies is started again, up to BOOTS times in all, with the tests that have not finished; one in
which it died twice has failed. What the last boot leaves has failed, too, unless none came up: then the lab is not
there, and its tests are skipped with the reason.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lab import inside, machine, prepare
from lab.machine import BOOTS, LOOK_S, LabDied, LabMissing, Machine

# What a test may take where nothing else is said; times all tests, the boot's limit.
TEST_S = 3600.0


def required() -> bool:
    """Whether a lab test that is skipped is a failure."""
    return os.environ.get("CI") in ("true", "1") or os.environ.get("EVTCHND_REQUIRE_LAB", "0") not in ("", "0")


class LabRun:
    """All lab tests of this session."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        self.deaths: list[LabDied] = []
        self.repeated: list[str] = []  # tests that a guest's triple fault had failed
        self.missing = ""  # why there is no lab
        self.skipped = 0
        self.boots = 0
        self.seconds = 0.0
        self._waiting = [item.nodeid for item in items]  # not finished, in order
        self._done: dict[str, list[pytest.TestReport]] = {}
        self._left: dict[str, str] = {}  # will not finish, and why
        self._running = ""
        self._died_in: Counter[str] = Counter()
        self._partial: list[pytest.TestReport] = []
        self._rest = b""
        self._machine: Machine | None = None
        self._came_up = False

    def begin(self) -> None:
        """Boots the lab if there is something to run in it; it goes on beside the other tests, at a lower priority."""
        if self._waiting:
            try:
                self._machine = self._boot()
            except LabMissing as exc:
                self.missing = str(exc)

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of one test, once they are there."""
        begin = time.monotonic()
        while not (item.nodeid in self._done or item.nodeid in self._left or self.missing):
            self._step()
        self.seconds += time.monotonic() - begin
        if item.nodeid in self._done:
            yield from (self._judged(report) for report in self._done.pop(item.nodeid))
        elif item.nodeid in self._left:
            yield from made_up(item, "failed", self._left[item.nodeid])
        elif required():
            yield from made_up(item, "failed", f"{self.missing} (and the lab is required here)")
        else:
            self.skipped += 1
            yield from made_up(item, "skipped", self.missing)

    def _step(self) -> None:
        """Boots if need be; waits a moment for news."""
        try:
            if self._machine is None:
                self._machine = self._boot()
            status = self._machine.look()
            self._take_reports(self._machine)
            if status is None:
                time.sleep(LOOK_S)
            elif self._waiting:
                text = f"pytest in the lab ended ({status}) without a report of it:\n{self._machine.tail()}"
                self._leave(text)
        except LabMissing as exc:
            self.missing = str(exc)
        except LabDied as exc:
            self._died(exc)

    def _died(self, death: LabDied) -> None:
        self._take_reports(self._machine)
        self._came_up |= death.came_up
        self.deaths.append(death)
        output = self._machine.tail() if self._machine else ""
        self.close()
        running = self._running
        self._died_in[running] += 1
        last = len(self.deaths) == BOOTS
        if running and (last or self._died_in[running] == 2):
            self._left[running] = f"{death}\n{'-' * 20} the last output {'-' * 20}\n{output}"
            self._waiting.remove(running)
        if last and not self._came_up:
            self.missing = f"the lab did not come up: {death.args[0]}"
        elif last:
            self._leave(f"not run: the machine died in {running}" if running else f"not run: {death}")

    def _boot(self) -> Machine:
        lab = prepare.find()
        self._rest = b""
        self._partial, self._running = [], ""
        self.boots += 1
        option = self.config.option
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        command += [f"--tb={option.tbstyle}", *(["-vv"] if option.verbose > 1 else []), *(["-l"] * option.showlocals)]
        command += ["--color=no", "@/run/out/tests"]
        files = {"tests": "\n".join(self._waiting).encode()}
        limit = machine.BOOT_S + TEST_S * len(self._waiting)
        return Machine(lab, command, files=files, cwd=self.config.rootpath, limit=limit)

    def _take_reports(self, lab_machine: Machine | None) -> None:
        if lab_machine is None:
            return
        lab_machine.new("output")  # a sign of life
        *lines, self._rest = (self._rest + lab_machine.new("reports")).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "start" in told:
                self._running = told["start"]
            elif "report" in told:
                self._partial.append(self._report(told["report"]))
            elif told["finish"] in self._waiting:
                self._waiting.remove(told["finish"])
                self._done[told["finish"]] = self._partial
                self._partial, self._running = [], ""

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        report: pytest.TestReport = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
        if isinstance(report.longrepr, list):  # JSON has no tuples
            report.longrepr = tuple(report.longrepr)
        report.sections = [(name, text) for name, text in report.sections]
        report.user_properties = [(name, value) for name, value in report.user_properties]
        self.repeated += [f"{report.nodeid}: {why}" for name, why in report.user_properties if name == inside.REPEATED]
        return report

    def _judged(self, report: pytest.TestReport) -> pytest.TestReport:
        """Where the lab is required a test that it skips has failed."""
        if report.skipped and not hasattr(report, "wasxfail") and required():
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"{reason} (and the lab's tests are required here)"
        return report

    def _leave(self, why: str) -> None:
        self._left |= dict.fromkeys(self._waiting, why)
        self._waiting.clear()

    def close(self) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None


def made_up(item: pytest.Item, outcome: str, text: str) -> Iterator[pytest.TestReport]:
    """Reports of a test that did not run."""
    path, line, _ = item.location
    longrepr: Any = (path, (line or 0) + 1, f"Skipped: {text}") if outcome == "skipped" else text
    keywords = dict.fromkeys(item.keywords, 1)
    yield pytest.TestReport(item.nodeid, item.location, keywords, outcome, longrepr, "setup")  # type: ignore[arg-type]
    yield pytest.TestReport(item.nodeid, item.location, keywords, "passed", None, "teardown")
