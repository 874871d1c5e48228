"""The VMM's end of the socket: blocking, for any thread, no event loop.

    client = Client("/run/evtchnd/vmm.sock", on_bind=bind, on_unbind=unbind)
    client.register(7, vcpus=2, name="web")
    client.memory([MemorySlot(0, gfn=0, pages=65536, fd=ram, offset=0)])
    client.grant_frames([GrantFrame(0, fd=ram, offset=0x10000000)])
    client.xenstore(port=1, fd=ram, offset=0x10004000)
    client.console(port=2, gfn=0xfeffa)  # where client.features has CONSOLE
    client.start()                       # returns when the domain is served
    ...
    client.release(); client.close()

Two ways to read the socket, since the daemon asks too (`on_bind`, `on_unbind`):
- a reader thread of the client's own (the default); `on_bind` and `on_unbind` run in it, one at a time;
- `thread=False`: whoever calls. A VMM with a loop of its own watches `fileno()` and calls `poll(0)` when it is
  readable; a call that waits for its reply answers the daemon's questions meanwhile, in the caller's thread.

In both ways calls may come from several threads. `on_bind` and `on_unbind` must not make a call that waits for a
reply (RuntimeError), and must not block for long: the daemon waits for the answer.

Descriptors that are passed in stay the caller's; they can be closed once the call has returned.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.errors import EvtchndError, HostError, VmmError

log = logging.getLogger(__name__)

OnBind = Callable[[list[tuple[int, int]]], Sequence[int]]
OnUnbind = Callable[[list[int]], None]


class Refused(VmmError):
    """The daemon's ERROR reply: `errno` and the reason as it gave them."""


class Disconnected(HostError):
    """The daemon has gone, or does not answer: the connection is of no more use."""


class MemorySlot(NamedTuple):
    """`pages` of 4096 bytes at guest frame `gfn` are the memfd `fd` from byte `offset` on."""

    slot: int
    gfn: int
    pages: int
    fd: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class GrantFrame:
    """Frame `index` of the grant table is the page of memfd `fd` at byte `offset`."""

    index: int
    fd: int
    offset: int


class BoundPort(NamedTuple):
    """A port that is bound already (RESUME): the kick eventfd from on_bind, the notify eventfd that it returned."""

    port: int
    kick: int
    notify: int


@dataclass(slots=True)
class _Waiter:
    """A call that waits for its reply."""

    done: threading.Event = field(default_factory=threading.Event)
    reply: p.Body | None = None


class Client:
    """A connection to the daemon. Made from a path or a connected SEQPACKET socket (then owned).

    `on_bind([(port, kick eventfd), ...])` makes each port's EVTCHNOP_send signal its kick eventfd, all or none, and
    returns a notify eventfd a port, in order: the one that the VMM's irqfd for the port listens to. The kick
    descriptors are the callee's from then on; the returned ones stay its own (keep both for a RESUME). When it
    raises, it has kept nothing: the kick descriptors are closed here, and the daemon gets the error (its `errno`, if
    it has one). `on_unbind([port, ...])` undoes that. `on_lost()` runs once in the reading thread when the daemon
    has closed or broken the connection, not after `close()`.

    Errors of every call: Refused (the daemon said no), Disconnected (it is gone, or did not answer in `timeout`
    seconds), VmmError (the arguments make no valid message).
    """

    def __init__(
        self,
        path_or_socket: str | os.PathLike[str] | socket.socket,
        *,
        on_bind: OnBind,
        on_unbind: OnUnbind,
        on_lost: Callable[[], None] | None = None,
        timeout: float = 10.0,
        features: int = p.ALL_FEATURES,
        thread: bool = True,
    ) -> None:
        self._on_bind, self._on_unbind, self._on_lost = on_bind, on_unbind, on_lost
        self._timeout = timeout
        self._endpoint = transport.Endpoint()
        self._waiters: dict[int, _Waiter] = {}
        self._lock = threading.Lock()  # endpoint, waiters, order of messages, _lost
        self._reading = threading.Lock()  # who reads the socket where there is no thread for it
        self._reader_ident = 0  # the thread that runs a callback
        self._lost = ""
        self._closing = False
        if isinstance(path_or_socket, socket.socket):
            self._sock = path_or_socket
        else:
            try:
                self._sock = transport.connect(path_or_socket)
            except OSError as e:
                raise Disconnected(f"{os.fspath(path_or_socket)}: {e.strerror or e}") from None
        self._sock.setblocking(False)
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._read_on, name="evtchnd-vmm", daemon=True) if thread else None
        if self._thread is not None:
            self._thread.start()
        try:
            self.limits = self._hello(features)
        except BaseException:
            self.close()
            raise

    # -- the domain's life --

    def _hello(self, features: int) -> p.HelloReply:
        reply = self.call(p.Hello(p.VERSION, features))
        if not isinstance(reply, p.HelloReply):
            raise VmmError("the reply to HELLO is empty", errno.EPROTO)
        if reply.version != p.VERSION:
            raise VmmError(f"the daemon speaks version {reply.version}, {p.VERSION} expected", errno.EPROTONOSUPPORT)
        return reply

    @property
    def features(self) -> p.Feature:
        """What both sides have."""
        return p.Feature(self.limits.features)

    def register(
        self,
        domid: int,
        *,
        vcpus: int = 1,
        name: str = "",
        uuid: bytes = bytes(16),
        long_mode: bool = True,
        grant_version: int = 1,
    ) -> None:
        """A new domain is this connection's from now on."""
        flags = p.RegisterFlag.LONG_MODE if long_mode else 0
        self.call(p.Register(domid, flags, vcpus, grant_version, uuid, name))

    def resume(
        self,
        domid: int,
        *,
        vcpus: int = 1,
        name: str = "",
        uuid: bytes = bytes(16),
        long_mode: bool = True,
        grant_version: int = 1,
    ) -> None:
        """As `register`, for a guest that has been running, at a daemon that was restarted; then `ports` is due."""
        flags = p.RegisterFlag.LONG_MODE if long_mode else 0
        self.call(p.Resume(domid, flags, vcpus, grant_version, uuid, name))

    def memory(self, slots: Sequence[MemorySlot]) -> None:
        """The whole table of memory slots; replaces what there was, or raises and changes nothing."""

        def entry(n: int, index: Sequence[int]) -> p.TableEntry:
            each = slots[n]
            return p.MemoryEntry(each.slot, index[0], each.gfn, each.pages, each.offset)

        self._table(p.Kind.MEMORY, [(each.fd,) for each in slots], entry)

    def grant_frames(self, frames: Sequence[GrantFrame]) -> None:
        """The whole list of grant frames, as `memory`."""

        def entry(n: int, index: Sequence[int]) -> p.TableEntry:
            return p.GrantEntry(frames[n].index, index[0], frames[n].offset)

        self._table(p.Kind.GRANTS, [(each.fd,) for each in frames], entry)

    def ports(self, ports: Sequence[BoundPort]) -> None:
        """The ports that are bound (after `resume`), as `memory`."""

        def entry(n: int, index: Sequence[int]) -> p.TableEntry:
            return p.PortEntry(ports[n].port, *index)

        self._table(p.Kind.PORTS, [(each.kick, each.notify) for each in ports], entry)

    def xenstore(self, port: int, fd: int, offset: int) -> None:
        """The guest's XenStore page, `offset` bytes into the memfd, and its event port."""
        self.call(p.XenStore(port, offset), [fd])

    def console(self, port: int, gfn: int) -> None:
        """The guest's primary console: guest frame `gfn`, which is in a memory slot, and its event port.

        Only where `features` has CONSOLE; an older daemon refuses it.
        """
        self.call(p.Console(port, gfn))

    def start(self, timeout: float | None = None) -> None:
        """Returns when the domain is served. The daemon binds ports meanwhile."""
        self.call(p.Start(), timeout=timeout)

    def release(self, reason: int = 0) -> None:
        """The guest has ended in an orderly way (`reason`: SHUTDOWN_* of sched.h); then `close`."""
        self.call(p.Release(reason))

    # -- while it runs --

    def slot_add(self, slot: MemorySlot) -> None:
        self.call(p.MemoryEntry(slot.slot, 0, slot.gfn, slot.pages, slot.offset), [slot.fd])

    def slot_remove(self, slot: int) -> None:
        """Returns when the daemon does not touch the slot any more."""
        self.call(p.SlotRemove(slot))

    def grant_frame_add(self, frame: GrantFrame) -> None:
        self.call(p.GrantEntry(frame.index, 0, frame.offset), [frame.fd])

    def grant_frame_remove(self, index: int) -> None:
        self.call(p.GrantFrameRemove(index))

    def disk(self, devid: int, vdev: str, fd: int, *, readonly: bool = False, cdrom: bool = False) -> None:
        """Gives the guest a disk: a file or block device, open for reading (and writing unless `readonly`)."""
        flags = (p.DiskFlag.READONLY if readonly else 0) | (p.DiskFlag.CDROM if cdrom else 0)
        self.call(p.Disk(devid, flags, vdev), [fd])

    def vif(self, devid: int, mac: bytes, fds: Sequence[int], *, mtu: int = 0) -> None:
        """Gives the guest a network interface: a TAP's queues (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; several:
        IFF_MULTI_QUEUE). mtu 0: the TAP's.
        """
        self.call(p.Vif(devid, len(fds), mac, mtu), fds)

    def vif_remove(self, devid: int) -> None:
        self.call(p.VifRemove(devid))

    def disk_remove(self, devid: int) -> None:
        self.call(p.DiskRemove(devid))

    def port_closed(self, port: int) -> None:
        """The guest closed a port that is bound; `protocol.ALL_PORTS` after a reset."""
        self.call(p.PortClosed(port))

    def ping(self) -> None:
        self.call(p.Ping())

    # -- asking --

    def _table(
        self,
        kind: p.Kind,
        wanted: Sequence[Sequence[int]],
        entry: Callable[[int, Sequence[int]], p.TableEntry],
    ) -> None:
        """BEGIN, chunks, COMMIT: `entry(n, indices)` names the descriptors `wanted[n]` in its chunk.

        A chunk has as many entries as their descriptors allow; those of one RAM memfd travel once a chunk.
        """
        self.call(p.TableBegin(kind, len(wanted)))
        chunk: list[p.TableEntry] = []
        places: dict[int, int] = {}
        for n, fds in enumerate(wanted):
            if len(places.keys() | fds) > p.MAX_FDS:
                self.call(p.TableChunk(kind, tuple(chunk)), list(places))
                chunk, places = [], {}
            chunk.append(entry(n, [places.setdefault(fd, len(places)) for fd in fds]))
        if chunk:
            self.call(p.TableChunk(kind, tuple(chunk)), list(places))
        self.call(p.TableCommit(kind))

    def call(self, message: p.Message, fds: Sequence[int] = (), *, timeout: float | None = None) -> p.Body:
        """Sends a request, waits for its reply and returns it. (For messages that have no method here.)"""
        if self._reader_ident == threading.get_ident():
            raise RuntimeError("a callback of the client must not make a call that waits for a reply")
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        waiter = _Waiter()
        with self._lock:
            if self._lost:
                raise Disconnected(self._lost)
            id, data = self._endpoint.ask(message)
            self._waiters[id] = waiter
        try:
            self._send(data, fds, deadline)
            if self._thread is not None:
                waiter.done.wait(max(0.0, deadline - time.monotonic()))
            else:
                self._read_until(waiter, deadline)
        finally:
            with self._lock:
                if self._waiters.pop(id, None) is not None:
                    self._endpoint.abandon(id)
        reply = waiter.reply
        if isinstance(reply, p.ErrorReply):
            raise Refused(reply.reason, reply.errno)
        if reply is None:
            raise Disconnected(self._lost or f"no answer to {message.type.name} from the daemon in time")
        return reply

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        while True:
            try:
                with self._lock:
                    if self._lost:
                        raise Disconnected(self._lost)
                    transport.send(self._sock, data, fds)
                return
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                raise Disconnected("the daemon has closed the connection") from None
            left = deadline - time.monotonic()
            if left <= 0:
                raise Disconnected("the daemon does not take messages")
            _wait(self._sock, select.POLLOUT, min(left, 0.5))

    # -- reading --

    def fileno(self) -> int:
        """To watch for readability where `thread=False`."""
        return self._sock.fileno()

    def poll(self, timeout: float = 0.0) -> bool:
        """Takes the messages that are there (waits `timeout` seconds for the first). False: the connection is lost."""
        if self._thread is not None:
            raise RuntimeError("the client's thread reads the socket")
        with self._reading:
            while not self._lost and _wait(self._sock, select.POLLIN, timeout):
                self._take()
                timeout = 0.0
        return not self._lost

    def _read_until(self, waiter: _Waiter, deadline: float) -> None:
        while not waiter.done.is_set() and not self._lost and (left := deadline - time.monotonic()) > 0:
            # another thread may read our answer: look often enough
            if self._reading.acquire(timeout=min(left, 0.05)):
                try:
                    if not waiter.done.is_set() and _wait(self._sock, select.POLLIN, min(left, 0.05)):
                        self._take()
                finally:
                    self._reading.release()

    def _read_on(self) -> None:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake_r, select.POLLIN)
        while not self._lost:
            ready = dict(poller.poll())
            if self._closing:
                break
            if self._sock.fileno() in ready:
                self._take()

    def _take(self) -> None:
        """One message off the socket, or the end of the connection."""
        try:
            came = transport.recv(self._sock)
        except BlockingIOError:
            return
        except VmmError as e:
            self._refuse(e)
            return
        except OSError as e:
            self._end(f"the daemon's socket: {e.strerror or e}")
            return
        if came is None:
            self._end("the daemon has closed the connection")
            return
        data, fds = came
        try:
            with self._lock:
                event = self._endpoint.feed(data, len(fds))
        except VmmError as e:
            transport.close_all(fds)
            self._refuse(e)
            return
        if isinstance(event, transport.Question):
            self._serve(event, fds)
            return
        transport.close_all(fds)  # no answer to a VMM carries any
        if event is not None:
            self._answered(event)

    def _answered(self, answer: transport.Answer) -> None:
        with self._lock:
            waiter = self._waiters.pop(answer.id, None)
        if waiter is not None:
            waiter.reply = answer.message
            waiter.done.set()

    def _refuse(self, error: VmmError) -> None:
        if isinstance(error, p.WireError):
            with self._lock:
                outcome = self._endpoint.refuse(error)
            if isinstance(outcome, transport.Answer):
                self._answered(outcome)
                return
            if outcome is not None:
                self._reply(outcome, ())
                return
        self._end(f"the daemon's message is wrong: {error}")

    def _serve(self, question: transport.Question, fds: list[int]) -> None:
        """The daemon's question: answered before the next message is read."""
        message = question.message
        reply: p.Body = p.Ack(message.type)
        answer_fds: Sequence[int] = ()
        self._reader_ident = threading.get_ident()
        try:
            if isinstance(message, p.BindPorts):
                # the callee owns the kick descriptors once it has returned
                answer_fds = list(self._on_bind([(port, fds[index]) for port, index in message.ports]))
                fds = []
                if len(answer_fds) != len(message.ports):
                    raise VmmError(f"{len(answer_fds)} notify eventfds for {len(message.ports)} ports")
                reply = p.BindPortsReply(tuple((port, i) for i, (port, _) in enumerate(message.ports)))
            elif isinstance(message, p.UnbindPorts):
                self._on_unbind(list(message.ports))
            elif not isinstance(message, p.Ping):
                raise VmmError(f"{message.type.name} is not for a VMM to answer", errno.EPROTO)
        except (EvtchndError, OSError) as e:
            reply, answer_fds = p.ErrorReply.of(message.type, e), ()
        except Exception as e:
            log.exception("%s: the VMM's callback failed", message.type.name)
            reply, answer_fds = p.ErrorReply(message.type, errno.EIO, f"the VMM's callback failed: {e!r}"), ()
        finally:
            self._reader_ident = 0
            transport.close_all(fds)
        self._reply(self._endpoint.answer(question.id, reply), answer_fds)

    def _reply(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            self._send(data, fds, time.monotonic() + self._timeout)
        except (Disconnected, OSError) as e:
            self._end(str(e))

    # -- the end --

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._lost:
                return
            self._lost = reason
            waiters, self._waiters = list(self._waiters.values()), {}
        # the daemon sees the end at once, whoever still holds this object
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for waiter in waiters:
            waiter.done.set()
        if self._on_lost is not None and not self._closing:
            self._on_lost()

    @property
    def lost(self) -> str:
        """Why the connection has ended, or an empty string."""
        return self._lost

    def close(self) -> None:
        """Ends the connection (a domain that was not released is dropped by the daemon). Can be called twice."""
        if self._closing:
            return
        self._closing = True
        self._end("the client was closed")
        os.write(self._wake_w, b"\0")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._sock.close()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _wait(sock: socket.socket, events: int, timeout: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(timeout * 1000))
