"""A worker process: what the zygote runs after a fork."""

from __future__ import annotations

import socket

import uvloop

from evtchnd.worker.domain import Backend, Worker
from evtchnd_backends import blkback, console, netback  # the one line that binds backends to the daemon

BACKENDS: dict[str, Backend] = {"vbd": blkback.run, "console": console.run, "vif": netback.run}


def serve(sock: socket.socket) -> None:
    """Serves the control plane's `sock` until it closes."""
    uvloop.run(Worker(sock, BACKENDS, alone=True).run())


async def serve_here(sock: socket.socket) -> None:
    """The same as a task of a loop that runs already (single process)."""
    await Worker(sock, BACKENDS).run()
