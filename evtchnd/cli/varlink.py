"""A blocking Varlink client: enough for a command that asks once or twice. Imports little: a command starts quickly."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from evtchnd.errors import OperatorError

# The daemon waits limits.detach_s for a guest that does not let a disk go; an hour is the most that can be set.
_MOST_BYTES = 16 << 20


class Client:
    """One connection to a daemon's operator's socket."""

    def __init__(self, path: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """`timeout` in seconds for a connection and for each reply; None waits. OperatorError if nobody is there."""
        self._path = os.fspath(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout)
        self._rest = b""
        try:
            self._sock.connect(self._path)
        except OSError as exc:
            self._sock.close()
            raise OperatorError(f"{self._path}: {_advice(exc)}") from exc

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The reply's parameters. OperatorError with the daemon's reason where it refuses."""
        return self._call({"method": method, "parameters": parameters})

    def upgrade(self, method: str, **parameters: Any) -> tuple[socket.socket, bytes]:
        """As `call`, and the connection leaves Varlink: its socket, the caller's from now on, and what came already."""
        self._call({"method": method, "parameters": parameters, "upgrade": True})
        sock, self._sock = self._sock, socket.socket(socket.AF_UNIX)
        sock.settimeout(None)
        rest, self._rest = self._rest, b""
        return sock, rest

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        message = json.dumps(call).encode()
        try:
            self._sock.sendall(message + b"\0")
            reply = json.loads(self._receive())
        except TimeoutError:
            raise OperatorError(f"{self._path}: no answer in {self._sock.gettimeout():g} s") from None
        except OSError as exc:
            raise OperatorError(f"{self._path}: {exc.strerror}") from exc
        except ValueError as exc:
            raise OperatorError(f"{self._path}: the answer is no JSON: {exc}") from exc
        answer: dict[str, Any] = reply.get("parameters") or {}
        if "error" in reply:
            name = str(reply["error"])
            said = answer.get("reason") or " ".join([name, *(f"{key}={value}" for key, value in answer.items())])
            raise OperatorError(str(said))
        return answer

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> bytes:
        while b"\0" not in self._rest:
            piece = self._sock.recv(1 << 16)
            if not piece:
                raise OperatorError(f"{self._path}: the daemon closed the connection without an answer; see its log")
            self._rest += piece
            if len(self._rest) > _MOST_BYTES:
                raise OperatorError(f"{self._path}: an answer above {_MOST_BYTES} bytes")
        message, _, self._rest = self._rest.partition(b"\0")
        return message


def _advice(exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
        return "no evtchnd serves there (--runtime-dir names its folder)"
    if isinstance(exc, PermissionError):
        return "not allowed: the socket belongs to the daemon's user and group"
    return exc.strerror or str(exc)
