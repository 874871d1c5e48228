"""Writers do not starve a transaction for ever (XSA-206).

    client A          START  READ /x               END -> EAGAIN    three times in a row
    guest B                           WRITE /x                      it was B, each time
    client A          START  READ /x  WRITE /y     END -> OK        B is not listened to from START to END

Only who has changed what the transaction relies on is held, for HOLD_S at most, and not more often than once in
HOLD_EVERY_S: a guest that has others held on purpose takes a tenth of the time from them, and only from such as change
what it may read. Domain 0's tools and workers are never held. (The C server slows down every guest's writes while any
transaction is open: 200 a second for all of them together.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import wire
from .quota import Connection

CONFLICTS_MAX = 3
HOLD_S = 0.1
HOLD_EVERY_S = 1.0
# Paths whose last writer is known. A guest has 1,000 nodes.
_WRITERS_MAX = 4096


class Contention:
    """Who has changed what while transactions are open, and who waits for whom."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.open = 0
        self._writers: dict[bytes, Connection] = {}

    def started(self, conn: Connection) -> None:
        """`conn` has opened a transaction."""
        self.open += 1
        now = self.clock()
        for rival in conn.rivals:
            if now - rival.held_at >= HOLD_EVERY_S:
                rival.holder, rival.held_at = conn, now

    def ended(self, conn: Connection, conflict: bytes | None = None) -> None:
        """A transaction of `conn` is over; `conflict`: its commit was refused, for a change of this path."""
        self.open -= 1
        self._let_go(conn)
        if conflict is not None:
            conn.conflicts += 1
            rival = self._writers.get(conflict)
            if conn.conflicts >= CONFLICTS_MAX and rival is not None and rival is not conn:
                conn.rivals[rival] = None
        self._settle()

    def dropped(self, conn: Connection) -> None:
        """All transactions of `conn` go, without a word."""
        self.open -= len(conn.transactions)
        self._let_go(conn)
        self._settle()

    def _let_go(self, conn: Connection) -> None:
        for rival in conn.rivals:
            if rival.holder is conn:
                rival.holder = None
                rival.ready[rival] = None
        conn.rivals.clear()

    def _settle(self) -> None:
        if not self.open:
            self._writers.clear()

    def wrote(self, conn: Connection, paths: Iterable[bytes]) -> None:
        """A guest has changed nodes."""
        if not self.open:
            return
        writers = self._writers
        for path in paths:
            for changed in (path, wire.parent_of(path)):
                writers.pop(changed, None)
                writers[changed] = conn
        while len(writers) > _WRITERS_MAX:
            del writers[next(iter(writers))]

    def expire(self, conn: Connection) -> None:
        """Nobody is held for longer than HOLD_S."""
        if conn.holder is not None and self.clock() - conn.held_at >= HOLD_S:
            conn.holder = None
            conn.ready[conn] = None
