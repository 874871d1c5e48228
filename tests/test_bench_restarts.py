"""The benchmark of restarts is run: what it reads is there, and nothing was lost meanwhile."""

from __future__ import annotations

from evtchnd.bench.restarts import restarts
from scale import scaled


def test_a_daemon_that_is_killed_under_two_guests() -> None:
    found = restarts(2, scaled(20), seed=1)
    assert set(found) == {"restart_ms_p50", "restart_ms_p99", "restart_ms_max", "requests", "bad_blocks"}
    assert found["bad_blocks"] == 0
    assert found["requests"] > 0
    assert 0 < found["restart_ms_p50"] <= found["restart_ms_p99"] <= found["restart_ms_max"]
