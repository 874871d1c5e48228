"""What `evtchnd-bench xenstore` measures: a process with evtchnd's XenStore server alone, or an echo server, on uvloop.

Standard input: one line of JSON, `Given`; one line of JSON comes back when the socket listens. Then a line `walk` or
`storm` asks for what has to be done inside; each is answered with one line. Ends at EOF.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from evtchnd.bench import xenstorefill
from evtchnd.xenstore import restore
from evtchnd.xenstore.log import Log
from evtchnd.xenstore.server import Server, SocketConnection


@dataclass(frozen=True)
class Given:
    """path: of the socket; nodes: about so many, -1: an echo server; log: its changes are logged;
    poll_us: it looks for the next request so long before it sleeps."""

    path: str
    nodes: int
    cpu: int
    log: bool = True
    poll_us: int = 50


class Echo(asyncio.Protocol):
    """The least that a server on this loop can do."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def private_bytes() -> int:
    """Memory of this process alone: what it has not got from files or shared memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


async def walk(server: Server) -> dict[str, Any]:
    """`check` of the whole store, then a dump of it into the log's other area: the longer of both times, the longest
    pause of the loop."""
    taken = [await timed(server, server.store.check_steps())]
    if (recorder := server.store.recorder) is not None:
        while (copying := recorder.compact()) is None:
            await asyncio.sleep(0.01)
        taken.append(await timed(server, copying))
    return {"nodes": len(server.store.tree), **{key: max(one[key] for one in taken) for key in taken[0]}}


async def timed(server: Server, walking: Generator[None, None, Any]) -> dict[str, float]:
    """A walk, with a ticking task beside it."""
    longest = 0.0
    over = False

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    longest = 0.0
    begin = time.perf_counter()
    ended = asyncio.get_running_loop().create_future()

    def steps() -> Generator[None, None, None]:
        ended.set_result((yield from walking))

    server.turns.walk(steps())
    faults = await ended
    seconds = time.perf_counter() - begin
    over = True
    await ticking
    return {"faults": len(faults or ()), "seconds": seconds, "longest_s": longest}


async def serve(given: Given) -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if given.nodes < 0:
        await loop.create_unix_server(Echo, given.path)
        print("{}", flush=True)
        await reader.read()
        return
    server = Server(restore.open_store(Log.create()) if given.log else None, poll_us=given.poll_us)
    await server.listen(given.path)
    # each connection here is a guest: its paths, its permissions, its quotas
    domids = itertools.cycle(range(1, xenstorefill.GUESTS + 1))
    guests = await loop.create_unix_server(lambda: SocketConnection(server, next(domids), None), f"{given.path}.guests")
    gc.collect()
    empty = private_bytes()
    begin = time.perf_counter()
    xenstorefill.fill(server.store, given.nodes)
    count = len(server.store.tree)
    size = private_bytes() - empty
    if (recorder := server.store.recorder) is not None:
        size += recorder.log.used
    told = {"nodes": count, "bytes": size, "seconds": time.perf_counter() - begin}
    print(json.dumps(told), flush=True)
    while line := await reader.readline():
        if line == b"walk\n":
            print(json.dumps(await walk(server)), flush=True)
    guests.close()
    await server.close()


def main() -> None:
    given = Given(**json.loads(os.read(0, 65536)))
    os.sched_setaffinity(0, {given.cpu})
    uvloop.run(serve(given))


if __name__ == "__main__":
    main()
