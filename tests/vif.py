"""A domain with vifs for the tests of netback: a namespace with a TAP, the backend, a frontend; no lab."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from evtchnd import answers
from evtchnd.guest.netfront import Netfront
from evtchnd.guest.packets import Way
from evtchnd.worker.device import Params, VifDevice
from evtchnd.worker.messages import Vif
from evtchnd_backends import netback
from netns import Netns
from oneprocess import Host, LocalVm, noted, open_fds

MAC = "00:16:3e:00:00:07"
GUEST_MAC = bytes.fromhex(MAC.replace(":", ""))
TAP = "vif7.0"
HOST4, GUEST4 = "10.77.0.1", "10.77.0.7"
HOST6, GUEST6 = "fd77::1", "fd77::7"


@dataclass
class World:
    """A host with a namespace. `attach` makes the TAP and serves it; `front` is a frontend for it."""

    host: Host
    netns: Netns
    taps: dict[int, list[int]] = field(default_factory=dict)
    answers: dict[int, int] = field(default_factory=dict)
    devices: dict[int, VifDevice] = field(default_factory=dict)
    reported: dict[int, Params | None] = field(default_factory=dict)

    def attach(self, devid: int = 0, *, queues: int = 1, address: bool = True, **options: object) -> VifDevice:
        name = f"vif7.{devid}"
        self.taps[devid] = self.netns.tap(name, queues)
        self.answers[devid] = answers.create(queues, name)
        if address:
            self.netns.up(name, f"{HOST4}/24", f"{HOST6}/64")
            self.netns.ip("neigh", "add", GUEST4, "lladdr", MAC, "dev", name)
            self.netns.ip("neigh", "add", GUEST6, "lladdr", MAC, "dev", name)
        self.write_nodes(devid)
        return self.run(devid, Vif(MAC, queues, name, **options))  # type: ignore[arg-type]

    def run(self, devid: int, vif: Vif, connected: Params | None = None) -> VifDevice:
        host = self.host
        device = VifDevice(
            vif=vif,
            taps=self.taps[devid],
            answers_fd=self.answers[devid],
            domid=host.domid,
            devid=devid,
            kind="vif",
            store=host.client,
            memory=host.memory,
            grants=host.grants,
            poller=host.poller,
            loop=host.loop,
            connected=connected,
            bind=host._bind,
            unbind=host._unbind,
            report=lambda params: noted(self.reported.__setitem__(devid, params)),
        )
        self.devices[devid] = device
        host.devices[devid] = device  # type: ignore[assignment]
        host.tasks[devid] = host.loop.create_task(netback.run(device))
        return device

    def write_nodes(self, devid: int) -> None:
        """What xl writes for a vif."""
        host = self.host
        front, back = f"/local/domain/{host.domid}/device/vif/{devid}", self.backend(devid)
        own, theirs = [f"n{host.domid}", "r0"], ["n0", f"r{host.domid}"]
        with host.server.transaction() as t:
            t.write(front, "", perms=own)
            for name, value in {"backend": back, "backend-id": 0, "state": 1, "handle": devid, "mac": MAC}.items():
                t.write(f"{front}/{name}", value, perms=own)
            t.write(back, "", perms=theirs)
            nodes = {"frontend": front, "frontend-id": host.domid, "online": 1, "state": 1, "handle": devid, "mac": MAC}
            for name, value in nodes.items():
                t.write(f"{back}/{name}", value, perms=theirs)

    def backend(self, devid: int = 0) -> str:
        return f"/local/domain/0/backend/vif/{self.host.domid}/{devid}"

    def node(self, name: str, devid: int = 0) -> str | None:
        return self.host.server.get(f"{self.backend(devid)}/{name}")

    def front(self, devid: int = 0, **options: object) -> Netfront:
        return Netfront(self.host.domain, self.host.store, devid, **options)  # type: ignore[arg-type]

    def connect(self, front: Netfront) -> None:
        """Connects, and waits until the kernel has seen the carrier.

        Before that it drops what is for the guest; its IPv6 addresses, and what is sent to them, come a little later.
        """
        front.connect()
        name, deadline = f"vif7.{front.devid}", time.monotonic() + 20
        while not self._up(name):
            assert time.monotonic() < deadline, f"{name} is not up"
            time.sleep(0.005)

    def _up(self, name: str) -> bool:
        state = self.netns.ip("-br", "link", "show", name).split()[1]
        route = self.netns.ip("-6", "route", "show", "table", "local", "dev", name)
        return state == "UP" and (HOST6 in route or HOST6 not in self.netns.ip("-6", "addr", "show", "dev", name))

    def way(self, port: int = 7001, *, ipv6: bool = False) -> Way:
        """From the guest to the host's end."""
        mac = self.netns.mac(TAP)
        if ipv6:
            ends = [socket.inet_pton(socket.AF_INET6, address) for address in (GUEST6, HOST6)]
        else:
            ends = [socket.inet_aton(address) for address in (GUEST4, HOST4)]
        return Way(GUEST_MAC, mac, *ends, port=7000, peer_port=port)

    def udp(self, *, ipv6: bool = False, port: int = 7001) -> socket.socket:
        """A socket of the host's end."""
        sock = self.netns.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
        sock.bind((HOST6 if ipv6 else HOST4, port))
        sock.settimeout(20)
        return sock

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await self.host.until(condition, what)


@asynccontextmanager
async def world(*, mib: int = 32, frames: int = 16) -> AsyncIterator[World]:
    """A domain; at the end nothing is left of it."""
    ours, theirs = socket.socketpair()
    with theirs:  # uvloop makes a socket of its own when it gets the first
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        transport.close()
        await asyncio.sleep(0.01)
    before = open_fds()
    vm = LocalVm(mib=mib, frames=frames)
    try:
        with Netns() as netns:
            async with Host(vm) as host:
                here = World(host, netns)
                host.server.write("/local/domain/0/backend/vif/7", "", perms=["n0", "r7"])
                host.server.write("/local/domain/7/device/vif", "", perms=["n7"])
                yield here
                for devid in list(host.tasks):
                    await host.kill(devid)
                for fd in (*(fd for fds in here.taps.values() for fd in fds), *here.answers.values()):
                    os.close(fd)
                assert host.grants.pinned == 0
                assert host.bound == []
    except BaseException:
        with suppress(RuntimeError):  # the guest's views are alive: the first error is the one to see
            vm.close()
        raise
    vm.close()
    for _ in range(100):  # uvloop closes a socket some turns later
        if open_fds() == before:
            break
        await asyncio.sleep(0.01)
    assert open_fds() == before
