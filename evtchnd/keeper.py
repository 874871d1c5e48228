"""`evtchnd --keep`: where no systemd is, holds what a daemon has to find again, and starts it whenever it has ended.

It speaks systemd's side of sd_notify(3) and sd_listen_fds(3), as far as the daemon uses them: FDSTORE=1 with FDNAME,
FDSTOREREMOVE=1, BARRIER=1; what it holds comes with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES. Any other program that
starts the daemon can do the same.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from evtchnd.errors import HostError

# The unit's FileDescriptorStoreMax
MOST = 4096
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_MESSAGE, _FDS = 4096, 253
# One that ends as soon as it has begun is not started again at once.
_SHORT_S, _PAUSE_S = 1.0, 0.1
_TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Keeper:
    """Starts `command` again and again; `run()` returns the last exit status, once it was told to end.

    SIGTERM and SIGINT end the daemon and then the keeper; SIGHUP goes to the daemon. A daemon that ends because its
    configuration is wrong (78) is not started again.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        """`folder`: where its socket lies. HostError."""
        self._command = list(command)
        self._held: list[tuple[str, int]] = []
        self._path = folder / "keep.sock"
        self._over = False
        self._pid = 0
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._sock.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as exc:
            raise HostError(f"{self._path}: {exc.strerror}") from exc

    def run(self) -> int:
        """Until SIGTERM or SIGINT."""
        wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(woken)
        for number in _TOLD:
            signal.signal(number, self._told)
        try:
            while True:
                began = time.monotonic()
                status = self._life(wake)
                if self._over or status == os.EX_CONFIG:
                    return max(status, 0)  # one that we ended before it could do so in order has not failed
                if time.monotonic() - began < _SHORT_S:
                    select.select([wake], [], [], _PAUSE_S)
        finally:
            for _, fd in self._held:
                _close(fd)
            self._sock.close()
            self._path.unlink(missing_ok=True)

    def _told(self, number: int, _: object) -> None:
        self._over = self._over or number != signal.SIGHUP
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _life(self, wake: int) -> int:
        """One daemon, from its start to its end; its exit status, below 0 where a signal ended it."""
        pid = self._start()
        pidfd = os.pidfd_open(pid)
        self._pid = pid
        try:
            if self._over:
                os.kill(pid, signal.SIGTERM)
            poll = select.poll()
            for fd in (self._sock.fileno(), pidfd, wake):
                poll.register(fd, select.POLLIN)
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if wake in ready:
                    os.read(wake, 4096)
                self._take(pid)  # before its end is looked at: its last words count
                if pidfd in ready:
                    break
        finally:
            self._pid = 0
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _start(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            for number in _TOLD:
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            above = _FIRST_FD + len(self._held)
            copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for _, fd in self._held]
            for place, fd in enumerate(copies, _FIRST_FD):
                os.dup2(fd, place)
            names = ":".join(name for name, _ in self._held)
            told = {"LISTEN_FDS": str(len(copies)), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names}
            environment = {**os.environ, **(told if copies else {})}
            environment |= {"NOTIFY_SOCKET": str(self._path), "FDSTORE": str(MOST)}
            os.execve(self._command[0], self._command, environment)
        finally:
            os._exit(127)

    def _take(self, pid: int) -> None:
        """Every message that is there. Only the daemon's own process is listened to."""
        while True:
            try:
                data, control, _, _ = self._sock.recvmsg(
                    _MESSAGE, socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * _FDS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            fds, sender = array.array("i"), 0
            for level, kind, body in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(body[: len(body) // 4 * 4])
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    sender = int.from_bytes(body[:4], sys.byteorder)
            said = dict(line.partition("=")[::2] for line in data.decode(errors="replace").splitlines())
            self._handle(said if sender == pid else {}, list(fds))

    def _handle(self, said: dict[str, str], fds: list[int]) -> None:
        """Takes the descriptors: a barrier is answered by their end."""
        name = said.get("FDNAME", "stored")
        if said.get("FDSTORE") == "1":
            while fds and len(self._held) < MOST:
                self._held.append((name, fds.pop(0)))
        elif said.get("FDSTOREREMOVE") == "1":
            for each, fd in self._held:
                if each == name:
                    _close(fd)
            self._held = [(each, fd) for each, fd in self._held if each != name]
        for fd in fds:
            _close(fd)


def _close(fd: int) -> None:
    with suppress(OSError):  # a file of a share that has gone says so when it is closed, and is closed
        os.close(fd)
