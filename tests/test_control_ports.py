"""A domain's ports: all or none, whose they are, what a guest closes, what is left."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from evtchnd.control.ports import STORE, Ports
from evtchnd.errors import VmmError
from evtchnd.messages import ALL_PORTS


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Machine:
    """A VMM that binds what it is asked for, but for some."""

    def __init__(self, *closed: int) -> None:
        self.closed = closed
        self.asked: list[list[int]] = []
        self.unbound: list[int] = []

    async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
        self.asked.append(list(ports))
        for port in ports:
            if port in self.closed:
                raise VmmError(f"port {port} is closed")
        return {port: os.eventfd(0) for port in ports}

    def unbind_ports(self, ports: Sequence[int]) -> None:
        self.unbound += ports


async def test_a_device_gets_the_same_eventfds_again() -> None:
    before = descriptors()
    vmm = Machine()
    ports = Ports("domain 7", vmm, 16)
    first = await ports.bind(51712, [5, 6])
    os.eventfd_write(first[0], 3)
    assert await ports.bind(51712, [6, 5]) == [*first[2:], *first[:2]]
    assert vmm.asked == [[5, 6]]
    ports.kick(51712)
    assert [os.eventfd_read(fd) for fd in (first[0], first[2])] == [4, 1]
    assert (len(ports), ports.of(51712)) == (2, [5, 6])
    ports.close()
    assert descriptors() == before


async def test_a_full_kick_that_blocks_stalls_nobody() -> None:
    ports = Ports("domain 7", Machine(), 16)
    kick, _ = await ports.bind(51712, [5])
    os.eventfd_write(kick, 2**64 - 2)
    os.set_blocking(kick, True)  # the VMM's, too
    timer = threading.Timer(30, os.eventfd_read, [kick])  # ends the test where it fails
    timer.start()
    ports.kick(51712)
    assert not timer.finished.is_set()
    timer.cancel()
    timer.join()
    ports.close()


async def test_all_or_none() -> None:
    before = descriptors()
    ports = Ports("domain 7", Machine(6), 3)
    with pytest.raises(VmmError, match="domain 7: device 51712: port 6 is closed"):
        await ports.bind(51712, [5, 6])
    with pytest.raises(VmmError, match="3 ports are the limit"):
        await ports.bind(51712, [1, 2, 3, 4])
    assert (len(ports), descriptors()) == (0, before)
    await ports.bind(51712, [5])
    with pytest.raises(VmmError, match="port 5 is bound for another device"):
        await ports.bind(51728, [7, 5])
    assert len(ports) == 1
    ports.close()
    assert descriptors() == before


async def test_only_its_own_are_given_back() -> None:
    before = descriptors()
    vmm = Machine()
    ports = Ports("domain 7", vmm, 16)
    await ports.bind(STORE, [1])
    await ports.bind(51712, [5])
    ports.unbind(51712, [1, 5, 9])
    assert (vmm.unbound, ports.of(STORE), len(ports)) == ([5], [1], 1)
    ports.unbind(51712, [5])
    assert vmm.unbound == [5]
    ports.close()
    assert descriptors() == before


async def test_what_the_guest_closes_is_another_channel_when_it_is_asked_for_again() -> None:
    before = descriptors()
    vmm = Machine()
    ports = Ports("domain 7", vmm, 16)
    await ports.bind(51712, [5])
    ports.closed(5)
    ports.closed(6)
    assert ports.of(51712) == [5]  # ours until the device gives it back: the guest may bind to it again
    await ports.bind(51728, [5])
    assert vmm.asked == [[5], [5]]
    ports.unbind(51712, [5])  # too late: it is the other device's
    assert (ports.of(51728), vmm.unbound) == ([5], [])
    ports.closed(ALL_PORTS)
    ports.unbind(51728, [5])
    assert vmm.unbound == [5]
    ports.close()
    assert descriptors() == before


async def test_ports_that_a_resume_brings_are_whoever_asks_first() -> None:
    before = descriptors()
    vmm = Machine()
    ports = Ports("domain 7", vmm, 16)
    pair = (os.eventfd(0), os.eventfd(0))
    ports.resume({5: pair})
    assert tuple(await ports.bind(51712, [5])) == pair
    with pytest.raises(VmmError, match="another device"):
        await ports.bind(STORE, [5])
    assert vmm.asked == []
    ports.resume({})
    assert len(ports) == 0
    assert descriptors() == before


async def test_a_domain_that_ends_while_ports_are_bound() -> None:
    before = descriptors()

    class Slow(Machine):
        async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
            table.close()
            return await super().bind_ports(ports)

    table = Ports("domain 7", Slow(), 16)
    with pytest.raises(VmmError, match="the domain has ended"):
        await table.bind(51712, [5, 6])
    assert descriptors() == before


async def test_a_port_that_is_being_bound_is_waited_for_by_its_device_alone() -> None:
    before = descriptors()
    answer = asyncio.Event()

    class Slow(Machine):
        async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
            await answer.wait()
            return await super().bind_ports(ports)

    vmm = Slow()
    ports = Ports("domain 7", vmm, 16)
    first, second = (asyncio.create_task(ports.bind(51712, [5])) for _ in range(2))
    await asyncio.sleep(0)
    with pytest.raises(VmmError, match="port 5 is bound for another device"):
        await ports.bind(51728, [5])
    answer.set()
    assert await first == await second
    assert vmm.asked == [[5]]
    ports.close()
    assert descriptors() == before


async def test_descriptors_that_are_no_eventfds() -> None:
    before = descriptors()

    class Wrong(Machine):
        async def bind_ports(self, ports: Mapping[int, int]) -> dict[int, int]:
            return {port: os.eventfd(0) if port == 5 else os.memfd_create("file") for port in ports}

    vmm = Wrong()
    ports = Ports("domain 7", vmm, 16)
    with pytest.raises(VmmError, match=r"device 51712: port 6: notify: descriptor \d+ is no eventfd"):
        await ports.bind(51712, [5, 6])
    assert (len(ports), vmm.unbound) == (0, [5, 6])
    pair = tuple(await ports.bind(51712, [5]))
    for wrong in (lambda: (os.memfd_create("f"), os.eventfd(0)), lambda: (os.eventfd(0), os.memfd_create("f"))):
        with pytest.raises(VmmError, match=r"domain 7: port 8: (kick|notify): "):
            ports.resume({7: (os.eventfd(0), os.eventfd(0)), 8: wrong()})
    assert tuple(await ports.bind(51712, [5])) == pair  # nothing has changed
    ports.close()
    assert descriptors() == before
