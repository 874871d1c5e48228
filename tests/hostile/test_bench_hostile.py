"""The benchmark's readings are there; what they are is for a machine that is quiet."""

from __future__ import annotations

from pathlib import Path

from evtchnd.bench import hostile


def test_readings(tmp_path: Path) -> None:
    names = ("ring_index", "store_state")
    found = hostile.run(pairs=2, seconds=0.05, cases=names, folder=str(tmp_path))
    assert (found["cases"], found["leaks_fds"]) == (2, 0)
    assert all(found[f"{name}.rounds"] >= 1 for name in names)
    keys = {f"{name}.{key}" for name in (*names,) for key in ("p99_over_alone", "rate_over_alone", "rounds")}
    keys |= {"not_isolated", "neighbour_p99_over_alone", "neighbour_rate_over_alone", "leaks_rss_over_baseline"}
    assert keys <= found.keys()
    assert all(isinstance(value, int | float) for value in found.values())
