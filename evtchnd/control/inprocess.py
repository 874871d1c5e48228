"""Workers as tasks of the control plane's loop (`single_process`), for debugging: a guest that stops one stops all."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

from evtchnd.control.zygote import Ended, Process
from evtchnd.worker.main import serve_here

log = logging.getLogger(__name__)


class _Here:
    """A worker that is a task of this process."""

    def __init__(self, pid: int, task: asyncio.Task[None]) -> None:
        self.pid = pid
        self._task = task

    def kill(self) -> None:
        self._task.cancel()

    def copy(self, number: int) -> int:
        return os.dup(number)

    def close(self) -> None:
        pass


class InProcess:
    """What Zygote is to worker processes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Nothing to start."""

    async def worker(self, sock: socket.socket, ended: Ended) -> Process:
        """As Zygote.worker."""

        async def serve(end: socket.socket) -> None:
            try:
                await serve_here(end)
            except asyncio.CancelledError:
                ended("was cancelled")
                raise
            except Exception as exc:
                log.exception("worker")
                ended(f"ended by a defect: {exc!r}")
            else:
                ended("")

        task = asyncio.get_running_loop().create_task(serve(sock.dup()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _Here(os.getpid(), task)

    async def close(self) -> None:
        """Waits for what is left."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
