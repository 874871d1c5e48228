"""`evtchnctl console`: this terminal becomes a guest's, as `xl console` makes it, until ^] or the domain's end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType

from evtchnd.cli.varlink import Client
from evtchnd.errors import OperatorError

ESCAPE = b"\x1d"  # ^], xenconsole's
# A worker that died is replaced in milliseconds; one that dies again and again, every half a minute.
_AGAIN_S = 40.0
_PAUSE_S = 0.2


def show(connect: Callable[[], Client], domid: int, devid: int) -> str:
    """Shows the console until it ends; -> why, for the operator. OperatorError: it cannot be had at all."""
    sock, first = _open(connect, domid, devid)
    with _raw(sys.stdin.fileno()) as wake:
        while True:
            with sock:
                if _relay(sock, first, wake):
                    return ""
            # its worker is being replaced, or the domain has ended
            found = _again(connect, domid, devid)
            if isinstance(found, str):
                return found
            sock, first = found


def _open(connect: Callable[[], Client], domid: int, devid: int) -> tuple[socket.socket, bytes]:
    with connect() as client:
        return client.upgrade("io.evtchnd.Console", domid=domid, devid=devid)


def _again(connect: Callable[[], Client], domid: int, devid: int) -> tuple[socket.socket, bytes] | str:
    deadline = time.monotonic() + _AGAIN_S
    while True:
        try:
            return _open(connect, domid, devid)
        except OperatorError as exc:
            error = exc
        try:
            with connect() as client:
                there = any(row["domid"] == domid for row in client.call("io.evtchnd.List")["domains"])
        except OperatorError as exc:
            return str(exc)
        if not there:
            return f"domain {domid} has ended"
        if time.monotonic() > deadline:
            return str(error)
        time.sleep(_PAUSE_S)


def _relay(sock: socket.socket, first: bytes, wake: int) -> bool:
    """Bytes both ways. True: the operator has left; False: the other end has."""
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    sources = [sock.fileno(), stdin, wake]
    _write(stdout, first)
    while True:
        ready, _, _ = select.select(sources, [], [])
        if sock.fileno() in ready:
            data = _read(sock.fileno())
            if not data:
                return False
            _write(stdout, data)
        if stdin in ready:
            data = _read(stdin)
            typed, escape, _ = data.partition(ESCAPE)
            try:
                sock.sendall(typed)
            except OSError:
                return False
            if escape:
                return True
            if not data:  # nobody types any more: what the guest says is still of interest
                sources.remove(stdin)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # a terminal that has gone, a connection that was cut
        return b""


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[int]:
    """The terminal raw, and as it was afterwards, whatever ends us (but SIGKILL).

    Yields a descriptor that a signal makes readable: one that comes just before a select() would not end it.
    """
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(waker)
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.signal(number, _leave) for number in ends}
    before = termios.tcgetattr(fd) if os.isatty(fd) else None
    try:
        if before is not None:
            tty.setraw(fd, termios.TCSANOW)
        yield wake
    finally:
        if before is not None:
            # now: a terminal that is stopped (^S) would never drain
            termios.tcsetattr(fd, termios.TCSANOW, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(wake)
        os.close(waker)


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)
