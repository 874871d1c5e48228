"""The control plane's own access to the store: domain 0, not confined, synchronous."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import operations, wire
from .quota import Connection
from .store import XenStore
from .tree import CHILDREN, PERMS, Transaction
from .wire import Op, XenStoreError


class LocalAccess:
    """Reads and writes of one view: the public state, or a transaction.

    Values are `str` (UTF-8, other bytes as surrogate escapes), paths absolute; permissions are strings as
    `xenstore-chmod` takes them: `["n0", "r7"]` = owned by domain 0, no access for others, domain 7 reads.
    Every failing call raises `wire.XenStoreError` (an OSError too: `.name` "ENOENT", `.errno`).
    """

    def __init__(self, store: XenStore, conn: Connection, tx_id: int = 0) -> None:
        self._store = store
        self._conn = conn
        self._tx_id = tx_id

    def _settle(self) -> None:
        """After a change: whoever watches is told."""

    def _call(self, op: Op, payload: bytes, what: str) -> bytes:
        conn = self._conn
        conn.clear()
        operations.handle(self._store, conn, op, 0, self._tx_id, payload)
        reply = conn.take()
        self._settle()
        if reply[0] == Op.ERROR:
            raise XenStoreError(reply[wire.HEADER_SIZE : -1].decode(), what)
        return reply[wire.HEADER_SIZE :]

    def write(self, path: str, value: str | bytes | int, *, perms: Sequence[str] | None = None) -> None:
        """Write (parents are made); with `perms` the node's permissions are set, too."""
        self._call(Op.WRITE, wire.encode_path(path) + b"\0" + wire.encode(value), path)
        if perms is not None:
            self.set_perms(path, perms)

    def read(self, path: str) -> str:
        return wire.decode(self._call(Op.READ, wire.encode_path(path) + b"\0", path))

    def get(self, path: str, default: str | None = None) -> str | None:
        """`read`, with a default where the node is missing."""
        try:
            return self.read(path)
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise
            return default

    def ls(self, path: str) -> list[str]:
        """Names of the children, in order of creation, however many."""
        key = wire.canonical(wire.encode_path(path), self._conn.home)
        node = self._view.get(key, CHILDREN)
        if node is None:
            raise XenStoreError("ENOENT", path)
        return [wire.decode(name) for name in node.names()]

    def exists(self, path: str) -> bool:
        return self._view.get(wire.canonical(wire.encode_path(path), self._conn.home), PERMS) is not None

    @property
    def _view(self) -> Transaction:
        return self._conn.transactions[self._tx_id] if self._tx_id else self._store.now

    def mkdir(self, path: str, *, perms: Sequence[str] | None = None) -> None:
        """Make a node (and its parents) unless it is there; with `perms` its permissions are set."""
        self._call(Op.MKDIR, wire.encode_path(path) + b"\0", path)
        if perms is not None:
            self.set_perms(path, perms)

    def rm(self, path: str) -> None:
        """Remove a tree. No error if it is not there."""
        try:
            self._call(Op.RM, wire.encode_path(path) + b"\0", path)
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise

    def set_perms(self, path: str, perms: Sequence[str]) -> None:
        texts = [wire.encode_path(path), *[wire.encode(text) for text in perms], b""]
        self._call(Op.SET_PERMS, b"\0".join(texts), path)

    def get_perms(self, path: str) -> list[str]:
        reply = self._call(Op.GET_PERMS, wire.encode_path(path) + b"\0", path)
        return [wire.decode(text) for text in wire.strings(reply)]


class LocalTransaction(LocalAccess):
    """What `Server.transaction()` gives."""


@contextmanager
def transaction(store: XenStore, conn: Connection) -> Iterator[LocalTransaction]:
    """All or nothing. EAGAIN only if the body let somebody else in (an await)."""
    conn.clear()
    operations.handle(store, conn, Op.TRANSACTION_START, 0, 0, b"\0")
    tx_id = int(conn.take()[wire.HEADER_SIZE : -1])
    view = LocalTransaction(store, conn, tx_id)
    try:
        yield view
    except BaseException:
        view._call(Op.TRANSACTION_END, b"F\0", "transaction")
        raise
    view._call(Op.TRANSACTION_END, b"T\0", "transaction")
