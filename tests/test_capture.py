"""Captures of a vif: what tshark reads is what crossed it, and no reader is waited for."""

from __future__ import annotations

import asyncio
import json
import select
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from evtchnd.errors import HostError, VmmError
from evtchnd.guest.netfront import Frame, Netfront, Queue
from evtchnd.guest.packets import TCP, check_payload, ip, payload, pseudo, udp
from evtchnd.netif import TxFlag
from evtchnd_backends import capture, pcapng
from netns import possible
from scale import scaled
from test_netback_hostile import guest, slots
from vif import GUEST4, TAP, World, world

pytestmark = pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")
needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")

IN, OUT = 1, 2
HELLO = b'{"parameters":{}}\0'


class Reader:
    """The other end of a capture: takes nothing until it is asked to."""

    def __init__(self, here: World, *, snap: int = 0, most: int = 0) -> None:
        self.sock, theirs = socket.socketpair()
        here.devices[0].capture(theirs.detach(), HELLO, snap, most)

    @classmethod
    async def of(cls, here: World, **options: int) -> Reader:
        """Once its backend serves."""
        device = here.devices[0]
        await here.until(lambda: device.capture != device.refuse, "served")
        return cls(here, **options)

    def rest(self) -> bytes:
        """To the end."""
        self.sock.settimeout(30)
        data = bytearray()
        while piece := self.sock.recv(1 << 20):
            data += piece
        self.sock.close()
        assert data.startswith(HELLO)
        return bytes(data[len(HELLO) :])

    async def all(self) -> bytes:
        return await asyncio.to_thread(self.rest)

    async def end(self) -> bytes:
        """Says that it has had enough, and takes what comes."""
        self.sock.shutdown(socket.SHUT_WR)
        return await self.all()


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    """(type, body) of each block of a file that is whole."""
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack_from("=II", data, at)
        assert length % 4 == 0 and struct.unpack_from("=I", data, at + length - 4)[0] == length
        found.append((kind, data[at + 8 : at + length - 4]))
        at += length
    assert at == len(data)
    return found


def options(body: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while True:
        code, length = struct.unpack_from("=HH", body, at)
        if code == 0:
            assert at + 4 == len(body)
            return found
        found[code] = body[at + 4 : at + 4 + length]
        at += 4 + length + (-length & 3)


class Packet:
    """An Enhanced Packet Block."""

    def __init__(self, body: bytes) -> None:
        number, high, low, captured, self.length = struct.unpack_from("=IIIII", body)
        assert number == 0
        self.time = high << 32 | low
        self.data = body[20 : 20 + captured]
        said = options(body[20 + captured + (-captured & 3) :])
        (self.flags,), (self.queue,) = struct.unpack("=I", said[2]), struct.unpack("=I", said[6])
        self.dropped = struct.unpack("=Q", said[4])[0] if 4 in said else 0
        self.way = self.flags & 3


def packets(data: bytes) -> list[Packet]:
    return [Packet(body) for kind, body in blocks(data) if kind == 6]


def counted(data: bytes) -> tuple[int, int]:
    """isb_ifrecv, isb_ifdrop of the last block."""
    kind, body = blocks(data)[-1]
    assert kind == pcapng.STATISTICS
    said = options(body[12:])
    return struct.unpack("=Q", said[4])[0], struct.unpack("=Q", said[5])[0]


def tshark(file: Path, *arguments: str) -> str:
    run = subprocess.run(["tshark", "-n", "-r", str(file), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_tshark
@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_tshark_reads_what_crossed_both_ways(mtu: int, tmp_path: Path) -> None:
    async with world() as here:
        here.attach(queues=2, mtu=mtu)
        here.netns.ip("link", "set", TAP, "mtu", str(mtu))
        way = here.way()
        reader = await Reader.of(here)
        expected: list[tuple[int, int, bytes]] = []  # direction, queue, frame

        def body(front: Netfront, _: Queue, sock: socket.socket) -> None:
            for number in range(40):
                queue = front.queues[number % 2]
                data = udp(way, payload(number, 8 + number * (mtu - 50) // 40))
                sizes = [42, 1, len(data) - 43] if number % 3 and len(data) < 4000 else None
                queue.send(Frame(data), sizes)
                queue.push()
                received, peer = sock.recvfrom(65536)
                assert check_payload(received) == number
                expected.append((IN, number % 2, data))
                sock.sendto(payload(number, 8 + number), peer)
                got: list[tuple[int, Frame]] = []
                while not any(frame.data[:6] == front.mac for _, frame in got):
                    got += [(n, frame) for n, each in enumerate(front.queues) for frame in each.receive()]
                    if not got:
                        front.queues[0].wait(0.01)
                expected.extend((OUT, n, frame.data) for n, frame in got)

        await guest(here, body, queues=2)
        file = tmp_path / "file"
        file.write_bytes(await reader.end())
    names = ("interface_name", "packet_flags_direction", "interface_queue", "len", "cap_len", "time_epoch")
    told = tshark(file, "-T", "fields", *(word for name in names for word in ("-e", f"frame.{name}")))
    lines = [line.split("\t") for line in told.splitlines()]
    raw = [
        bytes.fromhex(each["_source"]["layers"]["frame_raw"][0]) for each in json.loads(tshark(file, "-T", "jsonraw"))
    ]
    assert {line[0] for line in lines} == {TAP}
    seen = [(int(line[1], 0), int(line[2]), data) for line, data in zip(lines, raw, strict=True)]
    # a multicast of the host's may come when the guest looks no more
    for number in range(2):
        sent = [each for each in expected if each[:2] == (OUT, number)]
        assert [each for each in seen if each[:2] == (OUT, number)][: len(sent)] == sent
    assert [each for each in seen if each[0] == IN] == [each for each in expected if each[0] == IN]
    assert all(int(line[3]) == int(line[4]) == len(data) for line, data in zip(lines, raw, strict=True))
    times = [float(line[5]) for line in lines]
    assert times == sorted(times) and abs(times[0] - time.time()) < 3600  # in the unit that the file says
    # and the file's own structure, as Wireshark's dissector of it has it
    structure = tshark(file, "-X", "read_format:MIME Files Format", "-V")
    for text in (
        "Option: User Application = evtchnd",
        f"Option: Interface Name = {TAP}",
        "Option: Interface Description = domain 7: vif 0, 00:16:3e:00:00:07",
        f"Option: Number of Received Packets = {len(raw)}",
        "Option: Number of Dropped Packets = 0",
        f"Option: Number of Packets Delivered to the User = {len(raw)}",
    ):
        assert text in structure, structure[-3000:]
    assert "Malformed" not in structure


def segmented(here: World, size: int) -> Frame:
    """One TCP packet that asks to be cut into segments."""
    way = here.way()
    head = struct.pack("!HHIIBBHHH", 7000, 7001, 1, 1, 0x50, 0x10, 1000, 0, 0)
    data = head + payload(1, size)
    total = pseudo(way.address, way.peer, TCP, len(data))
    data = data[:16] + total.to_bytes(2, "big") + data[18:]
    return Frame(ip(way, TCP, data), csum_blank=True, gso_size=1448, gso_type=1)


async def test_a_super_frame_as_it_is_and_cut_to_the_snap() -> None:
    async with world() as here:
        here.attach()
        whole, cut = await Reader.of(here), await Reader.of(here, snap=100)
        frame = segmented(here, 40000)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            queue.send(frame)
            queue.push()
            queue.flush()

        await guest(here, body)
        (one,) = [each for each in packets(await whole.end()) if each.way == IN]
        (part,) = [each for each in packets(await cut.end()) if each.way == IN]
    assert one.data == frame.data and one.flags == IN | 0x200 | 0x800
    assert part.data == frame.data[:100] and part.length == len(frame.data)


async def test_what_the_guest_gets_with_its_offloads() -> None:
    """A checksum that the kernel left open is marked so; a frame of a kernel's own super-segment is one frame."""
    async with world() as here:
        here.attach()
        reader = await Reader.of(here)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            with here.netns.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
                raw.sendto(struct.pack("!HHHH", 1, 2, 16, 0) + payload(5, 8), (GUEST4, 0))  # no checksum at all
            queue.expect(1, mac=front.mac)
            sock.sendto(payload(6, 8), (GUEST4, 7000))
            queue.expect(1, mac=front.mac)

        await guest(here, body)
        unicast = [each for each in packets(await reader.end()) if each.data[:6] == bytes.fromhex("00163e000007")]
    assert [each.flags for each in unicast] == [OUT, OUT | 0x200]


async def test_a_reader_that_stalls_costs_the_guest_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "BUFFER_BYTES", 1 << 16)
    count = scaled(8000, least=1000)
    async with world() as here:
        device = here.attach()
        way = here.way()
        stalled = await Reader.of(here)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            for number in range(count):
                queue.send(Frame(udp(way, payload(number, 1000))))
                queue.push()
                assert check_payload(sock.recv(2048)) == number
            queue.flush()

        await guest(here, body)
        stats = device.stats()
        assert stats["tx_packets"] == count and stats["captures"] == 1
        assert 0 < stats["capture_dropped"] < count + 100
        # it wakes up, takes what there is, and the capture goes on
        stalled.sock.setblocking(False)
        first = bytearray()
        while select.select([stalled.sock], [], [], 0.5)[0]:
            first += stalled.sock.recv(1 << 20)
            await asyncio.sleep(0)

        def more(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            queue.send(Frame(udp(way, payload(count, 1000))))
            queue.push()
            assert check_payload(sock.recv(2048)) == count

        await guest(here, more)
        stalled.sock.setblocking(True)
        stalled.sock.shutdown(socket.SHUT_WR)
        data = bytes(first)[len(HELLO) :] + await asyncio.to_thread(_rest, stalled.sock)
        assert device.stats()["captures"] == 0
    taken = packets(data)
    received, dropped = counted(data)
    assert dropped >= stats["capture_dropped"] and received == len(taken) + dropped
    assert sum(each.dropped for each in taken) == dropped  # said where they are missing
    numbers = [check_payload(each.data[42:]) for each in taken if each.way == IN]
    assert numbers == sorted(numbers) and numbers[-1] == count


def _rest(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 20):
        data += piece
    sock.close()
    return bytes(data)


async def test_a_reader_that_takes_nothing_at_its_end_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_LAST_S", 0.1)
    async with world() as here:
        device = here.attach()
        way = here.way()
        reader = await Reader.of(here)

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            for number in range(600):
                queue.send(Frame(udp(way, payload(number, 1400))))
                queue.push()
                assert check_payload(sock.recv(2048)) == number

        await guest(here, body)
        reader.sock.shutdown(socket.SHUT_WR)
        await here.until(lambda: device.stats()["captures"] == 0, "let go")
        reader.sock.close()


async def test_several_at_once() -> None:
    async with world() as here:
        device = here.attach()
        way = here.way()
        few, cut = await Reader.of(here, most=3), await Reader.of(here, snap=50)
        every, fourth = await Reader.of(here), await Reader.of(here)
        ours, theirs = socket.socketpair()
        with pytest.raises(HostError, match=r"^domain 7: vif 0: 4 captures of it run already$"):
            device.capture(theirs.detach(), HELLO, 0, 0)
        assert ours.recv(1) == b""
        ours.close()
        fourth.sock.close()  # without a word

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            for number in range(20):
                queue.send(Frame(udp(way, payload(number, 100))))
                queue.push()
                assert check_payload(sock.recv(2048)) == number

        await guest(here, body)
        three = await few.all()  # it ends by itself
        assert len(packets(three)) == 3 and counted(three) == (3, 0)
        await here.until(lambda: device.stats()["captures"] == 2, "two are left")
        short, whole = packets(await cut.end()), packets(await every.end())
        assert len(short) == len(whole) >= 20
        assert [each.data for each in short] == [each.data[:50] for each in whole]
        assert [check_payload(each.data[42:]) for each in whole if each.way == IN] == list(range(20))
        await here.until(lambda: device.stats()["captures"] == 0, "none is left")
        assert device.stats()["capture_dropped"] == 0


async def test_it_lasts_over_connections_and_ends_with_the_vif() -> None:
    async with world() as here:
        device = here.attach()
        way = here.way()
        reader = await Reader.of(here)
        for number in range(3):

            def body(front: Netfront, queue: Queue, sock: socket.socket, number: int = number) -> None:
                queue.send(Frame(udp(way, payload(number, 100))))
                queue.push()
                assert check_payload(sock.recv(2048)) == number

            await guest(here, body)
        await here.host.kill(0)
        data = await reader.all()
        ours, theirs = socket.socketpair()
        with pytest.raises(VmmError, match="not served now"):
            device.capture(theirs.detach(), HELLO, 0, 0)
        ours.close()
    numbers = [check_payload(each.data[42:]) for each in packets(data) if each.way == IN]
    assert numbers == [0, 1, 2]
    assert counted(data)[1] == 0


async def test_hostile_frames() -> None:
    """Split and empty slots are the frame that was sent; what was dropped did not cross; a vif that is stopped goes on
    being captured when it begins again."""
    async with world() as here:
        here.attach()
        way = here.way()
        reader = await Reader.of(here)
        sent: list[bytes] = []

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            number = 0
            for first in range(0, 131, 5):
                for ones in (0, 1, 17):
                    data = udp(way, payload(number, 200))
                    queue.send(Frame(data), [first] + [1] * ones + [len(data) - first - ones])
                    queue.push()
                    assert check_payload(sock.recv(2048)) == number
                    sent.append(data)
                    number += 1
            data = udp(way, payload(number, 100))
            good = slots(queue, data, [0, len(data), 0])
            queue.put(good, len(data), 0, (), [0xFFFFFFF0, queue.tx_grefs[good[1][0]], 0xFFFFFFF1])
            queue.push()
            assert check_payload(sock.recv(2048)) == number
            sent.append(data)
            # dropped: sizes that lie, a grant that is none, a checksum where there is none, too many slots
            queue.put(slots(queue, data, [60, 60]), 50)
            queue.put(slots(queue, data, [len(data)]), len(data), 0, (), [0xFFFFFFF0])
            queue.put(slots(queue, bytes(60), [60]), 60, TxFlag.CSUM_BLANK)
            queue.put(slots(queue, data, [2] * 20), 40)
            queue.flush()

        await guest(here, body)

        with here.udp() as sock:

            def stopped_and_again() -> None:
                bad = here.front()
                here.connect(bad)
                (queue,) = bad.queues
                queue.put([(queue.free.pop(), 4000, 0, 200)], 200)  # crosses its page
                queue.tx.push()
                here.host.vm.send(queue.ports[0])
                bad.bus.wait_backend(5)  # type: ignore[arg-type]
                bad.bus.switch(6)  # type: ignore[arg-type]
                bad.bus.wait_backend(6)  # type: ignore[arg-type]
                bad.release()
                good = here.front()
                here.connect(good)
                good.queues[0].send(Frame(udp(way, payload(7, 100))))
                good.queues[0].push()
                assert check_payload(sock.recv(2048)) == 7
                good.disconnect()

            await here.host.guest(stopped_and_again)
        sent.append(udp(way, payload(7, 100)))
        data = await reader.end()
    assert [each.data for each in packets(data) if each.way == IN] == sent


async def test_no_capture_no_copy() -> None:
    """The rings have nothing to write to before the first and after the last."""
    async with world() as here:
        device = here.attach()
        seen: list[Any] = []

        def body(front: Netfront, queue: Queue, sock: socket.socket) -> None:
            seen.append(device.stats()["captures"])

        await guest(here, body)
        reader = await Reader.of(here)
        await guest(here, body)
        await reader.end()
        await here.until(lambda: device.stats()["captures"] == 0, "over")
        await guest(here, body)
    assert seen == [0, 1, 0]
