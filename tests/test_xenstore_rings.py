"""A ring started anew, by its guest or by a tool; features of one domain; a guest that is held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from evtchnd import spurious
from evtchnd.xenstore import rings, wire
from evtchnd.xenstore.contention import HOLD_S
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.wire import Op
from scale import scaled
from xenstore_ends import FrontRing, SocketEnd

INDICES = (2048, 2052, 2056, 2060)
FEATURES, CONNECTION, ERROR = 2064, 2068, 2072


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()
    assert server.store.check() == []
    assert len(server.store.connections) == 1


@pytest.fixture
async def guest(server: Server) -> FrontRing:
    return boot(server, 7)


def boot(server: Server, domid: int, **options: int) -> FrontRing:
    server.introduce(domid)
    server.write(f"/local/domain/{domid}", "", perms=["n0", f"r{domid}"])
    server.write(f"/local/domain/{domid}/data", "", perms=[f"n{domid}"])
    return FrontRing(server, domid, **options)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def tool_asks(server: Server, op: Op, payload: bytes) -> bytes:
    """As a toolstack does, over a socket."""
    end = SocketEnd(server, 0)
    await end.send(wire.pack(op, 1, 0, payload))
    reply = (await end.receive())[3]
    end.close()
    await until(lambda: len(server.store.connections) == 2)
    return reply


@pytest.mark.parametrize("by", ["guest", "tool"])
async def test_a_ring_starts_anew_in_the_middle_of_packets(server: Server, guest: FrontRing, by: str) -> None:
    """Half a request has come, half a reply has gone: nothing of either is ever seen again."""
    server.write("/local/domain/7/data", "x" * 3000, perms=["n7"])
    assert await guest.ask(Op.WATCH, b"data\0tok\0") == b"OK\0"
    await guest.receive()
    assert await guest.ask(Op.TRANSACTION_START, b"\0")
    guest.send_some(wire.pack(Op.READ, 1, 0, b"data\0") + wire.pack(Op.WRITE, 2, 0, b"data/lost\0" + b"y" * 500)[:300])
    await until(lambda: guest.word(2060) - guest.word(2056) == 1024)
    server.write("/local/domain/7/data/z", "1")
    assert guest.ring.conn.unsent
    assert guest.ring._parser.partial
    if by == "guest":
        guest.put(CONNECTION, 1)
        guest.poke()
        await until(lambda: guest.word(CONNECTION) == 0)
    else:
        assert await tool_asks(server, Op.INTRODUCE, b"7\x00123\x001\0") == b"OK\0"
    assert [guest.word(at) for at in INDICES] == [0, 0, 0, 0]
    assert (len(server.store.watches), guest.ring.conn.transactions, list(guest.ring.conn.out)) == (0, {}, [])
    assert not guest.ring.conn.unsent
    assert not guest.ring._parser.partial
    guest.got = b""
    assert await guest.ask(Op.READ, b"data/lost\0") == b"ENOENT\0"
    assert await guest.ask(Op.WATCH, b"data\0tok\0") == b"OK\0"
    assert await guest.receive() == (Op.WATCH_EVENT, 0, 0, b"data\0tok\0")
    guest.close()


async def test_xsa_330_reconnecting_leaks_nothing(server: Server, guest: FrontRing) -> None:
    for _ in range(scaled(10_000, least=100)):
        guest.send_some(wire.pack(Op.WATCH, 1, 0, b"data\0t\0") + wire.pack(Op.TRANSACTION_START, 2, 0, b"\0"))
        guest.put(CONNECTION, 1)
        guest.poke()
        await until(lambda: guest.word(CONNECTION) == 0)
    assert (len(server.store.watches), server.store.contention.open) == (0, 0)
    guest.close()


async def test_features_of_one_domain(server: Server) -> None:
    assert await tool_asks(server, Op.SET_FEATURE, b"9\x000\0") == b"OK\0"
    guest, other = boot(server, 9), boot(server, 8)
    assert (guest.word(FEATURES), other.word(FEATURES)) == (0, 7)
    assert await guest.ask(Op.WATCH, b"data\0t\x001\0") == b"EINVAL\0"
    assert await guest.ask(Op.GET_FEATURE, b"\0") == b"0\0"
    # not offered: not looked at, not written
    guest.put(CONNECTION, 1)
    assert await guest.ask(Op.READ, b"data\0") == b""
    assert guest.word(CONNECTION) == 1
    guest.put(2052, guest.word(2048) + 2000)
    guest.poke()
    await until(lambda: guest.ring.closed)
    assert guest.word(ERROR) == 0
    guest.close()
    other.close()


async def test_xsa_206_a_guest_that_storms_is_held_over_its_ring(server: Server, guest: FrontRing) -> None:
    """A guest pipelines writes to what a transaction of ours relies on: the fourth try ends well, the guest goes on."""
    server.write("/local/domain/7/data/x", "0", perms=["b7"])
    server.store.contention.clock = lambda: 0.0
    tool = SocketEnd(server, 0)

    async def ask(op: Op, payload: bytes, tx: int = 0) -> bytes:
        await tool.send(wire.pack(op, 1, tx, payload))
        return (await tool.receive())[3]

    sent = 0
    tries = 0
    while True:
        tx = int((await ask(Op.TRANSACTION_START, b"\0"))[:-1])
        before = await ask(Op.READ, b"/local/domain/7/data/x\0", tx)
        await guest.send(wire.pack(Op.WRITE, sent, 0, b"data/x\0%d" % (sent + 1)))
        sent += 1
        await until(lambda: guest.ring.conn.busy or guest.word(2048) == guest.word(2052))
        await ask(Op.WRITE, b"/tool/x\0" + before, tx)
        tries += 1
        if await ask(Op.TRANSACTION_END, b"T\0", tx) == b"OK\0":
            break
    assert tries == 4
    for number in range(sent):
        assert (await guest.receive())[:2] == (Op.WRITE, number)
    assert server.read("/local/domain/7/data/x") == str(sent)
    tool.close()
    guest.close()
    await until(lambda: len(server.store.connections) == 1)


async def test_a_guest_is_not_held_for_ever(server: Server, guest: FrontRing) -> None:
    """The transaction that it has disturbed is never ended."""
    now = [0.0]
    server.store.contention.clock = lambda: now[0]
    server.write("/local/domain/7/data/x", "0", perms=["b7"])
    tool = SocketEnd(server, 0)
    for number in range(4):
        await tool.send(wire.pack(Op.TRANSACTION_START, 1, 0, b"\0"))
        tx = int((await tool.receive())[3][:-1])
        if number == 3:
            break
        await tool.send(wire.pack(Op.READ, 1, tx, b"/local/domain/7/data/x\0"))
        await tool.receive()
        assert await guest.ask(Op.WRITE, b"data/x\0%d" % (number + 1)) == b"OK\0"
        await tool.send(wire.pack(Op.TRANSACTION_END, 1, tx, b"T\0"))
        assert (await tool.receive())[3] == b"EAGAIN\0"
    assert guest.ring.conn.busy
    guest.send_some(wire.pack(Op.READ, 1, 0, b"data/x\0"))
    await asyncio.sleep(0)
    now[0] = HOLD_S
    assert (await guest.receive())[3] == b"3"
    tool.close()
    guest.close()
    await until(lambda: len(server.store.connections) == 1)


async def test_xsa_420_a_bad_header_leaves_the_loop_idle(
    server: Server, guest: FrontRing, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not looked at again, however often the guest kicks."""
    caplog.set_level(logging.WARNING)
    other = boot(server, 8)
    guest.send_some(wire.HEADER.pack(Op.READ, 1, 0, 2**32 - 1))
    await until(lambda: guest.ring.closed)
    for _ in range(scaled(10_000, least=100)):
        guest.poke()
        await asyncio.sleep(0)
    assert guest.word(ERROR) == wire.ERROR_PROTO
    assert len(caplog.records) == 1
    assert await other.ask(Op.READ, b"data\0") == b""
    guest.close()
    other.close()


async def test_xsa_332_kicks_for_nothing_are_heard_late(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that only kicks costs its neighbours nothing; one line says so; a request ends it."""
    monkeypatch.setattr(spurious, "delay_s", lambda *_, **__: 3600.0)
    storm, other = boot(server, 7), boot(server, 8)
    reader = storm.ring._kicked
    heard = 0

    def kicked() -> None:
        nonlocal heard
        heard += 1
        reader()

    loop = asyncio.get_running_loop()
    loop.remove_reader(storm.ring._kick)
    loop.add_reader(storm.ring._kick, kicked)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            storm.poke()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if number % 100 == 0:
                assert await other.ask(Op.READ, b"data\0") == b""
    assert 0 <= heard - (rings.FREE_KICKS + 1) <= 1  # its first turn may have been due still
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("domain 7: xenstore ring: kicked 65 times in a row for nothing: heard late")
    storm.send_some(wire.pack(Op.READ, 1, 0, b"data\0"))
    assert storm.ring._late is not None
    storm.ring._late.cancel()
    storm.ring._listen()
    assert (await storm.receive())[3] == b""
    monkeypatch.undo()
    for number in range(rings.FREE_KICKS + 20):  # and with the delays as they are, what it asks in a storm is answered
        storm.poke()
        await asyncio.sleep(0)
        if number % 20 == 19:
            assert await storm.ask(Op.READ, b"data\0") == b""
    for _ in range(3 * rings.FREE_KICKS):
        storm.poke()
        await asyncio.sleep(0)
    assert await storm.ask(Op.READ, b"data\0") == b""
    storm.close()
    other.close()
