"""What netback has answered on a vif's rings: in a memfd that outlives the worker.

Response i overwrites the slot of request i, so a worker that dies between its first response and the index that
publishes them would leave slots that are neither: the next one would take a response for a request. Therefore a
response is written here first, and goes into the ring only when all that come before it are published with it:

    response -> here    index here    responses -> ring    the ring's rsp_prod

A worker may die between any two of these. The next one compares the two indices: where this one is ahead, it puts the
responses in between into the ring (again) and publishes them; requests from there on are whole. Nothing has to be
cleared. (evtchnd/_core/answered.py: `publish`, `take_over`)

Two pages a queue, the transmit ring's first:

    0    u32 rsp_prod   up to where what lies below is whole
    64   256 responses of 12 (tx) or 8 (rx) bytes, each in the place of its slot
"""

from __future__ import annotations

import fcntl
import os

from evtchnd._core.words import Mem
from evtchnd.abi import PAGE_SIZE
from evtchnd.errors import HostError
from evtchnd.memory import map_range, sealed_memfd


def create(queues: int, name: str) -> int:
    """Of a vif with `queues` queues; -> the memfd, sealed, the caller's. HostError if there is none to be had."""
    return sealed_memfd(name, 2 * queues * PAGE_SIZE, name)


class Answers:
    """Those of one queue: `tx` and `rx`, a page each. HostError: `fd` is no such memfd. It is not kept."""

    def __init__(self, fd: int, queue: int) -> None:
        size = os.fstat(fd).st_size
        if size < 2 * (queue + 1) * PAGE_SIZE or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise HostError(f"answers: {size} bytes, or not sealed: queue {queue} cannot be served")
        region = map_range(fd, 2 * queue * PAGE_SIZE, 2 * PAGE_SIZE, "answers")
        self._area = region.area
        self.tx = Mem(region.view[:PAGE_SIZE])
        self.rx = Mem(region.view[PAGE_SIZE:])
        region.view.release()

    def close(self) -> None:
        """Unmap; what is in it stays. Idempotent. Close the rings first."""
        self.tx.close()
        self.rx.close()
        self._area.close()
