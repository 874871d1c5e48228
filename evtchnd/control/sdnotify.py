"""systemd's side of a service: sd_notify(3), its descriptor store, and sockets that it passes in (sd_listen_fds(3)).

Without systemd (no NOTIFY_SOCKET, no LISTEN_FDS) every call here is harmless and does nothing.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import re
import socket
from collections.abc import Sequence

from evtchnd.errors import HostError

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_NAME = re.compile(r"[ -9;-~]{1,255}")  # sd_pid_notify_with_fds(3): ASCII, no control character, no colon


class Notifier:
    """Messages to the service manager; `address` is NOTIFY_SOCKET's value, empty: nobody listens."""

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environment(cls) -> Notifier:
        """Takes NOTIFY_SOCKET out of the environment: a child's message would not be taken anyway."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def __bool__(self) -> bool:
        return bool(self._address)

    def send(self, *lines: str, fds: Sequence[int] = (), wait: bool = True) -> None:
        """One datagram, so all lines take effect together. HostError if the manager does not take it.

        wait=False: BlockingIOError where its queue is full.
        """
        if not self._address:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        # opened anew each time: no descriptor that a fork could inherit, and a manager that was re-executed is found
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(self._address)
                flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
                sock.sendmsg(["\n".join(lines).encode()], rights, flags)
            except BlockingIOError:
                raise
            except OSError as exc:
                raise HostError(f"the service manager does not take {lines[0]}: {exc.strerror}") from exc

    def ready(self, status: str) -> None:
        """The service serves now."""
        self.send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """What `systemctl status` shows."""
        self.send(f"STATUS={status}")

    def stopping(self) -> None:
        """The service ends by its own doing."""
        self.send("STOPPING=1", "STATUS=stopping")

    def watchdog(self) -> None:
        """The service is alive: once in `watchdog_period()` seconds."""
        self.send("WATCHDOG=1")

    def store(self, name: str, *fds: int, poll: bool = False) -> None:
        """Gives copies of `fds` to the descriptor store under `name`; the next start gets them by `inherited()`.

        The manager drops a stored descriptor that hangs up or fails, unless told not to poll it (FDPOLL=0: a socket
        whose peer is gone still has its meaning here). Beyond FileDescriptorStoreMax it drops without a word.
        """
        self.send("FDSTORE=1", f"FDNAME={_checked(name)}", *([] if poll else ["FDPOLL=0"]), fds=fds)

    def forget(self, name: str) -> None:
        """Removes every stored descriptor of that name."""
        self.send("FDSTOREREMOVE=1", f"FDNAME={_checked(name)}")

    async def barrier(self, deadline: float = 5.0) -> None:
        """Returns when all that was sent before has been handled. HostError after `deadline` seconds.

        The manager closes the descriptor that comes with BARRIER=1 at that point; nothing else may be in the message.
        """
        if not self._address:
            return
        loop = asyncio.get_running_loop()
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        hung_up: asyncio.Future[None] = loop.create_future()
        try:
            try:
                self.send("BARRIER=1", fds=[theirs])
            finally:
                os.close(theirs)
            # end of file makes a pipe readable
            loop.add_reader(ours, _settle, hung_up)
            async with asyncio.timeout(deadline):
                await hung_up
        except TimeoutError:
            raise HostError(f"the service manager has not answered BARRIER=1 in {deadline:g} s") from None
        finally:
            loop.remove_reader(ours)
            os.close(ours)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a stored descriptor")
    return name


def inherited() -> dict[str, list[int]]:
    """Descriptors by name that were passed in: by socket units (FileDescriptorName=) and by the descriptor store.

    Takes LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES out of the environment; a second call finds nothing. The caller owns
    the descriptors; they are close-on-exec. HostError where the variables contradict each other.
    """
    count, pid, names = (os.environ.pop(key, "") for key in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if not count or pid != str(os.getpid()):
        return {}
    if not count.isdecimal():
        raise HostError(f"LISTEN_FDS={count} is no number")
    number = int(count)
    said = names.split(":") if names else ["unknown"] * number
    if len(said) != number:
        raise HostError(f"LISTEN_FDNAMES has {len(said)} names for {number} descriptors")
    found: dict[str, list[int]] = {}
    for fd, name in enumerate(said, _FIRST_FD):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError as exc:
            raise HostError(f"LISTEN_FDS={number}: descriptor {fd} ({name}) is not open") from exc
        found.setdefault(name, []).append(fd)
    return found


def watchdog_period() -> float | None:
    """Seconds between two `watchdog()`: half of WatchdogSec, as sd_watchdog_enabled(3) advises; None: not asked for."""
    micros, pid = (os.environ.pop(key, "") for key in ("WATCHDOG_USEC", "WATCHDOG_PID"))
    if not micros.isdecimal() or int(micros) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(micros) / 2e6
