"""XenStore's transports on one asyncio loop: Unix sockets, guests' ring pages, the control plane itself.

Every transport is the same pump: take a bounded number of requests, let the store answer, send what has come up for
anybody. A client that does not take its replies is not read from; one with much to say is served in turns with the
others. What waits for one client is bounded: quota.Connection.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from ..errors import HostError
from . import local, operations, wire
from .local import LocalAccess, LocalTransaction
from .looking import Looking
from .quota import Connection, Quotas
from .rings import RingConnection
from .store import XenStore
from .turns import Turns

log = logging.getLogger(__name__)

__all__ = ["LocalTransaction", "Quotas", "RingConnection", "Server", "XenStore"]

# Requests that wait here, in bytes, beyond which no more are read from a client: two of the largest size
INPUT_MAX = 8192
# Bytes in a socket's transport beyond which its client is no longer read from; 16 replies of the largest size
HIGH_WATER = 65536
# Messages are joined up to about so many bytes for one write
WRITE_BYTES = 8192
# Clients of the socket: each costs a descriptor and some KiB; the C server has no limit but RLIMIT_NOFILE
CLIENTS_MAX = 4096
EXPIRE_S = 1.0


class SocketConnection(asyncio.Protocol):
    """One client's stream socket."""

    def __init__(self, server: Server, domid: int, confine: int | None) -> None:
        self._server = server
        self._conn = server.store.connect(domid, confine=confine)
        self._conn.flush = self.flush
        self._conn.on_close = self._end
        self._parser = wire.Parser()
        self._transport: asyncio.Transport | None = None
        self._blocked = False  # the transport holds more than HIGH_WATER
        self._paused = False  # nothing more is read from it
        self._queued = False  # it has a turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, only by what they do
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._server.connections[self._conn] = self
        self._server.looking.joined()
        if len(self._server.connections) > CLIENTS_MAX:
            self._end(f"{CLIENTS_MAX} clients are connected")

    def data_received(self, data: bytes) -> None:
        parser, server = self._parser, self._server
        parser.feed(data)
        if self._queued or self._blocked:
            self._pause(parser.partial)
        else:
            if self.turn():
                self.flush()
                if parser.partial:
                    # part of a message may be all that there is: a turn finds that out
                    self._queue()
            server.flush()
        # after the reply: its client goes on meanwhile
        server.looking.came()

    def _queue(self) -> None:
        self._queued = True
        self._server.turns.add(self)
        self._pause(self._parser.partial)

    def _pause(self, held: int) -> None:
        """Not more than INPUT_MAX waits here, whatever the client sends."""
        if self._transport is not None and (held > INPUT_MAX or self._blocked) is not self._paused:
            self._paused = not self._paused
            if self._paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def turn(self) -> bool:
        """One request; turns.Pump."""
        parser, transport = self._parser, self._transport
        if transport is not None and not self._blocked and not transport.is_closing():
            try:
                message = parser.next()
            except wire.ProtocolError as error:
                self._end(str(error))
            else:
                if message is not None:
                    operations.handle(self._server.store, self._conn, *message)
                    return True
        self._queued = False
        self._pause(parser.partial)
        return False

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        conn, transport = self._conn, self._transport
        if transport is None or transport.is_closing():
            return
        if conn.overflowed:
            self._end("it does not read its watch events")
            return
        while conn.out and not self._blocked:
            message = conn.take()
            if conn.out:
                # one system call for as many as there are, but the transport tells in time that it has enough
                parts, size = [message], len(message)
                while conn.out and size < WRITE_BYTES:
                    parts.append(conn.take())
                    size += len(parts[-1])
                message = b"".join(parts)
            transport.write(message)

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self.flush()
        if not self._blocked and not self._queued and self._transport is not None:
            self._queue()

    def _end(self, reason: str) -> None:
        if self._transport is not None and not self._transport.is_closing():
            log.warning("domain %d: xenstore: connection closed: %s", self._conn.domid, reason)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._queued:
            self._server.turns.discard(self)
            self._queued = False
        self._transport = None
        self._server.gone(self._conn)

    def close(self) -> None:
        """End it from our side."""
        if self._transport is not None:
            self._transport.abort()


class Server(LocalAccess):
    """The daemon's XenStore, on the loop's thread. Its own `write`, `read`, `ls`, ... are those of LocalAccess."""

    def __init__(self, store: XenStore | None = None, *, quotas: Quotas | None = None, poll_us: int = 0) -> None:
        """poll_us: how long it looks for the next request before it sleeps (looking.py)."""
        self.store = XenStore(quotas) if store is None else store
        super().__init__(self.store, self.store.connect(0))
        self.connections: dict[Connection, SocketConnection | RingConnection] = {}
        self.turns = Turns(self.flush)
        self.looking = Looking(poll_us)
        self.store.later = self.turns.walk
        self._listeners: list[asyncio.Server] = []
        self._paths: list[Path] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None

    # ---- transports

    async def listen(self, path: str, mode: int = 0o660) -> None:
        """Serve a Unix socket at `path` (a stale one is replaced): every client is domain 0, not confined.

        HostError if the socket cannot be made.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        file = Path(path)
        try:
            file.unlink(missing_ok=True)
            sock.bind(path)
            file.chmod(mode)
            sock.listen(128)
        except OSError as error:
            sock.close()
            raise HostError(f"xenstore: socket {path}: {error.strerror}") from None
        self._paths.append(file)
        await self.adopt(sock)

    async def adopt(self, sock: socket.socket) -> None:
        """Serve a listening Unix stream socket that came from elsewhere (systemd). Takes ownership."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        # From 3.13 on a loop removes the socket's file at its end unless told: who made it may keep it over a restart.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        made = await loop.create_unix_server(lambda: SocketConnection(self, 0, None), sock=sock, **options)
        self._listeners.append(made)

    def attach_socket(self, sock: socket.socket, *, domid: int = 0, confine: int | None = None) -> None:
        """Serve one end of a SOCK_STREAM socketpair. Takes ownership; ends by EOF.

        With `confine=7` (a worker) the client may write only below a device, /local/domain/0/backend/*/7/*/, never
        `params` there; it may read and watch only /local/domain/0/backend/*/7 and /local/domain/7 and what is below;
        SET_PERMS and what is for domain 0's tools are refused; a device that was removed does not come back by a write.
        """
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        protocol = SocketConnection(self, domid, confine)

        async def connect() -> None:
            try:
                await loop.connect_accepted_socket(lambda: protocol, sock)
            except OSError as error:
                log.warning("domain %d: xenstore: socket: %s", domid, error.strerror)
                sock.close()
                protocol.connection_lost(error)

        task = loop.create_task(connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def attach_ring(self, domid: int, page: mmap.mmap | memoryview, kick: int, notify: int) -> RingConnection:
        """Serve a guest's XenStore page (4096 bytes).

        `kick` and `notify` are eventfds and are duplicated; the page stays the caller's and must live until `close()`
        of what is returned, after which no view of it is held. A guest that corrupts its ring: one line in the log,
        the page's error field, and its connection is closed; nobody else is touched.
        """
        connection = RingConnection(self, domid, page, kick, notify)
        self.connections[connection.conn] = connection
        connection.start()
        return connection

    def gone(self, conn: Connection) -> None:
        """A transport has ended."""
        self.connections.pop(conn, None)
        self.store.disconnect(conn)
        conn.on_close = None

    # ---- over a restart

    def kept(self, domid: int) -> bool:
        """Was the domain there before this process was, and is not served again yet?"""
        return domid in self.store.waiting

    def resumed(self, domid: int) -> None:
        """It is served again. (`attach_ring` says so, too.)"""
        self.store.waiting.pop(domid, None)

    def stop_recording(self) -> None:
        """What ends from now on ends because this process does: the log stays as it is.

        So nobody is served any more who would have a reply that the log knows nothing of; workers are, to their end.
        """
        if self.store.recorder is not None:
            self.flush()
            self.store.recorder = None
            for conn, connection in list(self.connections.items()):
                if conn.confine is None:
                    connection.close()

    # ---- domains

    def introduce(self, domid: int) -> None:
        """The domain exists now: @introduceDomain fires. Its nodes may be written before or after."""
        self.store.introduce(domid)
        self.flush()

    def release(self, domid: int) -> None:
        """The domain is gone: its ring is closed; its nodes, permissions, watches and quotas go, /local/domain/<domid>
        is removed; @releaseDomain fires. Harmless for an unknown domain."""
        self.store.release(domid)
        self.flush()

    @contextmanager
    def transaction(self) -> Iterator[LocalTransaction]:
        """`with server.transaction() as t: t.write(...)`: all or nothing, watches fire at its end.

        Do not await inside: then it cannot conflict (EAGAIN).
        """
        with local.transaction(self.store, self._conn) as view:
            yield view
        self.flush()

    # ---- what waits to be sent

    def _settle(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Send what the last request has queued, in whatever connection; it is in the log by then."""
        ready, recorder = self.store.ready, self.store.recorder
        if recorder is not None:
            recorder.commit(ready)
        while ready:
            conn, _ = ready.popitem()
            if conn.flush is not None:
                conn.flush()

    def expire_later(self, after: float | None = None) -> None:
        """A guest waits for others (to take events that it has fired, to end a transaction that it has disturbed): look
        now and then, or `after` seconds, whether it has waited enough."""
        loop = asyncio.get_running_loop()
        when = loop.time() + (EXPIRE_S if after is None else after)
        if self._expiry is not None:
            if self._expiry.when() <= when:
                return
            self._expiry.cancel()
        self._expiry = loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        if self.store.expire():
            self.expire_later()
        self.flush()

    async def close(self) -> None:
        """Stop listening, close every connection, remove the socket's file. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for file in self._paths:
            with suppress(OSError):
                file.unlink()
        self._paths.clear()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._opening:
            await asyncio.wait(list(self._opening))
        for connection in list(self.connections.values()):
            connection.close()
        while self.connections:
            await asyncio.sleep(0)
        self.turns.close()
        self.looking.close()
        self.store.later = None
