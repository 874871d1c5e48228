"""evtchnd-bench reliability: what it makes of its parts; each part's own tests are beside it."""

from __future__ import annotations

import json

from benchrun import run
from evtchnd.bench import reliability


def test_a_part_is_run_and_the_others_are_said_to_be_missing() -> None:
    done = run("reliability", "--parts", "kills", "--kills", "4", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratios = found["ratios"]
    assert ratios.keys() == reliability.BOUNDS.keys()
    ran = {name: value for name, value in ratios.items() if value is not None}
    assert ran.keys() == {"kills.run", "kills.bad_blocks", "kills.duplicates", "worker_restart_ms_p99"}
    assert (ran["kills.run"], ran["kills.bad_blocks"], ran["kills.duplicates"]) == (4, 0, 0)
    assert ran["worker_restart_ms_p99"] > 0
    assert found["skipped"] == dict.fromkeys(("crash_points", "restarts", "hostile", "mutants"), "--parts")
    assert found["rounds"][0]["seed"] == 1
    assert "kills: kills.answers" in done.stderr


def test_readings_have_the_names_of_the_ratios() -> None:
    """Those that a part renames."""
    named = reliability.hostile_readings({"cases": 2, "storm.rounds": 3, "leaks_fds": 0})
    assert named == {"hostile.cases": 2, "hostile.storm.rounds": 3, "leaks.fds": 0}


def test_an_unknown_part_is_refused() -> None:
    done = run("reliability", "--parts", "kills,storms")
    assert done.returncode == 1
    assert done.stderr.startswith("evtchnd-bench: --parts: no storms: there are crash_points, kills,")
