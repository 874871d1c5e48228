"""Takes the guards of mutants.toml away one at a time, in a copy of the tree: the test that it names must fail then.

    python tests/mutants.py [--json FILE] [ROW ...]

The copy has no compiled core: `_core` is one source, which runs as Python there; tests/test_core_forms.py holds that
the compiled form passes the same tests. A mutant is killed by a test that fails, not by one that cannot be collected or
set up, nor by one that only ran out of time. The named tests pass before anything is taken away, or this ends with an
error, as it does when the text of a guard is not in its file exactly once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutants.toml"
TEST_S = 90
SURVIVED, KILLED = "survived", "killed"


class Wrong(Exception):
    """The table, or what it was tried on, is not as it should be."""


@dataclass(frozen=True)
class Mutant:
    """rows: what it is of (an advisory, or a row's name); what: the guard's absence in words; test: pytest's id."""

    rows: tuple[str, ...]
    what: str
    file: str
    text: str
    replacement: str
    test: str

    @property
    def name(self) -> str:
        return f"{', '.join(self.rows)}: {self.what}"

    def changed(self, root: Path) -> str:
        """The file's text without the guard. Wrong: it is not there once."""
        source = (root / self.file).read_text()
        if (count := source.count(self.text)) != 1:
            raise Wrong(f"{self.name}: {self.file} has its text {count} times:\n{self.text}")
        return source.replace(self.text, self.replacement)


def table(path: Path = TABLE) -> list[Mutant]:
    """All of them. Wrong: a key is missing or unknown."""
    with path.open("rb") as file:
        entries = tomllib.load(file)["mutant"]
    keys = {"rows", "what", "file", "text", "replacement", "test"}
    for number, entry in enumerate(entries):
        if set(entry) != keys:
            raise Wrong(f"mutant {number} ({entry.get('what')}): keys {sorted(set(entry) ^ keys)}")
    return [Mutant(**{**entry, "rows": tuple(entry["rows"])}) for entry in entries]


def copy(target: Path) -> None:
    """The tree as it is here, without what is built."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def outcome(root: Path, tests: Iterable[str]) -> tuple[str, str]:
    """SURVIVED or KILLED, and what pytest says of it. Wrong: neither."""
    report = root / "mutants.xml"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join(str(root / name) for name in (".", "backends"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--timeout={TEST_S}"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *tests],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "EVTCHND_PURE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout[-4000:] + done.stderr[-1000:]
    if done.returncode == 0:
        if "passed" not in done.stdout:
            raise Wrong(f"nothing was run (all of it skipped?):\n{text}")
        return SURVIVED, text
    if done.returncode != 1 or not report.exists():
        raise Wrong(f"pytest ended with {done.returncode}:\n{text}")
    faults = [fault for case in ElementTree.parse(report).iter("testcase") for fault in case if fault.tag != "skipped"]
    why = [fault.get("message", "") for fault in faults if fault.tag in ("failure", "error")]
    if not [each for each in why if not each.startswith(("failed on setup", "collection failure", "Failed: Timeout"))]:
        raise Wrong(f"no test failed for a reason of its own: {why}\n{text}")
    return KILLED, text


def run(rows: Sequence[str] = (), *, path: Path = TABLE, say: bool = False) -> dict[str, object]:
    """{"run": count, "survived": count, "survivors": names}. rows: only these; none: all.

    Wrong: at the end, with all that could not be tried and what has survived.
    """
    mutants = [each for each in table(path) if not rows or {*each.rows} & {*rows}]
    survivors, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="evtchnd-mutants-") as folder:
        root = Path(folder)
        copy(root)
        changed = [each.changed(root) for each in mutants]
        tests = sorted({each.test for each in mutants})
        found, text = outcome(root, tests)
        if found != SURVIVED:
            raise Wrong(f"a test fails with all guards in place:\n{text}")
        for mutant, source in zip(mutants, changed, strict=True):
            file = root / mutant.file
            before = file.read_text()
            file.write_text(source)
            try:
                found, text = outcome(root, [mutant.test])
            except Wrong as exc:
                found = "not tried"
                wrong.append(f"{mutant.name}: {exc}")
            finally:
                file.write_text(before)
            if say:
                print(f"{found}: {mutant.name}", flush=True)
            if found == SURVIVED:
                survivors.append(f"{mutant.name}: {mutant.test} passes without it")
    if wrong:
        raise Wrong("\n".join([*survivors, *wrong]))
    return {"run": len(mutants), "survived": len(survivors), "survivors": survivors}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="run and survived; -: alone on standard output")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only these, as XSA-39")
    arguments = parser.parse_args(argv)
    try:
        done = run(arguments.rows, say=arguments.json != "-")
    except Wrong as exc:
        print(f"mutants: {exc}", file=sys.stderr)
        return 2
    if arguments.json:
        with contextlib.ExitStack() as stack:
            file = sys.stdout if arguments.json == "-" else stack.enter_context(Path(arguments.json).open("w"))
            print(json.dumps(done), file=file)
    if arguments.json != "-":
        print(f"{done['run']} mutants, {done['survived']} survived")
    return 1 if done["survived"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
