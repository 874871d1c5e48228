"""A soft guest's netfront against netback and a TAP, whose other end is this kernel's stack in a namespace."""

from __future__ import annotations

import asyncio
import socket

import pytest

from evtchnd.guest.netfront import Frame
from evtchnd.guest.packets import arp_reply, check_payload, checksum, payload, udp, udp_data
from netns import possible
from vif import GUEST4, GUEST6, world

pytestmark = pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")


@pytest.mark.parametrize("split", [True, False], ids=["split", "one channel"])
@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
async def test_udp_both_ways(split: bool, ipv6: bool) -> None:
    async with world() as here:
        device = here.attach()
        way = here.way(ipv6=ipv6)
        with here.udp(ipv6=ipv6) as sock:

            def guest() -> None:
                front = here.front(split=split)
                front.connect()
                (queue,) = front.queues
                for number in range(600):
                    blank = number % 2 == 1
                    queue.send(Frame(udp(way, payload(number, 8 + number), blank=blank), csum_blank=blank))
                    queue.push()
                    data, peer = sock.recvfrom(2048)
                    assert check_payload(data) == number and len(data) == 8 + number
                    sock.sendto(payload(number + 1000, 8 + number), peer)
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert check_payload(udp_data(frame.data, blank=frame.csum_blank)) == number + 1000
                queue.flush()
                assert queue.tx_errors == 0
                front.disconnect()

            await here.host.guest(guest)
        stats = device.stats()
        assert stats["tx_packets"] == 600 and stats["rx_packets"] >= 600
        assert not any(value for name, value in stats.items() if "dropped" in name)


async def test_ping_and_arp_of_the_kernel() -> None:
    """The guest answers the kernel's own ARP request and echo requests."""
    async with world() as here:
        here.attach()
        here.netns.ip("neigh", "del", GUEST4, "dev", "vif7.0")
        stop = asyncio.Event()

        def guest() -> None:
            front = here.front()
            front.connect()
            (queue,) = front.queues
            while not stop.is_set():
                for frame in queue.receive():
                    if (answer := answered(frame.data, front.mac)) is not None:
                        queue.send(Frame(answer))
                queue.push()
                queue.wait(0.05)
            queue.flush()
            front.disconnect()

        running = asyncio.create_task(here.host.guest(guest))
        await here.until(lambda: here.node("state") == "4", "connected")

        def ping() -> None:
            with here.netns.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
                sock.settimeout(20)
                for number in range(20):
                    echo = bytes([8, 0, 0, 0, 0, 77, 0, number]) + payload(number, 1400)
                    echo = echo[:2] + (0xFFFF ^ checksum(echo)).to_bytes(2, "big") + echo[4:]
                    sock.sendto(echo, (GUEST4, 0))
                    got = sock.recv(2000)[20:]
                    assert got[0] == 0 and check_payload(got[8:]) == number

        await asyncio.to_thread(ping)
        stop.set()
        await running


def answered(frame: bytes, mac: bytes) -> bytes | None:
    """What a guest's stack says to a broadcast ARP request or an echo request."""
    if frame[12:14] == b"\x08\x06":
        return arp_reply(frame, mac)
    if frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 8:
        body = b"\0" + frame[35:36] + b"\0\0" + frame[38:]
        body = body[:2] + (0xFFFF ^ checksum(body)).to_bytes(2, "big") + body[4:]
        return frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30] + body
    return None
