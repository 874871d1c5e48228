"""`evtchnctl xenstore dump` and `load`, of a running daemon."""

from __future__ import annotations

import argparse
import asyncio
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.cli import xenstorestream, xenstoreverbs
from evtchnd.xenstore import migration, restore
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import Server
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


names = st.text("ab0-_@XyZ", min_size=1, max_size=6)
perms = st.lists(st.tuples(st.integers(0, 0x7FEF), st.integers(0, 3)), min_size=1, max_size=4).map(tuple)
contents = st.tuples(st.binary(max_size=300), perms)
trees = st.dictionaries(st.lists(names, max_size=5).map(tuple), contents, max_size=12)


def streamed(tree: dict[tuple[str, ...], tuple[bytes, tuple[tuple[int, int], ...]]]) -> bytes:
    """A stream of /t with these nodes, and with those that are missing above them; parents first, siblings as named."""
    whole: dict[tuple[str, ...], tuple[bytes, tuple[tuple[int, int], ...]]] = {}
    for path in tree:
        for length in range(len(path) + 1):
            whole.setdefault(path[:length], tree.get(path[:length], (b"", ((0, 0),))))

    def below(path: tuple[str, ...]) -> list[migration.Node]:
        found = [migration.Node(("/t" + "".join(f"/{name}" for name in path)).encode(), *whole[path])]
        for child in whole:
            if child and child[:-1] == path:
                found += below(child)
        return found

    nodes = below(()) if whole else [migration.Node(b"/t", b"", ((0, 0),))]
    return migration.header() + b"".join(map(migration.pack, nodes)) + migration.end()


async def loaded_and_dumped(data: bytes, folder: Path) -> bytes:
    """What a store has that had nothing before."""
    server = Server()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server.attach_socket(theirs)
    client = await Client.from_socket(ours)
    (folder / "given").write_bytes(data)
    args = {"dry_run": False, "output": "text", "path": "/t"}
    await xenstorestream.load(argparse.Namespace(file=str(folder / "given"), **args), client)
    await xenstorestream.dump(argparse.Namespace(file=str(folder / "dumped"), **args), client, xenstoreverbs._tree)
    await client.close()
    await server.close()
    assert server.store.check() == []
    return (folder / "dumped").read_bytes()


@given(trees)
def test_any_nodes_come_back(tree: dict[tuple[str, ...], tuple[bytes, tuple[tuple[int, int], ...]]]) -> None:
    """Values, permissions and the order of siblings, byte by byte."""
    data = streamed(tree)
    with tempfile.TemporaryDirectory() as folder:
        assert asyncio.run(loaded_and_dumped(data, Path(folder))) == data
