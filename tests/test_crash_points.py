"""A worker dies at each step of a request's life: a part of what evtchnd/bench/crashpoints.py runs whole."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evtchnd._core.blk as blk
from bareguest import Blkfront, Ram
from evtchnd._core import COMPILED
from evtchnd._core.points import LABELS
from evtchnd._core.req import Req
from evtchnd._core.words import Mem
from scale import SCALE

ROOT = Path(__file__).parents[1]


def run(code: str, **values: Any) -> Any:
    """In a process of its own: a small one, which forks fast. -> the JSON object that it prints."""
    head = "import json\nfrom evtchnd.bench.crashpoints import *\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, json.dumps(values)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TALLY = """
import sys
given = json.loads(sys.argv[1])
done = tally(Share(**given["share"]), given["seed"], processes=1)
print(json.dumps({"run": done.run, "failures": done.failures}))
"""


def test_every_step_has_a_label_and_is_passed() -> None:
    code = """
bench = Bench()
passed = set()
for layout in ABIS:
    passed |= {*bench.points(Plan(layout, "mixed", (1, 0, 2, 3), 4, fresh=True))}
    for deaths in ((), (6,)):
        passed |= {*bench.points(Plan(layout, "mixed", (1, 0, 2, 3), 4, pump=True), deaths)}
bench.close()
print(json.dumps(sorted(passed)))
"""
    assert run(code) == sorted(LABELS)


@pytest.mark.timeout(900)
def test_a_worker_dies_at_its_steps() -> None:
    """At full scale: every step at depth 1 and 2, and some thousand others."""
    share = {"small": min(1.0, SCALE), "large": 0.004 * SCALE, "pump": 0.01 * SCALE}
    if not COMPILED:  # tests/test_core_forms.py runs this, too
        share = {name: value / 4 for name, value in share.items()}
    done = run(TALLY, share=share, seed=1)
    assert not done["failures"], "\n".join(done["failures"][:20])
    assert done["run"] > 20


# Every write in the journal, whatever its state.
REDO = """
import struct
serve, parent = Worker.serve, os.getpid()
def redo(self, *order, **how):
    for entry in range(32 if os.getpid() == parent else 0):
        op, sector, gref = struct.unpack_from("<B15xQI", self._journal.mem.read(128 + 128 * entry + 16, 112))
        if op == 1:
            page = self._mapped.grants.map(gref, write=False)
            os.pwrite(self._guest.image, page.view, sector * 512)
            page.close()
    serve(self, *order, **how)
Worker.serve = redo
"""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        # what a guest has got is done again, and its newer data is gone
        (REDO, "holds"),
        # answers that were ready are lost
        ("Journal.restore = lambda self, prod, size: real(self, prod, size)._replace(done=[])", "no answer"),
        # the guest is not told
        ("Worker._push = lambda self, again=False: self.ring.push()", "not notified"),
    ],
)
def test_a_worker_that_restores_wrongly_is_found_out(broken: str, reason: str) -> None:
    code = f"""
from evtchnd.journal import Journal
real = Journal.restore
{broken}
done = Tally()
bench = Bench()
enumerate_plan(bench, Plan(X86_64, "writes", (1, 0), 2, push_each=True), done, lambda: True)
print(json.dumps(done.failures))
"""
    failures = run(code)
    assert any(reason in failure for failure in failures), failures


@pytest.mark.skipif(COMPILED, reason="needs the Python form; tests/test_core_forms.py runs it there")
def test_between_two_points_there_is_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a death at each point is a death at each instruction: of a ring's life from start to a restore."""
    import evtchnd._core.pins as pins
    import evtchnd._core.words as words
    import evtchnd.journal as journal

    seen: list[str] = []

    def watched(module: object, name: str, what: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            if said := what(*args):
                seen.append(said)
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    ram = Ram()
    front = Blkfront(ram)

    def store(p: Mem, off: int, *_: object) -> str:
        return "" if isinstance(p.view.obj, bytearray) else f"store at {off}"  # a bytearray dies with the worker

    for module, names in ((blk, ("st32", "st64", "put32")), (pins, ("cas32", "and16"))):
        for name in names:
            watched(module, name, store)
    watched(words.Area, "give", lambda *_: "store of a response")
    watched(words.Area, "take", lambda *_: "copy of a request")
    watched(words.Area, "arm", lambda *_: "store of req_event")
    watched(words.Mem, "store", lambda _, off, *__: f"store at {off}")
    watched(blk, "point", lambda label: f"point {LABELS[label]}")
    watched(journal, "passed", lambda label: "")  # it calls point

    def serve(reqs: list[Req]) -> None:
        for req in [*reqs, *front.ring.take(32)]:
            front.ring.done(req, req.status)
        front.ring.push()
        assert not front.ring.arm()

    assert front.ring.attach() == []
    for serial in range(2):
        front.request(1, 8 * serial, 0, front.data(1, 2))
        front.request(0, 8 * serial + 1, 8, front.data(3))
        front.request(3, 8 * serial + 2, 0, [])
        front.request(1, 8 * serial + 3, 1 << 40, front.data(4))
        front.indirect(0, 8 * serial + 4, 8, front.data(*range(5, 20)))
        front.discard(8 * serial + 5, 8, 8)
        front.publish()
        reqs = front.ring.take(4)
        front.ring.done(reqs[2], 0)
        if serial:
            front.ring.push()
            # and dies before it has stored `published`
            os.pwrite(front.journal_fd, (front.journal.mem.load(28) - 1).to_bytes(4, "little"), 24)
        # what is not looked at: the pins of the ring's own pages, which every worker sets anew
        seen.append("point of another worker's begin")
        serve(front.restart())  # type: ignore[arg-type]
        assert len(front.responses()) == 6
    stores = [(first, then) for first, then in itertools.pairwise(seen) if "point" not in first + then]
    assert not stores
    assert sum("point" not in each for each in seen) > 200
