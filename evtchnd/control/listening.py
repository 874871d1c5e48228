"""The sockets that a daemon listens on: passed in by systemd, or made in the runtime folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evtchnd.errors import HostError

if TYPE_CHECKING:
    from evtchnd.control.config import Config

log = logging.getLogger(__name__)

# Name (FileDescriptorName= of a socket unit, FDNAME= in the descriptor store) and kind. VMMs pass descriptors with
# whole messages; Varlink and XenStore are streams.
KINDS = {
    "vmm": socket.SOCK_SEQPACKET,
    "xenstored": socket.SOCK_STREAM,
    "control": socket.SOCK_STREAM,
}
_MODE = 0o660
_BACKLOG = 128


class Listening:
    """Every socket of KINDS, in `sockets` by name; `made`: names of those that were made here."""

    def __init__(self, config: Config, inherited: Mapping[str, Sequence[int]]) -> None:
        """Owns the descriptors of `inherited` from now on. HostError where a socket cannot be had.

        Two daemons in one folder would take each other's sockets: a lock in the folder says no to the second.
        """
        self.sockets: dict[str, socket.socket] = {}
        self.made: list[str] = []
        self._paths = {"vmm": config.vmm_socket, "xenstored": config.xenstore_socket, "control": config.control_socket}
        self._lock = -1
        for fd in [fd for name, fds in inherited.items() for fd in (fds[1:] if name in KINDS else fds)]:
            log.warning("descriptor %d was passed in and is of no use here: closed", fd)
            os.close(fd)
        try:
            for name in KINDS:
                if name in inherited:
                    self._take(name, socket.socket(fileno=inherited[name][0]))
            if len(self.sockets) < len(KINDS):
                self._lock_folder(Path(config.runtime_dir))
            for name in KINDS:
                if name not in self.sockets:
                    self.sockets[name] = _listen(self._paths[name], KINDS[name])
                    self.made.append(name)
        except BaseException:
            self.close(keep=False)
            raise

    def close(self, *, keep: bool) -> None:
        """Closes all; removes the files of those that were made here unless a copy of them lives on (`keep`)."""
        for name, sock in self.sockets.items():
            sock.close()
            if name in self.made and not keep:
                self._paths[name].unlink(missing_ok=True)
        self.sockets.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self, name: str, sock: socket.socket) -> None:
        kind = KINDS[name]
        if sock.family != socket.AF_UNIX or sock.type != kind:
            sock.close()
            raise HostError(f"socket '{name}' was passed in and is no Unix {kind.name} socket")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            raise HostError(f"socket '{name}' was passed in and does not listen")
        address = sock.getsockname()
        if isinstance(address, str) and not Path(address).is_socket():
            # kept in the descriptor store while its folder went: nobody can connect to it any more
            log.warning("socket '%s' was passed in, but %s is gone: made anew", name, address)
            sock.close()
            return
        self.sockets[name] = sock

    def _lock_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostError(f"{folder}: another evtchnd serves there (--runtime-dir)") from None
        except OSError as exc:
            raise HostError(f"{folder}: {exc.strerror} (--runtime-dir names another folder)") from exc


def _listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # the folder is locked: whatever socket lies here was left by a process that is gone
        if path.is_socket():
            path.unlink()
        sock.bind(os.fspath(path))
        path.chmod(_MODE)  # nobody can connect before listen()
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"{path}: cannot listen: {exc.strerror or exc}") from exc
    return sock
