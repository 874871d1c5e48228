"""Imported by a daemon before its zygote forks: a worker dies at a write to DEADLY, in the way that a file says.

The file `deaths` in the image's folder has lines "how": each death takes one; with none left the write is served.
A worker in its sandbox cannot read that file: such a daemon has `sandbox=False`.
"""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path
from typing import Any

from evtchnd_backends.vbd import Queue

DEADLY = 1024
"""The sector."""

_begin = Queue._begin


def _dies(how: str, folder: Path) -> None:
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "SIGBUS":  # a real one: memory behind the end of its file
        path = folder / "short"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as area:
            os.truncate(path, 0)
            area[0] = 1
    if how == "MemoryError":
        raise MemoryError
    raise ValueError("a defect")


def _begin_or_die(self: Queue, ring: Any, req: Any) -> None:
    folder = Path(f"/proc/self/fd/{self._disk.fd}").readlink().parent
    file = folder / "deaths"
    if req.op == 1 and req.sector == DEADLY and file.exists() and (deaths := file.read_text().split()):
        file.write_text("\n".join(deaths[1:]))
        _dies(deaths[0], folder)
    _begin(self, ring, req)


Queue._begin = _begin_or_die  # type: ignore[method-assign]
