"""A network namespace of a test's own, as an operator's `ip` sees it; a soft guest that answers what comes from it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from evtchnd.guest.netfront import Frame, Netfront
from evtchnd.guest.packets import arp_reply, check_payload, checksum, payload
from netns import Netns, possible

_CAN = possible()


class Namespace:
    """`name`: a path to it, for `ip` and for `netns=`."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self.name = f"/proc/{os.getpid()}/task/{netns.run(threading.get_native_id)}/ns/net"

    def ip(self, text: str) -> str:
        """`ip TEXT` in it."""
        return self.netns.ip(*text.split())

    def link(self, name: str) -> str:
        """`ip -d link show`, "" where there is none."""
        try:
            return self.ip(f"-d link show {name}")
        except OSError:
            return ""

    def bridge(self, name: str) -> None:
        self.ip(f"link add {name} type bridge")
        self.ip(f"link set {name} up")

    def ping(self, address: str, count: int, size: int = 1000) -> None:
        """Echo requests and their answers, each looked at to the last byte."""
        with self.netns.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(20)
            for number in range(count):
                echo = bytes([8, 0, 0, 0, 0, 77, 0, number]) + payload(number, size)
                echo = echo[:2] + (0xFFFF ^ checksum(echo)).to_bytes(2, "big") + echo[4:]
                sock.sendto(echo, (address, 0))
                got = sock.recv(65536)[20:]
                assert got[0] == 0
                assert check_payload(got[8:]) == number


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Skips the test where none can be made."""
    if not _CAN:
        pytest.skip("needs root: namespaces and /dev/net/tun")
    with Netns() as netns:
        yield Namespace(netns)


@contextmanager
def answering(front: Netfront) -> Iterator[None]:
    """A guest's stack that knows ARP and echo requests, in a thread, on all queues of a connected frontend."""
    stop, failed = threading.Event(), []

    def serve() -> None:
        try:
            while not stop.is_set():
                for queue in front.queues:
                    for frame in queue.receive():
                        if (answer := _answer(frame.data, front.mac)) is not None:
                            queue.send(Frame(answer))
                    queue.push()
                front.queues[0].wait(0.02)
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def _answer(frame: bytes, mac: bytes) -> bytes | None:
    if frame[12:14] == b"\x08\x06":
        return arp_reply(frame, mac)
    if frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 8:
        body = b"\0" + frame[35:36] + b"\0\0" + frame[38:]
        body = body[:2] + (0xFFFF ^ checksum(body)).to_bytes(2, "big") + body[4:]
        return frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30] + body
    return None
