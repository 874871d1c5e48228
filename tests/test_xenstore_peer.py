"""The same requests to Xen's xenstored, the server in C, and to evtchnd: the same replies, the same events.

Needs Debian's program (xen-utils-4.17), named by EVTCHND_XENSTORED or where the package has it; it runs without Xen
(evtchnd/bench/xenstoredalone.c), so its only clients are domain 0's, over its socket.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from evtchnd.bench.xenstored import Xenstored
from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled

PROGRAM = os.environ.get("EVTCHND_XENSTORED") or next(map(str, Path("/usr/lib").glob("xen-*/bin/xenstored")), "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="no xenstored in C: apt-get install xen-utils-4.17 (optional)")


class Theirs:
    """A client of xenstored."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._parser = wire.Parser()
        self.events: list[bytes] = []

    def ask(self, op: int, payload: bytes, tx: int = 0) -> tuple[int, bytes]:
        self._socket.sendall(wire.pack(op, 7, tx, payload))
        while True:
            while (message := self._parser.next()) is None:
                data = self._socket.recv(65536)
                assert data, f"xenstored has ended the connection: {op} {payload!r}"
                self._parser.feed(data)
            if message[0] != Op.WATCH_EVENT:
                return message[0], message[3]
            self.events.append(message[3])

    def close(self) -> None:
        self._socket.close()


class Ours:
    """A client of evtchnd's store."""

    def __init__(self, store: XenStore) -> None:
        self._store = store
        self._conn = store.connect(0)
        self.events: list[bytes] = []

    def ask(self, op: int, payload: bytes, tx: int = 0) -> tuple[int, bytes]:
        handle(self._store, self._conn, op, 7, tx, payload)
        while True:
            message = self._conn.take()
            if message[0] != Op.WATCH_EVENT:
                return wire.HEADER.unpack_from(message)[0], message[wire.HEADER_SIZE :]
            self.events.append(message[wire.HEADER_SIZE :])

    def close(self) -> None:
        self._store.disconnect(self._conn)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Xenstored]:
    with Xenstored(PROGRAM, tmp_path_factory.mktemp("xenstored")) as running:
        yield running


GOOD = [b"/q", b"/q/a", b"/q/a/b", b"/q/a/b/c", b"/q/d", b"/q/e-_@1", b"q", b"q/a", b"/q/d/e/f/g"]
# Neither server has them, whatever the request. (UNWATCH is not asked: 4.17 does not look.)
BAD = [
    *(b"", b"//", b"/q/", b"/q//a", b"q/", b"/q/a b", b"/q/\xff", b"/q/%", b"/q/.", b"/q/a:1", b"/q/a+"),
    # 4.17 holds domain 0 to the quota of 2,048 bytes, too; later ones, and evtchnd, to 3,072 at most
    *(b"/q/" + b"x" * 3070, b"q/" + b"x" * 3070),
]
LONG = [b"/q/" + b"x" * 2045, b"q/" + b"x" * 2046]
PERMS = [b"n0\0", b"b7\0", b"n7\0r8\0", b"r0\0w1\0b2\0", b"", b"z7\0", b"n\0", b"n7x\0", b"7\0"]
END = b"\0"


def request(dice: random.Random) -> tuple[int, bytes]:
    """Mostly whole ones."""
    path = dice.choice(dice.choice([GOOD] * 8 + [BAD, LONG]))
    value = dice.choice([b"", b"1", b"v\0w", b"x" * dice.randrange(1000)])
    match dice.randrange(12):
        case 0 | 1 | 2:
            return Op.WRITE, path + END + value
        case 3:
            return Op.MKDIR, path + END
        case 4:
            return Op.RM, path + END
        case 5:
            return Op.READ, path + END
        case 6:
            return Op.DIRECTORY, path + END
        case 7:
            return Op.GET_PERMS, path + END
        case 8:
            return Op.SET_PERMS, path + END + dice.choice(PERMS)
        case 9:
            return Op.WATCH, path + END + dice.choice([b"t", b"u", b""]) + END
        case 10 if path not in BAD:
            return Op.UNWATCH, path + END + dice.choice([b"t", b"u", b""]) + END
    # of one string where there should be more; 4.17 ends by an assertion when there is none where one should be
    op = dice.choice([Op.WRITE, Op.WATCH, Op.SET_PERMS])
    return op, dice.choice([b"", path, path + END if op != Op.WRITE else path])


@pytest.mark.parametrize("seed", range(scaled(400, least=10)))
def test_replies_and_events_are_the_same(peer: Xenstored, seed: int) -> None:
    with closing(Theirs(peer.path)) as theirs, closing(Ours(XenStore())) as ours:
        try:
            compare(theirs, ours, random.Random(seed))
        finally:
            for path in (b"/q\0", b"/local\0"):
                theirs.ask(Op.RM, path)


def compare(theirs: Theirs, ours: Ours, dice: random.Random) -> None:
    """150 requests of one client, with one transaction after another."""
    both = (theirs, ours)
    asked = []
    transactions = (0, 0)
    for _ in range(150):
        op, payload = request(dice)
        inside = transactions
        if transactions != (0, 0) and op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS) and dice.random() < 0.3:
            # not for what changes something: there that is a conflict more often than here
            inside = (0, 0)
        if dice.random() < 0.1:
            op = Op.TRANSACTION_START if transactions == (0, 0) else Op.TRANSACTION_END
            payload = b"\0" if op == Op.TRANSACTION_START else dice.choice([b"T\0", b"F\0"])
            inside = transactions
        asked.append(f"{op} {payload[:60]!r} in {inside}")
        said = "\n".join(asked[-20:])
        got = [client.ask(op, payload, tx) for client, tx in zip(both, inside, strict=True)]
        if op == Op.TRANSACTION_START:
            transactions = int(got[0][1][:-1]), int(got[1][1][:-1])
        else:
            assert got[0] == got[1], said
            if op == Op.TRANSACTION_END:
                transactions = (0, 0)
        # events come before the reply to what is asked now
        for client in both:
            client.ask(Op.READ, b"/\0")
        assert sorted(theirs.events) == sorted(ours.events), said
        for client in both:
            client.events.clear()
