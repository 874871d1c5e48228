"""`evtchnctl capture`: what crosses a vif, as pcapng, into a file or another program, until ^C or so many packets.

Whole blocks are written only, so that what was written is a capture wherever it ends. A worker that is replaced begins
a new section; the file goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from evtchnd.cli.varlink import Client
from evtchnd.errors import OperatorError

# pcapng: an Enhanced Packet Block, an Interface Statistics Block; its option isb_ifdrop
_PACKET, _STATISTICS, _IFDROP = 6, 5, 5
# The longest block is a packet's: 262,144 bytes and its header. More is no pcapng.
_MOST_BLOCK = 1 << 19
# A worker that died is replaced in milliseconds; one that dies again and again, every half a minute.
_AGAIN_S, _PAUSE_S = 40.0, 0.2


class Capture:
    """One, of `device`. `begin()`, then `run()`. `frames`, `dropped`: what has become of it."""

    def __init__(self, connect: Callable[[], Client], device: str, *, snap: int, most: int) -> None:
        self.frames = self.dropped = 0
        self.vif: dict[str, Any] = {}
        self._connect = connect
        self._device = device
        self._snap = snap
        self._most = most
        self._sock: socket.socket | None = None
        self._ended = self._interrupted = False

    def begin(self) -> bytes:
        """OperatorError: it cannot. What has come already."""
        with self._connect() as client:
            asked = {"device": self._device, "snap": self._snap, "frames": self._most and self._most - self.frames}
            self.vif = client.call("io.evtchnd.NetworkCapture", **asked)
            self._sock, rest = client.upgrade("io.evtchnd.NetworkCapture", **asked)
        if self._interrupted:
            self.enough()
        return rest

    def run(self, rest: bytes, out: int) -> None:
        """Into a descriptor, until it ends. OperatorError: it cannot go on. BrokenPipeError: nobody reads any more."""
        while True:
            self._copy(rest, out)
            if self._ended or self._interrupted:
                return
            rest = self._again()

    def _again(self) -> bytes:
        """The connection was cut before the capture's end: its worker is being replaced, or all is over."""
        deadline = time.monotonic() + _AGAIN_S
        while True:
            try:
                return self.begin()
            except OperatorError:
                if self._interrupted or time.monotonic() > deadline or not self._is_there():
                    raise
            time.sleep(_PAUSE_S)

    def _is_there(self) -> bool:
        with self._connect() as client:
            vifs = client.call("io.evtchnd.NetworkList", domid=self.vif["domid"])["vifs"]
        return any(vif["devid"] == self.vif["devid"] and not vif["reason"] for vif in vifs)

    def enough(self) -> None:
        """^C: the other end hears of it, and sends what it has, and its last block."""
        self._interrupted = True
        if self._sock is not None:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                return

    def _copy(self, rest: bytes, out: int) -> None:
        sock, data = self._sock, bytearray(rest)
        if sock is None:
            return
        with sock:
            while True:
                done = self._blocks(data)
                if done:
                    _write(out, data[:done])
                    del data[:done]
                try:
                    piece = sock.recv(1 << 20)
                except OSError:
                    piece = b""
                if not piece:
                    return
                data += piece

    def _blocks(self, data: bytearray) -> int:
        """How many bytes of whole blocks are there; counts them."""
        at = 0
        while at + 8 <= len(data):
            kind, length = struct.unpack_from("=II", data, at)
            if not 12 <= length <= _MOST_BLOCK or length % 4:
                raise OperatorError("what comes is no pcapng")
            if at + length > len(data):
                break
            self.frames += kind == _PACKET
            if kind == _STATISTICS:
                self._ended = True
                self.dropped += _dropped(data[at : at + length])
            at += length
        return at


def _dropped(block: bytearray) -> int:
    at = 20
    while at + 4 <= len(block) - 4:
        code, length = struct.unpack_from("=HH", block, at)
        if code == _IFDROP and length == 8:
            return int(struct.unpack_from("=Q", block, at + 4)[0])
        at += 4 + length + (-length & 3)
    return 0


def show(connect: Callable[[], Client], device: str, path: str, *, snap: int, most: int) -> None:
    """Captures to `path`, "-" for standard output; says on standard error what has become of it. OperatorError."""
    if path == "-" and sys.stdout.isatty():
        raise OperatorError("a capture is no text: -w FILE, or a pipe (evtchnctl capture vif7.0 -w - | tshark -r -)")
    capture = Capture(connect, device, snap=snap, most=most)
    with _ends(capture.enough):
        rest = capture.begin()
        out = sys.stdout.fileno() if path == "-" else _create(path)
        try:
            capture.run(rest, out)
        finally:
            if path != "-":
                os.close(out)
            said = f"{capture.vif['vifname']}: {capture.frames} packets, {capture.dropped} dropped"
            print(f"evtchnctl: {said}", file=sys.stderr)


def _create(path: str) -> int:
    try:
        return os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise OperatorError(f"{path}: {exc.strerror}") from None


def _write(fd: int, data: bytearray) -> None:
    try:
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.write(fd, view[done:])
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OperatorError(f"writing the capture: {exc.strerror}") from None


@contextmanager
def _ends(enough: Callable[[], None]) -> Iterator[None]:
    """The first ^C (or SIGTERM) is told to `enough`, a second one ends this process."""

    def heard(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        enough()

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
