"""The domain-0 ends of a domain's event ports: two eventfds each, and whose they are.

The control plane makes the kick eventfd, the VMM gives the one that notifies; both stay here, so that a worker that
replaces another one gets the same ones, with what was kicked meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from evtchnd import transport
from evtchnd.channel import check_eventfd
from evtchnd.control import descriptors
from evtchnd.errors import EvtchndError, VmmError
from evtchnd.messages import ALL_PORTS

STORE = -1
"""Owner of the XenStore ring's port; a disk's is its number, a console's its `console_key`."""
# Owner of a port that RESUME brought: the device that asks for it gets it.
_NOBODY = -2
_ONE = (1).to_bytes(8, "little")


class Vmm(Protocol):
    """The domain's VMM, as far as ports need it."""

    async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
        """Port to kick eventfd -> port to notify eventfd, the caller's. VmmError, HostError; all or none."""

    def unbind_ports(self, ports: Sequence[int]) -> None:
        """Does not wait."""


class _Port:
    def __init__(self, owner: int, kick: int, notify: int) -> None:
        self.owner = owner
        self.kick = kick
        self.notify = notify
        self.stale = False  # the guest has closed its end; it may bind to ours again

    def close(self) -> None:
        transport.close_all({self.kick, self.notify})


class Ports:
    """All of one domain. `label` begins every error; `most` is limits.ports."""

    def __init__(self, label: str, vmm: Vmm, most: int) -> None:
        self._label = label
        self._vmm = vmm
        self._most = most
        self._ports: dict[int, _Port] = {}
        self._binding: dict[int, tuple[int, asyncio.Event]] = {}  # owner, and when the VMM has answered
        self._over = False

    def __len__(self) -> int:
        return len(self._ports)

    def of(self, owner: int) -> list[int]:
        """A device's ports."""
        return [port for port, each in self._ports.items() if each.owner == owner]

    def resume(self, ports: Mapping[int, tuple[int, int]]) -> None:
        """Ports that are bound already: (kick, notify) by number. Takes the descriptors. VmmError: no eventfds."""
        try:
            for port, (kick, notify) in ports.items():
                check_eventfd(kick, f"{self._label}: port {port}: kick", semaphore_ok=False)
                check_eventfd(notify, f"{self._label}: port {port}: notify", semaphore_ok=True)
        except VmmError:
            transport.close_all(fd for pair in ports.values() for fd in pair)
            raise
        self._drop(list(self._ports))
        self._ports = {port: _Port(_NOBODY, kick, notify) for port, (kick, notify) in ports.items()}

    async def bind(self, owner: int, ports: Sequence[int]) -> list[int]:
        """Eventfds (kick, notify, kick, notify, ...) of a device's ports, bound if they are not yet; all or none.

        They stay ours. VmmError: the VMM refuses, or a port is another device's; HostError: no descriptors left.
        """
        what = f"{self._label}: " + ("xenstore" if owner == STORE else f"device {owner}")
        for port in ports:
            # a worker of this device may have asked already, and died before the VMM has answered
            while (pending := self._binding.get(port)) is not None and pending[0] == owner:
                await pending[1].wait()
        for port in ports:
            known = self._ports.get(port)
            other = known.owner if known is not None and not known.stale else _NOBODY
            if port in self._binding or other not in (_NOBODY, owner):
                raise VmmError(f"{what}: port {port} is bound for another device", errno.EBUSY)
        new = [port for port in dict.fromkeys(ports) if port not in self._ports or self._ports[port].stale]
        if len(self._ports) + len(self._binding) + len(new) > self._most:
            raise VmmError(f"{what}: {self._most} ports are the limit (limits.ports)", errno.ENOSPC)
        if new:
            await self._bind(owner, new, what)
        for port in ports:
            self._ports[port].owner = owner
        return [fd for port in ports for fd in (self._ports[port].kick, self._ports[port].notify)]

    async def _bind(self, owner: int, new: Sequence[int], what: str) -> None:
        descriptors.require(2 * len(new), what)
        answered = asyncio.Event()
        self._binding.update(dict.fromkeys(new, (owner, answered)))
        kicks: dict[int, int] = {}
        notifies: dict[int, int] = {}
        try:
            for port in new:
                kicks[port] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            notifies = await self._vmm.bind_ports(kicks)
            for port, notify in notifies.items():
                # the control plane itself writes to the store's: no pipe, no file on a share that hangs
                check_eventfd(notify, f"port {port}: notify", semaphore_ok=True)
        except BaseException as exc:
            transport.close_all([*kicks.values(), *notifies.values()])
            if notifies:
                self._vmm.unbind_ports(list(notifies))
            if isinstance(exc, EvtchndError):
                raise VmmError(f"{what}: {exc}") from None
            raise
        finally:
            for port in new:
                del self._binding[port]
            answered.set()
        if self._over:
            transport.close_all([*kicks.values(), *notifies.values()])
            raise VmmError(f"{what}: the domain has ended")
        self._drop([port for port in new if port in self._ports])
        self._ports.update({port: _Port(owner, kicks[port], notifies[port]) for port in new})

    def unbind(self, owner: int, ports: Sequence[int]) -> None:
        """Gives a device's ports back to the guest. Those that are not its own (any more) are left alone."""
        mine = [port for port in ports if port in self._ports and self._ports[port].owner == owner]
        self._drop(mine)
        if mine and not self._over:
            self._vmm.unbind_ports(mine)

    def closed(self, port: int) -> None:
        """The guest has closed its end of `port` (or of all).

        Ours stays until its device gives it back: the guest may bind to it again, as it does with the XenStore ring's
        after EVTCHNOP_reset. Asked for anew, the port is another channel.
        """
        for each in list(self._ports) if port == ALL_PORTS else [port]:
            if each in self._ports:
                self._ports[each].stale = True

    def kick(self, owner: int) -> None:
        """Kicks every port of a device, as if its guest had."""
        for port in self.of(owner):
            kick = self._ports[port].kick
            poll = select.poll()
            poll.register(kick, select.POLLOUT)
            # Not ready or EAGAIN: full, so it is kicked. The VMM shares O_NONBLOCK and could take it away.
            with suppress(BlockingIOError):
                if poll.poll(0):
                    os.write(kick, _ONE)

    def close(self) -> None:
        """Closes all, for good."""
        self._over = True
        self._drop(list(self._ports))

    def _drop(self, ports: Sequence[int]) -> None:
        for port in ports:
            self._ports.pop(port).close()
