"""What a guest may do to XenStore, each as a round that can be repeated; see attacks.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from evtchnd.bench.attacker import PATIENCE_S, VBD, Attacker, until
from evtchnd.guest.domain import GuestFault
from evtchnd.stream import XENSTORE, XENSTORE_ERROR, ByteStream
from evtchnd.xenstore import wire
from evtchnd.xenstore.wire import Op as StoreOp


class RawStore:
    """The guest's XenStore page without a client that minds what comes."""

    def __init__(self, attacker: Attacker) -> None:
        self._vm = attacker.vm
        self._client = attacker.store._stream
        self._page = attacker.vm.ram.view(attacker.vm.store_gfn)
        self._stream = ByteStream(self._page, XENSTORE, side="front")
        self._parser = wire.Parser()

    def put(self, data: bytes) -> bytes:
        """Writes what there is room for; -> the rest."""
        done = self._stream.write(data)
        self._vm.send(self._vm.store_port)
        return data[done:]

    def take(self) -> list[tuple[int, int, int, bytes]]:
        """All that has come."""
        data = self._stream.read(XENSTORE.to_front.size)
        if data:
            self._vm.send(self._vm.store_port)
        self._parser.feed(data)
        found = []
        while (message := self._parser.next()) is not None:
            found.append(message)
        return found

    def ask_all(self, requests: Sequence[bytes]) -> list[bytes]:
        """All requests at once, none of their replies taken before there is no more room; -> the replies' bodies."""
        rest = b"".join(requests)
        replies: list[bytes] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(replies) < len(requests):
            before = len(rest)
            rest = self.put(rest) if rest else rest
            if len(rest) == before:
                replies += [body for op, _, _, body in self.take() if op != StoreOp.WATCH_EVENT]
                time.sleep(0.0002)
            if time.monotonic() > deadline:
                raise GuestFault("XenStore does not answer")
        return replies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.attach()
        self._stream.close()
        self._page.release()


def pipelined(attacker: Attacker) -> None:
    """XSA-326, 416: requests without end, whose replies are taken when there is no more room."""
    with RawStore(attacker) as raw:
        raw.ask_all([wire.pack(StoreOp.DIRECTORY, number, 0, b"device\0") for number in range(300)])


def state(attacker: Attacker) -> None:
    """XSA-349: the path that the host watches is written again and again."""
    path = f"/local/domain/{attacker.domid}/device/vbd/{VBD}/state".encode() + b"\0"
    with RawStore(attacker) as raw:
        raw.ask_all([wire.pack(StoreOp.WRITE, number, 0, path + b"1") for number in range(300)])


def transactions(attacker: Attacker) -> None:
    """XSA-206, 484: transactions are begun, filled, and neither ended nor read."""
    with RawStore(attacker) as raw:
        started = raw.ask_all([wire.pack(StoreOp.TRANSACTION_START, 1, 0, b"\0")] * 12)
        known = [int(body.rstrip(b"\0")) for body in started if body.rstrip(b"\0").isdigit()]
        for tx in known:
            raw.ask_all(
                [wire.pack(StoreOp.WRITE, 1, tx, b"data/%d\0x" % number) for number in range(50)]
                + [wire.pack(StoreOp.DIRECTORY, 1, tx, b"\0"), wire.pack(StoreOp.RM, 1, tx, b"data/1\0")]
            )
        raw.ask_all([wire.pack(StoreOp.TRANSACTION_END, 1, tx, b"T\0") for tx in (*known, 99)])


def watches(attacker: Attacker) -> None:
    """XSA-324, 326: watches with tokens as long as may be, fired faster than their events are taken."""
    with RawStore(attacker) as raw:
        raw.ask_all([wire.pack(StoreOp.WATCH, 1, 0, b"data\0" + b"%0200d\0" % number) for number in range(140)])
        raw.ask_all([wire.pack(StoreOp.WRITE, 1, 0, b"data/a\0x")] * 20)
        raw.ask_all([wire.pack(StoreOp.RESET_WATCHES, 1, 0, b"\0")])


def nodes(attacker: Attacker) -> None:
    """XSA-325, 418, 481: nodes until the quota ends it, deep paths, paths that are none; all removed again."""
    deep = "/".join(["d"] * 200).encode()
    with RawStore(attacker) as raw:
        raw.ask_all([wire.pack(StoreOp.WRITE, 1, 0, b"data/%d\0" % number + b"x" * 100) for number in range(1100)])
        raw.ask_all(
            [wire.pack(StoreOp.MKDIR, 1, 0, path + b"\0") for path in (b"data/" + deep, b"//", b"", b"a//b", b"a\1")]
        )
        raw.ask_all([wire.pack(StoreOp.RM, 1, 0, b"data\0"), wire.pack(StoreOp.MKDIR, 1, 0, b"data\0")])


def index(attacker: Attacker) -> None:
    """XSA-38, 420: the ring's indices and headers are of chance. Its ring is off, and it has to boot again."""
    with attacker.vm.ram.view(attacker.vm.store_gfn) as page, page.cast("I") as words:
        words[XENSTORE_ERROR // 4] = 0
        page[0:1024] = attacker.dice.randbytes(1024)
        words[2052 // 4] = (words[2052 // 4] + attacker.dice.choice((1025, 1 << 31, 512))) & 0xFFFFFFFF
        attacker.vm.send(attacker.vm.store_port)
        until(lambda: words[XENSTORE_ERROR // 4] != 0, "the ring is served on")
    attacker.reboot()
