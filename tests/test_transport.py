"""Sockets with descriptors, questions and answers, tables in chunks: over real sockets, counting descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.errors import HostError, VmmError
from evtchnd.transport import Answer, Endpoint, Question, TableAssembly


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0) for _ in range(4)]
    yield fds
    transport.close_all(fds)


Pair = tuple[socket.socket, socket.socket]


def test_a_message_goes_with_its_descriptors(pair: Pair, eventfds: list[int]) -> None:
    before = open_fds()
    transport.send(pair[0], b"hello", eventfds)
    assert open_fds() == before  # the sender's stay the sender's
    came = transport.recv(pair[1])
    assert came is not None
    data, fds = came
    assert data == b"hello"
    assert len(fds) == 4
    os.eventfd_write(fds[2], 5)
    assert os.eventfd_read(eventfds[2]) == 5
    assert not any(os.get_inheritable(fd) for fd in fds)
    transport.close_all(fds)
    assert open_fds() == before


def test_253_descriptors_and_not_one_more(pair: Pair, eventfds: list[int]) -> None:
    transport.send(pair[0], bytes(p.MAX_MESSAGE), [eventfds[0]] * 253)
    came = transport.recv(pair[1])
    assert came is not None
    assert (len(came[0]), len(came[1])) == (65536, 253)
    transport.close_all(came[1])
    with pytest.raises(VmmError, match="254 descriptors"):
        transport.send(pair[0], b"x", [eventfds[0]] * 254)


def test_vmm_a_message_that_is_too_long_is_taken_and_refused(pair: Pair, eventfds: list[int]) -> None:
    before = open_fds()
    head = p.HEADER.pack(p.MAGIC, 5, 0, 42, 65537, 4)
    transport.send(pair[0], head.ljust(65537, b"\0"), eventfds)
    transport.send(pair[0], b"next")
    with pytest.raises(p.WireError, match="longer than 65536") as caught:
        transport.recv(pair[1])
    assert caught.value.errno == errno.EMSGSIZE
    assert caught.value.header == p.Header(5, 0, 42, 4)
    assert open_fds() == before
    assert transport.recv(pair[1]) == (b"next", [])


def test_vmm_descriptors_that_do_not_fit_are_all_closed(pair: Pair, eventfds: list[int]) -> None:
    """At RLIMIT_NOFILE some of them arrive: MSG_CTRUNC."""
    transport.send(pair[0], p.pack(p.Ping(), id=3), eventfds)
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 2, hard))
    try:
        with pytest.raises(p.WireError, match="not every descriptor") as caught:
            transport.recv(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert caught.value.header is not None
    assert caught.value.header.id == 3
    assert open_fds() == before


def test_the_end(pair: Pair, eventfds: list[int]) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        transport.recv(pair[1])
    before = open_fds()
    transport.send(pair[0], b"", eventfds)  # an empty message reads like the end
    assert transport.recv(pair[1]) is None
    assert open_fds() == before
    pair[0].close()
    assert transport.recv(pair[1]) is None
    with pytest.raises(BrokenPipeError):
        transport.send(pair[1], b"x")


def test_an_end_with_messages_unread(pair: Pair) -> None:
    transport.send(pair[1], b"never read")
    pair[0].close()
    assert transport.recv(pair[1]) is None


def test_a_full_socket_does_not_block(pair: Pair, eventfds: list[int]) -> None:
    pair[0].setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            transport.send(pair[0], bytes(60000), eventfds)
            sent += 1
    for _ in range(sent):
        came = transport.recv(pair[1])
        assert came is not None
        assert len(came[0]) == 60000
        transport.close_all(came[1])


def test_listen(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    with transport.listen(path, 0o600) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not listener.getblocking()
        with transport.connect(path) as client:
            with listener.accept()[0] as sock:
                assert transport.peer(sock) == transport.Peer(os.getpid(), os.getuid(), os.getgid())
                assert f"pid {os.getpid()}" in str(transport.peer(sock))
            assert transport.recv(client) is None
        with pytest.raises(HostError, match="another process listens there"):
            transport.listen(path)
    # what a dead process left does not stand in the way
    with transport.listen(path):
        pass


def test_listen_leaves_other_things_alone(tmp_path: Path) -> None:
    before = open_fds()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(HostError, match="is no socket"):
        transport.listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(HostError, match="cannot listen"):
        transport.listen(tmp_path / "missing" / "vmm.sock")
    with pytest.raises(HostError, match="cannot listen"):
        transport.listen(tmp_path / ("x" * 200))
    with pytest.raises(FileNotFoundError):
        transport.connect(tmp_path / "nothing")
    assert open_fds() == before


def test_close_all_goes_on_after_one_that_is_closed() -> None:
    fds = [os.eventfd(0) for _ in range(3)]
    os.close(fds[1])
    with pytest.raises(OSError, match="Bad file descriptor"):
        transport.close_all(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# ---- questions and answers -------------------------------------------------------------------------------------


def test_questions_and_answers_both_ways() -> None:
    vmm, daemon = Endpoint(), Endpoint()
    vmm_id, start = vmm.ask(p.Start())
    question = daemon.feed(start, 0)
    assert question == Question(vmm_id, p.Start())
    # the daemon asks before it answers; both ids are 1
    id, bind = daemon.ask(p.BindPorts(((9, 0),)))
    assert id == vmm_id
    asked = vmm.feed(bind, 1)
    assert isinstance(asked, Question)
    answer = daemon.feed(vmm.answer(asked.id, p.BindPortsReply(((9, 0),))), 1)
    assert answer == Answer(id, p.BindPorts(((9, 0),)), p.BindPortsReply(((9, 0),)))
    assert vmm.feed(daemon.answer(vmm_id, p.Ack(12)), 0) == Answer(vmm_id, p.Start(), p.Ack(12))
    assert vmm.outstanding == daemon.outstanding == 0


def test_replies_that_nobody_asked_for_end_the_connection() -> None:
    end = Endpoint()
    id, _ = end.ask(p.Ping())
    for wrong in (p.pack(p.Ack(17), id=id + 1), p.pack(p.Ack(12), id=id)):
        other = Endpoint()
        other.ask(p.Ping())
        with pytest.raises(p.WireError) as caught:
            other.feed(wrong, 0)
        assert other.refuse(caught.value) is None
    end.feed(p.pack(p.Ack(17), id=id), 0)
    with pytest.raises(p.WireError, match="was not asked"):
        end.feed(p.pack(p.Ack(17), id=id), 0)


def test_a_late_answer_is_dropped_once() -> None:
    end = Endpoint()
    id, _ = end.ask(p.Ping())
    end.abandon(id)
    assert end.feed(p.pack(p.Ack(17), id=id), 0) is None
    with pytest.raises(p.WireError):
        end.feed(p.pack(p.Ack(17), id=id), 0)


def test_what_is_refused_is_answered_or_fails_our_question() -> None:
    end = Endpoint()
    bad = bytearray(p.pack(p.SlotRemove(1), id=7)) + b"\0"
    bad[12:16] = len(bad).to_bytes(4, "little")
    with pytest.raises(p.WireError) as caught:
        end.feed(bytes(bad), 0)
    reply = end.refuse(caught.value)
    assert isinstance(reply, bytes)
    header, body = p.unpack(reply, 0)
    assert (header.id, header.type) == (7, 8)
    assert isinstance(body, p.ErrorReply)
    id, _ = end.ask(p.BindPorts(((9, 0),)))
    with pytest.raises(p.WireError) as caught:
        end.feed(p.pack(p.BindPortsReply(((9, 0),)), id=id), 0)  # its descriptor is missing
    failed = end.refuse(caught.value)
    assert isinstance(failed, Answer)
    assert isinstance(failed.message, p.ErrorReply)
    assert end.outstanding == 0
    assert end.refuse(p.WireError("no header")) is None


def test_ids_wrap_and_pass_over_those_in_use() -> None:
    end = Endpoint()
    end._next = 0xFFFFFFFF
    assert [end.ask(p.Ping())[0] for _ in range(2)] == [0xFFFFFFFF, 1]
    end._next = 0xFFFFFFFF
    assert end.ask(p.Ping())[0] == 2
    with pytest.raises(VmmError) as caught:
        for _ in range(transport.MAX_OUTSTANDING):
            end.ask(p.Ping())
    assert caught.value.errno == errno.EBUSY


def test_a_question_that_cannot_be_packed_is_not_outstanding() -> None:
    end = Endpoint()
    with pytest.raises(VmmError):
        end.ask(p.SlotRemove(-1))
    assert end.outstanding == 0


def test_bound_wants_the_ports_that_were_asked() -> None:
    asked = p.BindPorts(((5, 0), (6, 1)))
    assert transport.bound(asked, p.BindPortsReply(((6, 0), (5, 1))), [70, 71]) == {6: 70, 5: 71}
    with pytest.raises(VmmError, match="other ports"):
        transport.bound(asked, p.BindPortsReply(((5, 0), (7, 1))), [70, 71])


# ---- tables ----------------------------------------------------------------------------------------------------


def test_a_table_of_chunks() -> None:
    table = TableAssembly()
    fds = [os.eventfd(0) for _ in range(3)]
    table.begin(p.TableBegin(1, 3))
    table.chunk(p.TableChunk(1, (p.MemoryEntry(0, 0, 0, 1, 0), p.MemoryEntry(1, 0, 1, 1, 4096))), fds[:1])
    table.chunk(p.TableChunk(1, (p.MemoryEntry(2, 0, 2, 1, 0),)), fds[1:2])
    entries, came = table.commit(p.TableCommit(1))
    assert came == fds[:2]
    assert [entry.fd_index for entry in entries] == [0, 0, 1]
    table.drop()
    transport.close_all(fds)  # they were ours again


class Tables(RuleBasedStateMachine):
    """Whatever comes in whatever order: a commit is whole, and no descriptor is lost or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.base = open_fds()
        self.table = TableAssembly()
        self.kind = self.count = 0
        self.have: list[int] | None = None

    @rule(kind=st.sampled_from([1, 2, 3]), count=st.integers(0, 6))
    def begin(self, kind: int, count: int) -> None:
        self.table.begin(p.TableBegin(kind, count))
        self.kind, self.count, self.have = kind, count, []

    @rule(kind=st.sampled_from([1, 2, 3]), numbers=st.lists(st.integers(1, 20), min_size=1, max_size=3))
    def chunk(self, kind: int, numbers: list[int]) -> None:
        self.feed(kind, numbers)

    @precondition(lambda self: self.have is not None)
    @rule(numbers=st.lists(st.integers(1, 20), min_size=1, max_size=3))
    def chunk_of_the_kind(self, numbers: list[int]) -> None:
        self.feed(self.kind, numbers)

    def feed(self, kind: int, numbers: list[int]) -> None:
        entries: list[p.TableEntry] = []
        for i, n in enumerate(numbers):
            if kind == 1:
                entries.append(p.MemoryEntry(n, i, n, 1, 0))
            elif kind == 2:
                entries.append(p.GrantEntry(n, i, 0))
            else:
                entries.append(p.PortEntry(n, 2 * i, 2 * i + 1))
        message = p.TableChunk(kind, tuple(entries))
        fine = self.have is not None and kind == self.kind and len(self.have) + len(numbers) <= self.count
        fds = [os.eventfd(0) for _ in range(message.nfds)]
        if fine:
            self.table.chunk(message, fds)
            assert self.have is not None
            self.have += numbers
        else:
            with pytest.raises(VmmError):
                self.table.chunk(message, fds)
            self.have = None

    @rule(kind=st.sampled_from([1, 2, 3]))
    def commit(self, kind: int) -> None:
        have = self.have
        self.have = None
        if have is not None and kind == self.kind and len(have) == self.count and len(set(have)) == len(have):
            entries, fds = self.table.commit(p.TableCommit(kind))
            assert [next(iter(struct.unpack_from("<I", p_entry(entry)))) for entry in entries] == have
            assert len(fds) == len(have) * (2 if kind == 3 else 1)
            transport.close_all(fds)
        else:
            with pytest.raises(VmmError):
                self.table.commit(p.TableCommit(kind))

    @invariant()
    def no_descriptor_is_lost(self) -> None:
        held = len(self.have or []) * (2 if self.kind == 3 else 1)
        assert open_fds() == self.base + held

    def teardown(self) -> None:
        with contextlib.suppress(OSError):
            self.table.drop()
        assert open_fds() == self.base


def p_entry(entry: p.TableEntry) -> bytes:
    return entry.body()


TestTables = Tables.TestCase
