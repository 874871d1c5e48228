"""A client of the pure store, by hand."""

from __future__ import annotations

from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.quota import Connection
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op

OK = b"OK\0"


class Guest:
    """A client of the pure store, by hand."""

    def __init__(self, store: XenStore, domid: int, confine: int | None = None) -> None:
        self.store = store
        self.conn: Connection = store.connect(domid, confine=confine)

    def ask(self, op: int, payload: bytes = b"\0", tx: int = 0) -> bytes | str:
        """The reply's payload, or the name of the error. Events that waited are dropped."""
        self.events()
        handle(self.store, self.conn, op, 77, tx, payload)
        replies = [m for m in self.conn.out if m[0] != Op.WATCH_EVENT]
        assert len(replies) == 1
        kind, req_id, tx_id, length = wire.HEADER.unpack_from(replies[0])
        body = replies[0][16:]
        assert (req_id, tx_id, length) == (77, tx, len(body))
        if kind == Op.ERROR:
            assert body[-1:] == b"\0"
            assert body[:-1].decode() in wire.ERROR_NAMES
            return body[:-1].decode()
        assert kind == op
        return body

    def events(self) -> list[tuple[str, str]]:
        """(path, token) of the events that wait; replies are dropped."""
        found = []
        while self.conn.out:
            message = self.conn.take()
            if message[0] == Op.WATCH_EVENT:
                assert message[4:12] == bytes(8)
                path, token, end = message[16:].split(b"\0")
                assert end == b""
                found.append((path.decode(), token.decode()))
        return found

    def write(self, path: str, value: str = "", tx: int = 0) -> bytes | str:
        return self.ask(Op.WRITE, path.encode() + b"\0" + value.encode(), tx)

    def read(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.READ, path.encode() + b"\0", tx)

    def ls(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.DIRECTORY, path.encode() + b"\0", tx)

    def rm(self, path: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.RM, path.encode() + b"\0", tx)

    def chmod(self, path: str, *perms: str, tx: int = 0) -> bytes | str:
        return self.ask(Op.SET_PERMS, "\0".join([path, *perms, ""]).encode(), tx)

    def watch(self, path: str, token: str = "t", *more: str) -> bytes | str:
        return self.ask(Op.WATCH, "\0".join([path, token, *more, ""]).encode())

    def start(self) -> int:
        reply = self.ask(Op.TRANSACTION_START)
        assert isinstance(reply, bytes)
        return int(reply[:-1])

    def end(self, tx: int, verdict: str = "T") -> bytes | str:
        return self.ask(Op.TRANSACTION_END, verdict.encode() + b"\0", tx)


def boot(store: XenStore, tool: Guest, domid: int) -> Guest:
    """A domain with its home, as xl leaves it."""
    store.introduce(domid)
    home = f"/local/domain/{domid}"
    assert tool.write(home) == OK
    assert tool.chmod(home, "n0", f"r{domid}") == OK
    for name in ("device", "data", "control"):
        assert tool.write(f"{home}/{name}") == OK
        assert tool.chmod(f"{home}/{name}", f"n{domid}") == OK
    return Guest(store, domid)
