"""A soft guest's netfront against netback and a TAP, whose other end is this kernel's stack in a namespace."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from evtchnd.abi import XenbusState
from evtchnd.guest.domain import GuestFault
from evtchnd.guest.netfront import Frame, Netfront
from evtchnd.guest.packets import TCP, arp_reply, check_payload, checksum, ip, payload, udp, udp_data
from netns import Netns, possible
from netrelay import Relay
from scale import scaled
from vif import GUEST4, HOST4, HOST6, TAP, World, world

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
                here.connect(front)
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
            here.connect(front)
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


@asynccontextmanager
async def stacks(*, mtu: int = 1500, queues: int = 1, **options: object) -> AsyncIterator[tuple[World, Relay]]:
    """Two kernel stacks, netback between them."""
    async with world() as here:
        with Netns() as inside:
            here.attach(queues=queues, mtu=mtu)
            here.netns.ip("link", "set", TAP, "mtu", str(mtu))
            front = here.front(queues=queues, **options)
            relay = Relay(inside, here.host.vm, front, mtu=mtu)
            relay.neighbours(here.netns.mac(TAP))
            await here.host.guest(lambda: here.connect(front))
            relay.start()
            try:
                yield here, relay
            finally:
                await asyncio.to_thread(relay.stop)
            await here.host.guest(front.disconnect)


def carry(sender: socket.socket, receiver: socket.socket, content: bytes) -> str:
    """Sends `content` through a TCP connection; the SHA-256 of what arrives."""
    with sender, receiver:
        thread = threading.Thread(target=lambda: (sender.sendall(content), sender.shutdown(socket.SHUT_WR)))
        thread.start()
        digest = hashlib.sha256()
        while data := receiver.recv(1 << 16):
            digest.update(data)
        thread.join()
    return digest.hexdigest()


def connection(listening: Netns, connecting: Netns, address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """(accepted, connected)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with listening.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, port))
        listener.listen()
        listener.settimeout(20)
        client = connecting.socket(family, socket.SOCK_STREAM)
        client.settimeout(20)
        client.connect((address, port))
        return listener.accept()[0], client


MODES: dict[str, dict[str, object]] = {
    "all offloads": {},
    "no gso": {"gso": False},
    "no checksums": {"csum": False},
    "no scatter-gather": {"sg": False},
    "jumbo": {"mtu": 9000, "gso": False},
    "jumbo gso": {"mtu": 9000},
    "two queues": {"queues": 2},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
async def test_tcp_between_two_kernels(ipv6: bool, options: dict[str, object]) -> None:
    """SHA-256 of what goes each way; and what the frontend asked for is what happens."""
    content = random.Random(5).randbytes(scaled(100 << 20, least=4 << 20))
    wanted = hashlib.sha256(content).hexdigest()
    async with stacks(**options) as (here, relay):  # type: ignore[arg-type]

        def both() -> None:
            address = HOST6 if ipv6 else HOST4
            accepted, client = connection(here.netns, relay.netns, address, 5001)
            assert carry(client, accepted, content) == wanted, "guest to host"
            accepted, client = connection(here.netns, relay.netns, address, 5002)
            assert carry(accepted, client, content) == wanted, "host to guest"

        await asyncio.to_thread(both)
        stats = here.devices[0].stats()
    gso = options.get("gso", True) and options.get("csum", True) and options.get("sg", True)
    assert relay.sent_gso > 0
    assert (relay.got_gso > 0) == gso
    assert (relay.got_blank > 0) == options.get("csum", True)
    assert stats["tx_bytes"] >= len(content) and stats["rx_bytes"] >= len(content)
    assert not any(value for name, value in stats.items() if "dropped" in name), stats
    if options.get("mtu") == 9000:
        assert relay.longest > 8000
        assert gso or stats["rx_moved"] == 0
    if "queues" in options:
        assert all(stats[f"queue-{number}/tx_packets"] for number in range(2))


async def test_a_jumbo_frame_where_a_gso_packet_was_possible() -> None:
    """Its pages are moved up: there is no extra behind the first slot after all."""
    async with world() as here:
        device = here.attach(mtu=9000)
        here.netns.ip("link", "set", TAP, "mtu", "9000")
        with here.udp() as sock:

            def guest() -> None:
                front = here.front()
                here.connect(front)
                (queue,) = front.queues
                for number in range(300):
                    sock.sendto(payload(number, 4030 + 16 * number), (GUEST4, 7000))
                    (frame,) = queue.expect(1, mac=front.mac)
                    data = udp_data(frame.data, blank=frame.csum_blank)
                    assert check_payload(data) == number and len(data) == 4030 + 16 * number
                front.disconnect()

            await here.host.guest(guest)
        assert device.stats()["rx_moved"] > 250


async def test_large_packets_among_small_ones() -> None:
    """After small ones a single page is offered to the next: what is longer goes by way of the ring's buffer."""
    async with world() as here:
        here.attach(mtu=9000)
        here.netns.ip("link", "set", TAP, "mtu", "9000")
        with here.udp() as sock:

            def guest() -> None:
                front = here.front(post=0)
                here.connect(front)
                (queue,) = front.queues
                queue.post(24)
                for number in range(600):
                    size = 60 if number % 20 else 4060 + 8 * number
                    sock.sendto(payload(number, size), (GUEST4, 7000))
                    if number == 300:  # there are pages for half of it: it waits
                        queue.post(256)
                    (frame,) = queue.expect(1, mac=front.mac, post=4 if number < 300 else 256)
                    data = udp_data(frame.data, blank=frame.csum_blank)
                    assert check_payload(data) == number and len(data) == size
                front.disconnect()

            await here.host.guest(guest)


async def test_headroom_for_xdp() -> None:
    """xdp-headroom: asked for and given back while packets come, and from the start; one page, several, GSO."""
    async with world() as here:
        device = here.attach(mtu=9000)
        here.netns.ip("link", "set", TAP, "mtu", "9000")
        way = here.way().back()
        with here.udp() as sock, here.netns.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
            raw.bind((TAP, 0))

            def received(front: Netfront, headroom: int) -> None:
                (queue,) = front.queues
                each = 4096 - headroom
                for number, size in enumerate((8, 1472, each - 42, each - 41, 8000, 8, 8)):
                    sock.sendto(payload(number, size), (GUEST4, 7000))
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert check_payload(udp_data(frame.data, blank=frame.csum_blank)) == number
                    assert frame.slots == -(-(size + 42) // each)
                    extra = [(5, struct.pack("<HHH", headroom, 0, 0))] if headroom else []
                    assert frame.extras == extra
                body = bytes(12) + b"\x50\x04" + bytes(6) + payload(1, 44 * 1448)
                segments = ip(way, TCP, body)
                raw.send(struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + segments)
                if headroom <= 256:
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert (frame.data, frame.gso_size, frame.slots) == (segments, 1448, -(-len(segments) // each))
                    return
                for number in range(44):  # the host segments it
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert frame.data[54:] == body[20:][1448 * number :][:1448]

            def guest() -> None:
                front = here.front()
                here.connect(front)
                assert here.node("feature-xdp-headroom") == "1"
                for headroom in (0, 256, 0, 64, 1024, 256):
                    front.xdp(headroom)
                    received(front, headroom)
                front.disconnect()
                front = here.front(nodes={"xdp-headroom": "256"})
                here.connect(front)
                received(front, 256)
                with pytest.raises(GuestFault, match="closed instead of taking 2049 bytes"):
                    front.xdp(2049)
                front.bus.switch(XenbusState.CLOSED)
                front.bus.wait_backend(XenbusState.CLOSED)
                front.release()

            await here.host.guest(guest)
        assert device.stats()["rx_dropped_long"] == 0


async def test_a_checksum_that_the_guest_would_not_find_is_computed() -> None:
    """Left to do behind a VLAN tag: netif has no words for where it belongs. One page, several, odd lengths."""
    async with world() as here:
        device = here.attach(mtu=9000)
        here.netns.ip("link", "set", TAP, "mtu", "9100")
        way = here.way().back()
        with here.netns.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
            sock.bind((TAP, 0))

            def guest() -> None:
                front = here.front()
                here.connect(front)
                (queue,) = front.queues
                for number, size in enumerate((8, 9, 100, 1471, 4000, 4047, 4048, 4049, 4096, 8191, 8900)):
                    plain = udp(way, payload(number, size), blank=True)
                    tagged = plain[:12] + bytes.fromhex("81000005") + plain[12:]
                    sock.send(struct.pack("<BBHHHH", 1, 0, 0, 0, 38, 6) + tagged)
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert frame.data[12:16] == tagged[12:16] and not frame.csum_blank
                    assert check_payload(udp_data(frame.data[:12] + frame.data[16:], blank=False)) == number
                front.disconnect()

            await here.host.guest(guest)
        assert device.stats()["rx_completed"] == 11


def answered(frame: bytes, mac: bytes) -> bytes | None:
    """What a guest's stack says to a broadcast ARP request or an echo request."""
    if frame[12:14] == b"\x08\x06":
        return arp_reply(frame, mac)
    if frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 8:
        body = b"\0" + frame[35:36] + b"\0\0" + frame[38:]
        body = body[:2] + (0xFFFF ^ checksum(body)).to_bytes(2, "big") + body[4:]
        return frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30] + body
    return None
