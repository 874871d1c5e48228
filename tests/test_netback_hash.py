"""The control ring: Toeplitz hashes against Xen's own function in C, the mapping to queues, what is refused."""

from __future__ import annotations

import ctypes
import random
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from evtchnd.guest.netfront import Netfront
from evtchnd.guest.packets import TCP, check_payload, ip, payload, udp_data
from evtchnd.netif import CTRL_REQUEST, CTRL_RESPONSE, Ctrl, CtrlStatus
from evtchnd.ring import FrontRing, RingLayout
from netns import possible
from vif import GUEST4, TAP, World, world

pytestmark = pytest.mark.skipif(not possible(), reason="needs root: namespaces and /dev/net/tun")

HEADER = Path("/usr/include/xen/io/netif.h")


class Control:
    """The guest's end of a control ring."""

    def __init__(self, here: World) -> None:
        self.vm, self.domain = here.host.vm, here.host.domain
        self.gfn = self.domain.alloc(2)
        self.views = [self.vm.ram.view(self.gfn + index) for index in range(2)]
        self.views[0][:] = bytes(4096)
        self.ring = FrontRing(self.views[:1], RingLayout(CTRL_REQUEST.size, CTRL_RESPONSE.size, 1))
        self.grefs = [self.domain.grant(self.gfn + index) for index in range(2)]
        self.port = self.vm.alloc_unbound(0)
        self._ident = 0

    def nodes(self) -> dict[str, str]:
        return {"ctrl-ring-ref": str(self.grefs[0]), "event-channel-ctrl": str(self.port)}

    def ask(self, kind: int, *data: int) -> tuple[int, int]:
        """(status, data)."""
        self._ident += 1
        self.ring.request(CTRL_REQUEST.pack(self._ident, kind, *(list(data) + [0] * 3)[:3]))
        if self.ring.push():
            self.vm.send(self.port)
        while not self.ring.arm():
            assert self.vm.wait(self.port, 20), "no answer"
        (entry,) = self.ring.responses(2)
        ident, answered, status, value = CTRL_RESPONSE.unpack_from(entry)
        assert (ident, answered) == (self._ident, kind)
        return status, value

    def give(self, data: bytes) -> int:
        """The page with `data`, its grant."""
        self.views[1][: len(data)] = data
        return self.grefs[1]

    def release(self) -> None:
        self.ring.close()
        for view in self.views:
            view.release()
        for gref in self.grefs:
            self.domain.end_grant(gref)
        self.vm.close_port(self.port)


@pytest.fixture(scope="module")
def toeplitz(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """xen_netif_toeplitz_hash, as Xen's header has it."""
    if not HEADER.exists():
        pytest.skip("needs Xen's headers (Debian: libxen-dev)")
    path = tmp_path_factory.mktemp("toeplitz")
    (path / "t.c").write_text(
        "#include <stdint.h>\n#include <xen/xen.h>\n#define XEN_NETIF_DEFINE_TOEPLITZ\n#include <xen/io/netif.h>\n"
        "uint32_t hash(const uint8_t *k, unsigned kl, const uint8_t *b, unsigned n)"
        "{ return xen_netif_toeplitz_hash(k, kl, b, n); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", path / "t.so", path / "t.c"], check=True)
    return ctypes.CDLL(str(path / "t.so"))


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
async def test_hash_and_queue_of_what_comes(ipv6: bool, toeplitz: ctypes.CDLL) -> None:
    rng = random.Random(3)
    key = rng.randbytes(40)
    toeplitz.hash.restype = ctypes.c_uint32
    async with world() as here:
        device = here.attach(queues=2)
        way = here.way(ipv6=ipv6).back()
        control = Control(here)
        with here.netns.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((TAP, 0))

            def guest() -> None:
                front = here.front(queues=2, nodes=control.nodes())
                here.connect(front)
                assert here.node("feature-ctrl-ring") == "1"
                assert control.ask(Ctrl.SET_HASH_ALGORITHM, 1) == (CtrlStatus.SUCCESS, 0)
                assert control.ask(Ctrl.GET_HASH_FLAGS) == (CtrlStatus.SUCCESS, 15)
                assert control.ask(Ctrl.SET_HASH_FLAGS, 15) == (CtrlStatus.SUCCESS, 0)
                assert control.ask(Ctrl.SET_HASH_KEY, control.give(key), 40) == (CtrlStatus.SUCCESS, 0)
                size = 64
                assert control.ask(Ctrl.SET_HASH_MAPPING_SIZE, size) == (CtrlStatus.SUCCESS, 0)
                mapping = [rng.randrange(2) for _ in range(size)]
                table = struct.pack(f"<{size}I", *mapping)
                assert control.ask(Ctrl.SET_HASH_MAPPING, control.give(table), size, 0) == (CtrlStatus.SUCCESS, 0)
                seen = set()
                for number in range(200):
                    ports = struct.pack("!HH", rng.randrange(1, 65536), rng.randrange(1, 65536))
                    tcp = number % 4 != 0
                    body = ports + bytes(16) + payload(number, 64 + 40 * number)[: 1400 if number % 2 else 64]
                    sock.send(ip(way, TCP if tcp else 17, body))
                    offset = 54 if ipv6 else 34
                    frame, queue = one(front, offset + 20)
                    data = way.address + way.peer + (ports if tcp else b"")
                    value = toeplitz.hash(key, 40, data, len(data))
                    ((kind, extra),) = frame.extras
                    assert kind == 4
                    assert extra == struct.pack("<BBI", (2 if ipv6 else 0) + tcp, 1, value)
                    assert queue == mapping[value % size]
                    seen.add(queue)
                assert seen == {0, 1}
                assert control.ask(Ctrl.SET_HASH_FLAGS, 0) == (CtrlStatus.SUCCESS, 0)
                sock.send(ip(way, TCP, bytes(20) + payload(1, 64)))
                frame, _ = one(front, offset + 20)
                assert frame.extras == []
                front.disconnect()
                control.release()

            await here.host.guest(guest)
        assert device.stats()["rx_dropped_expired"] == 0


def one(front: Netfront, at: int) -> tuple[object, int]:
    """The next frame with a payload of ours at `at`, and its queue."""
    for _ in range(2000):
        for number, queue in enumerate(front.queues):
            for frame in queue.receive():
                if frame.data[:6] == front.mac and len(frame.data) > at + 8:
                    check_payload(frame.data[at:])
                    return frame, number
        front.queues[0].wait(0.01)
    raise AssertionError("nothing came")


async def test_what_is_refused() -> None:
    async with world() as here:
        here.attach(queues=2)
        control = Control(here)

        def guest() -> None:
            front = here.front(queues=1, nodes=control.nodes())
            here.connect(front)
            bad, over, no = CtrlStatus.INVALID_PARAMETER, CtrlStatus.BUFFER_OVERFLOW, CtrlStatus.NOT_SUPPORTED
            asked = [
                ((0,), no),
                ((8, 0), no),
                ((77, 1, 2, 3), no),
                ((Ctrl.GET_HASH_FLAGS,), no),
                ((Ctrl.SET_HASH_FLAGS, 1), bad),
                ((Ctrl.SET_HASH_ALGORITHM, 2), bad),
                ((Ctrl.SET_HASH_ALGORITHM, 1), 0),
                ((Ctrl.SET_HASH_FLAGS, 16), bad),
                ((Ctrl.SET_HASH_KEY, control.grefs[1], 41), over),
                ((Ctrl.SET_HASH_KEY, 5000, 40), bad),
                ((Ctrl.SET_HASH_KEY, 0xFFFFFFFF, 1), bad),
                ((Ctrl.SET_HASH_KEY, 5000, 0), 0),
                ((Ctrl.SET_HASH_MAPPING_SIZE, 129), bad),
                ((Ctrl.SET_HASH_MAPPING_SIZE, 128), 0),
                ((Ctrl.SET_HASH_MAPPING, control.grefs[1], 129, 0), over),
                ((Ctrl.SET_HASH_MAPPING, control.grefs[1], 1, 128), bad),
                ((Ctrl.SET_HASH_MAPPING, control.grefs[1], 2, 0xFFFFFFFF), bad),
                ((Ctrl.SET_HASH_MAPPING, 5000, 2, 0), bad),
            ]
            for request, status in asked:
                assert control.ask(*request)[0] == status, request
            for table, status in ((b"\0\0\0\0\1\0\0\0", bad), (bytes(8), 0)):  # it has one queue
                assert control.ask(Ctrl.SET_HASH_MAPPING, control.give(table), 2, 126)[0] == status
            assert control.ask(Ctrl.GET_HASH_MAPPING_SIZE) == (0, 128)
            front.disconnect()
            control.release()

        await here.host.guest(guest)


async def test_a_replaced_worker_hashes_on() -> None:
    async with world() as here:
        device = here.attach(queues=2)
        control = Control(here)
        with here.udp() as sock:
            front = here.front(queues=2, nodes=control.nodes())
            await here.host.guest(lambda: here.connect(front))

            def choose() -> None:
                assert control.ask(Ctrl.SET_HASH_ALGORITHM, 1)[0] == 0
                assert control.ask(Ctrl.SET_HASH_FLAGS, 1)[0] == 0
                assert control.ask(Ctrl.SET_HASH_KEY, control.give(bytes(range(40))), 40)[0] == 0

            def heard() -> bytes:
                sock.sendto(payload(5, 100), (GUEST4, 7000))
                frame, _ = one(front, 42)
                assert check_payload(udp_data(frame.data, blank=frame.csum_blank)) == 5  # type: ignore[attr-defined]
                ((kind, extra),) = frame.extras  # type: ignore[attr-defined]
                assert kind == 4
                return bytes(extra)

            await here.host.guest(choose)
            before = await here.host.guest(heard)
            assert before[2:] != bytes(4)
            await here.host.kill(0)
            here.run(0, device.vif, here.reported[0])
            await here.until(lambda: len(here.host.bound) == 5, "attached again")
            assert await here.host.guest(heard) == before
            await here.host.guest(front.disconnect)
            control.release()
