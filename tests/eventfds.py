"""Looks at descriptors and eventfds."""

from __future__ import annotations

import os
import select
from pathlib import Path

TIMEOUT = 20.0


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def eventfd_id(fd: int) -> int:
    """Which eventfd a descriptor is, whatever its number."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("eventfd-id:"):
            return int(line.split()[1])
    raise AssertionError(f"{fd} is no eventfd")


def counter(fd: int) -> int:
    """Empties an eventfd that does not block."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(TIMEOUT * 1000))
