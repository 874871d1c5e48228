"""The asyncio client against the server, over a socketpair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from evtchnd.xenstore.client import Client, Transaction
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.wire import XenStoreError


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()


async def connect(server: Server) -> Client:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server.attach_socket(theirs)
    return await Client.from_socket(ours)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    client = await connect(server)
    yield client
    await client.close()


async def test_operations(client: Client) -> None:
    await client.write("/a/b", 5)
    await client.write("/a/raw", b"\xff\x00")
    await client.mkdir("/a/c")
    assert await client.read("/a/b") == "5"
    assert await client.read_bytes("/a/raw") == b"\xff\x00"
    assert (await client.read("/a/raw")).encode("utf-8", "surrogateescape") == b"\xff\x00"
    assert await client.ls("/a") == ["b", "raw", "c"]
    assert await client.ls("/a/b") == []
    assert (await client.get("/none"), await client.get("/none", "x"), await client.get("/a/b")) == (None, "x", "5")
    assert (await client.exists("/a"), await client.exists("/b")) == (True, False)
    await client.set_perms("/a", ["n0", "r7"])
    assert await client.get_perms("/a") == ["n0", "r7"]
    await client.write("rel", "x")
    assert await client.read("/local/domain/0/rel") == "x"
    await client.rm("/a")
    with pytest.raises(XenStoreError, match="ENOENT: /a"):
        await client.read("/a")
    with pytest.raises(XenStoreError, match="EINVAL"):
        await client.read("/a\0b")
    with pytest.raises(XenStoreError, match="E2BIG"):
        await client.write("/a", "x" * 5000)


async def test_long_directories(server: Server, client: Client) -> None:
    names = [f"a-rather-long-name-{number}" for number in range(1000)]
    for name in names:
        server.write(f"/many/{name}", "")
    assert await client.ls("/many") == names


async def test_a_directory_that_changes_while_it_is_listed(server: Server, client: Client) -> None:
    for number in range(2000):
        server.write(f"/many/node-{number}", "")

    async def disturb() -> None:
        for number in range(20):
            server.write(f"/many/new-{number}", "")
            await asyncio.sleep(0.0005)

    disturbing = asyncio.create_task(disturb())
    names = await client.ls("/many")
    assert names[:2000] == [f"node-{number}" for number in range(2000)]
    assert len(set(names)) == len(names)
    await disturbing


async def test_many_tasks_share_a_connection(client: Client) -> None:
    async def one(number: int) -> str:
        await client.write(f"/{number}", number)
        return await client.read(f"/{number}")

    assert await asyncio.gather(*[one(number) for number in range(200)]) == [str(number) for number in range(200)]


async def test_a_cancelled_request_harms_nobody(client: Client) -> None:
    task = asyncio.create_task(client.read("/"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.ls("/") == []


async def test_watches(server: Server, client: Client) -> None:
    async with client.watch("/a") as one, client.watch("/a", depth=0) as two, client.watch("/") as three:
        assert [await anext(one), await anext(two), await anext(three)] == ["/a", "/a", "/"]
        for _ in range(3):
            server.write("/a/b", "x")
        assert [await anext(one), await anext(three)] == ["/a/b", "/a/b"]
        server.write("/a", "x")
        assert [await anext(one), await anext(two), await anext(three)] == ["/a"] * 3
    assert len(server.store.watches) == 0
    assert [path async for path in one] == []


async def test_closing_ends_an_iteration(client: Client) -> None:
    watch = await client.watch("/a").start()

    async def collect() -> list[str]:
        return [path async for path in watch]

    task = asyncio.create_task(collect())
    await asyncio.sleep(0.01)
    await watch.close()
    await watch.close()
    assert await task == ["/a"]


async def test_a_watch_that_is_refused(client: Client) -> None:
    with pytest.raises(XenStoreError, match="EINVAL"):
        await client.watch("/a//b").start()


async def test_a_lost_connection_reaches_everybody(server: Server, client: Client) -> None:
    watch = await client.watch("/a").start()
    assert await anext(watch) == "/a"
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.01)
    await server.close()
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError):
        await client.read("/")
    await watch.close()
    await client.close()
    await client.close()


async def test_a_request_under_way_when_the_connection_is_lost() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    client = await Client.from_socket(ours)
    task = asyncio.create_task(client.read("/"))
    await asyncio.sleep(0.01)
    theirs.close()
    with pytest.raises(ConnectionError):
        await task
    await client.close()


# ---- transactions


async def test_a_transaction_is_committed_or_dropped(server: Server, client: Client) -> None:
    async with client.transaction() as t:
        await t.write("/a", "1")
        await t.write("/b", "2")
        assert server.get("/a") is None
        assert await t.ls("/") == ["a", "b"]
    assert server.ls("/") == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        async with client.transaction() as t:
            await t.rm("/a")
            raise ZeroDivisionError
    assert server.ls("/") == ["a", "b"]
    assert all(not conn.transactions for conn in server.store.connections)


async def test_a_conflict_is_tried_again_when_nothing_that_was_read_differs(server: Server, client: Client) -> None:
    server.write("/a", "1")
    async with client.transaction() as t:
        await t.write("/a", "mine")
        assert await t.get("/none") is None
        server.write("/a", "theirs")
    assert server.read("/a") == "mine"


async def test_a_conflict_with_what_was_read_is_the_callers(server: Server, client: Client) -> None:
    server.write("/a", "1")
    with pytest.raises(XenStoreError, match="EAGAIN"):
        async with client.transaction() as t:
            await t.write("/b", int(await t.read("/a")) + 1)
            server.write("/a", "10")
    assert server.get("/b") is None


async def test_transact_runs_the_body_again(server: Server, client: Client) -> None:
    server.write("/a", "1")
    runs = []

    async def body(t: Transaction) -> int:
        value = int(await t.read("/a")) + 1
        runs.append(value)
        if len(runs) < 3:
            server.write("/a", value * 10)
        await t.write("/a", value)
        return value

    assert await client.transact(body) == 211
    assert (runs, server.read("/a")) == ([2, 21, 211], "211")


async def test_counters_of_many_clients_add_up(server: Server) -> None:
    """Read, add one, write, in transactions of several connections: none is lost."""
    server.write("/count", "0")
    clients = [await connect(server) for _ in range(4)]

    async def add(t: Transaction) -> None:
        value = int(await t.read("/count"))
        await asyncio.sleep(0)
        await t.write("/count", value + 1)

    async def run(client: Client) -> None:
        for _ in range(25):
            await client.transact(add, tries=10_000)

    await asyncio.gather(*map(run, clients))
    assert server.read("/count") == "100"
    for client in clients:
        await client.close()
