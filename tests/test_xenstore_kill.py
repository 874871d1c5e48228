"""Daemons that are killed at any moment under clients that write: the store is what was acknowledged, exactly.

Each client has nodes of its own, and knows what they are: as the last reply said, or, of a request that was under way
when the daemon died, as it would have made them. Nothing in between, nothing older, nothing of an open transaction.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from evtchnd.xenstore import restore, wire
from evtchnd.xenstore.log import Log
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled
from test_xenstore_restart import ROOT, Daemon, daemon, until  # noqa: F401 -- fixture

CLIENTS = 3
OTHERS = 10_000
# Path below the client's own -> value, permissions as SET_PERMS takes them
Nodes = dict[bytes, tuple[bytes, bytes]]
NAMES = [b"/a", b"/a/b", b"/a/b/c", b"/d", b"/d/e", b"/f"]
PERMS = [b"n0\0", b"n7\0r8\0", b"b0\0n9\0"]


class Writer(threading.Thread):
    """One client of the socket, until the daemon is gone."""

    def __init__(self, path: Path, home: bytes, nodes: Nodes, seed: int) -> None:
        super().__init__()
        self.home = home
        self.nodes = nodes  # acknowledged
        self.pending: Nodes | None = None  # with the request that is under way
        self.done = 0
        self.failed: BaseException | None = None
        self._random = random.Random(seed)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._parser = wire.Parser()

    def run(self) -> None:
        try:
            while True:
                self._step()
        except (ConnectionError, EOFError):
            return
        except BaseException as exc:
            self.failed = exc
        finally:
            self._socket.close()

    def _step(self) -> None:
        rng = self._random
        after = dict(self.nodes)
        if rng.random() < 0.6:
            op, payload = self._change(after)
            self.pending = after
            self._ask(op, payload)
        else:
            tx = int(self._ask(Op.TRANSACTION_START, b"\0")[:-1])
            for _ in range(rng.randrange(1, 5)):
                self._ask(*self._change(after), tx)
            commits = rng.random() < 0.8
            # not before this: what is in an open transaction has not happened
            self.pending = after if commits else dict(self.nodes)
            self._ask(Op.TRANSACTION_END, b"T\0" if commits else b"F\0", tx)
        self.nodes, self.pending = self.pending, None
        self.done += 1

    def _change(self, nodes: Nodes) -> tuple[Op, bytes]:
        """Any change, made on `nodes`."""
        rng = self._random
        # most of them seldom: a change that is lost is not made good by the next
        name = rng.choice(NAMES) if rng.random() < 0.5 else b"/n/%d" % rng.randrange(300)
        if name in nodes and rng.random() < 0.2:
            for below in [path for path in nodes if path == name or path.startswith(name + b"/")]:
                del nodes[below]
            return Op.RM, self.home + name + b"\0"
        if name in nodes and rng.random() < 0.2:
            perms = rng.choice(PERMS)
            nodes[name] = nodes[name][0], perms
            return Op.SET_PERMS, self.home + name + b"\0" + perms
        above = b""
        for part in name.split(b"/")[1:]:
            nodes.setdefault(above + b"/" + part, (b"", nodes[above][1]))
            above += b"/" + part
        # long ones: the log is copied every second or so
        value = b"%d " % rng.randrange(10**9) + b"x" * rng.choice([0, 10, 3500])
        nodes[name] = value, nodes[name][1]
        return Op.WRITE, self.home + name + b"\0" + value

    def _ask(self, op: Op, payload: bytes, tx: int = 0) -> bytes:
        self._socket.sendall(wire.pack(op, 1, tx, payload))
        while (message := self._parser.next()) is None:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError
            self._parser.feed(data)
        assert message[0] == op, (op, payload, message)
        return message[3]


def a_copy(daemon: Daemon) -> None:  # noqa: F811
    """Until a copy has become the log (its word `active`), or about so long."""
    before, end = os.pread(daemon.state, 4, 64), time.monotonic() + 5
    while os.pread(daemon.state, 4, 64) == before and time.monotonic() < end:
        time.sleep(0.001)


def of(store: XenStore, home: bytes) -> Nodes:
    """A client's nodes."""
    return {
        path[len(home) :]: (node.value, b"".join(text + b"\0" for text in wire.format_perms(node.perms)))
        for path, node in store.tree.walk(home)
    }


def dumped(daemon: Daemon) -> XenStore:  # noqa: F811
    """What a running daemon has."""
    command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(daemon.folder)]
    command += ["xenstore", "dump", "-", "/t"]
    data = subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout
    return restore.from_stream(data)


def test_the_store_is_what_was_acknowledged(daemon: Daemon) -> None:  # noqa: F811
    rng = random.Random(5)
    state: dict[bytes, Nodes] = {b"/t/%d" % number: {b"": (b"", b"n0\0")} for number in range(CLIENTS)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(daemon.socket))
        # others' nodes, so that a copy of the log takes some time
        for path in [*state, *[b"/others/%d/%d" % (k // 100, k % 100) for k in range(OTHERS)]]:
            sock.sendall(wire.pack(Op.WRITE, 0, 0, path + b"\0"))
            assert wire.HEADER.unpack(sock.recv(4096)[:16])[0] == Op.WRITE
    for number in range(scaled(100, least=4)):
        writers = [Writer(daemon.socket, home, nodes, rng.getrandbits(32)) for home, nodes in state.items()]
        for writer in writers:
            writer.start()
        until(lambda writers=writers: all(w.done > 20 or w.failed for w in writers))  # type: ignore[misc]
        if number % 2:
            time.sleep(rng.random())
        else:
            a_copy(daemon)
        daemon.end(signal.SIGKILL)
        for writer in writers:
            writer.join(20)
            assert writer.failed is None
        log = Log(os.dup(daemon.state))
        found, _ = restore.from_log(log)
        log.close()
        os.close(log.fd)
        assert found.check() == []
        assert len(list(found.tree.walk(b"/others"))) == 1 + OTHERS + OTHERS // 100
        for writer in writers:
            state[writer.home] = of(found, writer.home)
            assert state[writer.home] in (writer.nodes, writer.pending), number
        daemon.start()
        again = dumped(daemon)
        assert {home: of(again, home) for home in state} == state
    assert "damaged" not in daemon.text()
