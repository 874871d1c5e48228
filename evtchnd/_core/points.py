"""The steps of a block request's life, each with a name: where a test ends the worker (evtchnd/bench/crashpoints.py).

A point lies *before* its step. Between two points there is at most one store that outlives the worker (into the ring,
the journal, a grant entry) or one effect outside (I/O, an eventfd), so that a death at each point is a death at each
instruction; tests/test_crash_points.py holds this.

    start     a word of a new ring's journal, or of a reset
    take      copy, counter, pin (each), inflight, consumed; taken
    disk      submit, complete (of the disk side, by whoever serves the ring)
    done      unpin (each), index, done, response; answered
    push      target, rsp_prod, free (each), published; notify
    sleep     arm
    attach    settle (each word that the restored journal gets), and again pin, response
    over      nothing is left to do

Nobody watches in production: a point is a look at a word that is zero. The words of a watch are

    0 the number of the point at which to die by SIGKILL, from 1 on (0: none) | 1 points passed | 2 room for labels
    3 ... the labels of those that were passed
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evtchnd._core.words import Mem

LABELS = (
    "start",
    "copy",
    "counter",
    "pin",
    "inflight",
    "consumed",
    "taken",
    "submit",
    "complete",
    "unpin",
    "index",
    "done",
    "response",
    "answered",
    "target",
    "rsp_prod",
    "free",
    "published",
    "notify",
    "arm",
    "settle",
    "over",
)

# points.h has the same, as C constants.
(
    AT_START,
    AT_COPY,
    AT_COUNTER,
    AT_PIN,
    AT_INFLIGHT,
    AT_CONSUMED,
    AT_TAKEN,
    AT_SUBMIT,
    AT_COMPLETE,
    AT_UNPIN,
    AT_INDEX,
    AT_DONE,
    AT_RESPONSE,
    AT_ANSWERED,
    AT_TARGET,
    AT_RSP_PROD,
    AT_FREE,
    AT_PUBLISHED,
    AT_NOTIFY,
    AT_ARM,
    AT_SETTLE,
    AT_OVER,
) = range(len(LABELS))

DUE, PASSED, ROOM, FIRST = 0, 4, 8, 12
"""Where those words are, in bytes."""

_watched: list[Mem] = []


def point(label: int) -> None:
    """Passes a point; the Python form's (the compiled one's is inline C)."""
    if _watched:
        mem = _watched[0]
        n = mem.load(PASSED)
        mem.store(PASSED, n + 1)
        if n < mem.load(ROOM):
            mem.store(FIRST + 4 * n, label)
        if n + 1 == mem.load(DUE):
            os.kill(os.getpid(), signal.SIGKILL)


def set_watch(mem: Mem | None) -> None:
    """Blk's `watch`, in the Python form."""
    _watched[:] = [] if mem is None else [mem]
