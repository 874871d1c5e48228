"""Transports: sockets, a guest's ring page."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from evtchnd.errors import HostError
from evtchnd.xenstore import wire
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import HIGH_WATER, WRITE_BYTES, Server
from evtchnd.xenstore.wire import Op, XenStoreError
from scale import scaled
from xenstore_ends import FrontRing


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()
    assert server.store.check() == []
    assert len(server.store.connections) == 1


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def guest_of(server: Server) -> Callable[..., FrontRing]:
    def make(domid: int = 7, **options: int) -> FrontRing:
        server.introduce(domid)
        server.write(f"/local/domain/{domid}", "", perms=["n0", f"r{domid}"])
        server.write(f"/local/domain/{domid}/data", "", perms=[f"n{domid}"])
        return FrontRing(server, domid, **options)

    return make


# ---- sockets


async def test_a_socket_and_a_second_client(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "xs.sock"
    path.touch()
    await server.listen(str(path), mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    one, two = [await Client.connect(str(path)) for _ in range(2)]
    async with two.watch("/a") as watch:
        assert await anext(watch) == "/a"
        await one.write("/a/b", "text")
        assert await anext(watch) == "/a/b"
    assert await two.read("/a/b") == "text"
    await one.close()
    await two.close()
    await server.close()
    assert not path.exists()


async def test_a_socket_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="xenstore: socket"):
        await server.listen(str(tmp_path / "none" / "xs.sock"))


async def test_a_socket_that_was_made_elsewhere(server: Server, tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(tmp_path / "xs.sock"))
    sock.listen()
    await server.adopt(sock)
    client = await Client.connect(str(tmp_path / "xs.sock"))
    assert await client.ls("/") == []
    await client.close()


async def raw(server: Server, **options: int) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server.attach_socket(theirs, **options)
    ours.setblocking(False)
    return ours


async def test_a_confined_socket(server: Server) -> None:
    server.write("/local/domain/0/backend/vbd/7/51712/params", "disk.img")
    worker = await Client.from_socket(await raw(server, confine=7))
    await worker.write("/local/domain/0/backend/vbd/7/51712/state", 2)
    assert server.read("/local/domain/0/backend/vbd/7/51712/state") == "2"
    for path in ("/local/domain/0/backend/vbd/7/51712/params", "/local/domain/0/backend/vbd/8/1/state", "/tool/x"):
        with pytest.raises(XenStoreError, match="EACCES"):
            await worker.write(path, "x")
    await worker.close()
    await until(lambda: len(server.store.connections) == 1)


@pytest.mark.parametrize("length", [4097, 2**32 - 1])
async def test_xsa_38_a_long_payload_ends_that_client_only(
    server: Server, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    other = await Client.from_socket(await raw(server))
    sock = await raw(server)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, wire.pack(Op.READ, 1, 0, b"/\0") + wire.HEADER.pack(2, 1, 0, length))
    got = b""
    try:
        while data := await loop.sock_recv(sock, 4096):
            got += data
    except ConnectionResetError:
        pass
    sock.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"domain 0: xenstore: connection closed: a message of {length} bytes, 4096 at most"
    ]
    assert await other.ls("/") == []
    await other.close()


async def test_half_a_header_and_the_end(server: Server) -> None:
    for data in (b"", b"\x02", wire.pack(Op.READ, 1, 0, b"/\0")[:-1]):
        sock = await raw(server)
        await asyncio.get_running_loop().sock_sendall(sock, data)
        sock.close()
    await until(lambda: len(server.store.connections) == 1)


async def test_xsa_326_416_pipelined_requests_with_unread_replies(server: Server) -> None:
    """Memory stays flat, others are served, and nothing is lost in the end."""
    count = scaled(100_000, least=3000)
    server.write("/big", "x" * 4000)
    sock = await raw(server)
    loop = asyncio.get_running_loop()
    sending = loop.create_task(
        loop.sock_sendall(sock, b"".join(wire.pack(Op.READ, number, 0, b"/big\0") for number in range(count)))
    )
    other = await Client.from_socket(await raw(server))
    for _ in range(100):
        assert await other.ls("/") == ["big"]
    conn = next(conn for conn, handler in server.connections.items() if conn.out or handler._blocked)  # type: ignore[union-attr]
    assert conn.out_bytes < 1 << 20
    parser, replies = wire.Parser(), 0
    while replies < count:
        parser.feed(await loop.sock_recv(sock, 1 << 20))
        while (message := parser.next()) is not None:
            assert message[:2] == (Op.READ, replies)
            replies += 1
    await sending
    sock.close()
    await other.close()


async def test_events_that_have_waited_come_whole_and_in_order(server: Server) -> None:
    count, token = 5000, b"t" * 200
    sock = await raw(server)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, wire.pack(Op.WATCH, 7, 0, b"/a\0%b\0" % token))
    await until(lambda: len(server.store.watches))
    for number in range(count):
        server.write(f"/a/{number}", "")
    conn = next(conn for conn in server.connections if conn.watches)
    # more than a socket takes: they wait here, and leave together
    assert len(conn.out) > 100
    transport = server.connections[conn]._transport  # type: ignore[union-attr]
    assert transport is not None
    parser = wire.Parser()
    got: list[tuple[int, bytes]] = []
    while len(got) < count + 2:
        parser.feed(await loop.sock_recv(sock, 1 << 20))
        # what is not there any more for the quotas is bounded, too
        assert transport.get_write_buffer_size() <= HIGH_WATER + WRITE_BYTES + 4112
        while (message := parser.next()) is not None:
            got.append((message[0], message[3]))
    assert got[:2] == [(Op.WATCH, b"OK\0"), (Op.WATCH_EVENT, b"/a\0%b\0" % token)]
    assert got[2:] == [(Op.WATCH_EVENT, b"/a/%d\0%b\0" % (number, token)) for number in range(count)]
    assert (len(conn.out), conn.out_bytes, conn.unread) == (0, 0, {})
    sock.close()


async def test_a_tool_that_never_reads_its_events_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("evtchnd.xenstore.quota.PRIVILEGED_OUT_MAX", 100_000)
    sock = await raw(server)
    await asyncio.get_running_loop().sock_sendall(sock, wire.pack(Op.WATCH, 1, 0, b"/\0t\0"))
    await until(lambda: len(server.store.watches) == 1)
    for number in range(50_000):
        server.write(f"/{number % 5000}/{'x' * 200}", "")
        if number % 100 == 0:
            await asyncio.sleep(0)
        if len(server.store.connections) == 1:
            break
    else:
        pytest.fail("still served")
    assert caplog.records[-1].getMessage() == "domain 0: xenstore: connection closed: it does not read its watch events"
    sock.close()


# ---- the ring


async def test_a_guest_over_its_ring(guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    assert guest.word(2064) == 7
    assert await guest.ask(Op.WRITE, b"data/x\0hello") == b"OK\0"
    assert await guest.ask(Op.READ, b"/local/domain/7/data/x\0") == b"hello"
    assert await guest.ask(Op.READ, b"/local/domain/7/none\0") == b"ENOENT\0"
    assert await guest.ask(Op.RELEASE, b"8\0") == b"EACCES\0"
    guest.close()


@pytest.mark.parametrize("start", [0, 1000, 2**32 - 17])
async def test_large_messages_wrap_and_overrun_the_ring(guest_of: Callable[..., FrontRing], start: int) -> None:
    guest = guest_of(start=start)
    value = bytes(range(256)) * 7
    for _ in range(5):
        assert await guest.ask(Op.WRITE, b"data/x\0" + value) == b"OK\0"
        assert await guest.ask(Op.READ, b"data/x\0") == value
    guest.close()


async def test_what_was_written_before_is_served(server: Server, guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    guest.ring.close()
    message = wire.pack(Op.READ, 9, 0, b"data\0")
    guest.page[0 : len(message)] = message
    guest.put(2052, len(message))
    guest.ring = server.attach_ring(7, guest.page, guest.kick, guest.notify)
    assert await guest.receive() == (Op.READ, 9, 0, b"")
    guest.close()


async def test_one_kick_for_a_message_in_pieces_and_one_notification(guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    await asyncio.sleep(0.01)
    data = b"".join(wire.pack(Op.READ, number, 0, b"data\0") for number in range(10))
    guest.page[0 : len(data)] = data
    guest.put(2052, len(data))
    guest.poke()
    for number in range(10):
        assert (await guest.receive())[1] == number
    assert os.eventfd_read(guest.notify) == 1
    guest.close()


async def test_events_reach_a_quiet_guest(server: Server, guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    assert await guest.ask(Op.WATCH, b"data\0tok\0") == b"OK\0"
    assert await guest.receive() == (Op.WATCH_EVENT, 0, 0, b"data\0tok\0")
    os.eventfd_read(guest.notify)
    server.write("/local/domain/7/data/y", "1")
    assert await guest.receive() == (Op.WATCH_EVENT, 0, 0, b"data/y\0tok\0")
    assert os.eventfd_read(guest.notify) == 1
    guest.close()


@pytest.mark.parametrize(
    ("at", "value"), [(2052, 1025), (2052, 2**31), (2052, 2**32 - 1), (2056, 1), (2056, 2**31), (2056, 2**32 - 5000)]
)
async def test_xsa_38_a_corrupt_index_ends_that_ring_once(
    server: Server, guest_of: Callable[..., FrontRing], at: int, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    guest, other = guest_of(7), guest_of(8)
    if at == 2056:  # the server meets it when it has something to send
        message = wire.pack(Op.READ, 1, 0, b"data\0")
        guest.page[0 : len(message)] = message
        guest.put(2052, len(message))
    guest.put(at, value)
    guest.poke()
    await until(lambda: guest.ring.closed)
    for _ in range(10):
        guest.poke()
        await asyncio.sleep(0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("domain 7: xenstore ring: ")
    assert guest.word(2072) == 2
    assert os.eventfd_read(guest.notify) == 1
    assert await other.ask(Op.READ, b"data\0") == b""
    guest.close()
    other.close()


async def test_xsa_420_a_bad_length_ends_that_ring_once(
    guest_of: Callable[..., FrontRing], caplog: pytest.LogCaptureFixture
) -> None:
    guest = guest_of()
    guest.send_some(wire.HEADER.pack(Op.READ, 1, 0, 4097))
    await until(lambda: guest.ring.closed)
    assert guest.word(2072) == 3
    assert len(caplog.records) == 1
    guest.close()


async def test_xsa_326_a_guest_that_takes_no_replies_is_not_listened_to(
    server: Server, guest_of: Callable[..., FrontRing]
) -> None:
    guest = guest_of()
    server.write("/local/domain/7/data", "x" * 1000, perms=["n7"])
    sent = 0
    data = b"".join(wire.pack(Op.READ, number, 0, b"data\0") for number in range(2000))
    for _ in range(500):
        sent += guest.send_some(data[sent:])
        await asyncio.sleep(0)
    assert sent < 3000
    assert guest.ring.conn.out_bytes <= 21 * 1100
    sending = asyncio.ensure_future(guest.send(data[sent:]))
    for number in range(2000):
        assert (await guest.receive())[1] == number
    await sending
    guest.close()


async def test_a_guest_waits_for_those_who_do_not_read_its_events(
    server: Server, guest_of: Callable[..., FrontRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Domain 8 leaves the events of domain 7 unread: 7 gets on when 8 reads, or when it has waited enough."""
    guest, other = guest_of(7), guest_of(8)
    monkeypatch.setattr("evtchnd.xenstore.server.EXPIRE_S", 0.01)
    server.write("/local/domain/7/data", "", perms=["n7", "r8"])
    assert await other.ask(Op.WATCH, b"/local/domain/7/data\0" + b"t" * 500 + b"\0") == b"OK\0"
    other.take()
    data = b"".join(wire.pack(Op.WRITE, number, 0, b"data/%d\0" % number) for number in range(60))
    sending = asyncio.ensure_future(guest.send(data))
    for number in range(20):
        assert (await guest.receive())[1] == number
    await until(lambda: guest.ring.conn.busy)
    held = server.store.tree.get(b"/local/domain/7/data")
    assert held is not None
    assert len(held.names()) < 30
    monkeypatch.setattr(server.store.refusals, "clock", lambda: float("inf"))
    for number in range(20, 30):
        assert (await guest.receive())[1] == number
    monkeypatch.undo()
    got = 1
    for number in range(30, 60):
        while guest.ring.conn.busy:
            await other.receive()
            got += 1
        assert (await guest.receive())[1] == number
    await sending
    guest.close()
    other.close()


async def test_a_ring_is_reconnected(server: Server, guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of(start=77)
    await guest.ask(Op.WATCH, b"data\0tok\0")
    await guest.receive()
    assert await guest.ask(Op.TRANSACTION_START, b"\0")
    guest.send_some(b"half a header")
    await asyncio.sleep(0.01)
    guest.put(2068, 1)
    guest.poke()
    await until(lambda: guest.word(2068) == 0)
    assert [guest.word(at) for at in (2048, 2052, 2056, 2060)] == [0, 0, 0, 0]
    assert (len(server.store.watches), guest.ring.conn.transactions) == (0, {})
    guest.got = b""
    assert await guest.ask(Op.READ, b"data\0") == b""
    guest.close()


async def test_connection_is_cleared_by_the_server(guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of(connection=1)
    await until(lambda: guest.word(2068) == 0)
    guest.close()


async def test_a_full_notification_counter_does_not_stall(guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    os.eventfd_write(guest.notify, 2**64 - 2)
    os.eventfd_write(guest.kick, 2**64 - 3)
    assert await guest.ask(Op.READ, b"data\0") == b""
    guest.close()


async def test_a_full_counter_that_blocks_stalls_nobody(guest_of: Callable[..., FrontRing]) -> None:
    """The file flags are the VMM's, too: it may take O_NONBLOCK away again."""
    guest = guest_of()
    os.eventfd_write(guest.notify, 2**64 - 2)
    os.set_blocking(guest.notify, True)
    os.set_blocking(guest.kick, True)
    # ends the test where it fails
    timer = threading.Timer(30, os.eventfd_read, [guest.notify])
    timer.start()
    try:
        assert await guest.ask(Op.READ, b"data\0") == b""
        assert not timer.finished.is_set()
    finally:
        timer.cancel()
        timer.join()
    guest.close()


async def test_release_closes_the_ring_and_leaves_nothing(server: Server, guest_of: Callable[..., FrontRing]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(scaled(1000, least=20)):
        guest = guest_of()
        await guest.ask(Op.WRITE, b"data/x\0y")
        server.release(7)
        assert guest.ring.closed
        guest.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not server.exists("/local/domain/7")
    assert 7 not in server.store.domains
