"""Every kept input of every parser once more, bent by hypothesis too; `make fuzz` looks for new ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
# test_xenstore_fuzz.py has more to say about this one
OWN = [name for name in TARGETS if name != "xenstore"]


def kept(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*TARGETS}
    assert all(kept(target) for target in TARGETS)


@pytest.mark.parametrize("target", OWN)
def test_corpus(target: str) -> None:
    for path in kept(target):
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", OWN)
@given(data=st.data())
def test_a_corpus_that_is_bent(target: str, data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(kept(target))).read_bytes())
    for at, new in data.draw(st.lists(st.tuples(st.integers(0, 8191), st.binary(min_size=1, max_size=8)), max_size=6)):
        at %= len(whole) + 1
        whole[at : at + len(new)] = new
    TARGETS[target](bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (extra `fuzz`)")
def test_the_fuzzer_runs() -> None:
    command = [sys.executable, str(Path(__file__).parent / "fuzz"), "--seconds", "2", "diskspec", "message"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
