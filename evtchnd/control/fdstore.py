"""The descriptor store: what the service manager holds for the process that comes after this one.

systemd's (sd_pid_notify_with_fds(3)), or anybody's who starts this program with NOTIFY_SOCKET, keeps what comes with
FDSTORE=1, and gives it to the next one with LISTEN_FDS and LISTEN_FDNAMES (`evtchnd --keep` does). Without
NOTIFY_SOCKET nothing is kept, and every call here does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from evtchnd.control.sdnotify import Notifier
from evtchnd.errors import HostError

log = logging.getLogger(__name__)

# A manager that is busy (daemon-reload) reads its socket later; the loop does not wait in a system call for it.
_AGAIN_S = 0.002
_TAKEN_S = 5.0


class DescriptorStore:
    """names: what it holds already; most: how many it takes, since the manager closes those beyond without a word."""

    def __init__(self, notifier: Notifier, names: Iterable[str] = (), most: int = 0) -> None:
        self.over = False  # this process ends: whatever is held stays for the next one
        self._notifier = notifier
        self._names = list(names)
        self._most = most
        self._turn = asyncio.Lock()

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self._notifier)

    def require(self, count: int, what: str) -> None:
        """HostError if so many more have no room."""
        held = len(self._names)
        if self and held + count > self._most:
            raise HostError(
                f"{what}: {count} descriptors more do not fit into the service manager's store: "
                f"it holds {held} of {self._most} (FileDescriptorStoreMax=, limits.stored_descriptors)"
            )

    async def keep(self, fds: Mapping[str, int], what: str) -> None:
        """Copies of `fds`, by name. Returns when the manager holds them. HostError: it holds none of them."""
        if not self or self.over or not fds:
            return
        self.require(len(fds), what)
        self._names += fds
        try:
            async with self._turn:
                for name, fd in fds.items():
                    await self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
            await self._notifier.barrier(_TAKEN_S)
        except BaseException as exc:
            await self.forget(fds)
            if isinstance(exc, HostError):
                raise HostError(f"{what}: {exc}") from None
            raise

    async def forget(self, names: Iterable[str]) -> None:
        """Those are held no longer. Returns when the manager was told; harmless where it holds none.

        A manager that does not take it is told of in the log: what it keeps then, the next process lets go.
        """
        if not self or self.over:
            return
        names = list(names)
        self._names = [name for name in self._names if name not in names]
        try:
            async with self._turn:
                for name in names:
                    await self._send("FDSTOREREMOVE=1", f"FDNAME={name}")
        except HostError as exc:
            log.warning("%s and what belongs to it is not let go: %s", names[0], exc)

    async def _send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        try:
            async with asyncio.timeout(_TAKEN_S):
                while True:
                    try:
                        self._notifier.send(*lines, fds=fds, wait=False)
                        return
                    except BlockingIOError:
                        await asyncio.sleep(_AGAIN_S)
        except TimeoutError:
            raise HostError(f"the service manager does not take {lines[0]} in {_TAKEN_S:g} s") from None
