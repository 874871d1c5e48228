"""A process like a worker, with channels whose requests are a word and whose answers are a word.

It has what lies between a kick and a backend's handler: uvloop, `Channel`, `Poller`. A channel's words are drawn in
wakeup.c. Standard input: one line of JSON, `Given`; "ready" is printed when all channels are served. Ends at EOF.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import uvloop

from evtchnd._core.words import Mem, full_fence
from evtchnd.channel import Channel, Poller

WORDS_BYTES = 128
REQUEST, REQUEST_EVENT, ANSWER, ANSWER_EVENT = 0, 4, 64, 68
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Given:
    """ram: memfd; offset: of the first channel's words; kicks, notifies: eventfds by channel; cpu: -1 for any."""

    ram: int
    offset: int
    kicks: list[int]
    notifies: list[int]
    max_us: int
    cpu: int


class Answering:
    """Serves one channel's words, `mem`: each request is answered with its number. `ended`: `drive()`'s future.

    As compact as a compiled ring's state: with thousands of channels all of it is cold when the kick comes.
    """

    __slots__ = ("channel", "ended", "mem", "seen")

    def __init__(self, channel: Channel, mem: Mem) -> None:
        self.channel = channel
        self.mem = mem
        self.seen = mem.load(ANSWER)
        channel.watch(self.pending, self.arm)
        self.ended = channel.drive(self.pump())

    def pending(self) -> bool:
        return self.mem.load(REQUEST) != self.seen

    def arm(self) -> bool:
        mem, seen = self.mem, self.seen
        mem.store(REQUEST_EVENT, seen + 1 & MASK)
        full_fence()
        return mem.load(REQUEST) != seen

    async def pump(self) -> None:
        mem, channel = self.mem, self.channel
        while True:
            await channel.kicked()
            request, old = mem.load(REQUEST), self.seen
            if request == old:
                continue
            mem.store(ANSWER, request)
            full_fence()
            self.seen = request
            if request - mem.load(ANSWER_EVENT) & MASK < request - old & MASK:
                channel.notify()


async def serve(given: Given, words: Sequence[Mem]) -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    poller = Poller(loop, max_us=given.max_us)
    over = loop.create_future()
    for kick, notify, mem in zip(given.kicks, given.notifies, words, strict=True):
        served = Answering(Channel(kick, notify, name=f"bench: kick {kick}", poller=poller), mem)
        served.ended.add_done_callback(lambda ended: None if over.done() else over.set_result(ended))
    loop.add_reader(sys.stdin.fileno(), lambda: None if over.done() else over.set_result(None))
    print("ready", flush=True)
    ended: asyncio.Future[Any] | None = await over
    if ended is not None:
        ended.result()


def main() -> None:
    given = Given(**json.loads(sys.stdin.readline()))
    if given.cpu >= 0:
        os.sched_setaffinity(0, {given.cpu})
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(memoryview(stack.enter_context(mmap.mmap(given.ram, 0))))
        words = []
        for at in range(given.offset, given.offset + len(given.kicks) * WORDS_BYTES, WORDS_BYTES):
            words.append(Mem(view[at : at + WORDS_BYTES]))
            stack.callback(words[-1].close)
        uvloop.run(serve(given, words))


if __name__ == "__main__":
    main()
