"""Route netlink on the control plane's loop: requests by pyroute2, and links' news.

pyroute2's own asyncio sockets use `create_datagram_endpoint`, which uvloop refuses for AF_NETLINK ("cannot open a UDP
handle, invalid family 16"). Here the socket is a plain one with a reader of the loop, on uvloop and asyncio alike; all
that pyroute2 does with messages stays its own. Requests and news have a socket each: a notification carries the
sequence number of the request of another process that caused it, which may be that of one of ours.

The import takes pyroute2 along (0.3 s): network.py makes it in a thread, when the first vif comes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_DELLINK, RTM_NEWLINK, RTMGRP_LINK
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from evtchnd.errors import OperatorError

T = TypeVar("T")

LINKS = RTMGRP_LINK
# linux/if.h
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
# A message of a link has a kilobyte or two, the kernel's largest skb for netlink 32.
_DATAGRAM_BYTES = 32768
# In one turn of the loop; a message takes pyroute2 about a fifth of a millisecond.
_MOST_A_TURN = 8
# At a time: their answers have room in the socket's buffer (SO_RCVBUF is 212,992 bytes where nobody changed it).
_MOST_REQUESTS = 8
# One request: the kernel's lock for interfaces may be held for long where hundreds of them are made.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Link:
    """An interface as netlink tells of it. master: the index of its bridge, 0: none; here: False: it is deleted."""

    index: int
    name: str
    mtu: int
    master: int
    up: bool
    running: bool
    here: bool = True


class _Reader:
    """What pyroute2 takes for a transport: `sock` in the loop, each datagram handed on."""

    def __init__(
        self, sock: socket.socket, take: Callable[[bytes], object], failed: Callable[[OSError], object]
    ) -> None:
        self._sock = sock
        self._take = take
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._ready)

    def _ready(self) -> None:
        for _ in range(_MOST_A_TURN):
            if self._sock.fileno() < 0:  # what was taken has closed it
                return
            try:
                data = self._sock.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as exc:
                # ENOBUFS: the kernel had more to say than there was room for, and goes on. libuv takes the POLLERR that
                # came with it for the end, and looks at the socket no more.
                self._loop.remove_reader(self._sock.fileno())
                self._loop.add_reader(self._sock.fileno(), self._ready)
                self._failed(exc)
                return
            self._take(data)

    def abort(self) -> None:
        """Reads no more. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """As abort."""
        self.abort()


class Netlink(AsyncIPRoute):  # type: ignore[misc]  # pyroute2 has no types
    """pyroute2's requests (`link`, `addr`, `route`) over `sock`, a bound socket that does not block; owned."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(use_socket=sock, groups=0)
        self._sock = sock
        self._few = asyncio.Semaphore(_MOST_REQUESTS)

    async def setup_endpoint(self) -> None:
        """Called by pyroute2 before each request."""
        if getattr(self.local, "transport", None) is None:
            _ = self.socket  # makes the queues of answers
            self.local.transport = _Reader(self._sock, lambda data: self.enqueue(data, None), lambda _: None)
            self.local.protocol = None

    def close(self, code: int = errno.ECONNRESET) -> None:
        """Ends requests that wait. Idempotent."""
        if self._sock.fileno() >= 0:
            super().close(code)
            self._sock.close()

    async def ask(self, what: str, request: Awaitable[T], limit_s: float = _ANSWER_S) -> T:
        """The answer of one request. OperatorError: `what`, and why; also when no answer comes."""
        try:
            async with asyncio.timeout(limit_s), self._few:
                return await request
        except TimeoutError:
            raise OperatorError(f"{what}: netlink does not answer", errno.ETIMEDOUT) from None
        except NetlinkError as exc:
            hint = " (it takes CAP_NET_ADMIN: systemd/evtchnd.service.d/tap.conf)" if exc.code == errno.EPERM else ""
            raise OperatorError(f"{what}: {os.strerror(exc.code)}{hint}", exc.code) from None
        except OSError as exc:
            raise OperatorError(f"{what}: netlink: {exc.strerror}", exc.errno or errno.EIO) from None

    async def link_named(self, name: str) -> Link | None:
        """One link by its name, without a dump of all; None: there is none. OperatorError."""
        return await self.ask(name, self._get(ifname=name))

    async def link_of(self, name: str, index: int) -> Link | None:
        """The same by its number; `name` begins an error."""
        return await self.ask(name, self._get(index=index))

    async def _get(self, **which: Any) -> Link | None:
        try:
            answers = await self.link("get", **which)
        except NetlinkError as exc:
            if exc.code == errno.ENODEV:
                return None
            raise
        return _link(answers[0]) if answers else None


class Links:
    """News of every link of a namespace, from `sock`, which is bound to the group LINKS; owned."""

    def __init__(self, sock: socket.socket, changed: Callable[[Link], None], missed: Callable[[], None]) -> None:
        """`missed`: some news is lost (a storm of it): look at the links themselves."""
        self._sock = sock
        self._changed = changed
        self._marshal = MarshalRtnl()
        self._reader = _Reader(sock, self._take, lambda _: missed())

    def _take(self, data: bytes) -> None:
        for message in self._marshal.parse(data):
            if message["header"]["type"] in (RTM_NEWLINK, RTM_DELLINK) and message["family"] == socket.AF_UNSPEC:
                self._changed(_link(message))

    def close(self) -> None:
        """Idempotent."""
        self._reader.close()
        self._sock.close()


def _link(message: Any) -> Link:
    flags = message["flags"]
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        master=message.get_attr("IFLA_MASTER") or 0,
        up=bool(flags & _IFF_UP),
        running=bool(flags & _IFF_RUNNING),
        here=message["header"]["type"] == RTM_NEWLINK,
    )
