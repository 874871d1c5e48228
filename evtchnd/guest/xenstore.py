"""A guest's XenStore client over its ring page: blocking, for several threads at once.

One thread at a time sleeps on the event channel, for all that wait; whoever wakes reads the whole ring and sorts
what came: replies by request id, watch events into their queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from evtchnd.abi import XENSTORE_RING_SIZE
from evtchnd.guest.domain import Domain, GuestFault
from evtchnd.stream import XENSTORE, ByteStream
from evtchnd.xenstore import wire
from evtchnd.xenstore.wire import Op, XenStoreError

T = TypeVar("T")

# A guest's kernel waits for ever; a test or a demo wants to say what is missing.
DEFAULT_TIMEOUT = 30.0
# The sleeper gives up its turn so often, in case its wake-up went to somebody who has gone.
_TURN = 0.5


class XenStore:
    """The connection of a whole guest: there is one ring. Paths may be relative to /local/domain/<domid>."""

    def __init__(self, domain: Domain, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._vm = domain.vm
        self._port = domain.vm.store_port
        self._page = domain.vm.ram.view(domain.vm.store_gfn)
        self._stream = ByteStream(self._page, XENSTORE, side="front")
        self._timeout = timeout
        self._changed = threading.Condition()
        self._sleeping = False
        self._writing = threading.Lock()
        self._parser = wire.Parser()
        self._next = 1
        self._waiting: set[int] = set()
        self._replies: dict[int, tuple[int, bytes]] = {}
        self._events: dict[str, deque[str]] = {}

    # ---- requests

    def read(self, path: str, *, tx: int = 0) -> str:
        return self._ask(Op.READ, path, tx=tx).decode("utf-8", "surrogateescape")

    def get(self, path: str, *, tx: int = 0) -> str | None:
        """`read`, None where the node is missing."""
        try:
            return self.read(path, tx=tx)
        except XenStoreError as exc:
            if exc.name != "ENOENT":
                raise
            return None

    def write(self, path: str, value: str, *, tx: int = 0) -> None:
        self._ask(Op.WRITE, path, value.encode("utf-8", "surrogateescape"), tx=tx)

    def ls(self, path: str, *, tx: int = 0) -> list[str]:
        """Names of the children."""
        return [name.decode() for name in self._ask(Op.DIRECTORY, path, tx=tx).split(b"\0") if name]

    def mkdir(self, path: str, *, tx: int = 0) -> None:
        self._ask(Op.MKDIR, path, tx=tx)

    def rm(self, path: str, *, tx: int = 0) -> None:
        self._ask(Op.RM, path, tx=tx)

    def get_perms(self, path: str, *, tx: int = 0) -> list[str]:
        return [perm.decode() for perm in self._ask(Op.GET_PERMS, path, tx=tx).split(b"\0") if perm]

    def transact(self, body: Callable[[int], T], *, tries: int = 32) -> T:
        """Runs `body(tx)` in a transaction, again after each conflict."""
        for _ in range(tries):
            tx = int(self._request(Op.TRANSACTION_START, b"\0", what="transaction").rstrip(b"\0"))
            try:
                result = body(tx)
            except BaseException:
                self._request(Op.TRANSACTION_END, b"F\0", tx=tx, what="transaction")
                raise
            try:
                self._request(Op.TRANSACTION_END, b"T\0", tx=tx, what="transaction")
            except XenStoreError as exc:
                if exc.name != "EAGAIN":
                    raise
                continue
            return result
        raise XenStoreError("EAGAIN", f"transaction, {tries} times")

    def write_all(self, folder: str, nodes: Mapping[str, str]) -> None:
        """Writes `folder/name` for all of `nodes` at once."""

        def body(tx: int) -> None:
            for name, value in nodes.items():
                self.write(f"{folder}/{name}", value, tx=tx)

        self.transact(body)

    # ---- watches

    @contextmanager
    def watch(self, path: str) -> Iterator[Callable[[float], str | None]]:
        """Gives `next(timeout) -> path that changed`, None when nothing did; the first event comes at once."""
        with self._changed:
            token = f"w{self._next}"
            self._next += 1
            events = self._events[token] = deque()
        try:
            self._ask(Op.WATCH, path, token.encode() + b"\0")
            yield lambda timeout: self._await(lambda: events.popleft() if events else None, timeout)
        finally:
            self._ask(Op.UNWATCH, path, token.encode() + b"\0")
            with self._changed:
                del self._events[token]

    def wait_for(self, path: str, wanted: Callable[[str | None], bool], timeout: float | None = None) -> str | None:
        """The value of `path` once `wanted(value)`; GuestFault with the last value when it takes too long."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        with self.watch(path) as changed:
            while True:
                value = self.get(path)
                if wanted(value):
                    return value
                left = deadline - time.monotonic()
                if left <= 0 or changed(left) is None:
                    raise GuestFault(f"{path}: is {value!r} still")

    # ---- the ring

    def _ask(self, op: Op, path: str, rest: bytes = b"", *, tx: int = 0) -> bytes:
        return self._request(op, path.encode() + b"\0" + rest, tx=tx, what=f"{op.name} {path}")

    def _request(self, op: Op, payload: bytes, *, tx: int = 0, what: str) -> bytes:
        with self._changed:
            ident = self._next
            self._next = (self._next + 1) & 0xFFFFFFFF or 1
            self._waiting.add(ident)
        deadline = time.monotonic() + self._timeout
        with self._writing:  # one whole message after the other
            rest = wire.pack(op, ident, tx, payload)
            while rest:
                # another thread may sleep on the port meanwhile: what wakes it may be room for us
                written = self._await(partial(self._put, rest), deadline - time.monotonic())
                if written is None:
                    raise GuestFault(f"{what}: no room in XenStore's ring for {self._timeout} s")
                rest = rest[written:]
                self._vm.send(self._port)
        reply = self._await(lambda: self._replies.pop(ident, None), deadline - time.monotonic())
        if reply is None:
            raise GuestFault(f"{what}: no answer of XenStore within {self._timeout} s")
        kind, body = reply
        if kind == Op.ERROR:
            raise XenStoreError(body.rstrip(b"\0").decode("ascii", "replace"), what)
        if kind != op:
            raise GuestFault(f"{what}: answered by {kind}")
        return body

    def _put(self, data: bytes) -> int | None:
        return self._stream.write(data) or None

    def _await(self, ready: Callable[[], T | None], timeout: float) -> T | None:
        """The first result of `ready()` that is not None, None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._drain()
                result = ready()
                if result is not None:
                    return result
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                if self._sleeping:
                    self._changed.wait(min(left, _TURN))
                    continue
                self._sleeping = True
                self._changed.release()
                try:
                    self._vm.wait(self._port, min(left, _TURN))
                finally:
                    self._changed.acquire()
                    self._sleeping = False
                    self._changed.notify_all()

    def _drain(self) -> None:
        """Reads all there is; tells the other end if it may have been waiting for room."""
        while True:
            full = self._stream.available() == XENSTORE_RING_SIZE
            data = self._stream.read(XENSTORE_RING_SIZE)
            if full:
                self._vm.send(self._port)
            if not data:
                return
            self._parser.feed(data)
            while (message := self._parser.next()) is not None:
                kind, ident, _, body = message
                self._sort(kind, ident, body)
            self._changed.notify_all()

    def _sort(self, kind: int, ident: int, body: bytes) -> None:
        if kind == Op.WATCH_EVENT:
            path, token = body.split(b"\0")[:2]
            events = self._events.get(token.decode())
            if events is not None:
                events.append(path.decode("utf-8", "surrogateescape"))
        elif ident in self._waiting:
            self._waiting.remove(ident)
            self._replies[ident] = (kind, body)
        else:
            raise GuestFault(f"XenStore: a reply to request {ident}, which is not open")

    def close(self) -> None:
        """Lets go of the page."""
        self._stream.close()
        self._page.release()
