"""Lines that come too often."""

from __future__ import annotations

from evtchnd.seldom import Seldom


def test_a_few_at_once_then_one_in_a_while() -> None:
    now = [0.0]
    lines = Seldom(burst=3, pause_s=60, clock=lambda: now[0])
    assert [lines.due("stopped") for _ in range(5)] == ["", "", "", None, None]
    assert lines.due("connected") == ""  # another kind
    now[0] = 59.0
    assert lines.due("stopped") is None
    now[0] = 60.0
    assert lines.due("stopped") == " (3 more since the last such line)"
    assert lines.due("stopped") is None
    now[0] = 120.0
    assert lines.due("stopped") == " (1 more since the last such line)"
    now[0] = 180.0  # nothing was left out: as at first
    assert [lines.due("stopped") for _ in range(4)] == ["", "", "", None]
