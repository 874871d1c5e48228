"""`evtchnctl xenstore dump` and `load`, of a running daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from evtchnd.xenstore import migration, restore
from test_cli import Running, ctl
from test_cli_xenstore import daemon, empty, say  # noqa: F401 -- fixtures

NODES = {
    "/t/a": (b"1", ((0, 0),)),
    "/t/b": (b"", ((7, 1), (8, 3))),
    "/t/b/c": (b"two\0words\xff", ((0, 2),)),
}


def stream(tmp_path: Path) -> Path:
    file = tmp_path / "given"
    nodes = [migration.Node(b"/t", b"", ((0, 0),))]
    nodes += [migration.Node(path.encode(), value, perms) for path, (value, perms) in NODES.items()]
    file.write_bytes(migration.header() + b"".join(map(migration.pack, nodes)) + migration.end())
    return file


def test_what_was_loaded_is_dumped(daemon: Running, tmp_path: Path) -> None:  # noqa: F811
    say(daemon, "load", str(stream(tmp_path)))
    file = tmp_path / "dumped"
    assert "4 nodes" in say(daemon, "dump", str(file), "/t")
    assert file.read_bytes() == stream(tmp_path).read_bytes()


def test_a_dump_of_everything_is_a_store(daemon: Running, tmp_path: Path) -> None:  # noqa: F811
    say(daemon, "load", str(stream(tmp_path)))
    file = tmp_path / "dumped"
    say(daemon, "dump", str(file))
    store = restore.from_stream(file.read_bytes())
    assert store.check() == []
    for path, (value, perms) in NODES.items():
        node = store.tree.get(path.encode())
        assert node is not None
        assert (node.value, node.perms) == (value, perms)


def test_a_dry_run_writes_nothing(daemon: Running, tmp_path: Path) -> None:  # noqa: F811
    assert "would write 4" in say(daemon, "load", "--dry-run", str(stream(tmp_path)))
    assert ctl(daemon.folder, "xenstore", "read", "/t/a").returncode == 1


@pytest.mark.parametrize("data", [b"", b"xenstore" + bytes(8), b"#!/bin/sh\n" * 9])
def test_what_is_no_stream_is_one_line(daemon: Running, tmp_path: Path, data: bytes) -> None:  # noqa: F811
    file = tmp_path / "none"
    file.write_bytes(data)
    for name, reason in ((file, "stream"), (tmp_path / "missing", "No such file")):
        done = ctl(daemon.folder, "xenstore", "load", str(name))
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
