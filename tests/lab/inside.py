"""pytest inside the lab: each test's reports go out as they are made, one JSON object a line.

{"start": node id}, {"report": ...} for each of its phases, {"finish": node id}: the host replays them (outside.py).

The emulated processors have made real guests triple-fault, once in a hundred boots or less (docs/decisions.md). A test
that fails for that is repeated, and the host's summary tells; twice a run at most, so that nothing else hides there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from lab.patience import patient

REPORTS = Path("/run/out/reports")
REPEATS = 2
# of a report: why its test has been repeated
REPEATED = "repeated"
# evtchnd-micro's log, in what RealGuest raises
_TRIPLE_FAULT = re.compile(r"vCPU \d: (?:triple fault|rip 0xf000:0xfff0)")


class Reporter:
    def __init__(self, config: pytest.Config, reports: Path = REPORTS) -> None:
        self._config = config
        self._file = reports.open("a")
        self._repeats = REPEATS

    def _tell(self, **line: Any) -> None:
        # what a test put into its user_properties need not be JSON
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        failure = "".join(report.longreprtext for report in reports if report.failed)
        if self._repeats and _TRIPLE_FAULT.search(failure):
            self._repeats -= 1
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
            why = next(line for line in failure.splitlines() if _TRIPLE_FAULT.search(line))
            reports[0].user_properties.append((REPEATED, why))
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._tell(report=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell(finish=nodeid)

    def pytest_unconfigure(self) -> None:
        self._file.close()


def lengthen_timeouts(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-timeout's limits, from the marker or the configuration, as long as they have to be here."""
    default = float(config.getini("timeout") or 0)
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(
            marker.args[0] if marker and marker.args else (marker.kwargs if marker else {}).get("timeout", default)
        )
        item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
