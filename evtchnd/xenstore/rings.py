"""A guest's XenStore page, served on the loop.

    struct xenstore_domain_interface (io/xs_wire.h)
       0  req[1024]      2048  req_cons     2056  rsp_cons     2064  server_features    2072  error
    1024  rsp[1024]      2052  req_prod     2060  rsp_prod     2068  connection

With a log (recorder.py) the guest's page and the log agree after a crash: a request is answered in the log before the
page says that it was read, and an answer is in the log before the page has it.

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

from .. import spurious
from ..errors import GuestError
from ..seldom import Seldom
from ..stream import XENSTORE, XENSTORE_CONNECTION, XENSTORE_ERROR, XENSTORE_FEATURES, ByteStream
from . import operations, wire
from .contention import HOLD_S

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger(__name__)

# Looks at one guest's ring in a row, each for one request; then the others have their turn
BATCH = 4
# Kicks in a row without a request, and without an answer or event for it, that are free: Linux kicks twice for each
# reply that it takes (header, body), and takes twenty of them (the quota of outstanding ones) or some events in a row.
FREE_KICKS = 64
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
        waiting = server.store.waiting.pop(domid, None)
        self.conn = server.store.connect(domid) if waiting is None else waiting
        self._resumed = waiting is not None
        self.conn.flush = self._flush
        self.conn.on_close = self._end
        self.conn.on_reset = self._reintroduced
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._view = memoryview(page)
        self._words = self._view.cast("B").cast("I")
        self._stream = ByteStream(self._view, XENSTORE, side="back")
        self._parser = wire.Parser()
        self._peeked = 0  # bytes that the parser has, and the ring, too
        self._waiting = False  # a request may lie in the ring, untouched
        self._dirty = False  # something was consumed or produced: the guest is notified once
        self._queued = False  # it has a turn
        self._idle = 0  # kicks in a row that brought nothing
        self._late: asyncio.TimerHandle | None = None  # it is not heard until then
        self._lines = Seldom()
        self._kick = _own(kick)
        self._notify = _own(notify)

    def start(self) -> None:
        """Offer the features, then serve; what the guest has written before is served at once."""
        recorder = self._server.store.recorder
        self._words[XENSTORE_ERROR // 4] = 0
        self._words[XENSTORE_FEATURES // 4] = self.conn.domain.features
        self._loop.add_reader(self._kick, self._kicked)
        if self._resumed and not self._resume():
            return
        if recorder is not None:
            queued = self._stream.prod if not self._resumed else self.conn.queued
            recorder.opened(self.conn, self._stream.cons, queued)
            self._server.flush()
        self._later()

    def _resume(self) -> bool:
        """Goes on where an earlier process was. False: the guest has changed its page, so that it cannot be."""
        conn, stream = self.conn, self._stream
        stream.resume(conn.received)
        self._parser.feed(conn.partial)
        written = (stream.prod - (conn.queued - len(conn.unsent))) & 0xFFFFFFFF
        if written > len(conn.unsent):
            self._end(f"producer {stream.prod:#x} is not what was written", wire.ERROR_RINGIDX)
            return False
        conn.unsent = conn.unsent[written:]
        # It may have been written, and not told
        self._dirty = True
        return True

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
        self._server.looking.came()
        if not self._queued:
            self._idle += 1  # 0 again with the first thing that moves
            self._pump()
            if self._idle > FREE_KICKS:
                self._delay()

    def _delay(self) -> None:
        """The guest kicks for nothing: it is not heard for a while (spurious.py). Others have this loop, too."""
        if self.closed or self._queued or self._late is not None:
            return
        self._loop.remove_reader(self._kick)
        self._late = self._loop.call_later(spurious.delay_s(self._idle, free=FREE_KICKS), self._listen)
        if self._idle == FREE_KICKS + 1 and (more := self._lines.due("late")) is not None:
            log.warning(
                "domain %d: xenstore ring: kicked %d times in a row for nothing: heard late, by up to %g ms, until a "
                "kick brings a request%s",
                *(self.domid, self._idle, spurious.LONGEST_S * 1000, more),
            )

    def _listen(self) -> None:
        self._late = None
        if not _ready(self._kick, select.POLLIN):
            self._idle -= self._idle > 0  # silent for as long as it was not heard
        self._loop.add_reader(self._kick, self._kicked)

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
                self._consume(parser.rest())
                data = self._stream.peek(wire.HEADER_SIZE + wire.PAYLOAD_MAX)
                if not data:
                    return False
                parser.feed(data)
                self._peeked = len(data)
                continue
            done = self._peeked - parser.partial
            if store.recorder is not None:
                store.recorder.received(conn, (self._stream.cons + done) & 0xFFFFFFFF, b"")
            operations.handle(store, conn, *message)
            if self.closed:
                return False
            if self._peeked:  # else the ring was reconnected
                self._stream.consume(done)
                self._peeked -= done
                self._dirty = True
        self._send()
        return True

    def _consume(self, partial: bytes) -> None:
        """Takes what was peeked at from the ring: `partial`, which is no whole request yet, is kept here."""
        if self._peeked:
            recorder = self._server.store.recorder
            if recorder is not None:
                recorder.received(self.conn, (self._stream.cons + self._peeked) & 0xFFFFFFFF, partial)
                recorder.commit(self._server.store.ready)
            self._stream.consume(self._peeked)
            self._peeked = 0
            self._dirty = True

    def _send(self) -> None:
        """As much of what waits as the ring has room for."""
        conn, stream = self.conn, self._stream
        while conn.unsent or conn.out:
            if not conn.unsent:
                conn.unsent = conn.take()
            done = stream.write(conn.unsent)
            if done == 0:
                return
            self._dirty = True
            conn.unsent = conn.unsent[done:]

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
            self._idle = 0
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
        store = self._server.store
        recorder = store.recorder
        store.reset(self.conn)
        self._parser = wire.Parser()
        self._peeked = 0
        if recorder is not None:
            recorder.opened(self.conn, 0, 0)
            recorder.commit(store.ready)
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
        if self._late is not None:
            self._late.cancel()
        if self._queued:
            self._server.turns.discard(self)
            self._queued = False
        os.close(self._kick)
        os.close(self._notify)
        self._stream.close()
        self._words.release()
        self._view.release()
        self._server.gone(self.conn)
