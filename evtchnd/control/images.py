"""Images are opened, looked at and closed beside the loop: each of these blocks as long as its storage hangs.

Each in a thread of its own, not in the loop's executor: a few shares that hang would take all of its threads, and the
daemon could not end before they come back.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from evtchnd import transport
from evtchnd.control.disk import Image, check_passed, open_image, resize_image
from evtchnd.errors import OperatorError

T = TypeVar("T")

# Threads that wait for a storage: as many as an operator's script may have tried before somebody looks.
_MOST_WAITING = 64


class Images:
    """`seconds`: limits.image_s. Every call raises OperatorError (ETIMEDOUT) when it has taken as long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting = 0

    async def open(self, target: Path, *, readonly: bool, sector_size: int = 0, direct: bool = False) -> Image:
        """As `open_image`. What comes when nobody waits any more is closed, and its lock with it."""
        if self._waiting >= _MOST_WAITING:
            raise OperatorError(f"{target}: {self._waiting} images wait for their storage already", errno.EBUSY)
        return await self.beside(
            str(target),
            lambda: open_image(target, readonly=readonly, sector_size=sector_size, direct=direct),
            self._drop,
        )

    async def passed(self, fd: int, *, readonly: bool) -> Image:
        """As `check_passed`. Takes `fd`: it is closed where it is refused."""
        try:
            return await self.beside("the descriptor", lambda: check_passed(fd, readonly=readonly), lambda _: None)
        except Exception:
            with suppress(OperatorError):
                await self.close([fd])
            raise
        except BaseException:
            _run(lambda: transport.close_all([fd]))
            raise

    async def resize(self, what: str, fd: int, size: int | None) -> int:
        """As `resize_image`; works on a copy of `fd`. `what` begins an error."""
        copy = os.dup(fd)

        def work() -> int:
            try:
                return resize_image(copy, size)
            finally:
                os.close(copy)

        return await self.beside(what, work, lambda _: None)

    async def close(self, fds: Iterable[int]) -> None:
        """Closes images; a share's writes may have to go out first. OperatorError: that goes on without us."""
        fds = list(fds)
        await self.beside("closing an image", lambda: transport.close_all(fds), lambda _: None)

    def _drop(self, image: Image) -> None:
        _run(lambda: transport.close_all([image.fd]))

    async def beside(self, what: str, work: Callable[[], T], undo: Callable[[T], None]) -> T:
        """`work()` in a thread; `undo` gets what comes when nobody waits any more. OperatorError: it takes too long."""
        loop = asyncio.get_running_loop()
        come: asyncio.Future[T] = loop.create_future()

        def arrived(result: T | None, error: Exception | None) -> None:
            self._waiting -= 1
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

        self._waiting += 1
        _run(run)
        try:
            async with asyncio.timeout(self._seconds):
                try:
                    return await come
                except asyncio.CancelledError:
                    if come.done() and not come.cancelled() and come.exception() is None:
                        undo(come.result())
                    raise
        except TimeoutError:
            reason = f"{what}: its storage has not answered in {self._seconds:g} s (limits.image_s)"
            raise OperatorError(reason, errno.ETIMEDOUT) from None


def _run(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="image", daemon=True).start()
