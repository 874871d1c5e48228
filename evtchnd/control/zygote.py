"""Forks workers: a process that has imported everything, has one thread, and holds nothing but its socketpair.

A fork of it takes a few milliseconds and shares the interpreter's pages, where an exec and the imports take a tenth
of a second. It is forked first thing in `main`: a fork of a process that has threads may find locks held for ever.

    control plane                                 zygote
        spawn ------------------ worker's socket -->  fork, worker serves the socket
        <-- u32 pid ------------ pidfd -------------
        <-- u32 pid, i32 status -------------------  when it ended (only its parent can wait for it)

When the control plane goes, the zygote sees the end of file (or the parent's death) and goes, and with it every
worker, by its parent's death or by the end of file on its own socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from evtchnd import transport
from evtchnd._core.uring import descriptor_of
from evtchnd.control import logs
from evtchnd.control.descriptors import raise_limit
from evtchnd.errors import HostError
from evtchnd.worker.link import Link
from evtchnd.worker.messages import DEFECT

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_SPAWN = b"spawn"
_STARTED = struct.Struct("<I")
_ENDED = struct.Struct("<Ii")
# Answers that may wait to be read by this very process.
_MOST_WAITING = 4096
# A fork takes some milliseconds; on a host that swaps, much longer.
_SPAWN_S = 10.0
# The zygote has nothing to finish.
_END_S = 5.0

Ended = Callable[[str], None]
"""Called once when a worker has ended, with the reason ("" in order, "killed by SIGKILL")."""


class Process(Protocol):
    """A worker that runs."""

    pid: int

    def kill(self) -> None:
        """Ends it at once; nothing if it has ended. Idempotent; `close()` lets go of it."""

    def copy(self, number: int) -> int:
        """A copy of its descriptor `number`. HostError where the kernel refuses."""

    def close(self) -> None: ...


class Workers(Protocol):
    """Where workers come from: a zygote, or this process (evtchnd.control.inprocess)."""

    def start(self) -> None: ...
    async def worker(self, sock: socket.socket, ended: Ended) -> Process: ...
    async def close(self) -> None: ...


class Forked:
    """A worker that the zygote forked, known by its pidfd: its pid may be another's once it has ended."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def kill(self) -> None:
        """SIGKILL."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def copy(self, number: int) -> int:
        """By pidfd_getfd."""
        return descriptor_of(self._pidfd, number)

    def close(self) -> None:
        """Closes the pidfd. Idempotent."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


class Zygote:
    """The control plane's end. `fork()` before everything else, `start()` when the loop runs."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._sock = sock
        self.pid = pid
        self._link: Link | None = None
        self._asked: deque[asyncio.Future[Forked]] = deque()
        self._ends: dict[int, Ended] = {}

    @classmethod
    def fork(cls, *, sandbox: bool = True) -> Zygote:
        """Forks the zygote: before any event loop or thread exists, after logging is set up on standard error.

        sandbox: whether workers are confined (evtchnd/worker/sandbox.py).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run(lambda: _serve(theirs.fileno(), parent, sandboxed=sandbox))
        theirs.close()
        return cls(ours, pid)

    def start(self) -> None:
        """Takes answers on the running loop."""
        self._link = Link(self._sock, self._received, self._closed, most=_MOST_WAITING)

    async def worker(self, sock: socket.socket, ended: Ended) -> Process:
        """A new worker that serves `sock`, of which the caller closes its copy. HostError if none can be forked."""
        link = self._link
        if link is None or not link.is_open:
            raise HostError("the process that starts workers has ended: restart evtchnd")
        future: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        link.send(_SPAWN, [sock.fileno()])
        try:
            process = await asyncio.wait_for(asyncio.shield(future), _SPAWN_S)
        except BaseException as exc:
            future.add_done_callback(_drop)
            if isinstance(exc, TimeoutError):
                raise HostError(f"no worker was forked in {_SPAWN_S:g} s") from None
            raise
        self._ends[process.pid] = ended
        return process

    async def close(self) -> None:
        """Ends the zygote and waits for it. Idempotent."""
        if self._link is not None:
            self._link.close()
        else:
            self._sock.close()
        if self.pid:
            pid, self.pid = self.pid, 0
            await _wait(pid)

    def _received(self, data: bytes, fds: list[int]) -> None:
        if len(data) == _STARTED.size and self._asked:
            (pid,) = _STARTED.unpack(data)
            future = self._asked.popleft()
            if pid:
                future.set_result(Forked(pid, fds[0]))
            else:
                future.set_exception(HostError("no worker could be forked: a limit of processes or memory?"))
        elif len(data) == _ENDED.size:
            # A turn later: whoever asked for a worker that ended at once has then been given it.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._end, *_ENDED.unpack(data))
        else:
            transport.close_all(fds)

    def _end(self, pid: int, status: int) -> None:
        ended = self._ends.pop(pid, None)
        if ended is not None:
            ended(_describe(status))

    def _closed(self, reason: str) -> None:
        log.error("the process that starts workers has ended: %s", reason or "it died")
        for future in self._asked:
            if not future.done():
                future.set_exception(HostError("the process that starts workers has ended"))
        self._asked.clear()
        # its workers died with it
        ends, self._ends = self._ends, {}
        for ended in ends.values():
            ended("ended with the process that started it")


def _drop(future: asyncio.Future[Forked]) -> None:
    """A worker that came when nobody waited any more: it ends, since its socket's other end is closed."""
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == DEFECT:
        return "ended by a defect"
    return f"exit status {code}" if code else ""


async def _wait(pid: int) -> None:
    """Waits for a child, which gets SIGKILL after a while."""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), _END_S)
    except TimeoutError:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    os.waitpid(pid, 0)  # noqa: ASYNC222 -- it has ended


# ---- the zygote's process, and its children --------------------------------------------------------------------


def _run(main: Callable[[], None]) -> None:
    """Runs `main` and ends this process: nothing of the parent's code may run on in a fork."""
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        logging.getLogger(__name__).exception("process %d ends", os.getpid())
    finally:
        os._exit(status)


def _become(name: str, parent: int) -> None:
    """Names the process for ps and top (15 bytes), and ties its life to its parent's."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)


def _keep_only(fd: int) -> socket.socket:
    """Closes every descriptor but the standard streams and `fd`."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- names are numbers here
        if int(name) > 2 and int(name) != fd:
            with suppress(OSError):  # the one that listed them
                os.close(int(name))
    return socket.socket(fileno=os.dup(fd))


def _serve(fd: int, parent: int, *, sandboxed: bool) -> None:
    from evtchnd.worker import sandbox  # imported here: every worker is a copy of this process
    from evtchnd.worker.main import serve

    _become("evtchnd-zygote", parent)
    # libuv's own io_uring would be one more way around the workers' filter
    os.environ["UV_USE_IO_URING"] = "0"
    # A terminal's Ctrl-C and systemd's SIGTERM reach every process: the control plane alone decides in which order
    # workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise_limit()
    sock = _keep_only(fd)
    os.close(fd)
    me = os.getpid()
    if sandboxed:
        sandbox.prepare()
        if not sandbox.landlock_abi():
            log.warning("this kernel has no Landlock: what keeps workers from files is their system call filter alone")
    gc.collect()
    gc.freeze()  # or the first collection in each worker touches, and so copies, every page
    workers: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != sock.fileno():
                pid = workers.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                transport.send(sock, _ENDED.pack(*os.waitpid(pid, 0)))
                continue
            message = transport.recv(sock)
            if message is None:
                return
            _, (theirs,) = message
            try:
                pid = os.fork()
            except OSError as exc:
                log.error("no worker could be forked: %s", exc.strerror)
                transport.send(sock, _STARTED.pack(0))
                os.close(theirs)
                continue
            if pid == 0:
                sock.close()
                transport.close_all(workers)
                _run(lambda fd=theirs: _work(fd, me, serve, sandboxed))  # type: ignore[misc]
            os.close(theirs)
            pidfd = os.pidfd_open(pid)
            workers[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
            transport.send(sock, _STARTED.pack(pid), [pidfd])


def _work(fd: int, parent: int, serve: Callable[..., None], sandboxed: bool) -> None:
    _become("evtchnd-worker", parent)
    logs.connect()
    serve(socket.socket(fileno=fd), sandboxed=sandboxed)
