"""What hostile guests do to a XenStore, by the number of the advisory: the rest of them, and those at transports.

Others are in test_xenstore_advisories.py, _server.py and _rings.py. One bad client is refused or closed; the others do
not notice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable

import pytest

from evtchnd.xenstore import wire
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled
from xenstore_ends import FrontRing, SocketEnd
from xenstore_guest import OK, Guest, boot

NODE_OPS = (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS, Op.DIRECTORY_PART)
WATCH_OPS = (Op.WATCH, Op.UNWATCH)


def payload(op: int, path: bytes) -> bytes:
    """A request of `op` about `path` that is whole in every other respect."""
    more = {Op.SET_PERMS: b"n7\0", Op.DIRECTORY_PART: b"0\0", Op.WATCH: b"t\0", Op.UNWATCH: b"t\0"}
    return path + b"\0" + more.get(Op(op), b"")


@pytest.fixture
def store() -> XenStore:
    return XenStore()


@pytest.fixture
def tool(store: XenStore) -> Guest:
    return Guest(store, 0)


@pytest.fixture
def guest(store: XenStore, tool: Guest) -> Guest:
    return boot(store, tool, 7)


# ---- the store


@pytest.mark.parametrize("op", [Op.DIRECTORY, Op.GET_PERMS, Op.GET_QUOTA, Op.CONTROL, Op.READ])
def test_xsa_72_a_reply_that_is_too_big_is_e2big(store: XenStore, tool: Guest, op: Op) -> None:
    """Or the operation cannot come to one; the connection stays as it was."""
    for number in range(900):
        tool.write(f"/many/{number:05}")
        store.domain(1000 + number).configured = True
    tool.chmod("/many", *[f"n{number}" for number in range(1, 650)])
    replies = {
        Op.DIRECTORY: (b"/many\0", "E2BIG"),
        Op.GET_PERMS: (b"/many\0", None),
        Op.GET_QUOTA: (b"\0", None),
        Op.CONTROL: (b"memreport\0", None),
        Op.READ: (b"/many\0", b""),
    }
    request, expected = replies[op]
    got = tool.ask(op, request)
    assert got == expected if expected is not None else len(got) <= wire.PAYLOAD_MAX
    assert tool.read("/many/00000") == b""


@pytest.mark.parametrize("op", NODE_OPS)
def test_xsa_323_a_path_that_is_too_long_with_its_prefix(tool: Guest, guest: Guest, op: Op) -> None:
    prefix = len("/local/domain/7/")
    tool.ask(Op.SET_QUOTA, b"7\0path-max\x003072\0")
    tool.ask(Op.SET_QUOTA, b"7\0node-size\x000\0")
    room = 3072 - prefix - len("data/")
    assert guest.ask(op, payload(op, b"data/" + b"x" * room)) != "EINVAL"
    for more in (1, prefix, 900):
        assert guest.ask(op, payload(op, b"data/" + b"x" * (room + more))) == "EINVAL"
    assert tool.store.check() == []


BAD_PATHS = [
    *(b"", b"//", b"/local/domain/", b"/local/domain/7/", b"data/", b"data//x", b"/data\xff", b"/a b", b"./data"),
    *(b"../8/data", b"data/..", b"/%2e", b"/*", b"/a\n", b"~", b"\\", b"/data:x", b"/data,x"),
]


@pytest.mark.parametrize("op", [*NODE_OPS, *WATCH_OPS])
def test_xsa_481_paths_that_are_none_are_einval(tool: Guest, guest: Guest, op: Op) -> None:
    before = dict(tool.store.tree.items())
    for path in BAD_PATHS:
        for client in (guest, tool):
            assert client.ask(op, payload(op, path)) == "EINVAL", path
    if op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM):
        for text in (b"data\0x\0", b"data\0\0", b"\0data\0", b"data", b"data\0x"):
            assert guest.ask(op, text) == "EINVAL"
    assert dict(tool.store.tree.items()) == before
    assert not tool.store.watches


@pytest.mark.parametrize("path", [b"@releaseDomain", b"@introduceDomain", b"@x", b"@", b"@/x", b"@releaseDomain/x/y"])
def test_special_paths_are_no_way_in(tool: Guest, guest: Guest, path: bytes) -> None:
    for op in (*NODE_OPS, Op.WATCH):
        reply = guest.ask(op, payload(op, path))
        if op == Op.WATCH and not path.endswith(b"/"):
            assert reply == OK
        else:
            assert reply in ("EINVAL", "EACCES"), op
    # what looks like one below a directory is a name as any other
    assert guest.write("data/@releaseDomain") == OK
    guest.events()
    tool.store.introduce(9)
    tool.store.release(9)
    assert guest.events() == []


def test_xsa_352_353_nor_by_a_transaction_or_a_target(store: XenStore, tool: Guest, guest: Guest) -> None:
    other = boot(store, tool, 8)
    guest.write("data/x")
    tx = guest.start()
    assert guest.write("data/y", tx=tx) == OK
    assert guest.chmod("data/y", "n8", tx=tx) == "EPERM"
    assert guest.chmod("data/y", "n0", "b8", tx=tx) == "EPERM"
    assert guest.end(tx) == OK
    assert tool.ask(Op.GET_PERMS, b"/local/domain/7/data/y\0") == b"n7\0"
    assert tool.ask(Op.SET_TARGET, b"8\x007\0") == OK
    assert other.chmod("/local/domain/7/data/x", "n8") == "EPERM"
    assert other.chmod("/local/domain/7", "n7") == "EACCES"
    assert other.chmod("/", "n8") == "EACCES"
    assert store.domains[8].owned == 3


def test_xsa_414_415_421_counts_hold_after_every_step(store: XenStore, tool: Guest, guest: Guest) -> None:
    """Nodes made and removed under each other's feet, in transactions that are committed, dropped and refused."""
    dice = random.Random(414)
    paths = ["data/a", "data/a/b", "data/a/b/c", "data/x", "data/x/y"]
    open_: list[int] = []
    for _ in range(scaled(20_000, least=1000)):
        tx = dice.choice([0, 0, *open_])
        match dice.randrange(6):
            case 0 if len(open_) < 10:
                open_.append(guest.start())
            case 1 if open_:
                guest.end(open_.pop(dice.randrange(len(open_))), dice.choice("TF"))
            case 2 | 3:
                guest.write(dice.choice(paths), "x" * dice.randrange(99), tx)
            case 4:
                guest.rm(dice.choice(paths), tx)
            case _:
                guest.chmod(dice.choice(paths), "n7", dice.choice(["r8", "b0"]), tx=tx)
        assert store.check() == []
    assert guest.ask(Op.RESET_WATCHES) == OK
    assert store.contention.open == 0


def test_transactions_that_are_held_open(store: XenStore, tool: Guest, guest: Guest) -> None:
    """They cost their owner's memory and nobody's time."""
    other = boot(store, tool, 8)
    opened = [guest.start() for _ in range(10)]
    refused = 0
    for tx in opened:
        for number in range(300):
            refused += guest.write(f"data/{number}", "x" * 2000, tx) == "ENOMEM"
    assert refused
    assert guest.conn.memory <= 2_621_440
    for number in range(500):
        assert not other.conn.busy
        assert other.write(f"data/{number % 50}", str(number)) == OK
    mine = other.start()
    assert other.read("data/1", mine) == b"451"
    assert other.end(mine) == OK
    assert guest.ask(Op.RESET_WATCHES) == OK
    assert guest.conn.memory < 1000
    assert store.check() == []


def test_xsa_324_tokens_do_not_grow_memory(store: XenStore, tool: Guest, guest: Guest) -> None:
    assert [guest.watch("data", f"{number:0>4080}") for number in range(129)] == [OK] * 128 + ["ENOSPC"]
    assert guest.watch("data", "t" * 4091) == "ENOSPC"
    tool.ask(Op.SET_QUOTA, b"7\0watches\x000\0")
    number = 128
    while number < 1000 and guest.watch("data", f"{number:0>4080}") == OK:
        number += 1
    assert number < 650
    assert guest.conn.memory <= 2_621_440
    store.disconnect(guest.conn)
    assert len(store.watches) == 0


# ---- transports


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()
    assert server.store.check() == []
    assert len(server.store.connections) == 1


def on_a_ring(server: Server, domid: int) -> FrontRing:
    server.introduce(domid)
    server.write(f"/local/domain/{domid}", "", perms=["n0", f"r{domid}"])
    server.write(f"/local/domain/{domid}/data", "", perms=[f"n{domid}"])
    return FrontRing(server, domid)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_xsa_38_index_chaos(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Any four indices, any bytes: served or closed with one line, and the neighbour is served after each."""
    caplog.set_level(logging.WARNING)
    other = on_a_ring(server, 8)
    dice = random.Random(38)
    for _ in range(scaled(2000, least=50)):
        caplog.clear()
        guest = on_a_ring(server, 7)
        guest.page[0:2048] = dice.randbytes(2048)
        for at in (2048, 2052, 2056, 2060):
            guest.put(at, dice.choice([0, 1, 1023, 1024, 1025, 2**31, 2**32 - 1, dice.getrandbits(32)]))
        guest.poke()
        for _ in range(3):
            await asyncio.sleep(0)
        assert await other.ask(Op.READ, b"data\0") == b""
        closed = guest.ring.closed
        assert (guest.word(2072) != 0) == closed
        assert len([r for r in caplog.records if "not served any more" in r.getMessage()]) == closed
        guest.close()
        server.release(7)
    other.close()


async def test_xsa_326_416_pipelined_requests_over_a_ring(server: Server) -> None:
    """Replies that wait are twenty at most, memory stays flat, and nothing is lost in the end."""
    count = scaled(100_000, least=2000)
    guest, other = on_a_ring(server, 7), on_a_ring(server, 8)
    server.write("/local/domain/7/data", "x" * 1000, perms=["n7"])
    data = b"".join(wire.pack(Op.READ, number, 0, b"data\0") for number in range(count))
    sending = asyncio.ensure_future(guest.send(data))
    for _ in range(100):
        assert await other.ask(Op.READ, b"data\0") == b""
        assert guest.ring.conn.replies <= 20
        assert guest.ring.conn.out_bytes <= 20 * 1016
    for number in range(count):
        assert (await guest.receive())[:2] == (Op.READ, number)
        assert guest.ring.conn.replies <= 20
    await sending
    guest.close()
    other.close()


async def test_half_a_header_and_silence(server: Server) -> None:
    """It costs nobody anything, and the rest is served when it comes."""
    guest, other = on_a_ring(server, 7), on_a_ring(server, 8)
    sock = SocketEnd(server, 0)
    message = wire.pack(Op.READ, 77, 0, b"/local/domain/7/data\0")
    for cut in (1, 8, 15, 16, 20):
        guest.send_some(message[:cut])
        await sock.send(message[:cut])
        assert await other.ask(Op.READ, b"data\0") == b""
        guest.send_some(message[cut:])
        await sock.send(message[cut:])
        assert (await guest.receive())[:2] == (await sock.receive())[:2] == (Op.READ, 77)
    guest.send_some(message[:7])
    guest.close()
    other.close()
    await sock.send(message[:7])
    sock.close()
    await until(lambda: len(server.store.connections) == 1)
