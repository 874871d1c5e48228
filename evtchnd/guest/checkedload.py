"""A load on a disk that knows what every block has to be: nothing lost, nothing old, nothing answered twice.

The frontend itself refuses a response to a request that is not in flight (blkqueue.py); what is checked here is data,
and at the end the image.
"""

from __future__ import annotations

import random
import struct
import threading
import time

from evtchnd.blkif import Op, Status
from evtchnd.guest.blkfront import Blkfront, Completion
from evtchnd.guest.domain import GuestFault

BLOCK = 4096
_SECTORS = BLOCK // 512
_WORDS = struct.Struct("<QQ")
# Longer than any request takes while it is served, shorter than any restart.
_LONG_S = 0.1


class CheckedLoad:
    """Reads and writes blocks of 4 KiB in random order, `depth` at a time, each block by one request at a time.

    blocks      the first so many of the disk, which are zeros
    think_s     a pause after each batch of answers: a guest that does other things, too
    answered    requests so far
    pauses      the longest times, in seconds, in which nothing was answered: one for each `mark()`
    failed      what went wrong, None so far
    """

    def __init__(self, front: Blkfront, blocks: int, *, depth: int = 8, seed: int = 0, think_s: float = 0.0) -> None:
        self.answered = 0
        self.failed: BaseException | None = None
        self.pauses: list[float] = []
        self._front = front
        self._depth = depth
        self._think_s = think_s
        self._random = random.Random(seed)
        self._versions = [0] * blocks
        self._free = list(range(blocks))
        self._busy: dict[int, tuple[int, int]] = {}  # request: block, version after it
        self._over = threading.Event()
        self._longest = 0.0
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"vbd {front.devid}: load", daemon=True)

    def start(self) -> None:
        """In a thread of its own, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Waits for what is in flight. Raises what went wrong."""
        self._over.set()
        self._thread.join()
        if self.failed is not None:
            raise self.failed

    def mark(self) -> None:
        """The longest pause since the last mark goes to `pauses`."""
        self.pauses.append(self._longest)
        self._longest = 0.0

    def hurry(self) -> None:
        """From now on something is always in flight, until it takes longer than _LONG_S."""
        self._hurry.set()

    def image(self) -> bytes:
        """What the blocks have to be, once it was stopped."""
        return b"".join(_block(block, version) for block, version in enumerate(self._versions))

    def _run(self) -> None:
        try:
            last = time.monotonic()
            while self._busy or not self._over.is_set():
                while self._free and len(self._busy) < self._depth and not self._over.is_set():
                    self._submit()
                for done in self._front.complete():
                    self._check(done)
                now = time.monotonic()
                self._longest, last = max(self._longest, now - last), now
                if self._longest > _LONG_S:
                    self._hurry.clear()
                if self._think_s:
                    self._hurry.wait(self._think_s)
                    last = time.monotonic()
        except BaseException as error:
            self.failed = error

    def _submit(self) -> None:
        at = self._random.randrange(len(self._free))
        block, self._free[at] = self._free[at], self._free[-1]
        self._free.pop()
        version, sector = self._versions[block], block * _SECTORS
        if self._random.random() < 0.5:
            self._busy[self._front.submit_read(sector, _SECTORS)] = block, version
        else:
            request = self._front.submit_write(sector, _block(block, version + 1))
            self._busy[request] = block, version + 1

    def _check(self, done: Completion) -> None:
        block, version = self._busy.pop(done.ident)
        self._free.append(block)
        if done.status != Status.OKAY:
            raise GuestFault(f"block {block}: request {done.ident}: status {done.status}")
        if done.op == Op.READ and done.data != _block(block, version):
            raise GuestFault(f"block {block}: is not what version {version} was")
        self._versions[block] = version
        self.answered += 1


def _block(block: int, version: int) -> bytes:
    return _WORDS.pack(block, version) * (BLOCK // _WORDS.size) if version else bytes(BLOCK)
