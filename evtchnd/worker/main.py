"""A worker process: what the zygote runs after a fork."""

from __future__ import annotations

import os
import socket

import uvloop

from evtchnd.worker import sandbox
from evtchnd.worker.domain import Backend, Worker
from evtchnd.worker.messages import DEFECT
from evtchnd_backends import blkback, console, netback  # the one line that binds backends to the daemon

BACKENDS: dict[str, Backend] = {"vbd": blkback.run, "console": console.run, "vif": netback.run}


def serve(sock: socket.socket, *, sandboxed: bool) -> None:
    """Serves the control plane's `sock` until it closes. HostError: there is no sandbox here."""

    async def life() -> None:
        if sandboxed:
            # the loop has its descriptors, and nothing of the control plane has been read
            sandbox.enter()
        await Worker(sock, BACKENDS, alone=True, die=_die).run()

    # not uvloop.run(): each run of a loop begins with a socketpair, and it would run once more to clean up; this
    # process ends instead
    uvloop.new_event_loop().run_until_complete(life())


def _die() -> None:
    """Ends this process here and now: the next one finds rings and journals as after a SIGKILL."""
    os._exit(DEFECT)


async def serve_here(sock: socket.socket) -> None:
    """The same as a task of a loop that runs already (single process)."""
    await Worker(sock, BACKENDS).run()
