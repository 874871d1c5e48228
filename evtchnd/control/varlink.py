"""A Varlink server (varlink.org) on asyncio: calls are JSON objects, each ended by a NUL byte.

Knows nothing of what it serves: a `Service` has interfaces, an `Interface` its description and a table of methods.
A client's calls are answered in order, the next is read when the reply is written: nothing queues up here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

log = logging.getLogger(__name__)

# A reply that its client does not read: the client is on this host and has asked for it.
_WRITE_S = 10.0
# Without a descriptor to spare, the next look at who waits to be accepted.
_ACCEPT_PAUSE_S = 1.0


class Call(Struct, frozen=True):
    """A client's message. Keys that are not known here are passed over: systemd's clients may send newer ones."""

    method: str
    parameters: dict[str, Any] | None = None
    oneway: bool = False  # no reply is wanted
    more: bool = False  # several replies are welcome; a single one is an answer, too
    upgrade: bool = False  # the connection shall leave Varlink after the reply


class NoParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """Of a method that takes none."""


class Upgraded(Exception):
    """The connection has left Varlink: nothing is read from it or written to it any more."""


class VarlinkError(Exception):
    """An error reply: its full name and its parameters."""

    def __init__(self, name: str, **parameters: Any) -> None:
        super().__init__(name, parameters)
        self.name = name
        self.parameters = parameters


@dataclass(frozen=True)
class Method:
    """parameters: what a call must fit; call: gets them and returns the reply's parameters, a Struct or a mapping.

    upgrade: of a method whose connection may leave Varlink. Gets the parameters, the connection's descriptor (to be
    copied: it is closed here) and the reply's bytes, which whoever takes the connection over sends first. What it
    raises is the reply instead, and the connection's last.
    """

    parameters: type[Struct]
    call: Callable[[Any], Awaitable[Struct | Mapping[str, Any]]]
    upgrade: Callable[[Any, int, bytes], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Interface:
    """The table of an interface. `failed` makes the error reply of an exception that no method should let out."""

    description: str
    methods: Mapping[str, Method]
    failed: Callable[[Exception], VarlinkError]

    @property
    def name(self) -> str:
        """From the description: io.evtchnd."""
        found = re.search(r"^interface +(\S+)", self.description, re.MULTILINE)
        if not found:
            raise ValueError("a description begins with its interface")
        return found[1]


class Service:
    """Interfaces and org.varlink.service, which tells of them."""

    NAME: ClassVar = "org.varlink.service"

    def __init__(self, interfaces: Iterable[Interface], *, vendor: str, product: str, version: str, url: str) -> None:
        own = Interface(
            _SERVICE_DESCRIPTION,
            {
                "GetInfo": Method(NoParameters, self._get_info),
                "GetInterfaceDescription": Method(_Which, self._get_description),
            },
            lambda exc: VarlinkError(f"{self.NAME}.MethodNotImplemented", method=str(exc)),
        )
        self._interfaces = {interface.name: interface for interface in (own, *interfaces)}
        self._about = {"vendor": vendor, "product": product, "version": version, "url": url}

    async def reply(self, message: bytes, leave: Callable[[], int] | None = None) -> bytes | None:
        """The answer to one message without its NUL; None where none is wanted. ValueError: no call at all.

        `leave`: stops reading from the connection and tells its descriptor. Upgraded: it is somebody else's now.
        """
        try:
            call = msgspec.json.decode(message, type=Call)
        except msgspec.MsgspecError as exc:
            raise ValueError(str(exc)) from exc
        try:
            answer: Mapping[str, Any] = {"parameters": await self._run(call, leave)}
        except VarlinkError as exc:
            answer = {"error": exc.name, "parameters": exc.parameters}
        return None if call.oneway else msgspec.json.encode(answer)

    async def _run(self, call: Call, leave: Callable[[], int] | None) -> Struct | Mapping[str, Any]:
        where, _, name = call.method.rpartition(".")
        interface = self._interfaces.get(where)
        if interface is None:
            raise VarlinkError(f"{self.NAME}.InterfaceNotFound", interface=where)
        method = interface.methods.get(name)
        if method is None:
            raise VarlinkError(f"{self.NAME}.MethodNotFound", method=call.method)
        if call.upgrade and (method.upgrade is None or leave is None or call.oneway):
            raise VarlinkError(f"{self.NAME}.InvalidParameter", parameter="upgrade")
        try:
            parameters = msgspec.convert(call.parameters or {}, method.parameters)
        except msgspec.ValidationError as exc:
            raise VarlinkError(f"{self.NAME}.InvalidParameter", parameter=_parameter_of(str(exc))) from exc
        try:
            reply = await method.call(parameters)
            if call.upgrade and method.upgrade is not None and leave is not None:
                await method.upgrade(parameters, leave(), msgspec.json.encode({"parameters": reply}) + b"\0")
                raise Upgraded
            return reply
        except (VarlinkError, Upgraded):
            raise
        except Exception as exc:
            raise interface.failed(exc) from exc

    async def _get_info(self, _: NoParameters) -> Mapping[str, Any]:
        return {**self._about, "interfaces": sorted(self._interfaces)}

    async def _get_description(self, which: _Which) -> Mapping[str, Any]:
        interface = self._interfaces.get(which.interface)
        if interface is None:
            raise VarlinkError(f"{self.NAME}.InterfaceNotFound", interface=which.interface)
        return {"description": interface.description}


class _Which(Struct, frozen=True, forbid_unknown_fields=True):
    interface: str


class Server:
    """Serves a Service on a listening Unix stream socket, which stays its owner's."""

    def __init__(
        self, service: Service, sock: socket.socket, *, connections: int, message_bytes: int, idle_s: float
    ) -> None:
        self._service = service
        self._sock = sock
        self._most = connections
        self._message_bytes = message_bytes
        self._idle_s = idle_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accepts from now on; needs a running loop."""
        self._paused = None
        self._sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sock, self._accept)

    async def close(self) -> None:
        """Accepts no more and ends every connection. Idempotent."""
        asyncio.get_running_loop().remove_reader(self._sock)
        if self._paused:
            self._paused.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as exc:
            # out of descriptors: the socket stays readable, so looking at once again would be a busy loop
            log.warning("operator's socket: cannot accept: %s", exc.strerror)
            loop.remove_reader(self._sock)
            self._paused = loop.call_later(_ACCEPT_PAUSE_S, self.start)
            return
        if len(self._tasks) >= self._most:
            log.warning("operator's socket: %d connections are open (limits.operator_connections): refused", self._most)
            sock.close()
            return
        task = loop.create_task(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=self._message_bytes)
        left = False

        def leave() -> int:
            nonlocal left
            left = True
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            return sock.fileno()

        try:
            while not left:
                async with asyncio.timeout(self._idle_s):
                    message = await reader.readuntil(b"\0")
                answer = await self._service.reply(message[:-1], leave)
                if answer is not None:
                    writer.write(answer + b"\0")
                    async with asyncio.timeout(_WRITE_S):
                        await writer.drain()
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                log.warning("operator's socket: a connection ended within a message of %d bytes", len(exc.partial))
        except asyncio.LimitOverrunError:
            log.warning("operator's socket: a message above %d bytes: closed", self._message_bytes)
        except ValueError as exc:
            log.warning("operator's socket: no Varlink call: %s: closed", exc)
        except Upgraded:
            log.debug("operator's socket: a connection was upgraded")
        except (TimeoutError, ConnectionError):
            log.debug("operator's socket: closed: idle, or its client is gone")
        finally:
            # abort, not close: a client that does not read must not keep us
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()


def _parameter_of(text: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.domid`" -> domid."""
    place = re.search(r" - at `\$\.([A-Za-z0-9_]+)", text)
    field = re.search(r" field `([^`]*)`", text)
    return field[1] if field else place[1] if place else "parameters"


_SERVICE_DESCRIPTION = """\
# What every Varlink service tells of itself.
interface org.varlink.service

# Who made this service, and the interfaces it has.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# The text that describes one of the interfaces.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)
"""
