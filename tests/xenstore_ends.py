"""A client of the server by each transport, raw: a Unix socket, a guest's ring, in process."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from typing import Protocol

from evtchnd.xenstore import wire
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.wire import Op

Message = tuple[int, int, int, bytes]


class End(Protocol):
    """What every one of them does."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self) -> Message: ...
    def close(self) -> None: ...


class SocketEnd:
    """A stream socket."""

    def __init__(self, server: Server, domid: int) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        server.attach_socket(theirs, domid=domid)
        self._parser = wire.Parser()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def receive(self) -> Message:
        async with asyncio.timeout(30):
            while (message := self._parser.next()) is None:
                data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
                if not data:
                    raise ConnectionResetError
                self._parser.feed(data)
        return message

    def close(self) -> None:
        self._sock.close()


class LocalEnd:
    """No transport at all: what the control plane uses."""

    def __init__(self, server: Server, domid: int) -> None:
        self._server = server
        self._conn = server.store.connect(domid)
        self._parser = wire.Parser()

    async def send(self, data: bytes) -> None:
        self._parser.feed(data)
        while (message := self._parser.next()) is not None:
            handle(self._server.store, self._conn, *message)
        self._server.flush()

    async def receive(self) -> Message:
        message = self._conn.take()
        op, req_id, tx_id, _ = wire.HEADER.unpack_from(message)
        return op, req_id, tx_id, message[wire.HEADER_SIZE :]

    def close(self) -> None:
        self._server.store.disconnect(self._conn)


class FrontRing:
    """A guest's side of its page, from io/xs_wire.h alone."""

    def __init__(self, server: Server, domid: int, *, start: int = 0, connection: int = 0) -> None:
        self.page = mmap.mmap(-1, 4096)
        self.kick, self.notify = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        for at in (2048, 2052, 2056, 2060):
            self.put(at, start)
        self.put(2068, connection)
        self.ring = server.attach_ring(domid, self.page, self.kick, self.notify)
        self.got = b""

    def word(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self.page, at)[0]
        return value

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.page, at, value & 0xFFFFFFFF)

    def poke(self) -> None:
        os.eventfd_write(self.kick, 1)

    def send_some(self, data: bytes) -> int:
        prod = self.word(2052)
        room = 1024 - ((prod - self.word(2048)) & 0xFFFFFFFF)
        for number, byte in enumerate(data[:room]):
            self.page[(prod + number) & 1023] = byte
        self.put(2052, prod + min(room, len(data)))
        self.poke()
        return min(room, len(data))

    async def send(self, data: bytes) -> None:
        while data:
            data = data[self.send_some(data) :]
            await asyncio.sleep(0)

    def take(self) -> None:
        cons = self.word(2056)
        count = (self.word(2060) - cons) & 0xFFFFFFFF
        assert count <= 1024
        self.got += bytes(self.page[1024 + ((cons + number) & 1023)] for number in range(count))
        self.put(2056, cons + count)
        if count == 1024:
            self.poke()

    async def receive(self) -> Message:
        async with asyncio.timeout(30):
            while True:
                self.take()
                if len(self.got) >= 16:
                    kind, req_id, tx_id, length = struct.unpack_from("<4I", self.got)
                    if len(self.got) >= 16 + length:
                        body, self.got = self.got[16 : 16 + length], self.got[16 + length :]
                        return kind, req_id, tx_id, body
                await asyncio.sleep(0.001)

    async def ask(self, op: Op, payload: bytes, tx: int = 0) -> bytes:
        await self.send(wire.pack(op, 5, tx, payload))
        kind, _, _, body = await self.receive()
        assert kind in (op, Op.ERROR)
        return body

    def close(self) -> None:
        self.ring.close()
        self.page.close()
        os.close(self.kick)
        os.close(self.notify)
