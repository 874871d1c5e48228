"""Work beside the loop: what blocks, in a thread of its own.

Not in the loop's executor: a few calls that hang would take all of its threads, and the daemon could not end before
they come back. And a network namespace is a thread's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def beside(work: Callable[[], T], undo: Callable[[T], None], ended: Callable[[], None] = lambda: None) -> T:
    """`work()` in a thread; `undo` gets what comes when nobody waits any more.

    ended    called in the loop when the work has ended, whoever waits
    """
    loop = asyncio.get_running_loop()
    come: asyncio.Future[T] = loop.create_future()

    def arrived(result: T | None, error: Exception | None) -> None:
        ended()
        if come.done():  # nobody waits
            if error is None:
                undo(result)  # type: ignore[arg-type]
        elif error is not None:
            come.set_exception(error)
        else:
            come.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as exc:
            error = exc
        with suppress(RuntimeError):  # the loop has ended, and this process does
            loop.call_soon_threadsafe(arrived, result, error)

    start(run)
    try:
        return await come
    except asyncio.CancelledError:
        if come.done() and not come.cancelled() and come.exception() is None:
            undo(come.result())
        raise


def start(work: Callable[[], None]) -> None:
    """`work()` in a thread that nobody waits for."""
    threading.Thread(target=work, name="beside", daemon=True).start()
