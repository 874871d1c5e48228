"""This terminal as the lab's second serial line, for a command inside that is talked to."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

LOOK_S = 0.2
# Of the lab: what is written there comes out here.
DEVICE = Path("/dev/ttyS1")


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Every key goes into the lab, ^C too; the terminal is as it was afterwards."""
    stdin = sys.stdin.fileno()
    if not os.isatty(stdin):
        yield
        return
    before = termios.tcgetattr(stdin)
    try:
        tty.setraw(stdin, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)


class Terminal:
    """QEMU's end is a Unix socket at `path`, there as soon as QEMU is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._typed = True  # more may be

    def relay(self) -> None:
        """Bytes both ways, for a moment."""
        if self._sock is None:
            with contextlib.suppress(OSError):
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(os.fspath(self._path))
                self._sock = sock
        sources = [] if self._sock is None else [self._sock.fileno()]
        stdin = sys.stdin.fileno()
        ready, _, _ = select.select([*sources, *([stdin] if self._typed and sources else [])], [], [], LOOK_S)
        if self._sock is not None and self._sock.fileno() in ready:
            data = self._sock.recv(1 << 16)
            os.write(sys.stdout.fileno(), data)
        if self._sock is not None and stdin in ready:
            data = os.read(stdin, 1 << 10)
            self._typed = bool(data)
            self._sock.sendall(data)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
