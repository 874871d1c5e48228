"""Forks workers: a process that has imported everything, has one thread, and holds nothing but its socketpair."""

from __future__ import annotations

import socket


class Zygote:
    """The control plane's end. `Zygote.fork()` first thing in `main`, before any loop, thread or descriptor."""

    @classmethod
    def fork(cls) -> Zygote:
        raise NotImplementedError

    async def worker(self, sock: socket.socket) -> tuple[int, int]:
        """A new worker that serves `sock` -> (pid, pidfd)."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
