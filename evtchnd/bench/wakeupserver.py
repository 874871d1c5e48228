"""A process like a worker, with channels whose requests are a word and whose answers are a word.

It has what lies between a kick and a backend's handler: uvloop, `Channel`, `Poller`. A channel's words are drawn in
wakeup.c. Standard input: one line of JSON, `Given`; "ready" is printed when all channels are served. Ends at EOF.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import sys
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


def answer(channel: Channel, mem: Mem, offset: int) -> asyncio.Future[None]:
    """Serves one channel's words at `offset`: each request is answered with its number. -> `drive()`'s future."""
    load, store = mem.load, mem.store
    at, event_at, answer_at, answer_event_at = (
        offset + part for part in (REQUEST, REQUEST_EVENT, ANSWER, ANSWER_EVENT)
    )
    seen = load(answer_at)

    def pending() -> bool:
        return load(at) != seen

    def arm() -> bool:
        store(event_at, seen + 1 & MASK)
        full_fence()
        return load(at) != seen

    async def pump() -> None:
        nonlocal seen
        kicked = channel.kicked
        while True:
            await kicked()
            request = load(at)
            if request == seen:
                continue
            store(answer_at, request)
            full_fence()
            old, seen = seen, request
            if request - load(answer_event_at) & MASK < request - old & MASK:
                channel.notify()

    channel.watch(pending, arm)
    return channel.drive(pump())


async def serve(given: Given, mem: Mem) -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    poller = Poller(loop, max_us=given.max_us)
    over = loop.create_future()
    for number, (kick, notify) in enumerate(zip(given.kicks, given.notifies, strict=True)):
        channel = Channel(kick, notify, name=f"bench: channel {number}", poller=poller)
        served = answer(channel, mem, given.offset + number * WORDS_BYTES)
        served.add_done_callback(lambda ended: None if over.done() else over.set_result(ended))
    loop.add_reader(sys.stdin.fileno(), lambda: None if over.done() else over.set_result(None))
    print("ready", flush=True)
    ended: asyncio.Future[Any] | None = await over
    if ended is not None:
        ended.result()


def main() -> None:
    given = Given(**json.loads(sys.stdin.readline()))
    if given.cpu >= 0:
        os.sched_setaffinity(0, {given.cpu})
    with mmap.mmap(given.ram, 0) as memory:
        mem = Mem(memory)
        try:
            uvloop.run(serve(given, mem))
        finally:
            mem.close()


if __name__ == "__main__":
    main()
