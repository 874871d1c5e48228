"""A worker that dies at a vif's rings, at each step from a packet to its published answers: the next one goes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from evtchnd import answers
from evtchnd._core import RxRing, TxRing
from evtchnd.answers import Answers
from evtchnd.errors import GuestError, HostError
from evtchnd.grants import GrantTable
from evtchnd.guest.domain import Domain
from evtchnd.guest.netqueue import Frame, Queue
from evtchnd.memory import GuestMemory
from oneprocess import LocalVm

GSO_HEADER = bytes([0, 1, 54, 0, 0xA8, 5, 0, 0, 0, 0, 0, 0])  # struct virtio_net_hdr_v1: TCPV4, segments of 1448
PLAIN_HEADER = bytes(12)


class Worker:
    """What a worker has of one queue: its own maps of guest memory and grants, rings that it takes over or begins."""

    def __init__(self, vm: LocalVm, queue: Queue, fd: int, *, again: bool) -> None:
        self.memory = GuestMemory()
        self.memory.add(0, 0, vm.ram_pages, vm.ram_fd, 0)
        self.grants = GrantTable(self.memory, vm.domid)
        for index in range(vm.frames):
            self.grants.add_frame(index, vm.grant_fd, index * 4096)
        self.pages = [self.grants.map(gref, write=True) for gref in queue.grefs]
        self.answers = Answers(fd, 0)
        self.rings: list[TxRing | RxRing] = []
        try:
            self.tx = TxRing(self.grants, self.pages[0], self.answers.tx, again=again)
            self.rings.append(self.tx)
            self.rx = RxRing(self.grants, self.pages[1], self.answers.rx, again=again, most_bytes=65557, gso=True)
            self.rings.append(self.rx)
        except GuestError:
            self.close()
            raise

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        self.answers.close()
        for page in self.pages:
            page.close()
        self.grants.close()
        self.memory.close()


def dies(body: Callable[[], None]) -> None:
    """`body` in a process that is gone at once, without a word."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException as exc:
            os.write(2, f"{exc!r}\n".encode())
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@contextmanager
def world() -> Iterator[tuple[LocalVm, Queue, int, socket.socket, socket.socket]]:
    """A guest's queue, the memfd of its answers, and a pair of sockets that does for a TAP and the host behind it."""
    vm = LocalVm()
    domain = Domain(vm)
    queue = Queue(domain, "queue", 0, split=False, timeout=5)
    fd = answers.create(1, "answers")
    tap, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    tap.setblocking(False)
    host.setblocking(False)
    for sock in (tap, host):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
    try:
        yield vm, queue, fd, tap, host
    finally:
        tap.close()
        host.close()
        os.close(fd)
        queue.release()
        domain.close()
        vm.close()


def answered(worker: Worker) -> None:
    """It has answered, nothing else."""


def noted(worker: Worker) -> None:
    """`push` has begun: the index is beside the answers."""
    for ring, mine in ((worker.tx, worker.answers.tx), (worker.rx, worker.answers.rx)):
        mine.store(0, (ring.posted if isinstance(ring, RxRing) else ring).rsp_prod)


def half_put(worker: Worker) -> None:
    """And three answers and a half are in the ring."""
    noted(worker)
    for page, mine, size in zip(worker.pages, (worker.answers.tx, worker.answers.rx), (12, 8), strict=True):
        start = 64 + (mine.load(0) - 6) % 256 * size
        page.view[start : start + 3 * size + 4] = mine.read(start, 3 * size + 4)


def published(worker: Worker) -> None:
    """All is done but the notification."""
    worker.tx.push()
    worker.rx.push()


STEPS = [answered, noted, half_put, published]


@pytest.mark.parametrize("died", STEPS, ids=lambda step: step.__name__)
def test_transmit_slots_are_answered_once(died: Callable[[Worker], None]) -> None:
    """Every one, with its own number (the frontend raises otherwise), in whichever step its worker dies."""
    with world() as (vm, queue, fd, tap, host):

        def body() -> None:
            worker = Worker(vm, queue, fd, again=False)
            worker.tx.run(tap.fileno(), 6)
            died(worker)

        for number in range(10):
            queue.send(Frame(bytes([number]) * 60))
        queue.push()
        dies(body)
        worker = Worker(vm, queue, fd, again=True)
        assert worker.tx.run(tap.fileno(), 99) == (10 if died is answered else 4)
        worker.tx.push()
        queue.reap()
        assert len(queue.free) == 256 and queue.tx_errors == 0
        frames = [host.recv(100)[12] for _ in range(worker.tx.packets + 6)]
        assert sorted(set(frames)) == list(range(10))
        worker.close()


@pytest.mark.parametrize("died", STEPS, ids=lambda step: step.__name__)
def test_receive_slots_are_answered_once(died: Callable[[Worker], None]) -> None:
    """A GSO packet's extra is no request either: its second word would name a page of the guest's, grant 1."""
    with world() as (vm, queue, fd, tap, host):

        def body() -> None:
            worker = Worker(vm, queue, fd, again=False)
            assert worker.rx.run(tap.fileno(), 9) == 2
            assert worker.rx.posted.used == 6
            died(worker)

        queue.post(200)
        host.send(GSO_HEADER + b"\1" * 15000)  # four pages, an extra
        host.send(PLAIN_HEADER + b"\2" * 60)
        dies(body)
        assert any(queue.domain.in_use(gref) for gref in queue.rx_grefs)
        worker = Worker(vm, queue, fd, again=True)
        assert not any(queue.domain.in_use(gref) for gref in queue.rx_grefs)
        host.send(PLAIN_HEADER + b"\3" * 60)
        assert worker.rx.run(tap.fileno(), 9) == 1
        worker.rx.push()
        frames = queue.receive(post=0)
        lost = [] if died is not answered else [b"\1" * 15000, b"\2" * 60]  # a network may lose what it likes
        assert lost + [frame.data for frame in frames] == [b"\1" * 15000, b"\2" * 60, b"\3" * 60]
        assert worker.rx.posted.bad_grants == 0
        worker.close()


def test_an_end_that_the_guest_moved_stops_the_vif() -> None:
    with world() as (vm, queue, fd, _, _):
        Worker(vm, queue, fd, again=False).close()
        for ring in (queue.tx, queue.rx):
            ring._area.store(8, 5)
            with pytest.raises(GuestError, match="rsp_prod is 0x5, this end left it at 0x0"):
                Worker(vm, queue, fd, again=True)
            ring._area.store(8, 0)


def test_what_holds_no_answers_is_refused() -> None:
    plain = os.memfd_create("plain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    small = answers.create(1, "small")
    try:
        os.ftruncate(plain, 1 << 20)
        for fd, queue in ((plain, 0), (small, 1)):
            with pytest.raises(HostError, match="answers"):
                Answers(fd, queue)
    finally:
        os.close(plain)
        os.close(small)
