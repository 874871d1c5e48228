"""Tables of requests, replies and events, the same over every transport.

A row: who sends (a domid), in which transaction ("" none, else a name), operation, payload, reply, events by domid.
Errors, corner cases and order are those of Xen's C server (tools/xenstored) and docs/misc/xenstore.txt.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest

from evtchnd.xenstore import wire
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.wire import Op
from xenstore_ends import End, FrontRing, LocalEnd, SocketEnd

OK = b"OK\0"
Reply = bytes | str | re.Pattern[bytes]
Events = dict[int, list[str]]
Row = tuple[int, str, Op | int, bytes, Reply] | tuple[int, str, Op | int, bytes, Reply, Events]
ID = re.compile(rb"[1-9][0-9]*\0")
HOME = b"/local/domain/7"

TABLES: dict[str, list[Row]] = {
    "nodes": [
        (0, "", Op.WRITE, b"/a/b/c\0v\0w", OK),
        (0, "", Op.READ, b"/a/b/c\0", b"v\0w"),
        (0, "", Op.READ, b"/a/b\0", b""),
        (0, "", Op.DIRECTORY, b"/a\0", b"b\0"),
        (0, "", Op.DIRECTORY, b"/a/b/c\0", b""),
        (0, "", Op.MKDIR, b"/a/b/c\0", OK),
        (0, "", Op.READ, b"/a/b/c\0", b"v\0w"),
        (0, "", Op.WRITE, b"/a/b/c\0", OK),
        (0, "", Op.READ, b"/a/b/c\0", b""),
        (0, "", Op.RM, b"/a/b\0", OK),
        (0, "", Op.RM, b"/a/b\0", OK),
        (0, "", Op.RM, b"/a/b/c\0", "ENOENT"),
        (0, "", Op.READ, b"/a/b/c\0", "ENOENT"),
        (0, "", Op.WRITE, b"/\0root", OK),
        (0, "", Op.READ, b"/\0", b"root"),
        (0, "", Op.RM, b"/\0", "EINVAL"),
        (7, "", Op.RM, b"/\0", "EACCES"),
    ],
    "payloads that are none": [
        (0, "", Op.READ, b"", "EINVAL"),
        (0, "", Op.READ, b"/", "EINVAL"),
        (0, "", Op.READ, b"/\0/\0", "EINVAL"),
        (0, "", Op.WRITE, b"/x", "EINVAL"),
        (0, "", Op.MKDIR, b"", "EINVAL"),
        (0, "", Op.RM, b"/x", "EINVAL"),
        (0, "", Op.GET_PERMS, b"", "EINVAL"),
        (0, "", Op.SET_PERMS, b"/\0", "EINVAL"),
        (0, "", Op.SET_PERMS, b"/\0z7\0", "EINVAL"),
        (0, "", Op.DIRECTORY_PART, b"/\0", "EINVAL"),
        (0, "", Op.WATCH, b"/\0", "EINVAL"),
        (0, "", Op.WATCH, b"/\0t\x001\0more\0", "EINVAL"),
        (0, "", Op.UNWATCH, b"/\0t\0more\0", "EINVAL"),
        (0, "", Op.TRANSACTION_END, b"", "EINVAL"),
        (0, "", Op.TRANSACTION_END, b"t\0", "EINVAL"),
        (0, "", Op.RELEASE, b"", "EINVAL"),
        (0, "", Op.SET_QUOTA, b"", "EINVAL"),
        (0, "", Op.CONTROL, b"", "EINVAL"),
        (0, "", Op.WATCH_EVENT, b"/\0t\0", "ENOSYS"),
        (0, "", Op.ERROR, b"EIO\0", "ENOSYS"),
        (0, "", 20, b"7\0", "ENOSYS"),
        (0, "", 27, b"", "ENOSYS"),
        (7, "", 65535, b"", "ENOSYS"),
    ],
    "relative paths": [
        (7, "", Op.WRITE, b"data/x\x001", OK),
        (7, "", Op.READ, HOME + b"/data/x\0", b"1"),
        (0, "", Op.WRITE, b"data/x\x002", OK),
        (0, "", Op.READ, b"/local/domain/0/data/x\0", b"2"),
        (7, "", Op.READ, b"data/x\0", b"1"),
    ],
    "directory in parts": [
        (0, "", Op.WRITE, b"/d/" + b"a" * 1000 + b"\0", OK),
        (0, "", Op.WRITE, b"/d/" + b"b" * 1000 + b"\0", OK),
        (0, "", Op.WRITE, b"/d/" + b"c" * 1000 + b"\0", OK),
        (0, "", Op.DIRECTORY_PART, b"/d\x000\0", re.compile(rb"\d+\0a{1000}\0b{1000}\0c{1000}\0\0")),
        (0, "", Op.WRITE, b"/d/" + b"d" * 1080 + b"\0", OK),
        (0, "", Op.DIRECTORY, b"/d\0", re.compile(rb"a{1000}\0b{1000}\0c{1000}\0d{1080}\0")),
        (0, "", Op.DIRECTORY_PART, b"/d\x000\0", re.compile(rb"\d+\0a{1000}\0b{1000}\0c{1000}\0d{1080}\0\0")),
        (0, "", Op.WRITE, b"/d/" + b"e" * 100 + b"\0", OK),
        (0, "", Op.DIRECTORY, b"/d\0", "E2BIG"),
        (0, "", Op.DIRECTORY_PART, b"/d\x000\0", re.compile(rb"\d+\0a{1000}\0b{1000}\0c{1000}\0d{1080}\0")),
        (0, "", Op.DIRECTORY_PART, b"/d\x004084\0", re.compile(rb"\d+\0e{100}\0\0")),
        (0, "", Op.DIRECTORY_PART, b"/d\x004185\0", re.compile(rb"\d+\0\0")),
        (0, "", Op.DIRECTORY_PART, b"/d\x0099999\0", re.compile(rb"\d+\0\0")),
        (0, "", Op.DIRECTORY_PART, b"/none\x000\0", "ENOENT"),
    ],
    "permissions": [
        (0, "", Op.GET_PERMS, b"/\0", b"n0\0"),
        (7, "", Op.GET_PERMS, b"data\0", b"n7\0"),
        (7, "", Op.GET_PERMS, b"/\0", "EACCES"),
        (8, "", Op.READ, HOME + b"/data\0", "EACCES"),
        (7, "", Op.SET_PERMS, b"data\0n7\0r8\0", OK),
        (8, "", Op.READ, HOME + b"/data\0", b""),
        (8, "", Op.WRITE, HOME + b"/data\0x", "EACCES"),
        (8, "", Op.READ, HOME + b"/data/none\0", "ENOENT"),
        (8, "", Op.WRITE, HOME + b"/data/none\0", "EACCES"),
        (7, "", Op.SET_PERMS, b"data\0n7\0w8\0", OK),
        (8, "", Op.READ, HOME + b"/data\0", "EACCES"),
        (8, "", Op.WRITE, HOME + b"/data\0x", OK),
        (8, "", Op.WRITE, HOME + b"/data/of8\0y", OK),
        (7, "", Op.READ, b"data/of8\0", "EACCES"),
        (8, "", Op.GET_PERMS, HOME + b"/data/of8\0", b"n8\0w8\0"),
        (8, "", Op.SET_PERMS, HOME + b"/data/of8\0r8\0", OK),
        (7, "", Op.READ, b"data/of8\0", b"y"),
        (7, "", Op.SET_PERMS, b"data/of8\0n7\0", "EACCES"),
        (7, "", Op.SET_PERMS, b"data\0n8\0", "EPERM"),
        (7, "", Op.SET_PERMS, b"data\0n7\0" + b"r8\0" * 5, "ENOSPC"),
        (7, "", Op.RM, b"data/of8\0", "EACCES"),
        (7, "", Op.RM, b"data\0", OK),
        (8, "", Op.READ, HOME + b"/data/of8\0", "EACCES"),
        (0, "", Op.SET_PERMS, b"/none\0n0\0", "ENOENT"),
        (0, "", Op.SET_PERMS, b"@releaseDomain\0n0\0r7\0", OK),
        (7, "", Op.GET_PERMS, b"@releaseDomain\0", b"n0\0r7\0"),
    ],
    "target": [
        (8, "", Op.WRITE, HOME + b"/data/x\0", "EACCES"),
        (0, "", Op.SET_TARGET, b"8\x007\0", OK),
        (8, "", Op.WRITE, HOME + b"/data/x\x001", OK),
        (8, "", Op.GET_PERMS, HOME + b"/data/x\0", b"n8\0"),
        (8, "", Op.READ, HOME + b"\0", b""),
        (7, "", Op.READ, b"/local/domain/8/data\0", "EACCES"),
        (0, "", Op.SET_TARGET, b"8\x009\0", "ENOENT"),
    ],
    "watches": [
        (7, "", Op.WATCH, b"data\0rel\0", OK, {7: ["data rel"]}),
        (7, "", Op.WATCH, HOME + b"/data\0abs\0", OK, {7: ["/local/domain/7/data abs"]}),
        (7, "", Op.WATCH, b"data\0rel\0", "EEXIST"),
        (7, "", Op.WATCH, HOME + b"/data\0rel\0", "EEXIST"),
        (7, "", Op.WATCH, b"data\0deep\x001\0", OK, {7: ["data deep"]}),
        (0, "", Op.WRITE, HOME + b"/data/x\0", OK, {7: ["data/x rel", "/local/domain/7/data/x abs", "data/x deep"]}),
        (0, "", Op.WRITE, HOME + b"/data/x/y\0", OK, {7: ["data/x/y rel", "/local/domain/7/data/x/y abs"]}),
        (0, "", Op.WRITE, HOME + b"/data/x/y\0", OK, {7: ["data/x/y rel", "/local/domain/7/data/x/y abs"]}),
        (0, "", Op.MKDIR, HOME + b"/data/x/y\0", OK),
        (7, "", Op.UNWATCH, b"data\0abs\0", OK),
        (7, "", Op.UNWATCH, b"data\0abs\0", "ENOENT"),
        (7, "", Op.UNWATCH, b"data\0deep\0", OK),
        (7, "", Op.SET_PERMS, b"data\0n7\0r8\0", OK, {7: ["data rel"]}),
        (7, "", Op.WATCH, b"data/x/y\0leaf\0", OK, {7: ["data/x/y leaf"]}),
        (7, "", Op.RM, b"data\0", OK, {7: ["data/x/y leaf", "data rel"]}),
        (7, "", Op.RM, b"data\0", "EACCES"),
        (7, "", Op.WATCH, b"gone\0t\0", OK, {7: ["gone t"]}),
        (7, "", Op.RESET_WATCHES, b"\0", OK),
        (0, "", Op.WRITE, HOME + b"/gone\0", OK),
    ],
    "an event for each who may see it": [
        (7, "", Op.WATCH, b"/\0seven\0", OK, {7: ["/ seven"]}),
        (8, "", Op.WATCH, b"/\0eight\0", OK, {8: ["/ eight"]}),
        (0, "", Op.WATCH, b"/\0nought\0", OK, {0: ["/ nought"]}),
        (
            7,
            "",
            Op.WRITE,
            b"data/x\0",
            OK,
            {p: [f"/local/domain/7/data/x {t}"] for p, t in ((7, "seven"), (0, "nought"))},
        ),
        (
            *(7, "", Op.SET_PERMS, b"data/x\0n7\0r8\0", OK),
            {p: [f"/local/domain/7/data/x {t}"] for p, t in ((7, "seven"), (8, "eight"), (0, "nought"))},
        ),
        (
            *(7, "", Op.SET_PERMS, b"data/x\0n7\0", OK),
            {p: [f"/local/domain/7/data/x {t}"] for p, t in ((7, "seven"), (8, "eight"), (0, "nought"))},
        ),
        (7, "", Op.RM, b"data/x\0", OK, {p: [f"/local/domain/7/data/x {t}"] for p, t in ((7, "seven"), (0, "nought"))}),
    ],
    "a transaction": [
        (0, "", Op.WATCH, HOME + b"/data\0t\0", OK, {0: ["/local/domain/7/data t"]}),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WRITE, b"data/x\x001", OK),
        (7, "a", Op.WRITE, b"data/y\x002", OK),
        (7, "a", Op.WRITE, b"data/x\x003", OK),
        (7, "a", Op.READ, b"data/x\0", b"3"),
        (7, "", Op.READ, b"data/x\0", "ENOENT"),
        (7, "a", Op.TRANSACTION_START, b"\0", "EBUSY"),
        (8, "a", Op.READ, b"data\0", "ENOENT"),
        (7, "a", Op.TRANSACTION_END, b"T\0", OK, {0: ["/local/domain/7/data/x t", "/local/domain/7/data/y t"]}),
        (7, "a", Op.TRANSACTION_END, b"T\0", "ENOENT"),
        (7, "a", Op.READ, b"data/x\0", "ENOENT"),
        (7, "", Op.READ, b"data/x\0", b"3"),
        (7, "", Op.TRANSACTION_END, b"T\0", "ENOENT"),
    ],
    "what was never there": [
        (0, "", Op.WATCH, b"/\0t\0", OK, {0: ["/ t"]}),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WRITE, b"data/x/y\x001", OK),
        (7, "a", Op.WRITE, b"data/z\x001", OK),
        (7, "a", Op.RM, b"data/x\0", OK),
        (7, "a", Op.TRANSACTION_END, b"T\0", OK, {0: ["/local/domain/7/data/z t"]}),
    ],
    "a transaction that is dropped": [
        (0, "", Op.WATCH, b"/\0t\0", OK, {0: ["/ t"]}),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WRITE, b"data/x\x001", OK),
        (7, "a", Op.RM, b"device\0", OK),
        (7, "a", Op.TRANSACTION_END, b"F\0", OK),
        (7, "", Op.READ, b"data/x\0", "ENOENT"),
        (7, "", Op.READ, b"device\0", b""),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WRITE, b"data/x\x001", OK),
        (7, "", Op.RESET_WATCHES, b"\0", OK),
        (7, "a", Op.TRANSACTION_END, b"T\0", "ENOENT"),
    ],
    "conflicts": [
        (7, "", Op.WRITE, b"data/x\x000", OK),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "b", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.READ, b"data/x\0", b"0"),
        (7, "b", Op.READ, b"data/x\0", b"0"),
        (7, "a", Op.WRITE, b"data/x\x001", OK),
        (7, "b", Op.WRITE, b"data/y\x001", OK),
        (7, "a", Op.TRANSACTION_END, b"T\0", OK),
        (7, "b", Op.TRANSACTION_END, b"T\0", "EAGAIN"),
        (7, "", Op.READ, b"data/y\0", "ENOENT"),
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WRITE, b"data/mine\0", OK),
        (0, "", Op.WRITE, HOME + b"/data/theirs\0", OK),
        (7, "a", Op.TRANSACTION_END, b"T\0", OK),
        (7, "", Op.DIRECTORY, b"data\0", b"x\0mine\0theirs\0"),  # by the time of the request
    ],
    "a watch in a transaction is a watch": [
        (7, "a", Op.TRANSACTION_START, b"\0", ID),
        (7, "a", Op.WATCH, b"data\0t\0", OK, {7: ["data t"]}),
        (7, "never", Op.WATCH, b"data\0u\0", OK, {7: ["data u"]}),
        (7, "a", Op.TRANSACTION_END, b"F\0", OK),
        (0, "", Op.WRITE, HOME + b"/data\0", OK, {7: ["data t", "data u"]}),
        (7, "never", Op.READ, b"data\0", "ENOENT"),
    ],
    "domains": [
        (0, "", Op.WATCH, b"@releaseDomain\0r\0", OK, {0: ["@releaseDomain r"]}),
        (0, "", Op.WATCH, b"@releaseDomain\0d\x001\0", OK, {0: ["@releaseDomain d"]}),
        (0, "", Op.WATCH, b"@releaseDomain/8\x008\0", OK, {0: ["@releaseDomain/8 8"]}),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"8\0", b"T\0"),
        (0, "", Op.GET_DOMAIN_PATH, b"8\0", b"/local/domain/8\0"),
        (7, "", Op.GET_DOMAIN_PATH, b"65535\0", b"/local/domain/65535\0"),
        (7, "", Op.IS_DOMAIN_INTRODUCED, b"8\0", "EACCES"),
        (7, "", Op.INTRODUCE, b"8\x001\x001\0", "EACCES"),
        (7, "", Op.RELEASE, b"8\0", "EACCES"),
        (7, "", Op.RESUME, b"8\0", "EACCES"),
        (7, "", Op.SET_TARGET, b"7\x008\0", "EACCES"),
        (0, "", Op.RESUME, b"8\0", OK),
        (
            *(0, "", Op.RELEASE, b"8\0", OK),
            {0: ["@releaseDomain r", "@releaseDomain/8 8", "@releaseDomain/8 d"]},
        ),
        (0, "", Op.RELEASE, b"8\0", "ENOENT"),
        (0, "", Op.READ, b"/local/domain/8/data\0", "ENOENT"),
        (0, "", Op.IS_DOMAIN_INTRODUCED, b"8\0", b"F\0"),
        (0, "", Op.INTRODUCE, b"8\x001\x001\0", "EINVAL"),
    ],
    "features and quotas": [
        (7, "", Op.GET_FEATURE, b"\0", b"7\0"),
        (0, "", Op.SET_FEATURE, b"7\x001\0", "EBUSY"),
        (0, "", Op.GET_QUOTA, b"7\0watches\0", b"128\0"),
        (0, "", Op.SET_QUOTA, b"7\0watches\x001\0", OK),
        (7, "", Op.WATCH, b"data\x001\0", OK, {7: ["data 1"]}),
        (7, "", Op.WATCH, b"data\x002\0", "ENOSPC"),
        (8, "", Op.WATCH, b"data\x001\0", OK, {8: ["data 1"]}),
        (8, "", Op.WATCH, b"data\x002\0", OK, {8: ["data 2"]}),
        (7, "", Op.GET_QUOTA, b"7\0watches\0", "EACCES"),
        (0, "", Op.CONTROL, b"check\0", OK),
        (7, "", Op.CONTROL, b"check\0", "EACCES"),
        (0, "", Op.CONTROL, b"nonsense\0", "EINVAL"),
    ],
}


class Clients:
    """Domain 0, 7 and 8, each by one connection."""

    def __init__(self, ends: dict[int, End]) -> None:
        self.ends = ends
        self.transactions: dict[str, int] = {"": 0}
        self.seen: Events = {}

    async def receive(self, domid: int) -> tuple[int, int, int, bytes]:
        """The next message that is no event."""
        while True:
            message = await self.ends[domid].receive()
            if message[0] != Op.WATCH_EVENT:
                return message
            assert message[1:3] == (0, 0)
            path, token = wire.strings(message[3])
            self.seen.setdefault(domid, []).append(f"{path.decode()} {token.decode()}")

    async def ask(self, domid: int, name: str, op: int, payload: bytes) -> bytes | str:
        tx = 0 if op == Op.TRANSACTION_START and name not in self.transactions else self.transactions.get(name, 4242)
        await self.ends[domid].send(wire.pack(op, 0x12345, tx, payload))
        kind, req_id, tx_id, body = await self.receive(domid)
        assert (req_id, tx_id) == (0x12345, tx)
        if op == Op.TRANSACTION_START and kind == op:
            self.transactions[name] = int(body[:-1])
        if kind != Op.ERROR:
            assert kind == op
            return body
        assert body.decode().removesuffix("\0") in wire.ERROR_NAMES
        return body[:-1].decode()

    async def settle(self, left: list[int]) -> None:
        """Whatever has come up is read: replies come behind it."""
        for domid in left:
            await self.ends[domid].send(wire.pack(Op.GET_DOMAIN_PATH, 1, 0, b"1\0"))
            await self.receive(domid)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()
    assert server.store.check() == []
    assert len(server.store.connections) == 1


async def run(rows: list[Row], clients: Clients) -> None:
    """Every row, and that nothing comes but what it says."""
    left = [0, 7, 8]
    for number, (domid, transaction, op, payload, reply, *more) in enumerate(rows):
        row = f"row {number}: {op!r} {payload[:60]!r}"
        if op == Op.TRANSACTION_START and reply is ID:
            clients.transactions.pop(transaction, None)
        clients.seen = {}
        got = await clients.ask(domid, transaction, op, payload)
        if isinstance(reply, re.Pattern):
            assert isinstance(got, bytes), row
            assert reply.fullmatch(got), row
        else:
            assert got == reply, row
        if op == Op.RELEASE and got == OK:
            left.remove(int(payload[:-1]))
        await clients.settle(left)
        assert clients.seen == (more[0] if more else {}), row


@pytest.mark.parametrize("transport", [SocketEnd, FrontRing, LocalEnd])
@pytest.mark.parametrize("name", TABLES)
async def test_table(server: Server, name: str, transport: Callable[[Server, int], End]) -> None:
    for domid in (7, 8):
        server.introduce(domid)
        server.write(f"/local/domain/{domid}", "", perms=["n0", f"r{domid}"])
        for what in ("data", "device"):
            server.write(f"/local/domain/{domid}/{what}", "", perms=[f"n{domid}"])
    ends = {domid: transport(server, domid) for domid in (0, 7, 8)}
    clients = Clients(ends)
    try:
        await run(TABLES[name], clients)
    finally:
        for end in ends.values():
            end.close()
    for _ in range(1000):
        if len(server.store.connections) == 1:
            break
        await asyncio.sleep(0.001)
