"""Tests below tests/lab run where KVM_CAP_XEN_HVM has everything: on this machine if it has, else inside the lab.

Where neither is to be had they are skipped with the reason, and the summary says how many; with CI=true or
EVTCHND_REQUIRE_LAB=1 that is a failure. `make lab` prepares the lab; deadlines: `from lab.patience import patient`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import guestimage, inside, outside
from lab.machine import EVERYTHING, INSIDE, LabMissing, xen_capability
from lab.realguest import RealGuest

HERE = Path(__file__).parent
RUN = pytest.StashKey[outside.LabRun]()


def pytest_configure(config: pytest.Config) -> None:
    if INSIDE:
        config.pluginmanager.register(inside.Reporter(config))


def ours(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INSIDE:
        inside.lengthen_timeouts(config, items)
        return
    # last: meanwhile they have run
    items.sort(key=ours)
    if xen_capability() & EVERYTHING == EVERYTHING:
        return
    for item in filter(ours, items):
        # the wait for a report is not the test; inside it has its limit
        item.add_marker(pytest.mark.timeout(0), append=False)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Once everything that deselects is done."""
    if not INSIDE and not session.config.option.collectonly and xen_capability() & EVERYTHING != EVERYTHING:
        run = outside.LabRun(session.config, [item for item in session.items if ours(item)])
        session.config.stash[RUN] = run
        run.begin()


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    run = item.config.stash.get(RUN, None)
    if run is None or not ours(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in run.reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if run := session.config.stash.get(RUN, None):
        run.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is None:
        return
    for death in run.deaths:
        terminalreporter.section("a boot of the lab died")
        terminalreporter.write_line(str(death))
    for repeated in run.repeated:
        terminalreporter.section("a guest of the lab triple-faulted, its test was repeated")
        terminalreporter.write_line(repeated)
    if run.skipped:
        terminalreporter.write_line(f"lab: {run.skipped} tests skipped: {run.missing}", yellow=True)
    elif run.boots:
        terminalreporter.write_line(f"lab: waited {run.seconds:.0f} s for it, {run.boots} boot{'s' * (run.boots > 1)}")


@pytest.fixture
def images() -> Iterator[Path]:
    """A folder for disk images on a real file system (the lab's ext4 disk), gone after the test."""
    with tempfile.TemporaryDirectory(prefix="i") as folder:
        yield Path(folder)


@pytest.fixture(scope="session", params=guestimage.SUITES)
def guests(request: pytest.FixtureRequest) -> Iterator[Guests]:
    """The real guest of one suite; booted by the first test that wants it, and again by the next when it has died."""
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        found = Guests(request.param, Path(folder))
        yield found
        found.close()


class Guests:
    def __init__(self, suite: str, folder: Path) -> None:
        self._suite = suite
        self._folder = folder
        self._guest: RealGuest | None = None

    def get(self) -> RealGuest:
        if self._guest is None or not self._guest.alive:
            self.close()
            self._guest = RealGuest(self._suite, self._folder)
        return self._guest

    def close(self) -> None:
        if self._guest is not None:
            self._guest.close()
            self._guest = None


@pytest.fixture
def guest(guests: Guests) -> RealGuest:
    """A real guest that runs; its disks but xvda and xvdb are the test's."""
    try:
        return guests.get()
    except LabMissing as missing:
        pytest.skip(str(missing))
