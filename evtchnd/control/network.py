"""The host's ends of all vifs: TAPs made, wired and watched, one pair of netlink sockets a network namespace.

News of links comes from the kernel; nothing is polled and no table is dumped. A TAP that is deleted is made again after
a pause if it was made here, and is opened again when somebody makes it anew if it was not; a bridge that is made anew
gets its ports back. Whoever goes on only with the guest's leave (its queues, its frames) is told by `Changed`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from evtchnd import transport
from evtchnd.control import tap
from evtchnd.control.beside import beside
from evtchnd.errors import OperatorError
from evtchnd.vifspec import Interface, VifSpec

if TYPE_CHECKING:
    from evtchnd.control.netlink import Link, Links, Netlink

log = logging.getLogger(__name__)

# Whoever makes a bridge or a TAP anew takes a few steps; and who deletes one again and again costs one a second.
_PAUSE_S, _PAUSE_MOST_S = 1.0, 30.0
_DEFAULT_MTU = 1500
# A port of a bridge has no address, also none that IPv6 makes up: IN6_ADDR_GEN_MODE_NONE
_NO_LINK_LOCAL = {"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", 1]]}]]}
# rt_scope_t: a route to a neighbour
_RT_SCOPE_LINK = 253


class Changed(Protocol):
    """Whose port it is."""

    def taps_changed(self, fds: list[int]) -> None:
        """The TAP is another one: its descriptors, the owner's from now on."""

    def mtu_changed(self, mtu: int) -> None: ...


@dataclass(frozen=True)
class Passed:
    """Queues of a TAP that somebody else opened, and who. With wiring `none` what it is wired to is theirs."""

    fds: list[int]
    origin: str
    by_vmm: bool = False


class Port:
    """The host's end of one vif: a TAP, what it is wired to, and what is known of it.

    state       "up"; else in a few words what is wrong: "down", "deleted", "br0 is not there"; "not watched" of one
                that was passed and is not in the namespace
    made        this daemon made the TAP, which goes with its last descriptor
    passed      nobody here can open it again
    """

    def __init__(
        self, label: str, name: str, queues: int, spec: VifSpec, owner: Changed, passed: Passed | None = None
    ) -> None:
        self.label = label
        self.name = name
        self.queues = queues
        self.spec = spec
        self.made = False
        self.passed = passed
        self.mtu = spec.mtu or _DEFAULT_MTU
        self.index = 0
        self.bridge = 0
        self.up = False
        self.owner = owner
        self.namespace: _Namespace | None = None
        self._wrong = ""
        # while it is wired: links that have ended meanwhile
        self.ended: set[int] | None = None
        self.changed = asyncio.Event()
        self.keeper: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        if self.passed is not None and self.namespace is None:
            return "not watched"
        if not self.index:
            return "deleted"
        return self._wrong or ("up" if self.up else "down")

    @property
    def origin(self) -> str:
        """Who has made the TAP, or opened it."""
        if self.passed is not None:
            return self.passed.origin
        return "made here" if self.made else "found"

    def wrong(self, what: str) -> None:
        """Another state than up or down; "" ends it. Logged when it changes."""
        if what and what != self._wrong:
            log.warning("%s: %s: %s", self.label, self.name, what)
        self._wrong = what

    def news(self, link: Link) -> None:
        """Some link of the port's namespace has changed."""
        if not link.here and self.ended is not None:
            self.ended.add(link.index)
        if self.index and link.index == self.index:
            self._own_news(link)
        elif link.here and link.name == self.name and not self.index:
            self.changed.set()
        if self.spec.bridge:
            if not link.here and link.index == self.bridge:
                self.bridge = 0
                self.wrong(f"{self.spec.bridge} is not there")
            elif link.here and link.name == self.spec.bridge and link.index != self.bridge:
                self.changed.set()

    def _own_news(self, link: Link) -> None:
        if not link.here:
            self.index, self.up = 0, False
            log.warning("%s: %s: deleted", self.label, self.name)
            if self.made:
                self.changed.set()
            return
        if link.name != self.name:
            log.info("%s: %s: is named %s now", self.label, self.name, link.name)
            self.name = link.name
        if link.up != self.up:
            self.up = link.up
            log.info("%s: %s: %s", self.label, self.name, "up" if link.up else "down")
        if link.mtu and link.mtu != self.mtu and not (self.passed is not None and self.spec.mtu):
            self.mtu = link.mtu
            log.info("%s: %s: mtu %d", self.label, self.name, link.mtu)
            self.owner.mtu_changed(link.mtu)
        if self.bridge:
            # taken out by somebody, who is not contradicted; or the bridge goes, whose own news is next
            self.wrong("" if link.master == self.bridge else f"no port of {self.spec.bridge} any more")


class Network:
    """All ports of this host."""

    def __init__(self, passed: Mapping[str, Sequence[int]] | None = None) -> None:
        """`passed`: queues of TAPs by the name that a vif string calls them by; the caller's."""
        self._passed = dict(passed or {})
        # by device and inode: a name may be another namespace's tomorrow
        self._namespaces: dict[tuple[int, int], _Namespace] = {}
        self._opening = asyncio.Lock()

    async def open(self, port: Port) -> list[int]:
        """Makes the port's TAP, wires it, and watches it from then on. Returns its queues. OperatorError."""
        if port.passed is not None:
            return await self._open_passed(port, port.passed.fds)
        return await self._open_in(port, await self._namespace(port.spec.netns))

    def passed(self, name: str) -> Passed | None:
        """Copies of the queues that were passed in under `name`. OperatorError: no descriptor is free."""
        try:
            fds = self._passed.get(name)
            return Passed([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds], "systemd") if fds else None
        except OSError as exc:
            raise OperatorError(f"{name}: {exc.strerror}", exc.errno or errno.EMFILE) from None

    async def _open_passed(self, port: Port, fds: list[int]) -> list[int]:
        """Where the TAP is not in the namespace, or that cannot be looked into, it is served and not watched."""
        port.name = await beside(lambda: tap.check_passed(fds), lambda _: None)
        try:
            namespace = await self._namespace(port.spec.netns)
        except OperatorError:
            if port.spec.wiring != "none" or port.spec.address:
                raise
            return fds
        try:
            place = namespace.place
            index = await beside(lambda: tap.index_of(fds[0], port.name, place), lambda _: None)
        except BaseException:
            self._leave(namespace)
            raise
        if index:
            return await self._open_in(port, namespace)
        self._leave(namespace)
        if port.spec.wiring != "none" or port.spec.address:
            raise OperatorError(f"{port.name}: the TAP that was passed is in another network namespace (netns=)")
        return fds

    async def _open_in(self, port: Port, namespace: _Namespace) -> list[int]:
        if any(other.name == port.name for other in namespace.ports):
            self._leave(namespace)
            raise OperatorError(f"{port.name}: another vif has it")
        namespace.ports.append(port)  # its name is taken, its news comes
        port.namespace = namespace
        try:
            fds = await namespace.open(port)
        except BaseException:
            await self.close(port)
            raise
        port.keeper = asyncio.get_running_loop().create_task(namespace.keep(port))
        return fds

    async def delete(self, port: Port) -> None:
        """Takes a TAP away that was made here, whoever has copies of its queues."""
        namespace = port.namespace
        if port.made and port.index and namespace is not None:
            with suppress(OperatorError):
                await namespace.delete(port)

    async def close(self, port: Port) -> None:
        """Watches the port no more. Its TAP goes with its descriptors. Idempotent."""
        keeper, port.keeper = port.keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        namespace, port.namespace = port.namespace, None
        if namespace is not None:
            namespace.ports.remove(port)
            self._leave(namespace)

    async def _namespace(self, netns: str) -> _Namespace:
        async with self._opening:
            opened = await beside(lambda: _Sockets(netns), _Sockets.close)
            found = self._namespaces.get(opened.which)
            if found is not None:
                opened.close()
                return found
            made = self._namespaces[opened.which] = _Namespace(opened)
            return made

    def _leave(self, namespace: _Namespace) -> None:
        """Lets a namespace go that no port is in: it would be kept from ending by its sockets."""
        if not namespace.ports and self._namespaces.get(namespace.which) is namespace:
            del self._namespaces[namespace.which]
            namespace.close()


class _Sockets:
    """A namespace's descriptor (-1: this process' own), and its sockets for requests and for news. OperatorError."""

    def __init__(self, netns: str) -> None:
        from evtchnd.control import netlink

        self.place = tap.open_namespace(netns)
        self.sockets: list[socket.socket] = []
        try:
            status = os.stat("/proc/thread-self/ns/net") if self.place < 0 else os.fstat(self.place)
            self.which = status.st_dev, status.st_ino
            self.sockets.append(tap.netlink_socket(self.place, 0))
            self.sockets.append(tap.netlink_socket(self.place, netlink.LINKS))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        if self.place >= 0:
            os.close(self.place)
            self.place = -1


class _Namespace:
    """One network namespace with ports of ours."""

    def __init__(self, opened: _Sockets) -> None:
        from evtchnd.control import netlink

        self.which = opened.which
        self._opened = opened
        requests, news = opened.sockets
        self.ports: list[Port] = []
        self._netlink: Netlink = netlink.Netlink(requests)
        self._links: Links = netlink.Links(news, self._news, self._missed)
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False

    @property
    def place(self) -> int:
        """Its descriptor, -1: this process' own."""
        return self._opened.place

    def close(self) -> None:
        """Idempotent."""
        if self._looking is not None:
            self._looking.cancel()
        self._links.close()
        self._netlink.close()
        self._opened.close()

    # ---- a port

    async def open(self, port: Port) -> list[int]:
        """Opens and wires the TAP. OperatorError: it is closed again."""
        if port.passed is not None:
            fds = port.passed.fds
            index = await beside(lambda: tap.index_of(fds[0], port.name, self.place), lambda _: None)
            await (self._look_at if port.spec.wiring == "none" else self._wire)(port, index)
            return fds
        opened = await beside(
            lambda: tap.open_tap(port.name, port.queues, self._opened.place), lambda late: transport.close_all(late.fds)
        )
        try:
            port.made = opened.made
            await self._wire(port, opened.index)
        except BaseException:
            transport.close_all(opened.fds)
            port.index = 0
            raise
        return opened.fds

    async def delete(self, port: Port) -> None:
        """OperatorError."""
        index, port.index = port.index, 0
        await self._netlink.ask(f"{port.name}: delete", self._netlink.link("del", index=index))

    async def _wire(self, port: Port, index: int) -> None:
        """As `_wire_it`. What ends under its hands is not taken for being there."""
        port.ended = set()
        try:
            await self._wire_it(port, index, port.ended)
        finally:
            port.ended = None

    async def _wire_it(self, port: Port, index: int, ended: set[int]) -> None:
        """MTU, bridge, addresses, routes, and up. What is so already is left alone: that takes no capability."""
        spec, name = port.spec, port.name
        now = await self._netlink.link_of(name, index)
        if now is None:
            raise OperatorError(f"{name}: is gone again")
        mtu, bridge = spec.mtu or (_DEFAULT_MTU if port.made else now.mtu), None
        if spec.bridge:
            bridge = await self._netlink.link_named(spec.bridge)
            if bridge is None:
                raise OperatorError(f"bridge {spec.bridge} is not there (ip link add {spec.bridge} type bridge)")
            mtu = spec.mtu or bridge.mtu
        wanted: dict[str, Any] = {"mtu": mtu} if mtu != now.mtu else {}
        if port.made:
            wanted["ifalias"] = port.label
        if bridge is not None and now.master != bridge.index:
            wanted["master"] = bridge.index
        if bridge is not None and port.made:
            # the guest's with a first byte that no bridge takes for its own (it takes the lowest), and not the guest's
            wanted["address"] = f"{'fa' if spec.mac.startswith('fe') else 'fe'}{spec.mac[2:]}"
            with suppress(OperatorError):  # a kernel without IPv6
                await self._netlink.ask(name, self._netlink.link("set", index=index, IFLA_AF_SPEC=_NO_LINK_LOCAL))
        for key, value in wanted.items():
            what = f"{name}: {key} {value}" if key != "master" else f"{name}: bridge {spec.bridge}"
            await self._netlink.ask(what, self._netlink.link("set", index=index, **{key: value}))
        if not now.up:
            await self._netlink.ask(f"{name}: up", self._netlink.link("set", index=index, state="up"))
        for address in spec.address:
            await self._address(port, index, address)
        for there in spec.ip if spec.wiring == "vif-route" else ():
            route = there if "/" in there else f"{there}/{128 if ':' in there else 32}"
            request = self._netlink.route("replace", dst=route, oif=index, scope=_RT_SCOPE_LINK)
            await self._netlink.ask(f"{name}: route to {there}", request)
        for gone, what in ((index, name), (bridge.index if bridge is not None else 0, f"bridge {spec.bridge}")):
            if gone in ended:
                raise OperatorError(f"{what}: is gone again")
        port.index, port.mtu, port.up = index, mtu, True
        port.bridge = bridge.index if bridge is not None else 0
        port.wrong("")

    async def _look_at(self, port: Port, index: int) -> None:
        """A TAP that was passed is as whoever passed it wants it: MTU and link are taken from it."""
        now = await self._netlink.link_of(port.name, index)
        if now is None:
            raise OperatorError(f"{port.name}: is gone again")
        for address in port.spec.address:
            await self._address(port, index, address)
        port.index, port.mtu, port.up = index, port.spec.mtu or now.mtu, now.up

    async def _address(self, port: Port, index: int, address: Interface) -> None:
        request = self._netlink.addr(
            "replace", index=index, address=str(address.ip), prefixlen=address.network.prefixlen
        )
        await self._netlink.ask(f"{port.name}: address {address}", request)

    async def keep(self, port: Port) -> None:
        """Makes the TAP anew when it is gone, and the bridge's port when the bridge is back; for ever."""
        pause = _PAUSE_S
        while True:
            await port.changed.wait()
            await asyncio.sleep(pause)
            port.changed.clear()
            try:
                if not port.index and port.passed is None:
                    await self._again(port)
                elif port.spec.bridge and not port.bridge:
                    await self._rejoin(port)
                pause = _PAUSE_S
            except OperatorError as exc:
                port.wrong(str(exc).removeprefix(f"{port.name}: "))
                pause = min(pause * 2, _PAUSE_MOST_S)
                port.changed.set()
            except Exception:
                log.exception("%s: %s: a defect of evtchnd", port.label, port.name)

    async def _again(self, port: Port) -> None:
        if not port.made and await self._netlink.link_named(port.name) is None:
            return
        fds = await self.open(port)
        log.info("%s: %s: is back", port.label, port.name)
        port.owner.taps_changed(fds)
        port.owner.mtu_changed(port.mtu)

    async def _rejoin(self, port: Port) -> None:
        bridge = await self._netlink.link_named(port.spec.bridge)
        now = await self._netlink.link_of(port.name, port.index)
        # it may be another bridge's meanwhile, by its operator
        if bridge is not None and now is not None and now.master in (0, bridge.index):
            await self._wire(port, port.index)
            log.info("%s: %s: is a port of %s again", port.label, port.name, port.spec.bridge)
            port.owner.mtu_changed(port.mtu)

    # ---- news

    def _news(self, link: Link) -> None:
        for port in self.ports:
            port.news(link)

    def _missed(self) -> None:
        self._look_again = True
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        """The kernel has dropped news: what has become of our links?"""
        while self._look_again:
            self._look_again = False
            await self._look_once()

    async def _look_once(self) -> None:
        from evtchnd.control import netlink

        for port in list(self.ports):
            with suppress(OperatorError):
                if port.index:
                    link = await self._netlink.link_of(port.name, port.index)
                    if link is not None:
                        port.news(link)
                    else:
                        port.news(netlink.Link(port.index, port.name, 0, 0, up=False, running=False, here=False))
                if port.spec.bridge:
                    bridge = await self._netlink.link_named(port.spec.bridge)
                    if bridge is None or bridge.index != port.bridge:
                        port.bridge = 0
                port.changed.set()
