"""SEQPACKET sockets that carry descriptors, and the bookkeeping of questions and answers that both ends share.

Used for the VMM's socket and between the control plane and its workers; knows nothing of asyncio. Every descriptor
that `recv` returns belongs to the caller; when it raises, it has closed all that came.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evtchnd import protocol
from evtchnd.errors import HostError, VmmError
from evtchnd.protocol import Body, ErrorReply, Header, Message, TableEntry, WireError

BACKLOG = 128  # connections that wait for accept(); more get EAGAIN from connect()
MAX_OUTSTANDING = 256  # questions without an answer at one end: a device asks at most once at a time
_FD_SPACE = socket.CMSG_SPACE(protocol.MAX_FDS * 4)
_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """SO_PEERCRED: who connected (at that time, in our namespaces)."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"pid {self.pid} (uid {self.uid})"


def peer(sock: socket.socket) -> Peer:
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def listen(path: str | os.PathLike[str], mode: int = 0o660) -> socket.socket:
    """A listening, non-blocking SEQPACKET socket at `path`. HostError: somebody listens there, or it is no place.

    A socket that a dead process left is removed. The mode is set before anybody can connect.
    """
    path = os.fspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        sock.bind(path)
        Path(path).chmod(mode)  # nobody can connect before listen()
        sock.listen(BACKLOG)
    except HostError:
        sock.close()
        raise
    except OSError as e:
        sock.close()
        raise HostError(f"{path}: cannot listen: {e.strerror or e}") from None
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise HostError(f"{path}: is there and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full: it is alive
    raise HostError(f"{path}: another process listens there")


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A connected, blocking SEQPACKET socket. OSError as connect(2) gives it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One message with its descriptors, which stay the caller's. Nothing of it was sent when this raises.

    BlockingIOError where the socket does not block and its buffer is full; OSError as sendmsg(2) gives it.
    """
    if len(fds) > protocol.MAX_FDS:
        raise VmmError(f"{len(fds)} descriptors in a message, {protocol.MAX_FDS} at most", errno.E2BIG)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    # a SEQPACKET record goes whole or not at all: no short count to look at
    sock.sendmsg([data], control, socket.MSG_NOSIGNAL)


def recv(sock: socket.socket, *, limit: int = protocol.MAX_MESSAGE, flags: int = 0) -> tuple[bytes, list[int]] | None:
    """One message with its descriptors (close-on-exec, the caller's from now on), or None: the other end has closed.

    An empty message reads like the end of the connection, and is treated as one. BlockingIOError where there is none
    yet. WireError: longer than `limit`, or the kernel could not hand over each descriptor; the message was taken.
    """
    try:
        data, control, came, _ = sock.recvmsg(limit, _FD_SPACE, socket.MSG_CMSG_CLOEXEC | flags)
    except ConnectionResetError:  # it closed with messages of ours unread
        return None
    fds = _descriptors(control)
    if came & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        header = _header(data)
        if came & socket.MSG_CTRUNC:
            raise WireError("not every descriptor of a message arrived (RLIMIT_NOFILE?)", errno.EMFILE, header)
        raise WireError(f"message longer than {limit} bytes", errno.EMSGSIZE, header)
    if not data:
        close_all(fds)
        return None
    return data, fds


def _header(data: bytes) -> Header | None:
    try:
        return protocol.unpack_header(data)
    except WireError as e:
        return e.header


def _descriptors(control: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def close_all(fds: Iterable[int]) -> None:
    """Closes each; one that is closed already is a defect of ours and raises after the rest."""
    failed: OSError | None = None
    for fd in fds:
        try:
            os.close(fd)
        except OSError as e:
            if e.errno == errno.EBADF:
                failed = e
    if failed is not None:
        raise failed


# ---- questions and answers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """The other end asks; it wants one reply with this id."""

    id: int
    message: Message


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to what we asked as `id`: `asked` is our question; `message` an Ack, an ErrorReply or a body."""

    id: int
    asked: Message
    message: Body


class Endpoint:
    """Request ids and the matching of replies, the same at both ends. Pure: bytes in, bytes out.

    Both ends ask, each in its own space of ids; a reply is known by its flag. An end that waits for an answer keeps
    reading: the other end's question may come first.
    """

    def __init__(self) -> None:
        self._next = 1
        self._asked: dict[int, Message] = {}
        self._abandoned: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Questions that wait for an answer."""
        return len(self._asked)

    def ask(self, message: Message) -> tuple[int, bytes]:
        """Id and bytes of a question. VmmError (EBUSY): too many wait for an answer."""
        if len(self._asked) + len(self._abandoned) >= MAX_OUTSTANDING:
            raise VmmError(f"{MAX_OUTSTANDING} requests wait for an answer", errno.EBUSY)
        while self._next in self._asked or self._next in self._abandoned:
            self._next = self._next % 0xFFFFFFFF + 1
        id = self._next
        data = protocol.pack(message, id=id)
        self._next = id % 0xFFFFFFFF + 1
        self._asked[id] = message
        return id, data

    def abandon(self, id: int) -> None:
        """Nobody waits for that answer any more (a deadline): it is dropped when it comes."""
        if self._asked.pop(id, None) is not None:
            self._abandoned.add(id)

    def answer(self, id: int, message: Body) -> bytes:
        """Bytes of a reply."""
        return protocol.pack(message, id=id)

    def refuse(self, error: WireError) -> bytes | Answer | None:
        """What becomes of a message that `feed` or `recv` refused.

        bytes: the ERROR reply to send. Answer: it was the reply to our question, which has failed for this reason.
        None: there is nothing to go on with, the connection has to end.
        """
        header = error.header
        if header is None:
            return None
        refusal = ErrorReply.of(header.type, error)
        if not header.is_reply:
            return protocol.pack(refusal, id=header.id)
        asked = self._asked.get(header.id)
        if asked is None or asked.type != header.type:
            return None
        del self._asked[header.id]
        return Answer(header.id, asked, refusal)

    def feed(self, data: bytes, nfds: int) -> Question | Answer | None:
        """What a message is. None: the answer to an abandoned question (close its descriptors).

        WireError: see `refuse`; the descriptors are the caller's to close.
        """
        header, message = protocol.unpack(data, nfds)
        if not header.is_reply:
            if not isinstance(message, Message):  # pragma: no cover
                raise WireError("a question without a body", header=header)
            return Question(header.id, message)
        asked = self._asked.pop(header.id, None)
        if asked is None:
            if header.id in self._abandoned:
                self._abandoned.discard(header.id)
                return None
            raise WireError(f"a reply with id {header.id}, which was not asked", errno.EPROTO)
        if asked.type != header.type:
            raise WireError(f"a reply of type {header.type} to {asked.type.name}", errno.EPROTO)
        return Answer(header.id, asked, message)


# ---- tables in chunks ------------------------------------------------------------------------------------------


class TableAssembly:
    """A table that comes as BEGIN, chunks, COMMIT; owns the descriptors of what it has collected.

    One table at a time: a new BEGIN drops what is not committed, and so does a chunk that is refused.
    """

    def __init__(self) -> None:
        self._kind = 0
        self._count = 0
        self._entries: list[TableEntry] = []
        self._fds: list[int] = []
        self._open = False

    def begin(self, message: protocol.TableBegin) -> None:
        self.drop()
        self._kind, self._count, self._open = message.kind, message.entries, True

    def chunk(self, message: protocol.TableChunk, fds: Sequence[int]) -> None:
        """Takes the chunk and its descriptors; when it is refused (VmmError), closes them and all before."""
        base = len(self._fds)
        self._fds += fds
        try:
            if not self._open:
                raise VmmError("table chunk without TABLE_BEGIN", errno.EPROTO)
            if message.kind != self._kind:
                raise VmmError(f"chunk of table kind {message.kind} in a table of kind {self._kind}", errno.EPROTO)
            if len(self._entries) + len(message.entries) > self._count:
                raise VmmError(f"more entries than the {self._count} of TABLE_BEGIN", errno.E2BIG)
        except VmmError:
            self.drop()
            raise
        self._entries += (_moved(entry, base) for entry in message.entries)

    def commit(self, message: protocol.TableCommit) -> tuple[list[TableEntry], list[int]]:
        """The checked table, and the descriptors that its indices name now: the caller's. VmmError: dropped."""
        try:
            if not self._open or message.kind != self._kind:
                raise VmmError(f"no table of kind {message.kind} was begun", errno.EPROTO)
            if len(self._entries) != self._count:
                raise VmmError(f"{len(self._entries)} of {self._count} table entries came", errno.EPROTO)
            protocol.check_table(self._entries)
        except VmmError:
            self.drop()
            raise
        entries, fds = self._entries, self._fds
        self._entries, self._fds, self._open = [], [], False
        return entries, fds

    def drop(self) -> None:
        """Forgets the table and closes its descriptors."""
        fds, self._fds, self._entries, self._open = self._fds, [], [], False
        close_all(fds)


def _moved(entry: TableEntry, base: int) -> TableEntry:
    """The entry with its descriptor index counted from the table's first descriptor."""
    if isinstance(entry, protocol.MemoryEntry):
        return protocol.MemoryEntry(entry.slot, entry.fd_index + base, entry.gfn, entry.pages, entry.offset)
    if isinstance(entry, protocol.GrantEntry):
        return protocol.GrantEntry(entry.index, entry.fd_index + base, entry.offset)
    return protocol.PortEntry(entry.port, entry.kick_fd_index + base, entry.notify_fd_index + base, entry.flags)


def bound(asked: protocol.BindPorts, answer: protocol.BindPortsReply, fds: Sequence[int]) -> Mapping[int, int]:
    """Port to notify eventfd. VmmError: the answer names other ports (the descriptors are the caller's to close)."""
    if {port for port, _ in asked.ports} != {port for port, _ in answer.ports}:
        raise VmmError("the answer to BIND_PORTS names other ports", errno.EPROTO)
    return {port: fds[index] for port, index in answer.ports}
