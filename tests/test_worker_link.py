"""One end of a SEQPACKET socket on the loop: descriptors, the bounded queue, the end."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from evtchnd import transport
from evtchnd.errors import VmmError
from evtchnd.worker.link import Link


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class End:
    """What a link told."""

    def __init__(self, sock: socket.socket, *, most: int = 8) -> None:
        self.messages: list[tuple[bytes, int]] = []
        self.reason: str | None = None
        self.over = asyncio.Event()
        self.link = Link(sock, self.received, self.closed, most=most)

    def received(self, data: bytes, fds: list[int]) -> None:
        transport.close_all(fds)
        if data == b"bad":
            raise VmmError("no message at all")
        self.messages.append((data, len(fds)))
        if data == b"last":
            self.over.set()

    def closed(self, reason: str) -> None:
        assert self.reason is None
        self.reason = reason
        self.over.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.over.wait(), 20)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def test_messages_keep_their_order_and_their_descriptors() -> None:
    before = descriptors()
    ours, theirs = pair()
    a, b = End(ours), End(theirs)
    null = os.open("/dev/null", os.O_RDONLY)
    for number in range(40):
        a.link.send(b"%d" % number, [null] * (number % 3))
        await asyncio.sleep(0)
    a.link.send(b"last")
    await b.wait()
    assert b.messages == [(b"%d" % number, number % 3) for number in range(40)] + [(b"last", 0)]
    os.close(null)
    a.link.close()
    b.link.close()
    assert (a.reason, b.reason) == (None, None)
    assert descriptors() == before


async def test_the_other_end_closes() -> None:
    ours, theirs = pair()
    a = End(ours)
    theirs.close()
    await a.wait()
    assert a.reason == ""
    assert not a.link.is_open
    a.link.send(b"into nothing")


async def test_what_waits_is_sent_when_the_peer_reads_and_owns_its_descriptors() -> None:
    before = descriptors()
    ours, theirs = pair()
    a = End(ours, most=4096)
    null = os.open("/dev/null", os.O_RDONLY)
    for number in range(2000):
        a.link.send(b"%d" % number + bytes(1000), [null])
    os.close(null)  # the caller's copy: those that wait have their own
    b = End(theirs)
    a.link.send(b"last")
    await b.wait()
    assert [int(data.rstrip(b"\0")) for data, count in b.messages[:-1] if count == 1] == list(range(2000))
    a.link.close()
    b.link.close()
    assert descriptors() == before


async def test_vmm_that_does_not_read_ends_the_link() -> None:
    before = descriptors()
    ours, theirs = pair()
    a = End(ours, most=16)
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(100_000):
        a.link.send(bytes(1000), [null])
        if not a.link.is_open:
            break
    os.close(null)
    assert a.reason is not None
    assert "does not read: 16" in a.reason
    theirs.close()
    assert descriptors() == before


async def test_an_error_of_the_callee_ends_the_link() -> None:
    ours, theirs = pair()
    a = End(ours)
    theirs.send(b"bad")
    await a.wait()
    assert a.reason == "no message at all"
    theirs.close()


@pytest.mark.parametrize("size", [transport.protocol.MAX_MESSAGE + 1])
async def test_a_message_that_is_too_long(size: int) -> None:
    ours, theirs = pair()
    a = End(ours)
    theirs.send(bytes(size))
    await a.wait()
    assert a.reason is not None
    assert "longer than" in a.reason
    theirs.close()
