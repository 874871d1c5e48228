"""pytest inside the lab: each test's reports go out as they are made, one JSON object a line.

{"start": node id}, {"report": ...} for each of its phases, {"finish": node id}: the host replays them (outside.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.patience import patient

REPORTS = Path("/run/out/reports")


class Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = REPORTS.open("a")

    def _tell(self, **line: Any) -> None:
        # what a test put into its user_properties need not be JSON
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

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
