"""The control plane's own access to its XenStore."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import pytest

from evtchnd.xenstore.server import Quotas, Server, XenStore
from evtchnd.xenstore.wire import Op, XenStoreError
from xenstore_ends import FrontRing


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()
    assert server.store.check() == []
    assert len(server.store.connections) == 1


@pytest.fixture
def guest_of(server: Server) -> Callable[..., FrontRing]:
    def make(domid: int = 7, **options: int) -> FrontRing:
        server.introduce(domid)
        server.write(f"/local/domain/{domid}", "", perms=["n0", f"r{domid}"])
        server.write(f"/local/domain/{domid}/data", "", perms=[f"n{domid}"])
        return FrontRing(server, domid, **options)

    return make


async def test_the_control_planes_access(server: Server) -> None:
    server.write("/a/b", 5, perms=["n0", "r7"])
    server.mkdir("/a/c", perms=["b7"])
    assert (server.read("/a/b"), server.ls("/a"), server.get("/none"), server.get("/none", "x")) == (
        *("5", ["b", "c"], None),
        "x",
    )
    assert (server.get_perms("/a/b"), server.get_perms("/a/c")) == (["n0", "r7"], ["b7"])
    assert (server.exists("/a"), server.exists("/b")) == (True, False)
    server.rm("/none/none")
    server.rm("/a")
    with pytest.raises(XenStoreError, match="ENOENT: /a/b"):
        server.read("/a/b")
    with pytest.raises(XenStoreError, match="EINVAL"):
        server.write("/a\0b", "x")


async def test_the_control_planes_transaction(server: Server, guest_of: Callable[..., FrontRing]) -> None:
    guest = guest_of()
    await guest.ask(Op.WATCH, b"data\0t\0")
    await guest.receive()
    with server.transaction() as t:
        t.write("/local/domain/7/data/a", "1")
        t.write("/local/domain/7/data/b", "2", perms=["r7"])
        assert not server.exists("/local/domain/7/data/a")
        assert t.ls("/local/domain/7/data") == ["a", "b"]
    assert (await guest.receive())[3] == b"data/a\0t\0"
    assert (await guest.receive())[3] == b"data/b\0t\0"
    with pytest.raises(ZeroDivisionError), server.transaction() as t:
        t.rm("/local")
        raise ZeroDivisionError
    assert server.ls("/local/domain/7/data") == ["a", "b"]
    guest.close()


async def test_quotas_reach_the_store(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = Server(quotas=Quotas(nodes=3))
    assert isinstance(server.store, XenStore)
    server.write("/local/domain/7", "", perms=["n7"])
    guest = FrontRing(server, 7)
    for number, reply in enumerate([b"OK\0", b"OK\0", b"ENOSPC\0"]):
        assert await guest.ask(Op.WRITE, b"%d\0" % number) == reply
    guest.close()
    await server.close()
