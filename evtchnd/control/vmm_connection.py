"""The daemon's end of a VMM's connection: messages to a domain and back, over a raw SEQPACKET socket on the loop.

Requests of a VMM are carried out one after the other, in the order in which they came; replies to the daemon's own
questions are taken at once, also while a request (START) waits for one of them. What is wrong in a message is
answered with an error and one line in the log; what is no message of the protocol ends the connection, and with it
the domain.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.control.config import Limits
from evtchnd.control.domain import Domain
from evtchnd.errors import HostError, OperatorError, VmmError
from evtchnd.protocol import State
from evtchnd.transport import Answer, Endpoint, Question, TableAssembly
from evtchnd.worker.link import Link

log = logging.getLogger(__name__)

# What the daemon has of the optional parts of the protocol.
FEATURES = p.ALL_FEATURES
# Requests that wait behind one that takes its time (START): a VMM sends its tables in a few messages and waits.
_MOST_REQUESTS = 64


class Host(Protocol):
    """The daemon, as a connection sees it."""

    def register(self, register: p.Register, connection: VmmConnection) -> Domain:
        """A new domain. VmmError: its number is taken, there are too many; HostError: no descriptors left."""

    async def release(self, domain: Domain, reason: str) -> None: ...
    async def attach_passed(self, domain: Domain, disk: p.Disk, fd: int) -> None: ...
    async def detach_passed(self, domain: Domain, devid: int) -> None: ...
    async def attach_passed_vif(self, domain: Domain, vif: p.Vif, fds: list[int]) -> None: ...
    async def detach_passed_vif(self, domain: Domain, devid: int) -> None: ...
    def gone(self, connection: VmmConnection) -> None: ...


class VmmConnection:
    """One connection. It begins to read at once, and ends by itself when the VMM does."""

    def __init__(self, sock: socket.socket, host: Host, limits: Limits) -> None:
        self.peer = transport.peer(sock)
        self.domain: Domain | None = None
        self._host = host
        self._limits = limits
        self._state = State.NEW
        self._endpoint = Endpoint()
        self._waiting: dict[int, asyncio.Future[tuple[p.Body, list[int]]]] = {}
        self._table = TableAssembly()
        self._requests: deque[tuple[Question, list[int]]] = deque()
        self._busy: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Task[None] | None = None
        self._farewell = ""  # what RELEASE said
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.call_later(limits.hello_s, self._late)
        self._link = Link(sock, self._received, self._closed, most=limits.vmm_queue)

    @property
    def name(self) -> str:
        """As every line about it begins."""
        return self.domain.label if self.domain is not None else f"vmm {self.peer}"

    def close(self, reason: str) -> None:
        """Ends the connection, and its domain; returns at once. Idempotent."""
        if self._ended is None:
            self._closed(reason)

    async def closed(self) -> None:
        """Waits until the connection and its domain have ended (after `close`)."""
        if self._ended is not None:
            await asyncio.wait([self._ended])

    # ---- what the daemon asks

    async def ask(self, message: p.Message, fds: Sequence[int] = ()) -> tuple[p.Body, list[int]]:
        """The VMM's answer and its descriptors, the caller's. VmmError: it refuses; HostError: none in time."""
        if not self._link.is_open:
            raise HostError(f"{self.name}: the VMM has gone")
        id, data = self._endpoint.ask(message)
        future = self._waiting[id] = self._loop.create_future()
        try:
            self._link.send(data, fds)
            body, came = await asyncio.wait_for(future, self._limits.request_s)
        except TimeoutError:
            raise HostError(f"the VMM has not answered {message.type.name} in {self._limits.request_s:g} s") from None
        finally:
            if self._waiting.pop(id, None) is not None and not future.done():
                self._endpoint.abandon(id)
        if isinstance(body, p.ErrorReply):
            transport.close_all(came)
            raise VmmError(f"the VMM refuses {message.type.name}: {body.reason}", body.errno)
        return body, came

    async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
        """Port to kick eventfd -> port to notify eventfd, the caller's."""
        notifies: dict[int, int] = {}
        try:
            todo = list(ports.items())
            while todo:
                now, todo = todo[: p.MAX_FDS], todo[p.MAX_FDS :]
                question = p.BindPorts(tuple((port, index) for index, (port, _) in enumerate(now)))
                body, fds = await self.ask(question, [fd for _, fd in now])
                try:
                    if not isinstance(body, p.BindPortsReply):
                        raise VmmError("the answer to BIND_PORTS is none", errno.EPROTO)
                    notifies.update(transport.bound(question, body, fds))
                except BaseException:
                    transport.close_all(fds)
                    raise
        except BaseException:
            transport.close_all(notifies.values())
            if notifies:
                self.unbind_ports(list(notifies))
            raise
        return notifies

    def unbind_ports(self, ports: Sequence[int]) -> None:
        """Does not wait; what the VMM has against it goes to the log."""
        if self._link.is_open and self._state is not State.GONE:
            self._spawn(self._unbind(ports))

    async def _unbind(self, ports: Sequence[int]) -> None:
        try:
            await self.ask(p.UnbindPorts(tuple(ports)))
        except (VmmError, HostError) as exc:
            log.warning("%s: ports %s: %s", self.name, ", ".join(map(str, ports)), exc)

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what comes

    def _received(self, data: bytes, fds: list[int]) -> None:
        try:
            come = self._endpoint.feed(data, len(fds))
        except p.WireError as exc:
            transport.close_all(fds)
            self._refuse(exc)
            return
        if isinstance(come, Question):
            if len(self._requests) >= _MOST_REQUESTS:
                transport.close_all(fds)
                self._reply(come.id, p.ErrorReply(come.message.type, errno.EBUSY, "too many requests wait"))
                return
            self._requests.append((come, fds))
            if self._busy is None:
                self._busy = self._loop.create_task(self._work())
        elif come is None:
            transport.close_all(fds)
        else:
            self._answered(come, fds)

    def _refuse(self, exc: p.WireError) -> None:
        log.warning("%s: refused: %s", self.name, exc)
        what = self._endpoint.refuse(exc)
        if isinstance(what, bytes):
            self._link.send(what)
        elif what is not None:
            self._answered(what, [])
        else:
            raise VmmError(f"no message of the protocol: {exc}")  # the link ends

    def _answered(self, answer: Answer, fds: list[int]) -> None:
        future = self._waiting.get(answer.id)
        if future is None or future.done():
            transport.close_all(fds)
        else:
            future.set_result((answer.message, fds))

    async def _work(self) -> None:
        """Carries out what is queued. A task, since some requests wait for the worker or the VMM itself."""
        try:
            while self._requests:
                question, fds = self._requests.popleft()
                await self._request(question, fds)
        finally:
            self._busy = None

    async def _request(self, question: Question, fds: list[int]) -> None:
        message = question.message
        spec = p.MESSAGES[message.type]
        body: p.Body
        try:
            if not spec.vmm or self._state not in spec.states:
                transport.close_all(fds)
                raise VmmError(f"{message.type.name} has no place in state {self._state.name}", errno.EPROTO)
            body = await self._HANDLERS[message.type](self, message, fds) or p.Ack(message.type)
        except (VmmError, HostError, OperatorError) as exc:
            text = str(exc)
            log.warning("%s: %s refused: %s", self.name, message.type.name, text.removeprefix(f"{self.name}: "))
            number = errno.ENOSPC if isinstance(exc, HostError) else exc.errno
            body = p.ErrorReply(message.type, number, text)
        except Exception as exc:
            log.exception("%s: %s: a defect of evtchnd", self.name, message.type.name)
            body = p.ErrorReply(message.type, errno.EIO, f"defect: {exc!r}")
        self._reply(question.id, body)
        if self._state is State.GONE and self._ended is None:
            self._closed("")

    def _reply(self, id: int, body: p.Body) -> None:
        self._link.send(self._endpoint.answer(id, body))

    # ---- requests; each closes the descriptors that came with it, or hands them on

    def _of(self) -> Domain:
        if self.domain is None:
            raise VmmError("no domain is registered", errno.EPROTO)
        return self.domain

    async def _hello(self, hello: p.Hello, _: list[int]) -> p.Body:
        if hello.version != p.VERSION:
            raise VmmError(f"version {hello.version} is not served, {p.VERSION} is", errno.EPROTONOSUPPORT)
        self._state = State.GREETED
        return p.HelloReply(
            features=hello.features & FEATURES,
            max_slots=min(p.MAX_SLOTS, self._limits.memory_slots),
            max_grant_frames=min(p.MAX_GRANT_FRAMES, self._limits.grant_frames),
            max_ports=min(p.MAX_PORTS, self._limits.ports),
        )

    async def _register(self, register: p.Register, _: list[int]) -> None:
        self.domain = self._host.register(register, self)
        self._deadline.cancel()
        self._state = State.SETUP
        how = "resumed" if self.domain.resumed else "registered"
        log.info("%s: %s: %s by %s", self.name, self.domain.name, how, self.peer)

    async def _table_begin(self, message: p.TableBegin, _: list[int]) -> None:
        self._table.begin(message)

    async def _table_chunk(self, message: p.TableChunk, fds: list[int]) -> None:
        self._table.chunk(message, fds)

    async def _table_commit(self, message: p.TableCommit, _: list[int]) -> None:
        entries, fds = self._table.commit(message)
        domain = self._of()
        if message.kind == p.Kind.MEMORY:
            domain.set_slots([each for each in entries if isinstance(each, p.MemoryEntry)], fds)
        elif message.kind == p.Kind.GRANTS:
            domain.set_frames([each for each in entries if isinstance(each, p.GrantEntry)], fds)
        else:
            domain.set_ports([each for each in entries if isinstance(each, p.PortEntry)], fds)

    async def _slot_add(self, entry: p.MemoryEntry, fds: list[int]) -> None:
        await self._of().add_slot(entry, fds[0])

    async def _slot_remove(self, message: p.SlotRemove, _: list[int]) -> None:
        await self._of().remove_slot(message.slot)

    async def _frame_add(self, entry: p.GrantEntry, fds: list[int]) -> None:
        await self._of().add_frame(entry, fds[0])

    async def _frame_remove(self, message: p.GrantFrameRemove, _: list[int]) -> None:
        await self._of().remove_frame(message.index)

    async def _xenstore(self, message: p.XenStore, fds: list[int]) -> None:
        self._of().set_store_page(message.port, fds[0], message.offset)

    async def _console(self, message: p.Console, _: list[int]) -> None:
        self._of().consoles.set_primary(message.port, message.gfn)

    async def _start(self, _: p.Start, __: list[int]) -> None:
        self._table.drop()
        await self._of().start()
        self._state = State.SERVED

    async def _port_closed(self, message: p.PortClosed, _: list[int]) -> None:
        self._of().port_closed(message.port)

    async def _disk(self, message: p.Disk, fds: list[int]) -> None:
        await self._host.attach_passed(self._of(), message, fds[0])

    async def _disk_remove(self, message: p.DiskRemove, _: list[int]) -> None:
        await self._host.detach_passed(self._of(), message.devid)

    async def _vif(self, message: p.Vif, fds: list[int]) -> None:
        await self._host.attach_passed_vif(self._of(), message, fds)

    async def _vif_remove(self, message: p.VifRemove, _: list[int]) -> None:
        await self._host.detach_passed_vif(self._of(), message.devid)

    async def _release(self, message: p.Release, _: list[int]) -> None:
        self._state = State.GONE
        self._farewell = f"released by its VMM (reason {message.reason})"
        self._of().give_up()
        await self._host.release(self._of(), self._farewell)

    async def _ping(self, _: p.Ping, __: list[int]) -> None:
        pass

    _HANDLERS: Mapping[p.Type, Callable[[VmmConnection, Any, list[int]], Awaitable[p.Body | None]]] = {
        p.Type.HELLO: _hello,
        p.Type.REGISTER: _register,
        p.Type.RESUME: _register,
        p.Type.TABLE_BEGIN: _table_begin,
        p.Type.TABLE_CHUNK: _table_chunk,
        p.Type.TABLE_COMMIT: _table_commit,
        p.Type.SLOT_ADD: _slot_add,
        p.Type.SLOT_REMOVE: _slot_remove,
        p.Type.GRANT_FRAME_ADD: _frame_add,
        p.Type.GRANT_FRAME_REMOVE: _frame_remove,
        p.Type.XENSTORE: _xenstore,
        p.Type.START: _start,
        p.Type.PORT_CLOSED: _port_closed,
        p.Type.DISK: _disk,
        p.Type.DISK_REMOVE: _disk_remove,
        p.Type.RELEASE: _release,
        p.Type.PING: _ping,
        p.Type.CONSOLE: _console,
        p.Type.VIF: _vif,
        p.Type.VIF_REMOVE: _vif_remove,
    }

    # ---- its end

    def _late(self) -> None:
        self.close(f"no REGISTER within {self._limits.hello_s:g} s")

    def _closed(self, reason: str) -> None:
        self._link.close()
        self._deadline.cancel()
        if self._ended is None:
            self._ended = self._loop.create_task(self._end(reason))

    async def _end(self, reason: str) -> None:
        if reason:
            log.warning("%s: connection ended: %s", self.name, reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(HostError("the VMM has gone"))
                future.exception()
        if self._busy is not None and self._busy is not asyncio.current_task():
            self._busy.cancel()
            await asyncio.wait([self._busy])
        while self._requests:
            transport.close_all(self._requests.popleft()[1])
        self._table.drop()
        self._state = State.GONE
        if self.domain is not None:
            # also after RELEASE: what carried it out was cancelled if the VMM did not wait for the answer
            gone = "its VMM has gone" if not reason else "its VMM's connection ended"
            await self._host.release(self.domain, self._farewell or gone)
        for task in list(self._tasks):
            task.cancel()
        self._host.gone(self)
