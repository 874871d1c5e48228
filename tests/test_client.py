"""The VMM's client against a daemon's end that the tests write message by message, in both ways of reading."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.errors import VmmError, XenError
from evtchnd.vmm.client import BoundPort, Client, Disconnected, GrantFrame, MemorySlot, Refused
from scale import scaled

Handle = Callable[["Daemon", transport.Question, list[int]], p.Body | None]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def agree(daemon: Daemon, question: transport.Question, fds: list[int]) -> p.Body | None:
    if isinstance(question.message, p.Hello):
        return p.HelloReply(features=question.message.features & 15)
    return p.Ack(question.message.type)


class Daemon:
    """The other end, in a thread. `handle` gives the reply to a question (None: it replies itself, or never)."""

    def __init__(self, sock: socket.socket, handle: Handle = agree) -> None:
        self.sock, self.handle = sock, handle
        self.endpoint = transport.Endpoint()
        self.asked: list[tuple[p.Message, int]] = []
        self.answers: list[tuple[p.Body, list[int]]] = []
        self.answered = threading.Semaphore(0)
        self.failed: list[BaseException] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            while (came := transport.recv(self.sock)) is not None:
                event = self.endpoint.feed(came[0], len(came[1]))
                if isinstance(event, transport.Question):
                    self.asked.append((event.message, len(came[1])))
                    reply = self.handle(self, event, came[1])
                    transport.close_all(came[1])
                    if reply is not None:
                        transport.send(self.sock, self.endpoint.answer(event.id, reply))
                elif event is not None:
                    self.answers.append((event.message, came[1]))
                    self.answered.release()
        except OSError:
            pass  # the test has closed one end
        except BaseException as e:
            self.failed.append(e)

    def ask(self, message: p.Message, *fds: int) -> None:
        transport.send(self.sock, self.endpoint.ask(message)[1], fds)

    def answer(self) -> tuple[p.Body, list[int]]:
        assert self.answered.acquire(timeout=30)
        return self.answers.pop(0)

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(30)
        self.sock.close()
        for _, fds in self.answers:
            transport.close_all(fds)
        assert not self.failed, self.failed


class Vmm:
    """What a VMM keeps: kick and notify eventfds by port."""

    def __init__(self) -> None:
        self.kicks: dict[int, int] = {}
        self.notifies: dict[int, int] = {}
        self.lost = 0
        self.refuse: Exception | None = None

    def bind(self, ports: list[tuple[int, int]]) -> list[int]:
        if self.refuse is not None:
            raise self.refuse
        for port, kick in ports:
            self.kicks[port] = kick
            self.notifies[port] = os.eventfd(0, os.EFD_NONBLOCK)
        return [self.notifies[port] for port, _ in ports]

    def unbind(self, ports: list[int]) -> None:
        for port in ports:
            transport.close_all([self.kicks.pop(port), self.notifies.pop(port)])

    def on_lost(self) -> None:
        self.lost += 1


@pytest.fixture(params=[True, False], ids=["thread", "poll"])
def thread(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


Start = Callable[..., tuple[Client, Daemon, Vmm]]


@pytest.fixture
def start(thread: bool) -> Iterator[Start]:
    base = open_fds()
    made: list[tuple[Client, Daemon, Vmm]] = []

    def make(handle: Handle = agree, timeout: float = 60.0) -> tuple[Client, Daemon, Vmm]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        vmm, daemon = Vmm(), Daemon(theirs, handle)
        client = Client(
            ours, on_bind=vmm.bind, on_unbind=vmm.unbind, on_lost=vmm.on_lost, timeout=timeout, thread=thread
        )
        made.append((client, daemon, vmm))
        return made[-1]

    yield make
    for client, daemon, vmm in made:
        client.close()
        daemon.close()
        transport.close_all([*vmm.kicks.values(), *vmm.notifies.values()])
    assert open_fds() == base


def serve(client: Client, done: Callable[[], bool]) -> None:
    """Where the client has no thread: its VMM's loop."""
    while not done():
        try:
            if not client.poll(0.05):
                return
        except RuntimeError:
            return  # it has a thread


def told(vmm: Vmm) -> None:
    """The reading thread tells the VMM of the loss after it told those who wait for answers: once, and soon."""
    deadline = time.monotonic() + 30
    while not vmm.lost and time.monotonic() < deadline:
        time.sleep(0.001)
    assert vmm.lost == 1


def test_a_domains_life(start: Start) -> None:
    client, daemon, _ = start()
    ram = os.memfd_create("ram")
    client.register(7, vcpus=2, name="web", uuid=b"\7" * 16)
    client.memory([MemorySlot(0, 0, 10, ram), MemorySlot(1, 100, 10, ram, 40960)])
    client.grant_frames([GrantFrame(0, ram, 81920)])
    client.xenstore(1, ram, 86016)
    client.console(2, 109)
    client.start()
    client.slot_add(MemorySlot(5, 200, 1, ram, 0))
    client.slot_remove(5)
    client.grant_frame_add(GrantFrame(1, ram, 0))
    client.grant_frame_remove(1)
    client.disk(51712, "xvda", ram, readonly=True)
    client.disk_remove(51712)
    client.vif(0, b"\0\x16\x3e\0\0\7", [ram, ram], mtu=9000)
    client.vif_remove(0)
    client.port_closed(9)
    client.ping()
    client.release(3)
    os.close(ram)
    assert client.features == p.Feature.RESUME | p.Feature.DISK | p.Feature.CONSOLE | p.Feature.VIF
    assert daemon.asked == [
        (p.Hello(1, 15), 0),
        (p.Register(7, 1, 2, 1, b"\7" * 16, "web"), 0),
        (p.TableBegin(1, 2), 0),
        # one memfd, sent once
        (p.TableChunk(1, (p.MemoryEntry(0, 0, 0, 10, 0), p.MemoryEntry(1, 0, 100, 10, 40960))), 1),
        (p.TableCommit(1), 0),
        (p.TableBegin(2, 1), 0),
        (p.TableChunk(2, (p.GrantEntry(0, 0, 81920),)), 1),
        (p.TableCommit(2), 0),
        (p.XenStore(1, 86016), 1),
        (p.Console(2, 109), 0),
        (p.Start(), 0),
        (p.MemoryEntry(5, 0, 200, 1, 0), 1),
        (p.SlotRemove(5), 0),
        (p.GrantEntry(1, 0, 0), 1),
        (p.GrantFrameRemove(1), 0),
        (p.Disk(51712, 1, "xvda"), 1),
        (p.DiskRemove(51712), 0),
        (p.Vif(0, 2, b"\0\x16\x3e\0\0\7", 9000), 2),
        (p.VifRemove(0), 0),
        (p.PortClosed(9), 0),
        (p.Ping(), 0),
        (p.Release(3), 0),
    ]


def test_large_tables_go_in_chunks(start: Start) -> None:
    client, daemon, _ = start()
    client.resume(7, vcpus=1)
    fds = [os.eventfd(0) for _ in range(300)]
    client.memory([MemorySlot(i, i, 1, fds[i]) for i in range(300)])
    client.ports([BoundPort(i + 1, fds[2 * i], fds[2 * i + 1]) for i in range(150)])
    client.grant_frames([])
    transport.close_all(fds)
    chunks = [(message, n) for message, n in daemon.asked if isinstance(message, p.TableChunk)]
    assert [n for _, n in chunks] == [253, 47, 252, 48]
    assert [len(message.entries) for message, _ in chunks] == [253, 47, 126, 24]
    assert daemon.asked[-2:] == [(p.TableBegin(2, 0), 0), (p.TableCommit(2), 0)]


def test_a_refusal_has_number_and_reason(start: Start) -> None:
    def refuse(daemon: Daemon, question: transport.Question, fds: list[int]) -> p.Body | None:
        if isinstance(question.message, p.Register):
            return p.ErrorReply(2, errno.EEXIST, "domain 7: is there already")
        return agree(daemon, question, fds)

    client, _, _ = start(refuse)
    with pytest.raises(Refused, match="domain 7: is there already") as caught:
        client.register(7)
    assert caught.value.errno == errno.EEXIST
    client.ping()


def test_arguments_that_make_no_message_are_not_sent(start: Start) -> None:
    client, daemon, _ = start()
    with pytest.raises(VmmError, match="domain 0"):
        client.register(0)
    with pytest.raises(VmmError, match="not a multiple"):
        client.slot_add(MemorySlot(0, 0, 1, 0, 5))
    client.ping()
    assert [type(message) for message, _ in daemon.asked] == [p.Hello, p.Ping]


def test_it_answers_while_it_waits(start: Start) -> None:
    """The daemon binds ports before it answers START, and both ends of each eventfd meet."""

    def handle(daemon: Daemon, question: transport.Question, fds: list[int]) -> p.Body | None:
        if isinstance(question.message, p.Start):
            kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
            daemon.ask(p.BindPorts(((5, 1), (6, 0))), *kicks)
            kicked.extend(kicks)
            began.append(question.id)
            return None
        return agree(daemon, question, fds)

    kicked: list[int] = []
    began: list[int] = []
    client, daemon, vmm = start(handle)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(client.start)
        reply, notifies = daemon.answer()
        transport.send(daemon.sock, daemon.endpoint.answer(began[0], p.Ack(12)))
        starting.result(60)
    assert reply == p.BindPortsReply(((5, 0), (6, 1)))
    os.eventfd_write(vmm.kicks[5], 3)
    assert os.eventfd_read(kicked[1]) == 3
    os.eventfd_write(notifies[1], 4)
    assert os.eventfd_read(vmm.notifies[6]) == 4
    transport.close_all([*kicked, *notifies])
    daemon.ask(p.UnbindPorts((5, 6)))
    serve(client, lambda: bool(daemon.answers))
    assert daemon.answer() == (p.Ack(33), [])
    assert vmm.kicks == {}


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (XenError(errno.ENOENT, "port 5 is closed"), errno.ENOENT),
        (VmmError("no"), errno.EINVAL),
        (OSError(errno.ENOSPC, "no irqfd"), errno.ENOSPC),
        (KeyError("a defect"), errno.EIO),
    ],
)
def test_a_callback_that_raises_refuses(start: Start, error: Exception, number: int) -> None:
    client, daemon, vmm = start()
    vmm.refuse = error
    kick = os.eventfd(0)
    before = open_fds()
    daemon.ask(p.BindPorts(((5, 0),)), kick)
    serve(client, lambda: bool(daemon.answers))
    reply, fds = daemon.answer()
    assert isinstance(reply, p.ErrorReply)
    assert reply.errno == number
    assert fds == []
    client.ping()
    assert open_fds() == before  # the kick descriptors that came are closed
    os.close(kick)


def test_a_callback_must_not_wait_for_the_daemon(start: Start) -> None:
    client, daemon, vmm = start()
    vmm.unbind = lambda ports: client.ping()  # type: ignore[method-assign]
    client._on_unbind = vmm.unbind
    daemon.ask(p.UnbindPorts((5,)))
    serve(client, lambda: bool(daemon.answers))
    reply, _ = daemon.answer()
    assert isinstance(reply, p.ErrorReply)
    assert "must not make a call" in reply.reason
    client.ping()


def test_too_few_notify_eventfds_are_refused(start: Start) -> None:
    client, daemon, _ = start()
    client._on_bind = lambda ports: transport.close_all(kick for _, kick in ports) or []  # returned: its own
    kick = os.eventfd(0)
    daemon.ask(p.BindPorts(((5, 0),)), kick)
    serve(client, lambda: bool(daemon.answers))
    reply, _ = daemon.answer()
    assert isinstance(reply, p.ErrorReply)
    assert "0 notify eventfds for 1 ports" in reply.reason
    os.close(kick)


def test_questions_from_many_threads(start: Start) -> None:
    client, daemon, _ = start()

    def work(n: int) -> None:
        for _ in range(scaled(400)):
            client.slot_remove(n)

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(work, n) for n in range(8)]
        for _ in range(20):
            daemon.ask(p.Ping())
        for job in jobs:
            job.result(100)
        serve(client, lambda: len(daemon.answers) == 20)
    assert [daemon.answer()[0] for _ in range(20)] == [p.Ack(17)] * 20
    assert len(daemon.asked) == 1 + 8 * scaled(400)


def test_the_daemons_end_wakes_everybody(start: Start) -> None:
    def never(daemon: Daemon, question: transport.Question, fds: list[int]) -> p.Body | None:
        if isinstance(question.message, p.Hello):
            return p.HelloReply()
        if isinstance(question.message, p.Release):
            daemon.sock.shutdown(socket.SHUT_RDWR)
        return None

    client, _, vmm = start(never, timeout=600.0)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(client.ping) for _ in range(3)]
        jobs.append(pool.submit(client.release))
        for job in jobs:
            with pytest.raises(Disconnected):
                job.result(60)
    assert client.lost
    told(vmm)
    with pytest.raises(Disconnected):
        client.ping()


def test_an_answer_that_does_not_come(start: Start) -> None:
    late: list[int] = []

    def slow(daemon: Daemon, question: transport.Question, fds: list[int]) -> p.Body | None:
        if isinstance(question.message, p.SlotRemove):
            late.append(question.id)
            return None
        if isinstance(question.message, p.Ping):
            transport.send(daemon.sock, daemon.endpoint.answer(late[0], p.Ack(8)))
        return agree(daemon, question, fds)

    client, _, _ = start(slow)
    client._timeout = 0.05
    with pytest.raises(Disconnected, match="no answer to SLOT_REMOVE"):
        client.slot_remove(1)
    client._timeout = 60.0
    client.ping()  # the late answer is dropped, the connection goes on
    assert client.lost == ""


def test_a_daemon_that_speaks_nonsense_is_left(start: Start) -> None:
    client, daemon, vmm = start()
    transport.send(daemon.sock, b"nonsense")
    serve(client, lambda: bool(client.lost))
    daemon.thread.join(60)  # it saw the end
    with pytest.raises(Disconnected, match="message is wrong"):
        client.ping()
    told(vmm)


def test_a_question_for_the_daemon_is_refused(start: Start) -> None:
    client, daemon, _ = start()
    daemon.ask(p.Start())
    serve(client, lambda: bool(daemon.answers))
    reply, _ = daemon.answer()
    assert isinstance(reply, p.ErrorReply)
    assert reply.errno == errno.EPROTO
    client.ping()


def test_another_version_is_refused_and_leaves_nothing() -> None:
    base = open_fds()
    for reply in (p.HelloReply(version=2), p.ErrorReply(1, errno.EPROTONOSUPPORT, "version 2")):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        daemon = Daemon(theirs, lambda *_, reply=reply: reply)
        with pytest.raises(VmmError, match="version 2"):
            Client(ours, on_bind=lambda _: [], on_unbind=lambda _: None)
        daemon.close()
    assert open_fds() == base


def test_nobody_listens(tmp_path: Path) -> None:
    base = open_fds()
    with pytest.raises(Disconnected, match=r"vmm\.sock"):
        Client(tmp_path / "vmm.sock", on_bind=lambda _: [], on_unbind=lambda _: None)
    assert open_fds() == base


def test_close_is_no_loss_and_can_be_called_twice(start: Start) -> None:
    client, daemon, vmm = start()
    with client:
        client.ping()
    client.close()
    daemon.thread.join(60)
    assert vmm.lost == 0
    with pytest.raises(Disconnected):
        client.ping()
