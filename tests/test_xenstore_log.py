"""The store's log: after an end at any point the store is what was acknowledged, and nothing else."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import random
from collections.abc import Generator

import pytest

from evtchnd._core.words import Mem
from evtchnd.errors import HostError
from evtchnd.xenstore import log as logs
from evtchnd.xenstore import migration, recorder, restore, wire
from evtchnd.xenstore.log import Log, LogFullError
from evtchnd.xenstore.operations import handle
from evtchnd.xenstore.server import Server
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op
from scale import scaled
from test_xenstore_migration import contents
from xenstore_ends import FrontRing

AREA = 1 << 20


def again(log: Log) -> XenStore:
    """What another process finds."""
    found = Log(os.dup(log.fd))
    try:
        return restore.from_log(found)[0]
    finally:
        found.close()
        os.close(found.fd)


@pytest.fixture
def log() -> Generator[Log, None, None]:
    made = Log.create(AREA)
    yield made
    made.close()
    os.close(made.fd)


def test_a_log_cannot_be_made_shorter_or_longer(log: Log) -> None:
    for size in (4096, 16 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(log.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(log.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_what_is_no_log_is_refused() -> None:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    with pytest.raises(HostError, match="no XenStore log"):
        Log(fd)
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(HostError, match="no XenStore log"):
        Log(fd)
    os.close(fd)


def test_a_log_that_could_fault_us_is_refused(log: Log) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, os.fstat(log.fd).st_size)
    os.pwrite(fd, os.pread(log.fd, 4096, 0), 0)
    with pytest.raises(HostError, match="shorter"):
        Log(fd)
    os.close(fd)


def test_another_version_is_refused(log: Log) -> None:
    os.pwrite(log.fd, b"\x02", 8)
    with pytest.raises(HostError, match="version 2"):
        Log(os.dup(log.fd))


def test_half_a_record_does_not_count(log: Log) -> None:
    store = restore.open_store(log)
    conn = store.connect(0)
    handle(store, conn, Op.WRITE, 0, 0, b"/a\x001")
    # a process that is killed has written this much of the next commit, and has not stored `committed`
    half = migration.pack_node(b"/a", b"2", migration.pack_perms(((0, 0),)))[:-8]
    with mmap.mmap(log.fd, 0) as whole:
        whole[4096 + log.used : 4096 + log.used + len(half)] = half
    assert contents(again(log)) == contents(store)
    assert again(log).tree.get(b"/a").value == b"1"  # type: ignore[union-attr]


def test_a_damaged_log_is_refused(log: Log) -> None:
    store = restore.open_store(log)
    handle(store, store.connect(0), Op.WRITE, 0, 0, b"/a\x001")
    os.pwrite(log.fd, b"\xff\xff\xff\x7f", 4096 + 4)
    with pytest.raises(migration.MigrationError):
        again(log)


def test_a_full_log_is_given_up_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    log = Log.create(8192)
    store = restore.open_store(log)
    conn = store.connect(0)
    for number in range(100):
        handle(store, conn, Op.WRITE, 0, 0, b"/a/%d\0" % number + b"x" * 100)
    assert len(store.tree) > 100
    assert "full" in caplog.text
    assert len(again(log).tree) == len(XenStore().tree)
    with pytest.raises(LogFullError):
        log.append(bytes(8200))
    log.close()
    os.close(log.fd)


# ---- an end at any point


class Crowd:
    """Clients that do anything, of a store with a log; with `compact` bytes it is copied all the time."""

    def __init__(self, log: Log, seed: int, compact: int) -> None:
        self.random = random.Random(seed)
        self.store = restore.open_store(log)
        assert self.store.recorder is not None
        self.store.recorder._compact_bytes = compact
        self.copies: list[Generator[None, None, None]] = []
        self.store.later = self.copies.append
        self.tool = self.store.connect(0)
        self.guests = []
        for domid in (7, 8):
            self.enter(domid)

    def enter(self, domid: int) -> None:
        store = self.store
        store.introduce(domid)
        handle(store, self.tool, Op.WRITE, 0, 0, b"/local/domain/%d/data\0" % domid)
        handle(store, self.tool, Op.SET_PERMS, 0, 0, b"/local/domain/%d\0n%d\0" % (domid, domid))
        conn = store.connect(domid)
        store.recorder.opened(conn, 0, 0)  # type: ignore[union-attr]
        self.guests.append(conn)

    def step(self) -> None:
        rng, store = self.random, self.store
        conn = rng.choice([self.tool, *self.guests])
        names = [b"/a", b"/a/b", b"/a/c", b"/local/domain/7/data/x", b"/local/domain/8/data/y", b"/local/domain/7/data"]
        path = rng.choice(names)
        tx = rng.choice([0, 0, *conn.transactions])
        value = b"%d" % rng.randrange(1000)
        requests = [
            *[(Op.WRITE, path + b"\0" + value)] * 5,
            *[(Op.RM, path + b"\0")] * 2,
            (Op.MKDIR, path + b"/" + value + b"\0"),
            (Op.SET_PERMS, path + b"\0" + rng.choice([b"n7\0", b"b8\0r7\0", b"n0\0b7\0"])),
            (Op.WATCH, path + b"\0" + value + b"\0" + rng.choice([b"", b"2\0"])),
            (Op.WATCH, b"data\0" + value + b"\0"),
            (Op.UNWATCH, b"\0".join([*rng.choice([*conn.watches, (path, value)]), b""])),
            (Op.TRANSACTION_START, b"\0"),
            (Op.READ, path + b"\0"),
            (Op.SET_QUOTA, rng.choice([b"", b"7\0"]) + b"nodes\0" + value + b"\0"),
            (Op.SET_TARGET, b"7\x008\0"),
            (Op.RESET_WATCHES, b"\0"),
        ]
        op, payload = rng.choice(requests)
        if tx and rng.random() < 0.3:
            op, payload = Op.TRANSACTION_END, rng.choice([b"T\0", b"F\0"])
        recording = store.recorder
        assert recording is not None
        recording.received(conn, (conn.received + 16 + len(payload)) & 0xFFFFFFFF, b"")
        handle(store, conn, op, 1, tx, payload)
        if rng.random() < 0.02:
            guest = self.guests.pop(rng.randrange(len(self.guests)))
            store.release(guest.domid)
            self.enter(guest.domid)
        if rng.random() < 0.01:
            for guest in self.guests:
                store.reset(guest)
                recording.opened(guest, 0, 0)
        # the transports take what they can
        for each in list(store.connections):
            while each.out and (not each.domid or rng.random() < 0.7):
                each.take()
        recording.commit(store.ready)
        store.ready.clear()
        while self.copies and rng.random() < 0.5:
            if next(self.copies[0], self) is self:
                self.copies.pop()


def same(store: XenStore, found: XenStore) -> None:
    """What matters of both is equal."""
    assert contents(found) == contents(store)
    assert found.check() == []
    assert found.quotas == store.quotas
    assert found.generation >= store.generation
    known = {domid: (d.introduced, d.target, d.quotas) for domid, d in store.domains.items() if d.introduced}
    assert known == {domid: (d.introduced, d.target, d.quotas) for domid, d in found.domains.items() if d.introduced}
    rings = {conn.domid: conn for conn in store.connections if conn.domid}
    back = {conn.domid: conn for conn in found.connections if conn.domid}
    assert set(rings) == set(back)
    for domid, conn in rings.items():
        other = back[domid]
        assert {(key, w.depth, w.strip) for key, w in conn.watches.items()} == {
            (key, w.depth, w.strip) for key, w in other.watches.items()
        }
        assert set(conn.transactions) == set(other.transactions)
        assert (conn.received, conn.queued) == (other.received, other.queued)
        # of what is to be written the page tells how much was: all that waits is the end of what is known
        waiting = conn.unsent + b"".join(conn.out)
        assert other.unsent.endswith(waiting)


@pytest.mark.parametrize("compact", [0, 1 << 30], ids=["copied", "not copied"])
@pytest.mark.parametrize("seed", range(scaled(40)))
def test_the_log_has_what_was_acknowledged_after_each_request(log: Log, seed: int, compact: int) -> None:
    crowd = Crowd(log, seed, compact)
    for number in range(400):
        crowd.step()
        if number % 7 == 0:
            same(crowd.store, again(log))
    same(crowd.store, again(log))
    # and goes on from there
    store = restore.open_store(log)
    handle(store, store.connect(0), Op.WRITE, 0, 0, b"/a/after\x001")
    same(store, again(log))


def test_siblings_keep_their_order(log: Log) -> None:
    """Linux numbers its devices by it. A transaction's nodes are as old as they were in it."""
    store = restore.open_store(log)
    conn = store.connect(0)
    handle(store, conn, Op.MKDIR, 0, 0, b"/a/first\0")
    handle(store, conn, Op.TRANSACTION_START, 0, 0, b"\0")
    (tx,) = conn.transactions
    handle(store, conn, Op.MKDIR, 0, tx, b"/a/mine\0")
    handle(store, conn, Op.MKDIR, 0, 0, b"/a/theirs\0")
    handle(store, conn, Op.TRANSACTION_END, 0, tx, b"T\0")
    handle(store, conn, Op.WRITE, 0, 0, b"/a/first\x00changed")
    assert store.tree.get(b"/a").names() == [b"first", b"mine", b"theirs"]  # type: ignore[union-attr]
    same(store, again(log))
    for _ in store.recorder.copy():  # type: ignore[union-attr]
        pass
    same(store, again(log))


def test_a_copy_makes_the_log_shorter_and_gives_memory_back(log: Log) -> None:
    store = restore.open_store(log)
    conn = store.connect(0)
    for number in range(3000):
        handle(store, conn, Op.WRITE, 0, 0, b"/a\0" + b"x" * (number % 100))
        conn.clear()
    before, blocks = log.used, os.fstat(log.fd).st_blocks
    for _ in store.recorder.copy():  # type: ignore[union-attr]
        pass
    assert log.used < before / 100
    assert os.fstat(log.fd).st_blocks < blocks / 4
    same(store, again(log))


# ---- a guest's ring, in one process after another


async def boot(server: Server) -> None:
    server.mkdir("/local/domain/7/data", perms=["n7"])
    server.introduce(7)


class Crash(BaseException):
    """The process is killed here."""


STORES = [2048, 2060]  # req_cons, rsp_prod
POINTS = [("append", number) for number in range(8)] + [(at, number) for at in STORES for number in range(6)]


@pytest.mark.parametrize(("what", "number"), POINTS)
async def test_a_request_is_answered_once_wherever_the_process_ends(
    log: Log, monkeypatch: pytest.MonkeyPatch, what: object, number: int
) -> None:
    """The end comes before or after the n-th commit, or the n-th store to a word of the page."""
    server = Server(restore.open_store(log))
    await boot(server)
    guest = FrontRing(server, 7)
    await guest.send(wire.pack(Op.WATCH, 1, 0, b"data/n\0tok\0"))
    await guest.receive()
    await guest.receive()

    count = 0
    ends = log.used, [guest.page[at : at + 4] for at in range(2048, 2064, 4)], bytes(guest.page[1024:2048])

    def crash_at(counted: bool) -> None:
        nonlocal count, ends
        if counted:
            count += 1
            if count == number + 1:
                words = [guest.page[at : at + 4] for at in range(2048, 2064, 4)]
                ends = log.used, words, bytes(guest.page[1024:2048])
                raise Crash

    class Watched:
        """The page's words, until the end."""

        def __init__(self, mem: Mem) -> None:
            self._mem = mem

        def store(self, at: int, value: int) -> None:
            crash_at(at == what)
            self._mem.store(at, value)

        def __getattr__(self, name: str) -> object:
            return getattr(self._mem, name)

    append = Log.append

    def appending(self: Log, data: bytes) -> None:
        crash_at(what == "append")
        append(self, data)

    monkeypatch.setattr(Log, "append", appending)
    guest.ring._stream._mem = Watched(guest.ring._stream._mem)  # type: ignore[assignment]
    requests = b"".join(wire.pack(Op.WRITE, 10 + n, 0, b"data/n\0%d" % n) for n in range(4))
    requests += wire.pack(Op.READ, 20, 0, b"data/n\0")
    first, second = requests[:60], requests[60:]
    crashed = False
    for part in (first, second):
        prod = guest.word(2052)
        for at, byte in enumerate(part):
            guest.page[(prod + at) & 1023] = byte
        guest.put(2052, prod + len(part))
        try:
            if not crashed:
                guest.ring._pump()
        except Crash:
            crashed = True
        # what was taken is the guest's to write on
        for at in range(guest.word(2052) - 1024, guest.word(2048)):
            guest.page[at & 1023] = 0xEE
    monkeypatch.undo()
    # nothing of what came after the end has happened
    if crashed:
        assert log.used == ends[0]
    page = bytes(guest.page)
    server.store.recorder = None
    guest.ring.close()

    later = Server(restore.open_store(log))
    guest.page[:] = page
    later_ring = later.attach_ring(7, guest.page, guest.kick, guest.notify)
    guest.ring = later_ring
    await asyncio.sleep(0.01)
    got = []
    while len([m for m in got if m[0] != Op.WATCH_EVENT]) < 5:
        got.append(await guest.receive())
    replies = [(kind, req_id) for kind, req_id, _, _ in got if kind != Op.WATCH_EVENT]
    assert replies == [(Op.WRITE, 10 + n) for n in range(4)] + [(Op.READ, 20)]
    assert [body for kind, _, _, body in got if kind == Op.READ] == [b"3"]
    assert any(kind == Op.WATCH_EVENT and body == b"data/n\0tok\0" for kind, _, _, body in got)
    await guest.send(wire.pack(Op.WRITE, 30, 0, b"data/n\x009"))
    while (message := await guest.receive())[0] == Op.WATCH_EVENT:
        pass
    assert message[:2] == (Op.WRITE, 30)
    assert later.read("/local/domain/7/data/n") == "9"
    assert later.store.check() == []
    guest.close()
    await server.close()
    await later.close()


async def test_a_guest_that_has_changed_its_page_is_not_served(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(restore.open_store(log))
    await boot(server)
    guest = FrontRing(server, 7)
    await guest.ask(Op.READ, b"data\0")
    server.store.recorder = None
    guest.ring.close()
    guest.put(2060, guest.word(2060) + 500)
    later = Server(restore.open_store(log))
    guest.ring = later.attach_ring(7, guest.page, guest.kick, guest.notify)
    assert guest.ring.closed
    assert "producer" in caplog.text
    assert guest.word(2072) == wire.ERROR_RINGIDX
    guest.close()
    await server.close()
    await later.close()


def test_records_of_the_log_are_outside_of_xens() -> None:
    assert all(kind > 0x8000_0000 for kind in recorder.Own)
    assert logs.AREA_BYTES % 4096 == 0
