"""The conformance suite against both real ends, and that it sees what is wrong with others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.vmm.conform_daemon import Suite

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}

# A VMM over our client: registers, starts, and lives until it is cut off. Its guest has allocated ports 3 and 4 only.
VMM = """
import os, sys, time
from evtchnd.errors import XenError
from evtchnd.vmm.client import Client, Disconnected, GrantFrame, MemorySlot

ports = {}

def bind(wanted):
    if any(port not in (3, 4) for port, _ in wanted):
        raise XenError(2, "the guest has not allocated that port")
    unbind([port for port, _ in wanted])
    for port, kick in wanted:
        ports[port] = kick, os.eventfd(0)
    return [ports[port][1] for port, _ in wanted]

def unbind(wanted):
    for port in wanted:
        for fd in ports.pop(port, ()):
            os.close(fd)

path, way = sys.argv[1:]
while True:
    try:
        client = Client(path, on_bind=bind, on_unbind=unbind, thread=way == "thread")
        break
    except Disconnected:
        time.sleep(0.02)
fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.truncate(fd, 12 << 12)
client.register(7, name="conformance")
client.memory([MemorySlot(0, 0, 10, fd)])
client.grant_frames([GrantFrame(0, fd, 10 << 12)])
client.xenstore(3, fd, 11 << 12)
client.console(4, 9)
client.start()
while not client.lost:
    time.sleep(0.02) if way == "thread" else client.poll(0.1)
client.close()
"""


def conformance(path: Path, role: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evtchnd.vmm.conformance", "--socket", path, "--role", role, *more]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=110)


@pytest.mark.parametrize("way", ["thread", "poll"])
def test_our_client_conforms(tmp_path: Path, way: str) -> None:
    path = tmp_path / "vmm.sock"
    with subprocess.Popen([sys.executable, "-c", VMM, path, way], env=ENVIRONMENT) as vmm:
        try:
            result = conformance(path, "vmm", "--timeout", "30")
            assert vmm.wait(60) == 0
        finally:
            vmm.kill()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert "SKIP" not in result.stdout
    assert result.stdout.count("PASS") == 12


@pytest.fixture
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The real daemon's vmm.sock; a process with workers of its own, or one for all."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "evtchnd", "--runtime-dir", tmp_path, *request.param]
    with log.open("wb") as out, subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out) as process:
        try:
            until = time.monotonic() + 60
            path = tmp_path / "vmm.sock"
            while not (path.exists() and _greets(path)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            yield path
            assert process.poll() is None, log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _greets(path: Path) -> bool:
    try:
        with transport.connect(path):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("daemon", [[], ["--single-process"]], ids=["workers", "single-process"], indirect=True)
def test_our_daemon_conforms(daemon: Path) -> None:
    result = conformance(daemon, "daemon", "--timeout", "30")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert result.stdout.count("PASS") + result.stdout.count("SKIP") == 28


class Careless:
    """A daemon that says yes to everything that it can read, and hangs up otherwise."""

    def __init__(self, path: Path) -> None:
        self.listener = transport.listen(path)
        self.listener.setblocking(True)
        self.threads: list[threading.Thread] = []
        self.socks: list[socket.socket] = []
        self.accepting = threading.Thread(target=self.accept)
        self.accepting.start()

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.socks.append(sock)
            self.threads.append(threading.Thread(target=self.serve, args=[sock]))
            self.threads[-1].start()

    def serve(self, sock: socket.socket) -> None:
        with sock:
            while True:
                try:
                    came = transport.recv(sock)
                    if came is None:
                        return
                    transport.close_all(came[1])
                    header, message = p.unpack(came[0], len(came[1]))
                    reply: p.Body = p.Ack(header.type)
                    if isinstance(message, p.Hello):
                        reply = p.HelloReply(features=message.features)
                    transport.send(sock, p.pack(reply, id=header.id))
                except (p.WireError, OSError):
                    return

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.accepting.join(60)
        self.listener.close()
        for thread in self.threads:
            thread.join(60)


def test_a_careless_daemon_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    careless = Careless(path)
    try:
        result = conformance(path, "daemon", "--timeout", "0.5")
    finally:
        careless.close()
    assert result.returncode == 1
    failed = {line.split(":")[0].removeprefix("FAIL").strip() for line in result.stdout.splitlines() if "FAIL" in line}
    assert failed >= {
        "unknown features are not accepted",
        "xenstore port is bound and ring served",
        "slots and frames change while it runs",
        "a refused table changes nothing",
        "tables that do not add up",
        "a domain has one owner",
        "order of messages",
        "another version",
        "headers that lie",
        "bodies that lie",
        "wrong number of descriptors",
        "descriptors that are no memory",
    }
    assert "hello states limits" not in failed


def test_nobody_to_test(tmp_path: Path) -> None:
    result = conformance(tmp_path / "vmm.sock", "daemon")
    assert result.returncode == 2
    assert "No such file" in result.stderr
    result = conformance(tmp_path / "vmm.sock", "vmm", "--timeout", "0.2")
    assert result.returncode == 2
    assert "no VMM has connected" in result.stderr


def test_every_case_has_a_name(tmp_path: Path) -> None:
    cases = [name for name, value in vars(Suite).items() if callable(value) and not name.startswith("_")]
    assert len(cases) == 31  # 28 and the slow one; `guest` and `still_there` are no cases
