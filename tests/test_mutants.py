"""Each advisory has a test of its name and a guard without which that fails; what looks for that is tested, too.

`make mutants` tries them all.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mutants
from mutants import ROOT, Mutant, Wrong

ROWS = [line for line in (ROOT / "tests/hostile/rows.txt").read_text().splitlines() if line and line[0] != "#"]


def names(path: Path) -> set[str]:
    """Tests of a file: functions, and what a hypothesis machine's TestCase is bound to."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_every_row_has_a_guard_and_every_guard_is_there() -> None:
    table = mutants.table()
    assert {row for each in table for row in each.rows} == {*ROWS}
    for each in table:
        assert each.changed(ROOT) != (ROOT / each.file).read_text(), each.name
        file, _, rest = each.test.partition("::")
        assert rest.partition("::")[0].partition("[")[0] in names(ROOT / file), each.test


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("XSA-")])
def test_every_advisory_has_a_test_of_its_name(row: str) -> None:
    number = row.removeprefix("XSA-")
    named = re.compile(rf"::test_xsa_(?:\d+_)*{number}_|::Test[Xx]sa_(?:\d+_)*{number}(?:_|::)")
    assert any(row in each.rows and named.search(each.test) for each in mutants.table())


def mutant(**changes: str) -> Mutant:
    """One that is killed, unless told otherwise."""
    guard = {
        "what": "the delay does not grow",
        "file": "evtchnd/spurious.py",
        "text": "FIRST_S * (1 << doublings)",
        "replacement": "FIRST_S",
        "test": "tests/test_spurious.py::test_the_delay_doubles_up_to_its_most",
    }
    return Mutant(rows=("XSA-332",), **{**guard, **changes})


@pytest.mark.timeout(300)
def test_survivors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = "tests/test_spurious.py::test_a_channel_without_a_ring_is_never_late"
    monkeypatch.setattr(mutants, "table", lambda _: [mutant(), mutant(what="and nobody sees", test=weak)])
    done = mutants.run()
    assert (done["run"], done["survived"]) == (2, 1)
    assert done["survivors"] == [f"XSA-332: and nobody sees: {weak} passes without it"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text": "no such text"}, r"has its text 0 times"),
        ({"text": "doublings"}, r"has its text \d times"),
        ({"replacement": "(("}, r"pytest ended with [24]"),  # no test can be collected then: not killed
        ({"test": "tests/test_spurious.py::test_that_is_not"}, r"pytest ended with 4"),
    ],
    ids=["gone", "twice", "no Python", "no test"],
)
def test_what_proves_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], why: str) -> None:
    monkeypatch.setattr(mutants, "table", lambda _: [mutant(**changes)])
    with pytest.raises(Wrong, match=why):
        mutants.run()


def test_keys_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "mutants.toml"
    file.write_text('[[mutant]]\nrows = ["XSA-39"]\nwhat = "x"\nfille = "y"\n')
    with pytest.raises(Wrong, match="fille"):
        mutants.table(file)
