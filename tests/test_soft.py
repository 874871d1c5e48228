"""The soft VMM: a domain at a daemon that is the wire alone."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventfds import TIMEOUT, counter, eventfd_id, open_fds, readable
from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.abi import DOMID_SELF, PAGE_SIZE, Evtchnop
from evtchnd.errors import HostError, VmmError, XenError
from evtchnd.vmm.client import Disconnected, Refused
from evtchnd.vmm.soft import CONSOLE_GFN, CONSOLE_PORT, STORE_GFN, STORE_PORT, SoftVmm
from scale import scaled

MEMORY = 4 << 20


class Daemon:
    """The daemon's end of the wire, and no more: answers with ACK, remembers what came, asks when told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[p.Message] = []
        self.ports: dict[int, tuple[int, int]] = {}  # kick, notify
        self.refuse: p.Type | None = None
        self.bind_at_start = True
        self._changed = threading.Condition()
        self._endpoint = transport.Endpoint()
        self._answers: dict[int, tuple[p.Body, list[int]]] = {}
        self._sock: Any = None
        self._listener = transport.listen(path)
        self._listener.setblocking(True)
        self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._sock, _ = self._listener.accept()
            except OSError:
                return
            self._endpoint, self._state, self._table = transport.Endpoint(), p.State.NEW, transport.TableAssembly()
            with self._sock:
                while (came := transport.recv(self._sock)) is not None:
                    self._take(*came)
            self._table.drop()

    def _take(self, data: bytes, fds: list[int]) -> None:
        come = self._endpoint.feed(data, len(fds))
        if isinstance(come, transport.Answer):
            with self._changed:
                self._answers[come.id] = (come.message, fds)
                self._changed.notify_all()
            return
        assert come is not None
        message = come.message
        self.messages.append(message)
        reply: p.Body = p.Ack(message.type)
        if message.type == self.refuse:
            reply = p.ErrorReply(message.type, errno.EPERM, f"domain 7: no {message.type.name} today")
        else:
            self._state = p.after(self._state, message.type)
        if isinstance(message, p.Hello):
            reply = p.HelloReply(features=message.features)
        elif isinstance(message, p.TableBegin):
            self._table.begin(message)
        elif isinstance(message, p.TableChunk):
            self._table.chunk(message, fds)
            fds = []
        elif isinstance(message, p.TableCommit):
            entries, fds = self._table.commit(message)
            for entry in entries:
                if isinstance(entry, p.PortEntry):
                    self.ports[entry.port] = (os.dup(fds[entry.kick_fd_index]), os.dup(fds[entry.notify_fd_index]))
        transport.close_all(fds)
        if isinstance(message, p.Start) and self.bind_at_start:
            # asks before it answers, as the real one does: the VMM has to read on
            threading.Thread(target=self._start, args=(come.id, reply)).start()
        else:
            transport.send(self._sock, self._endpoint.answer(come.id, reply))
            if isinstance(message, p.Release):
                self.hang_up()

    def _start(self, id: int, reply: p.Body) -> None:
        if STORE_PORT not in self.ports:
            self.bind(STORE_PORT)
        transport.send(self._sock, self._endpoint.answer(id, reply))

    def ask(self, message: p.Message, fds: Sequence[int] = ()) -> tuple[p.Body, list[int]]:
        id, data = self._endpoint.ask(message)
        transport.send(self._sock, data, fds)
        with self._changed:
            assert self._changed.wait_for(lambda: id in self._answers, TIMEOUT)
            return self._answers.pop(id)

    def bind(self, *ports: int) -> p.Body:
        kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in ports]
        question = p.BindPorts(tuple((port, i) for i, port in enumerate(ports)))
        body, fds = self.ask(question, kicks)
        if not isinstance(body, p.BindPortsReply):
            transport.close_all(kicks)
            return body
        notify = transport.bound(question, body, fds)
        for port, kick in zip(ports, kicks, strict=True):
            transport.close_all(self.ports.pop(port, ()))
            self.ports[port] = (kick, notify[port])
        return body

    def unbind(self, *ports: int) -> None:
        body, _ = self.ask(p.UnbindPorts(ports))
        assert isinstance(body, p.Ack)
        for port in ports:
            transport.close_all(self.ports.pop(port, ()))

    def kick(self, port: int) -> int:
        return self.ports[port][0]

    def notify(self, port: int) -> None:
        os.eventfd_write(self.ports[port][1], 1)

    def closed(self) -> list[int]:
        return [m.port for m in self.messages if isinstance(m, p.PortClosed)]

    def forget(self) -> None:
        for pair in self.ports.values():
            transport.close_all(pair)
        self.ports.clear()
        self.messages.clear()

    def hang_up(self) -> None:
        """Dies as far as the VMM can see."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(2)

    def close(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(2)
        self.hang_up()
        self._thread.join(TIMEOUT)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self.forget()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    before = open_fds()
    daemon = Daemon(tmp_path / "vmm.sock")
    yield daemon
    daemon.close()
    assert open_fds() == before, "a descriptor is left"


@pytest.fixture
def vmm(daemon: Daemon) -> Iterator[SoftVmm]:
    with SoftVmm(daemon.path, 7, memory=MEMORY, vcpus=2, name="web") as vmm:
        yield vmm


def test_it_registers_and_gives_its_tables(daemon: Daemon, vmm: SoftVmm) -> None:
    kinds = [type(m).__name__ for m in daemon.messages if not isinstance(m, p.TableChunk)]
    assert kinds == ["Hello", "Register", *["TableBegin", "TableCommit"] * 2, "XenStore", "Console", "Start"]
    register = next(m for m in daemon.messages if isinstance(m, p.Register))
    assert (register.domid, register.vcpus, register.name, register.flags) == (7, 2, "web", p.RegisterFlag.LONG_MODE)
    assert vmm.ram_pages == MEMORY // PAGE_SIZE
    words = vmm.grants.cast("I")
    assert words[:4].tolist() == [1, CONSOLE_GFN, 1, STORE_GFN]
    words.release()
    vmm.ram.write(vmm.store_gfn * PAGE_SIZE, b"page")
    assert vmm.ram.read(vmm.store_gfn * PAGE_SIZE, 5) == b"page\0"
    assert counter(daemon.kick(STORE_PORT)) == 1, "the backend has to look once"


def test_it_conforms(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    arguments = ["--socket", str(path), "--role", "vmm", "--timeout", str(TIMEOUT)]
    suite = subprocess.Popen(
        [sys.executable, "-m", "evtchnd.vmm.conformance", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with suite:
        vmm = None
        while vmm is None and suite.poll() is None:  # until it listens
            with contextlib.suppress(Disconnected):
                vmm = SoftVmm(path, 7, memory=MEMORY)
        text, _ = suite.communicate(timeout=4 * TIMEOUT)
    assert vmm is not None
    vmm.close()
    assert suite.returncode == 0, text


def test_kicks_and_events(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    assert port == 3
    vmm.send(port)
    daemon.bind(port)
    assert counter(daemon.kick(port)) == 1
    vmm.send(port)
    vmm.send(port)
    assert counter(daemon.kick(port)) == 2
    assert vmm.hypercall_evtchn(Evtchnop.SEND, struct.pack("<I", port)) == (0, b"")
    assert counter(daemon.kick(port)) == 1
    assert not vmm.wait(port, 0)
    daemon.notify(port)
    assert vmm.wait(port, TIMEOUT)
    assert not vmm.pending(port)
    assert eventfd_id(vmm.kick_fd(port)) == eventfd_id(daemon.kick(port))
    assert eventfd_id(vmm.irq_fd(port)) == eventfd_id(daemon.ports[port][1])
    daemon.notify(port)
    assert readable(vmm.irq_fd(port))


def test_a_bind_is_all_or_nothing(daemon: Daemon, vmm: SoftVmm) -> None:
    first, second = vmm.alloc_unbound(0), vmm.alloc_unbound(7)
    fds = open_fds()
    answer = daemon.bind(first, second)
    assert isinstance(answer, p.ErrorReply)
    assert answer.errno == errno.EINVAL
    assert f"port {second}: unbound, not unbound for domain 0" in answer.reason
    assert open_fds() == fds
    vmm.alloc_unbound(0)  # the table goes to the kernel again
    with pytest.raises(HostError, match="has not bound it"):
        vmm.kick_fd(first, timeout=0)
    daemon.bind(first)
    assert vmm.kick_fd(first) >= 0


def test_a_closed_port_is_told_before_its_number_is_used_again(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    daemon.bind(port)
    daemon.notify(port)
    vmm.close_port(port)
    assert daemon.closed() == [port]
    assert vmm.alloc_unbound(0) == port
    assert not vmm.wait(port, 0), "the old owner's event"
    daemon.unbind(port)
    fds = open_fds()
    daemon.bind(port)
    daemon.unbind(port)
    assert open_fds() == fds
    with pytest.raises(XenError):
        vmm.send(99)
    vmm.send(port)  # unbound: dropped
    daemon.unbind(port)  # once more: nothing to do
    vmm.close_port(port)
    assert daemon.closed() == [port]


def test_loopback_and_ipis_need_no_daemon(daemon: Daemon, vmm: SoftVmm) -> None:
    first = vmm.alloc_unbound(DOMID_SELF)
    second = vmm.bind_interdomain(DOMID_SELF, first)
    assert vmm.wait(second, 0), "bind_interdomain raises the binder's port"
    vmm.send(first)
    assert vmm.wait(second, 0)
    rc, out = vmm.hypercall_evtchn(Evtchnop.BIND_IPI, struct.pack("<II", 1, 0))
    assert rc == 0
    ipi = struct.unpack("<II", out)[1]
    timer = threading.Timer(0.05, vmm.send, [ipi])
    timer.start()
    assert vmm.wait(ipi, TIMEOUT)
    timer.join()
    vmm.close_port(second)
    vmm.send(first)
    assert not vmm.pending(second)
    assert daemon.closed() == []


def test_unmask_and_wrong_hypercalls(daemon: Daemon, vmm: SoftVmm) -> None:
    assert vmm.hypercall_evtchn(Evtchnop.UNMASK, struct.pack("<I", STORE_PORT)) == (0, b"")
    assert vmm.hypercall_evtchn(Evtchnop.SEND, b"\0") == (-errno.EFAULT, b"")
    assert vmm.hypercall_evtchn(Evtchnop.SEND, struct.pack("<I", 500)) == (-errno.EINVAL, b"")
    assert vmm.hypercall_evtchn(Evtchnop.INIT_CONTROL, bytes(32)) == (-errno.ENOSYS, b"")


def test_xsa_342_343_344_reset_and_the_way_back(daemon: Daemon, vmm: SoftVmm) -> None:
    port = vmm.alloc_unbound(0)
    daemon.bind(port, CONSOLE_PORT)
    status = struct.pack("<H2xIII8x", DOMID_SELF, STORE_PORT, 0, 0)
    _, out = vmm.hypercall_evtchn(Evtchnop.STATUS, status)
    *_, dom, number = struct.unpack("<H2xIIIH2xI", out)
    vmm.reset()
    assert daemon.closed() == [p.ALL_PORTS]
    with pytest.raises(XenError):
        vmm.send(STORE_PORT)
    assert vmm.bind_interdomain(dom, number) == STORE_PORT
    counter(daemon.kick(STORE_PORT))
    vmm.send(STORE_PORT)
    assert counter(daemon.kick(STORE_PORT)) == 1
    daemon.notify(STORE_PORT)
    assert vmm.wait(STORE_PORT, TIMEOUT)


def test_a_lost_daemon_is_logged(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    with SoftVmm(daemon.path, 7, memory=MEMORY) as vmm:
        vmm.close()
    assert not caplog.text, "released, not lost"
    with SoftVmm(daemon.path, 7, memory=MEMORY) as vmm:
        daemon.hang_up()
        with pytest.raises(Disconnected):
            while True:
                vmm.client.ping()
        deadline = time.monotonic() + TIMEOUT
        while "domain 7: the daemon has gone" not in caplog.text:  # the client's thread says it
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_reboot_begins_anew(daemon: Daemon, vmm: SoftVmm) -> None:
    fds = open_fds()
    port = vmm.alloc_unbound(0)
    daemon.bind(port)
    vmm.ram.write(0, b"ram stays")
    vmm.ram.write(vmm.store_gfn * PAGE_SIZE, b"ring")
    daemon.forget()
    vmm.reboot()
    assert open_fds() == fds
    assert [type(m).__name__ for m in daemon.messages][:3] == ["Release", "Hello", "Register"]
    assert vmm.ram.read(0, 9) == b"ram stays"
    assert vmm.ram.read(vmm.store_gfn * PAGE_SIZE, 4) == bytes(4)
    assert vmm.alloc_unbound(0) == port
    vmm.send(STORE_PORT)
    assert counter(daemon.kick(STORE_PORT)) == 2


def test_resume_sends_everything_again(daemon: Daemon, vmm: SoftVmm) -> None:
    kept, gone = vmm.alloc_unbound(0), vmm.alloc_unbound(0)
    daemon.bind(kept, gone)
    before = eventfd_id(daemon.kick(kept))
    daemon.hang_up()
    vmm.send(kept)  # while it is down: the eventfd keeps it
    vmm.close_port(gone)  # nobody to tell
    daemon.forget()
    vmm.resume()
    assert [type(m).__name__ for m in daemon.messages][:2] == ["Hello", "Resume"]
    assert sorted(daemon.ports) == [STORE_PORT, kept]
    assert eventfd_id(daemon.kick(kept)) == before
    assert counter(daemon.kick(kept)) == 2
    daemon.notify(kept)
    assert vmm.wait(kept, TIMEOUT)


def test_resume_waits_for_the_daemon(daemon: Daemon, vmm: SoftVmm, tmp_path: Path) -> None:
    daemon.close()
    with pytest.raises(Disconnected):
        vmm.resume(timeout=0)
    with pytest.raises(HostError):
        _ = vmm.client
    second: list[Daemon] = []
    timer = threading.Timer(0.2, lambda: second.append(Daemon(tmp_path / "vmm.sock")))
    timer.start()
    vmm.resume()
    timer.join()
    assert sorted(second[0].ports) == [STORE_PORT]
    vmm.close()
    second[0].close()


def test_a_refused_domain_leaves_nothing(daemon: Daemon) -> None:
    before, threads = open_fds(), threading.active_count()
    daemon.refuse = p.Type.XENSTORE
    with pytest.raises(Refused, match="no XENSTORE today"):
        SoftVmm(daemon.path, 7, memory=MEMORY)
    assert threading.active_count() == threads
    daemon.hang_up()
    assert open_fds() in (before, before + 1)  # the daemon's end closes when it has read that
    with pytest.raises(Disconnected):
        SoftVmm(daemon.path.with_name("nowhere"), 7, memory=MEMORY)
    with pytest.raises(VmmError):
        SoftVmm(daemon.path, 0, memory=MEMORY)
    for wrong in (0, 4097, 1 << 40):
        with pytest.raises(ValueError, match="bytes of memory"):
            SoftVmm(daemon.path, 7, memory=wrong)


def test_the_guest_from_several_threads(daemon: Daemon, vmm: SoftVmm) -> None:
    """Each thread opens a port, has it bound, sends and hears, closes; no number is crossed."""
    rounds = scaled(200, least=10)
    wrong: list[str] = []
    asking = threading.Lock()  # the test's daemon asks one at a time

    def live() -> None:
        for _ in range(rounds):
            port = vmm.alloc_unbound(0)
            with asking:
                daemon.bind(port)
            counter(daemon.kick(port))
            vmm.send(port)
            if counter(daemon.kick(port)) != 1:
                wrong.append(f"port {port}: kick")
            daemon.notify(port)
            if not vmm.wait(port, TIMEOUT):
                wrong.append(f"port {port}: event")
            vmm.close_port(port)

    threads = [threading.Thread(target=live) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert len(daemon.closed()) == 4 * rounds


def test_rebinds_over_the_socket_end_with_the_same_descriptors(daemon: Daemon, vmm: SoftVmm) -> None:
    ports = [vmm.alloc_unbound(0) for _ in range(3)]
    daemon.bind(*ports)
    baseline = open_fds()
    for i in range(scaled(20_000, least=20)):
        daemon.bind(*ports)
        if i % 5 == 0:
            daemon.unbind(ports[0])
            daemon.bind(ports[0])
        if i % 5 == 1:
            vmm.close_port(ports[1])
            assert vmm.alloc_unbound(0) == ports[1]
            daemon.bind(ports[1])
    assert open_fds() == baseline


def test_closing_wakes_who_waits(daemon: Daemon) -> None:
    vmm = SoftVmm(daemon.path, 7, memory=MEMORY)
    free, bound = vmm.alloc_unbound(0), vmm.alloc_unbound(0)
    daemon.bind(bound)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda port=port: results.append(vmm.wait(port, 100 * TIMEOUT)))
        for port in (free, bound)
    ]
    for thread in threads:
        thread.start()
    vmm.close()
    vmm.close()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert results == [False, False]
