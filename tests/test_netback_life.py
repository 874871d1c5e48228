"""A vif's life: what an operator changes, what happens to its TAP, a worker that dies, what the guest joins."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from pathlib import Path

import msgspec
import pytest

from evtchnd.errors import HostError
from evtchnd.guest.netfront import Frame, Netfront
from evtchnd.guest.packets import check_payload, payload, udp, udp_data
from evtchnd_backends.rate import LEAST_BURST, Rate
from evtchnd_backends.tap import Tap
from netns import Netns, possible
from vif import GUEST4, TAP, World, world

pytestmark = pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")


def exchange(here: World, front: Netfront, sock: socket.socket, numbers: range) -> None:
    """A datagram each way, on every queue."""
    way = here.way()
    for number in numbers:
        for queue in front.queues:
            queue.send(Frame(udp(way, payload(number, 200))))
            queue.push()
            assert check_payload(sock.recv(2048)) == number
        found: list[Frame] = []
        deadline = time.monotonic() + 20
        again = 0.0
        while not found:  # whichever queue the kernel takes
            if time.monotonic() > again:  # the kernel takes up to a second to see that a carrier is back
                sock.sendto(payload(number, 300), (GUEST4, 7000))
                again = time.monotonic() + 0.3
            assert time.monotonic() < deadline, "nothing comes"
            for queue in front.queues:
                found += [frame for frame in queue.receive() if frame.data[:6] == front.mac]
            found = [f for f in found if check_payload(udp_data(f.data, blank=f.csum_blank)) == number]


async def connected(here: World, **options: object) -> Netfront:
    front = here.front(**options)
    await here.host.guest(lambda: here.connect(front))
    return front


def test_rate_is_a_bucket() -> None:
    now = 100.0
    rate = Rate((10000, 50000), lambda: now)
    assert rate.left() == 10000
    rate.spent(400)
    assert rate.left() == 400
    now += 0.0499
    assert rate.left() == 400 and 0 < rate.wait() < 0.001
    now += 0.0002
    assert rate.left() == 10400
    now += 1000
    assert rate.left() == LEAST_BURST
    rate.limit((0, 0))
    assert rate.left() == -1


async def test_rate_holds_back_what_the_guest_sends_and_changes_live() -> None:
    async with world() as here:
        device = here.attach(rate=(50000, 1000 * 1000 * 1000))
        way = here.way()
        with here.udp() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            front = await connected(here)
            (queue,) = front.queues

            def send() -> None:
                for number in range(200):
                    queue.send(Frame(udp(way, payload(number, 958))))
                queue.push()

            await here.host.guest(send)
            await here.until(lambda: device.stats()["tx_packets"] == 50, "what the rate lets through")
            await asyncio.sleep(0.05)
            assert device.stats()["tx_packets"] == 50
            await device.change(msgspec.structs.replace(device.vif, rate=(0, 0)))
            await here.host.guest(queue.flush)
            assert device.stats()["tx_packets"] == 200 and queue.tx_errors == 0
            for number in range(200):
                assert check_payload(sock.recv(2048)) == number
            await here.host.guest(front.disconnect)


async def test_carrier_goes_and_comes() -> None:
    async with world() as here:
        device = here.attach()
        await here.until(lambda: here.node("state") == "2", "InitWait")
        assert here.node("carrier") == "1"
        with here.udp() as sock:
            assert "NO-CARRIER" in here.netns.flags(TAP)  # nobody is connected
            front = await connected(here)
            assert "NO-CARRIER" not in here.netns.flags(TAP)
            await here.host.guest(lambda: exchange(here, front, sock, range(5)))
            await device.change(msgspec.structs.replace(device.vif, carrier=False))
            assert here.node("carrier") == "0" and here.node("state") == "4"
            assert "NO-CARRIER" in here.netns.flags(TAP)

            def dropped() -> None:
                front.queues[0].send(Frame(b"\xff" * 60))
                front.queues[0].flush()

            await here.host.guest(dropped)
            assert device.stats()["tx_dropped_tap"] == 1
            await device.change(msgspec.structs.replace(device.vif, carrier=True))
            assert here.node("carrier") == "1"
            await here.host.guest(lambda: exchange(here, front, sock, range(5)))
            await here.host.guest(front.disconnect)
            assert "NO-CARRIER" in here.netns.flags(TAP)


async def test_mtu_grows_while_it_is_served() -> None:
    async with world() as here:
        device = here.attach()
        with here.udp() as sock:
            front = await connected(here, gso=False)
            here.netns.ip("link", "set", TAP, "mtu", "9000")
            await device.change(msgspec.structs.replace(device.vif, mtu=9000))
            assert here.node("mtu") == "9000"

            def jumbo() -> None:
                sock.sendto(payload(1, 8000), (GUEST4, 7000))
                (frame,) = front.queues[0].expect(1, mac=front.mac)
                assert check_payload(udp_data(frame.data, blank=frame.csum_blank)) == 1
                assert frame.slots == 2
                front.disconnect()

            await here.host.guest(jumbo)


async def test_a_tap_that_is_down_drops_with_an_answer() -> None:
    async with world() as here:
        device = here.attach()
        with here.udp() as sock:
            front = await connected(here)
            here.netns.ip("link", "set", TAP, "down")

            def dropped() -> None:
                for _ in range(10):
                    front.queues[0].send(Frame(b"\xff" * 60))
                front.queues[0].flush()

            await here.host.guest(dropped)
            assert device.stats()["tx_dropped_tap"] == 10
            assert front.queues[0].tx_errors == 10
            here.netns.ip("link", "set", TAP, "up")
            here.netns.ip("neigh", "replace", GUEST4, "lladdr", "00:16:3e:00:00:07", "dev", TAP)
            await here.host.guest(lambda: exchange(here, front, sock, range(5)))
            await here.host.guest(front.disconnect)


async def test_a_tap_that_is_deleted_and_made_again(caplog: pytest.LogCaptureFixture) -> None:
    """One line, no loop that spins, answers for what is sent; the new TAP goes on without a handshake."""
    async with world() as here:
        device = here.attach(queues=2)
        front = await connected(here, queues=2)
        before = list(here.taps[0])
        with caplog.at_level(logging.ERROR):
            here.netns.ip("link", "del", TAP)

            def dropped() -> None:
                for _ in range(10):
                    for queue in front.queues:
                        queue.send(Frame(b"\xff" * 60))
                        queue.flush()

            await here.host.guest(dropped)
            await asyncio.sleep(0.05)
            sleeps = here.host.poller.slices
            await asyncio.sleep(0.2)
            assert here.host.poller.slices - sleeps < 20
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert "vif 0: vif7.0 was deleted" in record.getMessage()
        assert device.stats()["tx_dropped_tap"] == 20
        here.taps[0] = here.netns.tap(TAP, 2)
        here.netns.up(TAP, "10.77.0.1/24")
        here.netns.ip("neigh", "replace", GUEST4, "lladdr", "00:16:3e:00:00:07", "dev", TAP)
        device.retap(here.taps[0])
        for fd in before:
            os.close(fd)
        with here.udp() as sock:
            await here.host.guest(lambda: exchange(here, front, sock, range(20)))
            await here.host.guest(front.disconnect)


@pytest.mark.parametrize("queues", [1, 2])
async def test_a_worker_that_dies_is_replaced_and_the_guest_does_not_notice(queues: int) -> None:
    async with world() as here:
        device = here.attach(queues=2)
        with here.udp() as sock:
            front = await connected(here, queues=queues)
            front.queues[0].put(
                [(front.queues[0].free.pop(), 0, 0, 60)], 60, 0, [b"\2\0" + bytes.fromhex("01005e000001")]
            )
            await here.host.guest(front.queues[0].flush)
            for round in range(3):
                await here.host.guest(
                    lambda round=round: exchange(here, front, sock, range(round * 10, round * 10 + 10))
                )
                kept = here.reported[0]
                assert kept is not None and kept["groups"] == ["01005e000001"]
                states = here.node("state")
                await here.host.kill(0)
                ports = {port for queue in front.queues for port in queue.ports}
                for port in ports:
                    here.host.vm.wait(port, 0)
                # what is sent meanwhile is taken by the next one
                front.queues[0].send(Frame(udp(here.way(), payload(round, 77))))
                front.queues[0].push()
                device = here.run(0, device.vif, msgspec.msgpack.decode(msgspec.msgpack.encode(kept)))
                assert check_payload(await here.host.guest(lambda: sock.recv(2048))) == round
                assert here.node("state") == states == "4"
                for port in ports:  # its last notification may have been lost with it
                    assert await here.host.guest(lambda port=port: here.host.vm.wait(port, 30)), port
            await here.host.guest(front.disconnect)
        assert here.reported[0] is None


async def test_hotplug_status_is_waited_for() -> None:
    async with world() as here:
        here.attach()
        here.host.server.write(f"{here.backend()}/hotplug-status", "")
        front = here.front()
        connecting = asyncio.create_task(here.host.guest(front.connect))
        await here.until(
            lambda: here.host.server.get("/local/domain/7/device/vif/0/state") == "4", "the frontend's side"
        )
        await asyncio.sleep(0.05)
        assert here.node("state") == "2"
        here.host.server.write(f"{here.backend()}/hotplug-status", "connected")
        await connecting
        await here.host.guest(front.disconnect)


GROUP = "239.1.2.3"
GROUP_MAC = bytes.fromhex("01005e010203")


async def test_multicast_is_filtered_by_what_the_guest_joins() -> None:
    """XEN_NETIF_EXTRA_TYPE_MCAST_ADD and _DEL; broadcast and unicast always come."""
    async with world() as here:
        device = here.attach()
        here.netns.ip("link", "set", TAP, "multicast", "on")
        with here.udp() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            front = await connected(here, nodes={"request-multicast-control": "1"})
            (queue,) = front.queues

            def join(kind: int, address: bytes) -> None:
                queue.put([(queue.free.pop(), 0, 0, 0)], 0, 0, [bytes([kind, 0]) + address])
                queue.flush()

            def heard() -> list[int]:
                sock.sendto(payload(1, 50), (GROUP, 7000))
                sock.sendto(payload(2, 50), ("10.77.0.255", 7000))
                sock.sendto(payload(3, 50), (GUEST4, 7000))
                found: list[int] = []
                while 3 not in found:
                    found += [
                        check_payload(udp_data(frame.data, blank=frame.csum_blank))
                        for frame in queue.receive()
                        if frame.data[12:14] == b"\x08\x00" and frame.data[23] == 17
                    ]
                return found

            def guest() -> None:
                assert heard() == [2, 3]
                join(2, GROUP_MAC)
                assert heard() == [1, 2, 3]
                join(3, GROUP_MAC)
                assert heard() == [2, 3]
                assert queue.tx_errors == 0
                for number in range(70):
                    join(2, b"\x01\x00\x5e\x7f\x00" + bytes([number]))
                assert queue.tx_errors == 6  # 64 groups
                join(2, b"\x02\x00\x5e\x00\x00\x01")
                assert queue.tx_errors == 7  # no group

            await here.host.guest(guest)
            assert device.stats()["rx_dropped_multicast"] >= 2
            # and it may be switched off while it runs
            here.host.server.write("/local/domain/7/device/vif/0/request-multicast-control", "0")
            for _ in range(100):
                if await here.host.guest(heard) == [1, 2, 3]:
                    break
            else:
                raise AssertionError("still filtered")
            await here.host.guest(front.disconnect)


def slept() -> int:
    """How often this thread has gone to sleep: once a turn of an idle loop."""
    (line,) = [
        line for line in Path("/proc/thread-self/status").read_text().splitlines() if line.startswith("voluntary_")
    ]
    return int(line.split()[1])


@pytest.mark.parametrize("posted", [256, 0], ids=["pages posted", "starved"])
async def test_an_idle_vif_wakes_nobody(posted: int) -> None:
    """Connected, all queues, also one whose guest has no page for a packet that waits: nothing is stepped or polled."""
    async with world() as here:
        device = here.attach(queues=2, stall_s=0)
        here.netns.ip("link", "set", TAP, "mtu", "1500")
        here.netns.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        with here.udp() as sock:
            front = await connected(here, queues=2)
            await here.host.guest(lambda: exchange(here, front, sock, range(20)))
            if not posted:
                waiting = here.netns.socket(socket.AF_PACKET, socket.SOCK_RAW)
                waiting.bind((TAP, 0))

                def starve() -> None:
                    while not device.stats()["starved"]:
                        waiting.send(b"\xff" * 1500)
                        for queue in front.queues:
                            queue.receive(post=0)
                    waiting.close()

                await here.host.guest(starve)
            poller = here.host.poller
            device.stats()  # takes the kicks that are counted still, for which it steps
            await here.until(lambda: not poller.live, "asleep")
            await asyncio.sleep(0.1)
            before, turns = (poller.slices, poller.sleeps, device.stats()), slept()
            await asyncio.sleep(0.5)
            turns = slept() - turns
            assert (poller.slices, poller.sleeps, device.stats()) == before
            assert turns < 4  # the pause's own
            await here.host.guest(front.disconnect)


def test_what_is_no_tap_is_refused() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(HostError, match="is no TAP"):
            Tap([read], "vif7.0")
    finally:
        os.close(read)
        os.close(write)
    with Netns() as netns:
        import fcntl

        fd = os.open("/dev/net/tun", os.O_RDWR)
        netns.run(lambda: fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"plain", 0x1002)))
        with pytest.raises(HostError, match="without IFF_VNET_HDR"):
            Tap([fd], "vif7.0")
        os.close(fd)
