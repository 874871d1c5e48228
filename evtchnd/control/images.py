"""Images are opened, looked at and closed beside the loop: each of these blocks as long as its storage hangs."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from evtchnd import transport
from evtchnd.control.beside import beside, start
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
            start(lambda: transport.close_all([fd]))
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
        start(lambda: transport.close_all([image.fd]))

    async def beside(self, what: str, work: Callable[[], T], undo: Callable[[T], None]) -> T:
        """`work()` in a thread; `undo` gets what comes when nobody waits any more. OperatorError: it takes too long."""
        self._waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                return await beside(work, undo, self._one_less)
        except TimeoutError:
            reason = f"{what}: its storage has not answered in {self._seconds:g} s (limits.image_s)"
            raise OperatorError(reason, errno.ETIMEDOUT) from None

    def _one_less(self) -> None:
        self._waiting -= 1
