"""Descriptors of this process: how many there may be, and those that several table entries name."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from evtchnd.errors import HostError

# For what is not a domain's: standard streams, sockets, the loop, the zygote, operators, XenStore clients.
_RESERVE = 128


def raise_limit() -> int:
    """RLIMIT_NOFILE up to its hard limit: systemd's soft default, 1024, is there for select(). Returns the limit."""
    soft, hard = limits()
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def limits() -> tuple[int, int]:
    """RLIMIT_NOFILE, soft and hard. From /proc: the unit's filter refuses prlimit64, even to those who only ask."""
    for line in Path("/proc/self/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return int(soft), int(hard)
    raise HostError("/proc/self/limits has no 'Max open files'")


def in_use() -> int:
    """Open descriptors of this process."""
    # the size is their number since Linux 6.2; to list thousands of them for each domain that comes takes milliseconds
    folder = "/proc/self/fd"
    return os.stat(folder).st_size or len(list(Path(folder).iterdir())) - 1


def require(count: int, what: str) -> None:
    """HostError if `count` more descriptors would bring this process near its limit."""
    limit, _ = limits()
    used = in_use()
    if used + count + _RESERVE > limit:
        raise HostError(f"{what}: {count} descriptors more are too many: {used} of {limit} are in use (LimitNOFILE)")


class Held:
    """A descriptor that lives as long as somebody uses it; made with one user."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._users = 1

    def take(self) -> Held:
        """One user more."""
        self._users += 1
        return self

    def drop(self) -> None:
        """One user less; the last one closes it."""
        self._users -= 1
        if self._users == 0:
            os.close(self.fd)
