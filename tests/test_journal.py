"""The in-flight journal: what a dead worker left, at each of its steps."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evtchnd._core.blk as blk
from bareguest import Blkfront, Ram
from evtchnd._core import COMPILED
from evtchnd.errors import GuestError, HostError
from evtchnd.journal import Journal, create
from scale import scaled


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


def test_each_queue_has_a_journal_of_its_own() -> None:
    fd = create(512, queues=4, name="j")
    journals = [Journal(fd, queue) for queue in range(4)]
    for queue, journal in enumerate(journals):
        assert journal.entries == 512 and not journal.started
        for entry in range(512):
            journal.mem.store(128 + 128 * entry + 124, queue + 1)
        journal.mem.store(32, 1)
    journals[1].reset()
    for queue, journal in enumerate(journals):
        assert journal.started == (queue != 1)
        assert all(journal.mem.load(128 + 128 * entry + 124) == queue + 1 for entry in range(512))
        journal.close()
    with pytest.raises(HostError, match="4 queues, queue 4 is not there"):
        Journal(fd, 4)
    os.close(fd)
    for queues in (0, 65):
        with pytest.raises(ValueError, match="queues"):
            create(32, queues=queues, name="j")


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    fd = create(32, name="j")
    Journal(fd).close()
    for seal in (os.ftruncate,):
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                seal(fd, size)
    for at, value, reason in (
        (0, b"XXXX", "magic"),
        (4, b"\2", "version 2"),
        (8, b"\xff", "255 entries"),
        (12, b"\1", "entries of 1"),
    ):
        good = os.pread(fd, 16, 0)
        os.pwrite(fd, value, at)
        with pytest.raises(HostError, match=reason):
            Journal(fd)
        os.pwrite(fd, good, 0)
    Journal(fd).close()
    os.close(fd)
    fd = os.memfd_create("short")
    with pytest.raises(HostError, match="0 bytes are no journal"):
        Journal(fd)
    os.ftruncate(fd, 4096)
    with pytest.raises(HostError, match="not sealed"):
        Journal(fd)
    os.close(fd)
    with pytest.raises(HostError, match="descriptor"):
        Journal(9999)
    for entries in (0, 5000):
        with pytest.raises(ValueError, match="entries"):
            create(entries, name="j")


def test_a_new_ring_begins_where_the_shared_index_is(ram: Ram) -> None:
    front = Blkfront(ram, start=77)
    assert not front.journal.started
    assert front.ring.attach() == []
    assert front.journal.started
    assert (front.ring.req_cons, front.ring.rsp_prod) == (77, 77)
    with pytest.raises(ValueError, match="started"):
        front.ring.attach()
    front.journal.reset()
    assert not front.journal.started
    front.close()


def test_a_journal_of_another_ring_is_refused(ram: Ram) -> None:
    front = Blkfront(ram, abi=64)
    front.ring.take(1)
    front.ring.close()
    ring = blk.BlkRing(ram.grants, front.pages, abi=32, journal=front.journal, sectors=1)
    with pytest.raises(HostError, match="another size or ABI"):
        ring.attach()
    ring.close()
    with pytest.raises(HostError, match="32 entries for a ring of 64"):
        blk.BlkRing(ram.grants, front.pages * 2, abi=64, journal=front.journal, sectors=1)
    front.close()


def replayed(front: Blkfront) -> list[int]:
    """Restart, finish what was in flight, publish; -> ids that were done again."""
    again = []
    for req in front.restart():
        again.append(req.id)  # type: ignore[attr-defined]
        front.ring.done(req, 0)  # type: ignore[arg-type]
    front.ring.push()
    return again


def forget(front: Blkfront) -> None:
    """Let go of dead workers' objects, which would have gone with their process."""
    for memory, grants, ring, journal, pages in front.abandoned:
        ring.close()
        for page in pages:
            page.close()
        journal.close()
        grants.close()
        memory.close()


@pytest.mark.parametrize("abi", [64, 32])
@pytest.mark.parametrize("start", [0, 2**32 - 3])
def test_in_flight_requests_come_back_in_order(ram: Ram, abi: int, start: int) -> None:
    front = Blkfront(ram, abi=abi, start=start)
    for id in range(6):
        front.request(1, id, 8 * id, front.data(id))
    front.publish()
    reqs = front.ring.take(6)
    front.ring.done(reqs[4], 0)
    front.ring.done(reqs[1], -1)
    front.ring.push()
    front.ring.done(reqs[3], 0)  # done, and never published
    found = front.restart()
    assert [(req.id, req.op, req.sector, req.want, req.status) for req in found] == [  # type: ignore[attr-defined]
        (id, 1, 8 * id, 4096, 0) for id in (0, 2, 5)
    ]
    assert front.ring.inflight == 3
    for req in found:
        front.ring.done(req, 0)  # type: ignore[arg-type]
    front.ring.push()
    assert front.responses() == [(4, 1, 0), (1, 1, -1), (3, 1, 0), (0, 1, 0), (2, 1, 0), (5, 1, 0)]
    assert all(ram.flags(100 + n) == 1 for n in range(6))
    for id in range(10, 42):
        front.request(0, id, 0, front.data(0))
    front.publish()
    assert [req.id for req in front.ring.take(100)] == list(range(10, 42))
    forget(front)
    front.close()


def test_a_guest_that_wrote_our_index_is_told(ram: Ram) -> None:
    front = Blkfront(ram)
    front.request(0, 1, 0, front.data(1))
    front.publish()
    front.ring.take(1)
    front.put_word(8, 5)
    with pytest.raises(GuestError, match="rsp_prod is 0x5, and this end left it at 0x0"):
        front.restart()
    forget(front)
    front.close()


def test_a_journal_that_contradicts_itself_is_not_replayed(ram: Ram) -> None:
    front = Blkfront(ram)
    for id in range(3):
        front.request(0, id, 0, front.data(1))
    front.publish()
    front.ring.take(3)
    front.journal.mem.store(128, 0)
    with pytest.raises(HostError, match="cannot be replayed"):
        front.restart()
    front.journal.mem.store(128, 9)
    with pytest.raises(HostError, match="state 9"):
        front.ring.attach()
    forget(front)
    front.close()


@pytest.mark.parametrize("idle", [False, True])
def test_a_death_before_the_consumed_index_is_stored_and_another_one_later(ram: Ram, idle: bool) -> None:
    """The request came back by its INFLIGHT entry; once that is DONE, or FREE again, nothing says it was taken."""
    front = Blkfront(ram)
    front.ring.start()
    front.request(1, 1, 0, front.data(1))
    front.publish()
    front.ring.take(1)
    front.journal.mem.store(16, 0)
    (req,) = front.restart()
    front.ring.done(req, 0)  # type: ignore[arg-type]
    if idle:
        front.ring.push()
    assert front.restart() == []
    front.ring.push()
    assert front.responses() == [(1, 1, 0)]
    assert front.journal.mem.load(16) == front.ring.req_cons == 1
    forget(front)
    front.close()


class Died(BaseException):
    """The worker, at one store."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Make the Python form die before its `step`-th store to shared memory, a grant or the journal; -> steps so far."""
    import evtchnd._core.pins as pins
    import evtchnd._core.words as words

    count = [0]

    def counted(name: str, module: object) -> None:
        real = getattr(words, name)

        def store(*args: object) -> object:
            count[0] += 1
            if count[0] == step:
                raise Died
            return real(*args)

        monkeypatch.setattr(module, name, store)

    for name in ("st32", "st64", "put32"):
        counted(name, blk)
    for name in ("cas32", "and16"):
        counted(name, pins)
    real_give, real_take = words.Area.give, words.Area.take

    def give(self: words.Area, *args: object) -> int:
        count[0] += 1
        if count[0] == step:
            raise Died
        return real_give(self, *args)  # type: ignore[arg-type]

    def take(self: words.Area, *args: object) -> int:
        count[0] += 1
        if count[0] == step:
            raise Died
        return real_take(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(words.Area, "give", give)
    monkeypatch.setattr(words.Area, "take", take)
    return count


@pytest.mark.skipif(COMPILED, reason="needs the Python form; tests/test_core_forms.py runs it there")
@pytest.mark.parametrize("start", [0, 2**32 - 3])
def test_every_step_at_which_a_worker_can_die(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    """Finite and complete: before each single store of a session (out of order, two batches, one bad request)."""
    step, finished = 0, False
    while not finished:
        step += 1
        ram = Ram()
        front = Blkfront(ram, start=start)
        front.ring.start()
        for id in range(5):
            front.request(1, id, 8 * id, front.data(id, id + 1))
        front.request(1, 5, 1 << 40, front.data(5))
        front.publish()
        performed: list[int] = []
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                reqs = front.ring.take(4)
                for n in (2, 0):
                    performed.append(reqs[n].id)
                    front.ring.done(reqs[n], 0)
                front.ring.push()
                more = front.ring.take(4)
                for req in (more[0], reqs[3], more[1]):
                    performed.append(req.id)
                    front.ring.done(req, req.status)
                front.ring.push()
                performed.append(reqs[1].id)
                front.ring.done(reqs[1], 0)
                front.ring.push()
                finished = True
            except Died:
                pass
        seen = front.responses()
        if not finished:
            for req in front.restart():
                front.ring.done(req, req.status)  # type: ignore[attr-defined,arg-type]
            front.ring.push()
            for req in front.ring.take(32):
                front.ring.done(req, req.status)
            front.ring.push()
            seen += front.responses()
        assert sorted(seen) == [(id, 1, 0) for id in range(5)] + [(5, 1, -1)], step
        assert [ram.flags(100 + n) for n in range(6)] == [1] * 6, step
        assert front.ring.inflight == 0
        # and the ring goes on
        for id in range(32):
            front.request(0, id, 0, front.data(0))
        front.publish()
        assert [req.id for req in front.ring.take(32)] == list(range(32))
        front.close()  # not the dead worker's objects: they stopped in the middle
        ram.close()
    assert step > 60


@given(st.lists(st.sampled_from(["put", "put", "take", "take", "done", "done", "push", "die"]), max_size=60),
       st.sampled_from([0, 2**32 - 5]), st.randoms(use_true_random=False))  # fmt: skip
def test_deaths_between_calls(steps: list[str], start: int, chance: random.Random) -> None:
    ram = Ram()
    front = Blkfront(ram, start=start)
    front.ring.start()
    front.abandoned = []
    asked: dict[int, int] = {}
    answered: list[int] = []
    held = []
    for serial, step in enumerate(steps):
        if step == "put":
            for n in range(chance.randint(1, 12)):
                if (front.prod - front.rsp_cons) & 0xFFFFFFFF < front.entries:
                    asked[100 * serial + n] = chance.randint(0, 1)
                    front.request(asked[100 * serial + n], 100 * serial + n, 8 * n, front.data(n, n + 3))
            front.publish()
        elif step == "take":
            held += front.ring.take(chance.randint(0, 9))
        elif step == "done" and held:
            for _ in range(chance.randint(1, len(held))):
                req = held.pop(chance.randrange(len(held)))
                front.ring.done(req, 0)
        elif step == "push":
            front.ring.push()
        elif step == "die":
            held = list(front.restart())  # type: ignore[arg-type]
        answered += [id for id, _, _ in front.responses()]
    held += front.ring.take(64)
    for req in held:
        front.ring.done(req, 0)
    front.ring.push()
    answered += [id for id, _, _ in front.responses()]
    assert sorted(answered) == sorted(asked)
    assert ram.grants.pinned == 1
    assert {ram.flags(100 + n) for n in range(20)} <= {0, 1}
    forget(front)
    front.close()
    ram.close()


def test_kills_at_any_instruction(ram: Ram) -> None:
    """The same in whole processes: SIGKILL while they run at full rate, ids answered once each, over all of them."""
    front = Blkfront(ram, start=2**32 - 100)
    front.ring.start()
    front.abandoned = []
    next_id, answered = 0, []
    chance = random.Random(1)
    for _ in range(scaled(400)):
        child = os.fork()
        if child == 0:
            try:
                held = list(front.restart())
                rng = random.Random(os.getpid())
                while True:
                    held += front.ring.take(rng.randint(1, 32))
                    rng.shuffle(held)
                    for req in held[: rng.randint(0, len(held))]:
                        front.ring.done(req, 0)  # type: ignore[arg-type]
                        held.remove(req)
                    front.ring.push()
            finally:
                os._exit(7)
        end = time.monotonic() + chance.uniform(0.02, 0.05)
        while time.monotonic() < end:
            answered += [id for id, _, _ in front.responses()]
            for _ in range(8):
                if (front.prod - front.rsp_cons) & 0xFFFFFFFF < front.entries:
                    front.request(next_id % 2, next_id, 0, front.data(next_id % 50))
                    next_id += 1
            front.publish()
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        answered += [id for id, _, _ in front.responses()]
    for req in front.restart():
        front.ring.done(req, 0)  # type: ignore[arg-type]
    for req in front.ring.take(64):
        front.ring.done(req, 0)
    front.ring.push()
    answered += [id for id, _, _ in front.responses()]
    assert sorted(answered) == list(range(next_id))
    assert {ram.flags(100 + n) for n in range(50)} <= {0, 1}
    forget(front)
    front.close()
