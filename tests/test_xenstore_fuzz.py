"""The kept corpus, and what hypothesis makes of it and of whole requests: xenstore_fuzz.py says what must hold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xenstore_fuzz
from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.wire import Op

CORPUS = sorted((Path(__file__).parent / "corpus/xenstore").iterdir())

paths = st.one_of(
    st.sampled_from(
        [
            *(
                "/",
                "data",
                "data/a",
                "data/a/b",
                "/local/domain/7/data",
                "/local/domain/8/data/x",
                "/secret",
                "/tool/x",
            ),
            *("", "//", "/a/", "@releaseDomain", "@introduceDomain/7", "data\x00", "/" + "x" * 3100, "x" * 2040),
        ]
    ).map(str.encode),
    st.binary(max_size=40),
)
texts = st.one_of(
    st.sampled_from(
        [b"n7", b"b8", b"r0", b"n8", b"T", b"F", b"7", b"8", b"0", b"1", b"nodes", b"quota", b"max", b"65535"]
    ),
    paths,
    st.sampled_from([b"t" * 2000, b"check", b"log", b"on", b"memreport", b"help", b"set"]),
)
payloads = st.one_of(
    st.lists(texts, max_size=4).map(lambda parts: b"".join([part + b"\0" for part in parts])),
    st.binary(max_size=60),
)
messages = st.one_of(
    st.tuples(st.integers(0, 27), st.integers(0, 3), st.integers(0, 3), payloads).map(lambda m: wire.pack(*m)),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), payloads).map(
        lambda m: wire.pack(*m)
    ),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 4).map(lambda words: wire.HEADER.pack(*words)),
)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    xenstore_fuzz.run(path.read_bytes())


@given(st.lists(st.tuples(st.sampled_from(xenstore_fuzz.DOMIDS), messages), max_size=25))
def test_any_requests(parts: list[tuple[int, bytes]]) -> None:
    xenstore_fuzz.run(b"".join(xenstore_fuzz.piece(*part) for part in parts))


@given(
    st.sampled_from(CORPUS), st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=4)), max_size=6)
)
def test_a_corpus_that_is_bent(path: Path, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(path.read_bytes())
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    xenstore_fuzz.run(bytes(data))


@given(st.binary(max_size=500))
def test_any_bytes(data: bytes) -> None:
    xenstore_fuzz.run(data)


def test_the_corpus_reaches_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a guest and by a tool, and each of them does something for one of the two."""
    seen: set[tuple[int, bool]] = set()
    served: set[int] = set()

    def watching(store: object, conn: object, op: int, *rest: object) -> None:
        handle(store, conn, op, *rest)  # type: ignore[arg-type]
        seen.add((op, conn.domid == 0))  # type: ignore[attr-defined]
        if any(message[0] == op for message in conn.out):  # type: ignore[attr-defined]
            served.add(op)

    monkeypatch.setattr(xenstore_fuzz, "handle", watching)
    for path in CORPUS:
        xenstore_fuzz.run(path.read_bytes())
    known = set(Op)
    assert {(op, tool) for op in known for tool in (False, True)} <= seen
    assert known - served - {Op.ERROR} == {Op.WATCH_EVENT}


def test_it_sees_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a store in which everybody may read everything fails."""
    from evtchnd.xenstore.quota import Connection

    monkeypatch.setattr(Connection, "rights", lambda *_: wire.PERM_ALL)
    with pytest.raises(AssertionError):
        xenstore_fuzz.run(xenstore_fuzz.piece(7, wire.pack(Op.READ, 1, 0, b"/secret\0")))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (optional)")
def test_atheris(tmp_path: Path) -> None:
    script = Path(xenstore_fuzz.__file__)
    command = [
        sys.executable,
        str(script),
        str(tmp_path),
        str(CORPUS[0].parent),
        "-runs=2000",
        f"-artifact_prefix={tmp_path}/",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
