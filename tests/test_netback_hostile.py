"""What a guest may do to netback: every row of Xen's and Linux' advisories about netif rings.

Each packet is either what was sent, byte for byte, or dropped with a counter; each slot has one answer; or the vif is
stopped with one line, begins again when the frontend does, and no other vif notices.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest

from evtchnd.guest.domain import GuestFault
from evtchnd.guest.netfront import Frame, Netfront, Queue
from evtchnd.guest.packets import TCP, check_payload, ip, payload, pseudo, udp
from evtchnd.netif import RX_REQUEST, TxFlag
from netns import possible
from scale import scaled
from vif import GUEST4, TAP, World, world

pytestmark = pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")


def slots(queue: Queue, data: bytes, sizes: Sequence[int], offset: int = 0) -> list[tuple[int, int, int, int]]:
    """Pages filled with the parts of `data`, for `Queue.put`."""
    found, at = [], 0
    queue.wait_room(len(sizes))
    for size in sizes:
        page = queue.free.pop()
        part = data[at : at + size]
        queue.tx_views[page][offset : offset + len(part)] = part
        found.append((page, offset, 0, size))
        at += size
    return found


async def guest(here: World, body: Callable[[Netfront, Queue, socket.socket], None], **options: object) -> None:
    """Runs `body` with a connected frontend, its first queue, and a socket of the host."""
    with here.udp() as sock:

        def run() -> None:
            front = here.front(**options)
            here.connect(front)
            body(front, front.queues[0], sock)
            front.disconnect()

        await here.host.guest(run)


async def test_xsa_423_headers_split_at_every_byte() -> None:
    """XSA-423: the first part of 0 to 130 bytes, then parts of one byte, 2 to 19 slots in all."""
    async with world() as here:
        device = here.attach()
        way = here.way()
        sent = 0

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            nonlocal sent
            for blank in (False, True):
                for first in range(131):
                    for ones in (0, 1, 2, 7, 16, 17):
                        data = udp(way, payload(sent, 200), blank=blank)
                        rest = len(data) - first - ones
                        queue.send(Frame(data, csum_blank=blank), [first] + [1] * ones + [rest])
                        queue.push()
                        assert check_payload(sock.recv(2048)) == sent
                        sent += 1
            queue.flush()
            assert queue.tx_errors == 0

        await guest(here, body)
        assert device.stats()["tx_packets"] == sent


async def test_xsa_448_slots_of_no_bytes_anywhere() -> None:
    """XSA-448: first, in the middle, last, all but one; their grants are never looked at."""
    async with world() as here:
        here.attach()
        way = here.way()

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            number = 0
            for count in range(2, 20):
                for place in range(count):
                    data = udp(way, payload(number, 100))
                    sizes = [0] * count
                    sizes[place] = len(data)
                    given = slots(queue, data, sizes)
                    grefs = [
                        queue.tx_grefs[page] if size else 0xFFFFFFF0 + index % 16
                        for index, (page, _, _, size) in enumerate(given)
                    ]
                    queue.put(given, len(data), 0, (), grefs)
                    queue.push()
                    assert check_payload(sock.recv(2048)) == number
                    number += 1
            queue.flush()
            assert queue.tx_errors == 0
            queue.put(slots(queue, b"", [0] * 5), 0)
            queue.flush()
            assert queue.tx_errors == 5

        await guest(here, body)


@pytest.mark.parametrize("size", [1, 60, 128, 3000])
async def test_xsa_432_slots_after_the_head(size: int) -> None:
    """18 are taken; 19 and 20 cost the packet, one answer a slot."""
    async with world() as here:
        device = here.attach(mtu=60000)
        here.netns.ip("link", "set", TAP, "mtu", "60000")
        way = here.way()

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            for number, after in enumerate((18, 19, 20, 18)):
                sizes = [60] + [size] * after
                data = udp(way, payload(number, sum(sizes) - 42))
                queue.put(slots(queue, data, sizes), len(data))
                before = queue.tx_errors
                queue.flush()
                assert queue.tx_errors - before == (after + 1 if after > 18 else 0)
            assert check_payload(sock.recv(65535)) == 0
            assert check_payload(sock.recv(65535)) == 3

        await guest(here, body)
        assert device.stats()["tx_dropped_bad"] == 2
        assert device.stats()["tx_packets"] == 2


GOOD = b"\xff" * 60


def gso(size: int, kind: int, more: int = 0) -> bytes:
    return struct.pack("<BBHBBH", 1, more, size, kind, 0, 0)


FATAL: dict[str, tuple[Callable[[Queue], None], str]] = {
    "21 slots after the head": (
        lambda q: q.put(slots(q, b"", [60] + [1] * 21), 81),
        "tx: more than 20 slots after the first one",
    ),
    "first slot crosses": (lambda q: q.put(slots(q, b"", [60], offset=4090), 60), "tx: slot 0: 4090 + 60 crosses"),
    "later slot crosses": (
        lambda q: q.put([*slots(q, GOOD, [60]), (q.free.pop(), 4000, 0, 97)], 157),
        "tx: slot 1: 4000 + 97 crosses",
    ),
    "size of 64 KiB in one slot": (lambda q: q.put(slots(q, GOOD, [60]), 65535), "tx: slot 0: 0 + 65535 crosses"),
    "a missing slot": (lambda q: q.put([(q.free.pop(), 0, int(TxFlag.MORE_DATA), 60)], 60), "tx: slot 2"),
    "a missing extra": (lambda q: q.put(slots(q, GOOD, [60]), 60, TxFlag.EXTRA_INFO), "tx: an extra is missing"),
    "an extra that promises more": (
        lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [gso(1400, 1, more=1)]),
        "tx: an extra is missing",
    ),
    "extra of type 0": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [bytes(8)]), "tx: extra of type 0"),
    "extra of type 6": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [b"\6" + bytes(7)]), "tx: extra of type 6"),
    "extra of type 255": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [b"\xff" * 8]), "tx: extra of type 255"),
    "gso of 0 bytes": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [gso(0, 1)]), "tx: segments of 0 bytes"),
    "gso of type 0": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [gso(1400, 0)]), "tx: segmentation of type 0"),
    "gso of type 3": (lambda q: q.put(slots(q, GOOD, [60]), 60, 0, [gso(1400, 3)]), "tx: segmentation of type 3"),
    "tx index one too far": (lambda q: q.tx._area.store(0, q.tx.req_prod + 257), "tx ring: request index jumped"),
    "tx index behind": (lambda q: q.tx._area.store(0, q.tx.req_prod - 1 & 0xFFFFFFFF), "tx ring: request index jumped"),
    "tx index half around": (lambda q: q.tx._area.store(0, q.tx.req_prod ^ 1 << 31), "tx ring: request index jumped"),
    "rx index one too far": (lambda q: q.rx._area.store(0, q.rx._area.load(8) + 257), "rx ring: request index jumped"),
    "rx index behind": (lambda q: q.rx._area.store(0, q.rx.rsp_cons - 1 & 0xFFFFFFFF), "rx ring: request index jumped"),
}


@pytest.mark.parametrize(("what", "line"), FATAL.values(), ids=FATAL)
async def test_what_no_driver_does_stops_that_vif(
    what: Callable[[Queue], None], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, Closing; the frontend may begin again; the other vif goes on all the time."""
    async with world() as here:
        here.attach()
        here.attach(1, address=False)
        here.netns.sysctl("net.ipv6.conf.all.disable_ipv6", 1)  # nothing comes by itself: rx indices stand still
        way = here.way()
        with here.udp() as sock:

            def run() -> None:
                bad, other = here.front(0), here.front(1)
                other.connect()
                here.connect(bad)
                queue = bad.queues[0]
                what(queue)
                queue.tx.push() if queue.tx.free < 256 else None
                here.host.vm.send(queue.ports[0])
                # the receive ring is looked at when a packet comes
                sock.sendto(b"for the guest", (GUEST4, 7000))
                bad.bus.wait_backend(5)  # type: ignore[arg-type]
                bad.bus.switch(6)  # type: ignore[arg-type]
                bad.bus.wait_backend(6)  # type: ignore[arg-type]
                bad.release()
                other.queues[0].send(Frame(b"\xff" * 60))
                other.queues[0].flush()
                assert other.queues[0].tx_errors == 1  # its TAP is down: dropped, answered
                good = here.front(0)
                here.connect(good)
                good.queues[0].send(Frame(udp(way, payload(1, 100))))
                good.queues[0].push()
                assert check_payload(sock.recv(2048)) == 1
                good.disconnect()
                other.disconnect()

            with caplog.at_level(logging.ERROR):
                await here.host.guest(run)
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert record.getMessage().startswith(f"domain 7: vif 0: stopped: {line}")


def tcp(here: World, size: int) -> bytes:
    """A TCP segment to a closed port, its checksum left to do."""
    way = here.way()
    body = struct.pack("!HHIIBBHHH", 7000, 9, 1, 0, 0x50, 0x10, 1000, 0, 0) + bytes(size)
    value = pseudo(way.address, way.peer, TCP, len(body))
    return ip(way, TCP, body[:16] + struct.pack("!H", value) + body[18:])


async def test_packets_that_lie_are_dropped() -> None:
    """By reason; and the next packet goes through."""
    async with world() as here:
        device = here.attach()
        way = here.way()
        plain = udp(way, payload(0, 500), blank=True)
        segment = tcp(here, 3000)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            def bad(counter: str, put: Callable[[], None], answers: int = 1) -> None:
                before, errors = device.stats()[counter], queue.tx_errors
                put()
                queue.flush()
                assert device.stats()[counter] == before + 1, counter
                assert queue.tx_errors == errors + answers
                queue.send(Frame(udp(way, payload(77, 80))))
                queue.flush()
                assert check_payload(sock.recv(2048)) == 77

            def put(data: bytes, total: int | None = None, flags: int = 0, extras: Sequence[bytes] = ()) -> None:
                sizes = [min(4096, len(data) - at) for at in range(0, len(data), 4096)]
                queue.put(slots(queue, data, sizes), len(data) if total is None else total, flags, extras)

            for size in range(14):
                bad("tx_dropped_bad", lambda size=size: put(GOOD, total=size))
            bad("tx_dropped_bad", lambda: queue.put(slots(queue, plain, [100, 442]), 441), 2)
            for gref in (0, 5000, 0x7FFFFFFF, 0xFFFFFFFF):
                bad("tx_dropped_grant", lambda gref=gref: queue.put(slots(queue, GOOD, [60]), 60, 0, (), [gref]))
            bad(
                "tx_dropped_grant",
                lambda: queue.put(slots(queue, GOOD, [30, 30]), 60, 0, (), [queue.tx_grefs[queue.free[-1]], 4000]),
                2,
            )
            blank = TxFlag.CSUM_BLANK
            bad("tx_dropped_header", lambda: put(GOOD, flags=blank))
            bad("tx_dropped_header", lambda: put(plain[:14], flags=blank))
            for cut in range(15, 42):
                bad("tx_dropped_header", lambda cut=cut: put(plain[:cut], flags=blank))
            bad("tx_dropped_header", lambda: put(plain[:14] + b"\x44" + plain[15:], flags=blank))
            bad("tx_dropped_header", lambda: put(plain[:14] + b"\x4f" + plain[15:40], flags=blank))
            bad("tx_dropped_header", lambda: put(plain[:20] + b"\x20\x00" + plain[22:], flags=blank))
            bad("tx_dropped_header", lambda: put(plain[:23] + b"\x01" + plain[24:], flags=blank))
            bad("tx_dropped_header", lambda: put(plain, flags=blank, extras=[gso(100, 1)]))
            bad("tx_dropped_header", lambda: put(segment, flags=blank, extras=[gso(1000, 2)]))
            bad("tx_dropped_header", lambda: put(segment[:46] + b"\x40" + segment[47:], extras=[gso(1000, 1)]))

        await guest(here, body)


async def test_xsa_155_requests_and_headers_that_change_while_they_are_read() -> None:
    """XSA-155: what arrives is whole, of the old or the new bytes, or it is dropped; the vif and its pins stand."""
    async with world() as here:
        device = here.attach()
        way = here.way()
        stop = threading.Event()

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            ring = queue._views[0]

            def flip() -> None:
                rng = random.Random(1)
                while not stop.is_set():
                    at = 64 + 12 * rng.randrange(256)
                    ring[at : at + 4] = rng.choice((0, 7, 5000, 0xFFFFFFFF)).to_bytes(4, "little")
                    page = queue.tx_views[rng.randrange(256)]
                    page[12:40] = rng.randbytes(28)

            flipper = threading.Thread(target=flip)
            flipper.start()
            data = udp(way, payload(3, 900), blank=True)
            answers = 0
            try:
                for number in range(scaled(20000, least=500)):
                    page = number % 256
                    queue.tx_views[page][: len(data)] = data
                    while not queue.tx.free:  # what an answer says is flipped, too: they are only counted
                        answers += len(queue.tx.responses(256))
                    queue.put([(page, 0, 0, len(data))], len(data), TxFlag.CSUM_BLANK)
                    queue.push()
                while answers < scaled(20000, least=500):
                    answers += len(queue.tx.responses(256))
            finally:
                stop.set()
                flipper.join()

        await guest(here, body)
        stats = device.stats()
        dropped = sum(value for name, value in stats.items() if name.startswith("tx_dropped"))
        assert stats["tx_packets"] + dropped == scaled(20000, least=500)
        assert dropped > 0


async def test_grants_of_receive_pages_that_are_none() -> None:
    """Each such slot is answered with an error, in its place; packets go to the good ones."""
    async with world() as here:
        device = here.attach(mtu=9000)
        here.netns.ip("link", "set", TAP, "mtu", "9000")

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            def post(bad: Callable[[int], bool]) -> None:
                while queue.rx.free:
                    slot = queue.rx.req_prod & 255
                    gref = 5000 if bad(slot) else queue.rx_grefs[slot]
                    queue.rx.request(RX_REQUEST.pack(slot, 0, gref))
                queue.rx.push()
                here.host.vm.send(queue.ports[-1])

            post(lambda slot: slot % 7 < 3)
            for number in range(300):
                sock.sendto(payload(number, 100 if number % 2 else 8000), (GUEST4, 7000))
                while True:
                    found = [f for f in queue.receive(post=0) if f.data[:6] == front.mac]
                    post(lambda slot: slot % 7 < 3)
                    if found:
                        break
                    queue.wait(0.2)
                assert check_payload(found[0].data[42:]) == number

        await guest(here, body, post=0)
        assert device.stats()["rx_bad_grants"] > 100


@pytest.mark.parametrize("posted", [0, 1])
async def test_xsa_392_a_guest_that_takes_nothing_is_flooded(posted: int, caplog: pytest.LogCaptureFixture) -> None:
    """XSA-392: nothing piles up here; what is too old is dropped and counted, the carrier goes, and comes back."""
    async with world() as here:
        device = here.attach(drain_s=0.2, stall_s=0.6)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            queue.post(posted)
            sock.setblocking(False)
            # larger than a page: one free slot is not enough
            for _ in range(5000):
                for size in (1400, 100):
                    with suppress(BlockingIOError):
                        sock.sendto(bytes(size), (GUEST4, 7000))

        async with asyncio.timeout(60):
            with here.udp() as sock:
                front = here.front(post=0)
                await here.host.guest(lambda: here.connect(front))
                queue = front.queues[0]
                with caplog.at_level(logging.WARNING):
                    await here.host.guest(lambda: body(front, queue, sock))
                    assert device.stats()["waiting_bytes"] <= 65557
                    await here.until(lambda: "NO-CARRIER" in here.netns.flags(TAP), "the carrier goes")
                    assert device.stats()["stalled"] == 1
                    assert device.stats()["rx_dropped_expired"] > 0
                    assert device.stats()["rx_packets"] <= posted
                    assert here.node("state") == "4"
                    await here.host.guest(queue.post)
                    await here.until(lambda: "NO-CARRIER" not in here.netns.flags(TAP), "the carrier comes back")

                def again() -> None:
                    for number in range(20):
                        sock.settimeout(5)
                        sock.sendto(payload(number, 1000), (GUEST4, 7000))
                    numbers: list[int] = []
                    while 19 not in numbers:
                        found = queue.expect(1, mac=front.mac)
                        numbers += [check_payload(f.data[42:]) for f in found if f.data[42:50] != bytes(8)]
                    front.disconnect()

                await here.host.guest(again)
        lines = [r.getMessage() for r in caplog.records if "queue 0" in r.getMessage()]
        assert lines == [
            "domain 7: vif 0: queue 0 stalled: no receive slots, carrier off",
            "domain 7: vif 0: queue 0 receives again",
        ]


async def test_a_frontend_that_never_kicks_for_its_receive_slots() -> None:
    """No feature-rx-notify: the ring is looked at every 30 ms while a packet waits, and nobody is called stalled."""
    async with world() as here:
        device = here.attach(stall_s=0.1)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            for number in range(5):
                sock.sendto(payload(number, 300), (GUEST4, 7000))
            while queue.rx.free > 200:
                slot = queue.rx.req_prod & 255
                queue.rx.request(RX_REQUEST.pack(slot, 0, queue.rx_grefs[slot]))
            queue.rx.push()
            frames = queue.expect(5, mac=front.mac, post=0)
            assert [check_payload(f.data[42:]) for f in frames] == list(range(5))

        await guest(here, body, post=0, notify=False)
        assert device.stats()["stalled"] == 0


async def test_indices_near_their_end() -> None:
    """Both rings begin at 2^32 - 3."""
    async with world() as here:
        here.attach()
        way = here.way()
        with here.udp() as sock:

            def run() -> None:
                from evtchnd.guest import netqueue

                class Late(netqueue.FrontRing):
                    def __init__(self, *args: object) -> None:
                        super().__init__(*args)  # type: ignore[arg-type]
                        self.preset((1 << 32) - 3)

                before, netqueue.FrontRing = netqueue.FrontRing, Late  # type: ignore[misc]
                try:
                    front = here.front()
                    here.connect(front)
                finally:
                    netqueue.FrontRing = before  # type: ignore[misc]
                (queue,) = front.queues
                for number in range(600):
                    queue.send(Frame(udp(way, payload(number, 100))), [20, 20, 102])
                    queue.push()
                    assert check_payload(sock.recv(2048)) == number
                    sock.sendto(payload(number, 100), (GUEST4, 7000))
                    (frame,) = queue.expect(1, mac=front.mac)
                    assert check_payload(frame.data[42:]) == number
                front.disconnect()

            await here.host.guest(run)


async def test_xsa_350_connected_a_thousand_times() -> None:
    """XSA-350: descriptors, pins, ports and tasks are back where they were after every connection."""
    async with world() as here:
        here.attach()
        way = here.way()

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            queue.send(Frame(udp(way, payload(1, 100))))
            queue.push()
            assert check_payload(sock.recv(2048)) == 1

        await guest(here, body)
        tasks = len(asyncio.all_tasks())
        for _ in range(scaled(1000, least=10)):
            await guest(here, body)
            assert here.host.grants.pinned == 0 and here.host.bound == []
        await here.until(lambda: len(asyncio.all_tasks()) <= tasks, "tasks end")


BAD_NODES: dict[str, tuple[dict[str, str], str]] = {
    "no rx copy": ({"request-rx-copy": "0"}, "request-rx-copy"),
    "text": ({"tx-ring-ref": "abc"}, "tx-ring-ref: 'abc' is no number"),
    "gref out of the table": ({"rx-ring-ref": "4000000000"}, "4000000000"),
    "the same page twice": ({"rx-ring-ref": "9", "tx-ring-ref": "9"}, "the same page twice"),
    "no such port": ({"event-channel-tx": "999"}, "port"),
    "port 0": ({"event-channel-rx": "0"}, "port 0 is never valid"),
    "one port for both": ({"event-channel-tx": "5", "event-channel-rx": "5"}, "both are port 5"),
    "too many queues": ({"multi-queue-num-queues": "9"}, "multi-queue-num-queues: 9 queues"),
    "no queues": ({"multi-queue-num-queues": "0"}, "multi-queue-num-queues: 0 queues"),
    "queues without folders": ({"multi-queue-num-queues": "2"}, "queue-0/tx-ring-ref: missing"),
}


@pytest.mark.parametrize(("nodes", "line"), BAD_NODES.values(), ids=BAD_NODES)
async def test_a_wrong_handshake(nodes: dict[str, str], line: str, caplog: pytest.LogCaptureFixture) -> None:
    async with world() as here:
        here.attach(queues=2)

        def run() -> None:
            bad = here.front(nodes=nodes)
            with pytest.raises(GuestFault, match="closed instead of connecting"):
                bad.connect()
            bad.bus.switch(6)  # type: ignore[arg-type]
            bad.bus.wait_backend(6)  # type: ignore[arg-type]
            for name in nodes:
                here.host.store.rm(f"{bad.bus.path}/{name}")
            bad.release()
            good = here.front()
            here.connect(good)
            good.disconnect()

        with caplog.at_level(logging.ERROR):
            await here.host.guest(run)
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert record.getMessage().startswith("domain 7: vif 0: stopped: ") and line in record.getMessage()
