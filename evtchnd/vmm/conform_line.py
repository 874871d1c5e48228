"""One connection of the VMM's socket, message by message, for the conformance suite: it may send nonsense."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.errors import VmmError


class CaseFailed(Exception):
    """The other end did what the protocol does not allow; the text says what."""


class Skipped(Exception):
    """The case cannot be tried here; the text says why."""


class Ended(CaseFailed):
    """The other end has closed the connection."""


def require(ok: bool, text: str) -> None:
    if not ok:
        raise CaseFailed(text)


Serve = Callable[[p.Message, list[int]], tuple[p.Body, list[int]]]


@dataclass(slots=True)
class Line:
    """One connection, message by message, with no protection against sending nonsense.

    `serve(question, descriptors) -> (answer, descriptors)` answers what the other end asks while we wait; the
    descriptors on both ways are its own to keep or close. `questions` remembers what was asked.
    """

    sock: socket.socket
    serve: Serve
    timeout: float
    questions: list[p.Message] = field(default_factory=list)
    _id: int = 0

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self.sock.settimeout(self.timeout)
        try:
            transport.send(self.sock, data, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise Ended("the connection was closed") from None
        except TimeoutError:
            raise CaseFailed(f"takes no message for {self.timeout:g} s") from None

    def recv(self) -> tuple[bytes, list[int]] | None:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        if not poller.poll(self.timeout * 1000):
            raise CaseFailed(f"nothing came for {self.timeout:g} s")
        return transport.recv(self.sock)

    def message(self) -> tuple[p.Header, p.Body, list[int]] | None:
        """The next one, read, with its descriptors; None at the end of the connection."""
        came = self.recv()
        if came is None:
            return None
        data, fds = came
        try:
            return *p.unpack(data, len(fds)), fds
        except VmmError as e:
            transport.close_all(fds)
            raise CaseFailed(f"sends what is no message: {e}") from None

    def next_id(self) -> int:
        self._id += 1
        return self._id

    def reply_to(self, id: int) -> tuple[p.Body, list[int]]:
        """The reply with that id; serves questions meanwhile. Ended: the connection was closed instead."""
        while (came := self.message()) is not None:
            header, message, fds = came
            if not header.is_reply:
                self._serve(header, message, fds)
            elif header.id == id:
                return message, fds
            else:
                transport.close_all(fds)
                raise CaseFailed(f"a reply has id {header.id}, {id} was asked")
        raise Ended("the connection was closed instead of a reply")

    def _serve(self, header: p.Header, message: p.Body, fds: list[int]) -> None:
        if not isinstance(message, p.Message):
            raise CaseFailed("a question without a body")
        self.questions.append(message)
        answer, back = self.serve(message, fds)
        self.send(p.pack(answer, id=header.id), back)

    def ask(self, message: p.Message, fds: Sequence[int] = ()) -> tuple[p.Body, list[int]]:
        """Any reply, an error included."""
        id = self.next_id()
        self.send(p.pack(message, id=id), fds)
        return self.reply_to(id)

    def well(self, message: p.Message, fds: Sequence[int] = ()) -> p.Body:
        """A reply that carries no descriptor and is no error."""
        reply, came = self.ask(message, fds)
        transport.close_all(came)
        if isinstance(reply, p.ErrorReply):
            raise CaseFailed(f"{message.type.name} is refused: {os.strerror(reply.errno)}: {reply.reason}")
        return reply

    def refused(self, data: bytes | p.Message, fds: Sequence[int] = (), *, errnos: Iterable[int] = ()) -> p.ErrorReply:
        """The ERROR reply that must come; its number is one of `errnos` (none given: any)."""
        id = self.next_id()
        if isinstance(data, p.Message):
            data = p.pack(data, id=id)
        else:
            data = data[:8] + id.to_bytes(4, "little") + data[12:]
        self.send(data, fds)
        reply, came = self.reply_to(id)
        transport.close_all(came)
        if not isinstance(reply, p.ErrorReply):
            raise CaseFailed("is accepted, an ERROR reply was due")
        wanted = list(errnos)
        names = " or ".join(os.strerror(each) for each in wanted)
        require(not wanted or reply.errno in wanted, f"errno {reply.errno} ({reply.reason}), due is {names}")
        require(bool(reply.reason.strip()), "the ERROR reply gives no reason")
        return reply

    def ended(self) -> None:
        """The other end must close now; what it still sends is taken."""
        until = time.monotonic() + self.timeout
        while time.monotonic() < until:
            came = self.recv()
            if came is None:
                return
            transport.close_all(came[1])
        raise CaseFailed("the connection is not closed")


def body_of(message: p.Message) -> bytes:
    return p.pack(message, id=0)[p.HEADER_SIZE :]


def raw(
    type: int,
    body: bytes = b"",
    *,
    magic: int = p.MAGIC,
    flags: int = 0,
    size: int | None = None,
    nfds: int = 0,
    reserved: bytes = bytes(12),
) -> bytes:
    """A message of any fields; id 0."""
    whole = p.HEADER_SIZE + len(body) if size is None else size
    return p.HEADER.pack(magic, type, flags, 0, whole, nfds)[:20] + reserved + body


def descriptors_of(pid: int) -> int:
    """Open descriptors of the process at the other end. Skipped: it cannot be seen."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError as e:
        raise Skipped(f"/proc/{pid}/fd: {e.strerror}") from None


def is_eventfd(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"
