"""Any bytes of two guests and a tool into the store, and what must hold whatever they are.

    pip install atheris; python tests/xenstore_fuzz.py tests/corpus/xenstore -max_total_time=60

lets atheris look for new ways in, by coverage; tests/test_xenstore_fuzz.py runs the corpus and what hypothesis makes.
An input is a row of pieces: u8 who, u16 length, so many bytes of that client's stream. Its requests get the next
request ids and only transaction ids of 0 to 7 (the store gives them out from 1).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable

from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.quota import Connection
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op

PIECE = struct.Struct(">BH")
DOMIDS = (7, 8, 0)
SECRET = b"s3cr3t"
# What an input may cost: one that holds more is cut
_REQUESTS = 200


class Fuzzed:
    """A booted store with its three clients."""

    def __init__(self) -> None:
        self.store = XenStore(clock=lambda: 0.0)
        self.tool = self.store.connect(0)
        self._ask(Op.WRITE, b"/secret\0" + SECRET)
        for domid in (7, 8):
            self.store.introduce(domid)
            home = b"/local/domain/%d" % domid
            self._ask(Op.WRITE, home + b"/data\0")
            self._ask(Op.SET_PERMS, home + b"\0n0\0r%d\0" % domid)
            self._ask(Op.SET_PERMS, home + b"/data\0n%d\0" % domid)
        self.clients = {domid: self.store.connect(domid) for domid in DOMIDS}
        self.parsers = {domid: wire.Parser() for domid in DOMIDS}
        self.left = _REQUESTS

    def _ask(self, op: Op, payload: bytes) -> None:
        handle(self.store, self.tool, op, 0, 0, payload)
        self.tool.clear()

    def feed(self, domid: int, data: bytes) -> None:
        """Some bytes of a client's stream, served as a transport does; checked."""
        parser = self.parsers[domid]
        parser.feed(data)
        assert parser.partial <= len(data) + wire.HEADER_SIZE + wire.PAYLOAD_MAX
        while self.left > 0:
            try:
                message = parser.next()
            except wire.ProtocolError:
                self.again(domid)
                return
            if message is None:
                return
            self.left -= 1
            op, req_id, tx_id, payload = message
            handle(self.store, self.clients[domid], op, req_id, tx_id & 7, payload)
            for conn in list(self.clients.values()):
                self.read(conn, req_id, tx_id & 7, op)
            for known in (7, 8):
                if not self.store.exists(known):
                    self.again(known)
                    self.store.introduce(known)

    def again(self, domid: int) -> None:
        """The client's connection has ended: a new one."""
        self.store.disconnect(self.clients[domid])
        self.clients[domid] = self.store.connect(domid)
        self.parsers[domid] = wire.Parser()

    def read(self, conn: Connection, req_id: int, tx_id: int, op: int) -> None:
        """Whatever waits is whole, and tells a guest nothing that it may not know."""
        while conn.out:
            message = conn.take()
            kind, got_id, got_tx, length = wire.HEADER.unpack_from(message)
            body = message[wire.HEADER_SIZE :]
            assert length == len(body) <= wire.PAYLOAD_MAX
            if conn.domid:
                assert SECRET not in body
            if kind == Op.WATCH_EVENT:
                assert (got_id, got_tx) == (0, 0)
                assert len(wire.strings(body)) == 2
                continue
            assert (got_id, got_tx) == (req_id, tx_id)
            if kind == Op.ERROR:
                assert body[-1:] == b"\0"
                assert body[:-1].decode() in wire.ERROR_NAMES
                assert body != b"EIO\0", "a defect of ours"
            else:
                assert kind == op

    def settle(self) -> None:
        """At the end: accounts hold, and when all clients are gone nothing of them is left."""
        assert self.store.check() == []
        secret = self.store.tree.get(b"/secret")
        if secret is not None:
            assert secret.owner == 0 or secret.value == SECRET or self.store.exists(secret.owner)
        for domid in DOMIDS:
            self.store.disconnect(self.clients[domid])
        assert (len(self.store.watches), self.store.contention.open) == (0, 0)
        for domid in (7, 8):
            self.store.release(domid)
            assert domid not in self.store.domains
        assert self.store.check() == []


def pieces(data: bytes) -> Iterable[tuple[int, bytes]]:
    """(domid, bytes) of an input."""
    at = 0
    while at + PIECE.size <= len(data):
        who, length = PIECE.unpack_from(data, at)
        at += PIECE.size
        yield DOMIDS[who % len(DOMIDS)], data[at : at + length]
        at += length


def piece(domid: int, data: bytes) -> bytes:
    """The reverse of `pieces`, for one."""
    return PIECE.pack(DOMIDS.index(domid), len(data)) + data


def run(data: bytes) -> None:
    """AssertionError if something does not hold."""
    it = Fuzzed()
    for domid, part in pieces(data):
        it.feed(domid, part)
    it.settle()


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
