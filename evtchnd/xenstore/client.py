"""An asyncio client of XenStore, over a Unix stream socket.

client = await Client.connect("/run/evtchnd/xenstored.sock")
await client.write("/tool/answer", 42)
async with client.watch("/local/domain/7/device") as watch:
    async for path in watch: ...
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Self, TypeVar

from . import wire
from .wire import Op, XenStoreError

T = TypeVar("T")


class Operations:
    """What a client and a transaction both can do.

    Paths and values are `str` (UTF-8, other bytes as surrogate escapes); a relative path belongs to
    /local/domain/<domid of the connection>. What the store refuses is a `wire.XenStoreError` (`.name` "ENOENT",
    `.errno`); a lost connection is ConnectionError.
    """

    async def _call(self, op: Op, payload: bytes, what: str = "") -> bytes:
        raise NotImplementedError

    async def read_bytes(self, path: str) -> bytes:
        """The value as it is."""
        return await self._call(Op.READ, wire.encode_path(path) + b"\0", path)

    async def read(self, path: str) -> str:
        """The value."""
        return wire.decode(await self.read_bytes(path))

    async def get(self, path: str, default: str | None = None) -> str | None:
        """`read`, with a default where the node is missing (ENOENT only)."""
        try:
            return await self.read(path)
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise
            return default

    async def write(self, path: str, value: str | bytes | int) -> None:
        """Write; missing parents are made."""
        await self._call(Op.WRITE, wire.encode_path(path) + b"\0" + wire.encode(value), path)

    async def ls(self, path: str) -> list[str]:
        """Names of the children, in order of creation, however many."""
        key = wire.encode_path(path) + b"\0"
        try:
            return [wire.decode(name) for name in wire.strings(await self._call(Op.DIRECTORY, key, path))]
        except XenStoreError as error:
            if error.name != "E2BIG":
                raise
        names = b""
        generation = b""
        while True:
            reply = await self._call(Op.DIRECTORY_PART, key + b"%d\0" % len(names), path)
            now, _, part = reply.partition(b"\0")
            if names and now != generation:
                names = b""  # it changed in between: from the start
                continue
            generation = now
            if part.endswith(b"\0\0") or part in (b"", b"\0"):
                return [wire.decode(name) for name in wire.strings(names + part[:-1])]
            names += part

    async def mkdir(self, path: str) -> None:
        """Make a node, and its parents, unless it is there."""
        await self._call(Op.MKDIR, wire.encode_path(path) + b"\0", path)

    async def rm(self, path: str) -> None:
        """Remove a tree. No error if the node is missing and its parent is there."""
        await self._call(Op.RM, wire.encode_path(path) + b"\0", path)

    async def exists(self, path: str) -> bool:
        """Is the node there, as far as this client may know?"""
        return await self.get(path) is not None

    async def get_perms(self, path: str) -> list[str]:
        """As `["n0", "r7"]`: the owner with everyone's default first."""
        reply = await self._call(Op.GET_PERMS, wire.encode_path(path) + b"\0", path)
        return [wire.decode(text) for text in wire.strings(reply)]

    async def set_perms(self, path: str, perms: Sequence[str]) -> None:
        """All permissions at once, as `get_perms` gives them."""
        texts = [wire.encode_path(path), *[wire.encode(text) for text in perms], b""]
        await self._call(Op.SET_PERMS, b"\0".join(texts), path)


class Transaction(Operations):
    """An open transaction; see `Client.transaction`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._id = 0
        # Everything that was asked, with what was answered: to do it again after a conflict
        self._log: list[tuple[Op, bytes, bytes | str]] = []

    async def _call(self, op: Op, payload: bytes, what: str = "") -> bytes:
        try:
            reply = await self._client.request(op, payload, self._id, what)
        except XenStoreError as error:
            self._log.append((op, payload, error.name))
            raise
        self._log.append((op, payload, reply))
        return reply

    async def begin(self) -> None:
        """What `async with` does on entry."""
        self._log.clear()
        self._id = int((await self._client.request(Op.TRANSACTION_START, b"\0"))[:-1])

    async def commit(self) -> None:
        """End it, once. EAGAIN: somebody changed what it relied on, and nothing of it has happened."""
        await self._client.request(Op.TRANSACTION_END, b"T\0", self._id, "commit")

    async def abort(self) -> None:
        """Drop it; harmless if it or the connection is gone already."""
        with suppress(XenStoreError, ConnectionError):
            await self._client.request(Op.TRANSACTION_END, b"F\0", self._id, "abort")

    async def _replay(self) -> bool:
        """The same operations again. False: something answers differently now."""
        done = self._log.copy()
        await self.begin()
        for op, payload, before in done:
            answer: bytes | str
            try:
                answer = await self._call(op, payload)
            except XenStoreError as error:
                answer = error.name
            if answer != before:
                await self.abort()
                return False
        return True

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            await self.abort()
            return
        for _ in range(_TRIES):
            try:
                await self.commit()
                return
            except XenStoreError as refused:
                if refused.name != "EAGAIN" or not await self._replay():
                    raise
        raise XenStoreError("EAGAIN", f"{_TRIES} tries")


# A transaction that met others so often will meet them for ever
_TRIES = 32
# Bodies of `transact` that run at once; the server allows a guest, and a worker, ten
TRANSACTIONS = 8


class Watch:
    """`async with client.watch(path) as watch: async for changed in watch: ...`

    The first event comes at once (the path itself). Events that are identical and unread are one.
    Iteration ends when the watch is closed; a lost connection raises ConnectionError.
    """

    def __init__(self, client: Client, path: str, depth: int | None) -> None:
        self.path = path
        self._client = client
        self._depth = depth
        self._token = b""
        self._unread: dict[bytes, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._state = "new"

    def arrived(self, path: bytes) -> None:
        """An event of this watch's token."""
        self._unread[path] = None
        self.wake()

    def wake(self) -> None:
        """Let whoever waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def start(self) -> Self:
        """What `async with` does on entry."""
        self._token = self._client.enter(self)
        payload = b"%b\0%b\0" % (wire.encode_path(self.path), self._token)
        if self._depth is not None:
            payload += b"%d\0" % self._depth
        try:
            await self._client.request(Op.WATCH, payload, what=self.path)
        except BaseException:
            self._client.leave(self._token)
            raise
        self._state = "open"
        return self

    async def close(self) -> None:
        """What `async with` does on exit: UNWATCH. Idempotent."""
        if self._state != "open":
            return
        self._state = "closed"
        self._client.leave(self._token)
        self.wake()
        if not self._client.closed:
            await self._client.request(Op.UNWATCH, b"%b\0%b\0" % (wire.encode_path(self.path), self._token))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The path that changed."""
        while not self._unread:
            if self._state != "open":
                raise StopAsyncIteration
            self._client.check()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        path = next(iter(self._unread))
        del self._unread[path]
        return wire.decode(path)


class _Stream(asyncio.Protocol):
    """Bytes of the connection into the client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._parser = wire.Parser()

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        try:
            while (message := self._parser.next()) is not None:
                self._client.received(*message)
        except wire.ProtocolError as error:
            self._client.lost(ConnectionError(f"xenstore: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(ConnectionError(f"xenstore: connection lost: {exc}" if exc else "xenstore: connection lost"))


class Client(Operations):
    """One connection. Safe for many tasks at once; requests are pipelined."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._error: ConnectionError | None = None
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._watches: dict[bytes, Watch] = {}
        self._next = 0
        self._transactions = asyncio.Semaphore(TRANSACTIONS)

    @classmethod
    async def connect(cls, path: str) -> Client:
        """Connect to a server's Unix socket."""
        client = cls()
        loop = asyncio.get_running_loop()
        client._transport, _ = await loop.create_unix_connection(lambda: _Stream(client), path)
        return client

    @classmethod
    async def from_socket(cls, sock: socket.socket) -> Client:
        """Over one end of a SOCK_STREAM socketpair; takes ownership."""
        client = cls()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        client._transport, _ = await loop.create_unix_connection(lambda: _Stream(client), sock=sock)
        return client

    # ---- requests

    @property
    def closed(self) -> bool:
        """The connection is lost or was closed."""
        return self._error is not None

    def check(self) -> None:
        """ConnectionError if the connection is lost or was closed."""
        if self._error is not None:
            raise ConnectionError(str(self._error))

    async def request(self, op: Op, payload: bytes, tx_id: int = 0, what: str = "") -> bytes:
        """One request as it goes over the wire, for what has no method here. The reply's payload."""
        self.check()
        if len(payload) > wire.PAYLOAD_MAX:
            # The server would end the connection for it
            raise XenStoreError("E2BIG", what)
        if self._transport is None:
            raise ConnectionError("xenstore: not connected")
        while True:
            self._next = (self._next + 1) & 0xFFFFFFFF
            if self._next not in self._waiting:
                break
        req_id = self._next
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[req_id] = future
        self._transport.write(wire.pack(op, req_id, tx_id, payload))
        try:
            return await future
        except XenStoreError as error:
            raise XenStoreError(error.name, what) from None
        finally:
            if not future.cancelled():
                self._waiting.pop(req_id, None)

    async def _call(self, op: Op, payload: bytes, what: str = "") -> bytes:
        return await self.request(op, payload, what=what)

    def received(self, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """One message from the server."""
        if op == Op.WATCH_EVENT:
            texts = wire.strings(payload)
            watch = self._watches.get(texts[1]) if len(texts) == 2 else None
            if watch is not None:
                watch.arrived(texts[0])
            return
        future = self._waiting.pop(req_id, None)
        if future is None or future.done():
            return
        if op == Op.ERROR:
            future.set_exception(XenStoreError(wire.decode(payload[:-1])))
        else:
            future.set_result(payload)

    def lost(self, error: ConnectionError) -> None:
        """The connection is over: whoever waits is told."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionError(str(self._error)))
        for watch in self._watches.values():
            watch.wake()

    async def close(self) -> None:
        """Close the connection; whoever waits gets ConnectionError. Idempotent."""
        self.lost(ConnectionError("xenstore: closed"))
        await asyncio.sleep(0)

    # ---- watches and transactions

    def enter(self, watch: Watch) -> bytes:
        """A token for a watch."""
        self._next = (self._next + 1) & 0xFFFFFFFF
        token = b"%d" % self._next
        self._watches[token] = watch
        return token

    def leave(self, token: bytes) -> None:
        """The token's events are nobody's any more."""
        self._watches.pop(token, None)

    def watch(self, path: str, *, depth: int | None = None) -> Watch:
        """Changes of `path` and below it, `depth` levels at most."""
        return Watch(self, path, depth)

    def transaction(self) -> Transaction:
        """`async with client.transaction() as t: await t.write(...)`: committed at the end, dropped if the body raises.

        A commit that meets a conflict is tried again with the same operations, as long as all that the body read is
        still the same; else XenStoreError EAGAIN: the body itself has to run again, which `transact` does.
        """
        return Transaction(self)

    async def transact(self, body: Callable[[Transaction], Awaitable[T]], *, tries: int = _TRIES) -> T:
        """Run `body(t)` in a transaction, again from its start after each conflict; EAGAIN after `tries`.

        Not from within another body. More than TRANSACTIONS of them wait for one another.
        """
        async with self._transactions:
            return await self._transact(body, tries)

    async def _transact(self, body: Callable[[Transaction], Awaitable[T]], tries: int) -> T:
        for _ in range(tries):
            transaction = Transaction(self)
            await transaction.begin()
            try:
                result = await body(transaction)
            except BaseException:
                await transaction.abort()
                raise
            try:
                await transaction.commit()
            except XenStoreError as error:
                if error.name != "EAGAIN":
                    raise
            else:
                return result
        raise XenStoreError("EAGAIN", f"{tries} tries")
