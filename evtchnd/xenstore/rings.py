"""A guest's XenStore page, served on the loop.

    struct xenstore_domain_interface (io/xs_wire.h)
       0  req[1024]      2048  req_cons     2056  rsp_cons     2064  server_features    2072  error
    1024  rsp[1024]      2052  req_prod     2060  rsp_prod     2068  connection

The two streams and their indices are stream.ByteStream's; the three words behind them are used here. A guest kicks
once for a request that it writes in pieces, and not at all while the server is known to look: so look again until
nothing is left, and notify once for all that was done (docs/misc/xenstore-ring.txt).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import GuestError
from ..stream import XENSTORE, XENSTORE_CONNECTION, XENSTORE_ERROR, XENSTORE_FEATURES, ByteStream
from . import operations, wire
from .contention import HOLD_S

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger(__name__)

# Looks at one guest's ring in a row, each for one request; then the others have their turn
BATCH = 4
_ONE = (1).to_bytes(8, "little")


def _own(fd: int) -> int:
    """A duplicate that never blocks (the flag is the eventfd's own: its other holders share it)."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    os.set_blocking(copy, False)
    return copy


def _ready(fd: int, what: int) -> bool:
    """Looked at before each read and write: the VMM can take O_NONBLOCK away again, and all guests would wait here."""
    poll = select.poll()
    poll.register(fd, what)
    return bool(poll.poll(0))


class RingConnection:
    """A guest's ring; see Server.attach_ring."""

    def __init__(self, server: Server, domid: int, page: mmap.mmap | memoryview, kick: int, notify: int) -> None:
        self.domid = domid
        self.closed = False
        self.conn = server.store.connect(domid)
        self.conn.flush = self._flush
        self.conn.on_close = self._end
        self.conn.on_reset = self._reintroduced
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._view = memoryview(page)
        self._words = self._view.cast("B").cast("I")
        self._stream = ByteStream(self._view, XENSTORE, side="back")
        self._parser = wire.Parser()
        self._sending = b""
        self._waiting = False  # a request may lie in the ring, untouched
        self._dirty = False  # something was consumed or produced: the guest is notified once
        self._queued = False  # it has a turn
        self._kick = _own(kick)
        self._notify = _own(notify)

    def start(self) -> None:
        """Offer the features, then serve; what the guest has written before is served at once."""
        self._words[XENSTORE_ERROR // 4] = 0
        self._words[XENSTORE_FEATURES // 4] = self.conn.domain.features
        self._loop.add_reader(self._kick, self._kicked)
        self._later()

    def _later(self) -> None:
        self._queued = True
        self._server.turns.add(self)

    def turn(self) -> bool:
        """turns.Pump; it has itself added again."""
        self._queued = False
        self._pump()
        return False

    def _kicked(self) -> None:
        try:
            if not _ready(self._kick, select.POLLIN):
                return
            os.read(self._kick, 8)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"event channel: {error.strerror}", wire.ERROR_COMM)
            return
        if not self._queued:
            self._pump()

    def _pump(self) -> None:
        try:
            offered = self.conn.domain.features & wire.FEATURE_RECONNECTION
            if offered and self._words[XENSTORE_CONNECTION // 4] == wire.RING_RECONNECT:
                self._reconnect()
            more = self._serve()
        except GuestError as error:
            self._end(str(error), wire.ERROR_RINGIDX)
        except wire.ProtocolError as error:
            self._end(str(error), wire.ERROR_PROTO)
        else:
            if more:
                # it is told when it has had all its turns; its quota of outstanding replies ends them
                self._later()
            else:
                self._tell()
        self._server.flush()

    def _serve(self) -> bool:
        """True: stopped only to give others their turn."""
        conn, parser, store = self.conn, self._parser, self._server.store
        for _ in range(BATCH):
            self._send()
            if conn.busy:
                # Not listened to until it has taken replies (then it kicks), or others the events that it has fired
                self._waiting = True
                if conn.holder is not None:
                    self._server.expire_later(HOLD_S)
                elif conn.caused:
                    self._server.expire_later()
                return False
            self._waiting = False
            message = parser.next()
            if message is None:
                data = self._stream.read(wire.HEADER_SIZE + wire.PAYLOAD_MAX)
                if not data:
                    return False
                self._dirty = True
                parser.feed(data)
                continue
            operations.handle(store, conn, *message)
            if self.closed:
                return False
        self._send()
        return True

    def _send(self) -> None:
        """As much of what waits as the ring has room for."""
        conn, stream = self.conn, self._stream
        while self._sending or conn.out:
            if not self._sending:
                self._sending = conn.take()
            done = stream.write(self._sending)
            if done == 0:
                return
            self._dirty = True
            self._sending = self._sending[done:]

    def _flush(self) -> None:
        """An event has come up by somebody else's request."""
        if self._queued or self.closed:
            return
        if self._waiting and not self.conn.busy:
            self._later()
            return
        try:
            self._send()
        except GuestError as error:
            self._end(str(error), wire.ERROR_RINGIDX)
        else:
            self._tell()

    def _tell(self) -> None:
        if self._dirty and not self.closed:
            self._dirty = False
            # Not ready: the counter is full, the guest has not looked yet, and will
            with suppress(BlockingIOError):
                if _ready(self._notify, select.POLLOUT):
                    os.write(self._notify, _ONE)

    def _reintroduced(self) -> None:
        """A tool wants it (INTRODUCE): the ring is fresh before the tool has its reply."""
        if not self.closed:
            self._reconnect()
            self._tell()

    def _reconnect(self) -> None:
        """The guest wants a fresh ring: whatever was under way is dropped, in both directions."""
        self._server.store.reset(self.conn)
        self._parser = wire.Parser()
        self._sending = b""
        self._stream.reset()
        self._words[XENSTORE_ERROR // 4] = 0
        self._words[XENSTORE_CONNECTION // 4] = wire.RING_CONNECTED
        self._dirty = True

    def _end(self, reason: str, error: int = wire.ERROR_COMM) -> None:
        if not self.closed:
            log.warning("domain %d: xenstore ring: %s: not served any more", self.domid, reason)
            if self.conn.domain.features & wire.FEATURE_ERROR:
                self._words[XENSTORE_ERROR // 4] = error
            self._dirty = True
            self._tell()
            self.close()

    def close(self) -> None:
        """Stop serving the ring; the connection's watches and transactions go. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._kick)
        if self._queued:
            self._server.turns.discard(self)
            self._queued = False
        os.close(self._kick)
        os.close(self._notify)
        self._stream.close()
        self._words.release()
        self._view.release()
        self._server.gone(self.conn)
