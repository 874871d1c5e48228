"""Consoles: the page's layout, readers and logs by themselves, then guests and real workers with ptys and clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemonprocess import until
from evtchnd.cli.varlink import Client
from evtchnd.control.console import _open_log
from evtchnd.errors import OperatorError
from evtchnd.guest.console import Console
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.stream import CONSOLE, CONSOLE_CONNECTION
from evtchnd.vmm.soft import CONSOLE_GFN, CONSOLE_PORT, SoftVmm
from evtchnd_backends.consolelog import Allowance, ConsoleLog
from evtchnd_backends.terminal import Terminal
from scale import scaled
from test_cli import ENVIRONMENT, TIMEOUT, Running, ctl

HEADER = Path("/usr/include/xen/io/console.h")
MIB = 1 << 20


# ---- the layout ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HEADER.exists(), reason="no libxen-dev")
def test_the_layout_is_the_header_s(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    to_back, to_front = CONSOLE.to_back, CONSOLE.to_front
    offsets = {
        "out": to_back.data,
        "out_cons": to_back.cons,
        "out_prod": to_back.prod,
        "in": to_front.data,
        "in_cons": to_front.cons,
        "in_prod": to_front.prod,
    }
    checks = [f'_Static_assert(offsetof(struct xencons_interface, {n}) == {at}, "{n}");' for n, at in offsets.items()]
    checks += [
        f'_Static_assert(sizeof(((struct xencons_interface *)0)->out) == {to_back.size}, "size of out");',
        f'_Static_assert(sizeof(((struct xencons_interface *)0)->in) == {to_front.size}, "size of in");',
        "#ifdef XENCONSOLE_CONNECTED",  # since Xen 4.21
        f'_Static_assert(offsetof(struct xencons_interface, connection) == {CONSOLE_CONNECTION}, "connection");',
        "#endif",
        f"_Static_assert(sizeof(struct xencons_interface) == {CONSOLE_CONNECTION} "
        f'|| sizeof(struct xencons_interface) == {CONSOLE_CONNECTION + 4}, "where the next field is");',
    ]
    source = tmp_path / "layout.c"
    head = "#include <stddef.h>\n#include <stdint.h>\n#include <xen/io/console.h>\n"
    source.write_text(head + "\n".join(checks) + "\n")
    subprocess.run([compiler, "-std=c11", "-fsyntax-only", source], check=True, timeout=60)


# ---- the log -------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_allowance_fills_with_time() -> None:
    clock = Clock()
    allowance = Allowance(100, 400, clock)
    assert [allowance.take(300), allowance.take(300), allowance.take(1)] == [300, 100, 0]
    clock.now += 0.5
    assert allowance.take(300) == 50
    clock.now += 3600
    assert allowance.take(1000) == 400


@contextmanager
def log_files(folder: Path) -> Iterator[tuple[int, int]]:
    fds = _open_log(folder / "log")
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_a_log_says_what_it_left_out(tmp_path: Path) -> None:
    clock = Clock()
    with log_files(tmp_path) as (fd, old):
        log = ConsoleLog(fd, old, size=MIB, rate=100, name="console", clock=clock)
        log.put(b"a" * 1000)
        log.put(b"b" * 500)
        clock.now += 1
        log.put(b"c" * 50)
        assert log.suppressed == 1100
        clock.now += 100
        log.put(b"d" * 500)
        assert log.close()
    text = (tmp_path / "log").read_bytes()
    line = b"\n[evtchnd: %d bytes suppressed: above console.log_rate_bytes]\n"
    assert text == b"a" * 400 + line % 1100 + b"c" * 50 + b"d" * 400 + line % 100
    assert (tmp_path / "log.1").read_bytes() == b""


def test_a_full_log_becomes_the_old_one(tmp_path: Path) -> None:
    with log_files(tmp_path) as (fd, old):
        log = ConsoleLog(fd, old, size=4096, rate=MIB, name="console")
        data = b"".join(b"%07d\n" % n for n in range(2000))
        for at in range(0, len(data), 1000):
            log.put(data[at : at + 1000])
        assert log.close()
        assert log.suppressed == log.lost == 0
    files = [(tmp_path / name).read_bytes() for name in ("log.1", "log")]
    assert [len(each) for each in files] == [4096, 16000 % 4096]
    assert b"".join(files) == data[-len(b"".join(files)) :]


def test_a_storage_that_is_full_costs_the_log_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    log = ConsoleLog(full, full, size=4096, rate=MIB, name="domain 7: console 0")
    for _ in range(3):
        log.put(b"x" * 100)
        time.sleep(0.01)
    assert log.close()
    assert log.lost == 300
    assert [record.message for record in caplog.records] == ["domain 7: console 0: log: No space left on device"]
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(full)


# ---- one reader ----------------------------------------------------------------------------------------------------


class Ends:
    """A terminal on one end of a socket pair or a pty, its reader's end in `other`."""

    def __init__(self, fd: int, other: int, *, most: int = 4096) -> None:
        self.other = other
        self.fd = fd
        self.came = bytearray()
        self.lost = 0
        self.terminal = Terminal(fd, asyncio.get_running_loop(), typed=self.came.extend, gone=self._gone, most=most)

    def _gone(self, terminal: Terminal) -> None:
        assert terminal is self.terminal
        self.lost += 1

    def close(self) -> None:
        self.terminal.close()
        os.close(self.fd)


async def read_all(fd: int, count: int) -> bytes:
    os.set_blocking(fd, False)
    got = b""
    for _ in range(2000):
        try:
            got += os.read(fd, 65536)
        except BlockingIOError:
            if len(got) >= count:
                return got
            await asyncio.sleep(0.005)
    return got


async def test_a_reader_that_stalls_loses_the_oldest() -> None:
    a, b = socket.socketpair()
    ends = Ends(a.detach(), b.fileno(), most=10_000)
    total = b"".join(b"%09d\n" % n for n in range(200_000))
    for at in range(0, len(total), 2000):
        ends.terminal.put(total[at : at + 2000])
    dropped = ends.terminal.dropped
    assert dropped > MIB
    got = await read_all(b.fileno(), len(total) - dropped)
    assert len(got) == len(total) - dropped
    assert got.endswith(total[-10_000:]), "the newest is kept"
    assert total.startswith(got[: len(got) - 10_000]), "and what the socket had taken"
    ends.terminal.put(b"again")
    assert await read_all(b.fileno(), 5) == b"again"
    ends.close()
    b.close()


async def test_typing_waits_where_there_is_no_room() -> None:
    a, b = socket.socketpair()
    ends = Ends(a.detach(), b.fileno())
    b.send(b"0123456789")
    await asyncio.sleep(0.02)
    assert ends.came == b"", "not listened to yet"
    ends.terminal.listen(4)
    for _ in range(1000):
        if ends.came:
            break
        await asyncio.sleep(0.005)
    ends.terminal.listen(0)
    assert ends.came[:4] == b"0123"
    seen = len(ends.came)
    b.send(b"more")
    await asyncio.sleep(0.02)
    assert len(ends.came) == seen
    assert not ends.lost
    b.close()
    ends.terminal.look()
    assert ends.lost == 1
    ends.close()


async def test_a_pty_that_nobody_reads_costs_nothing() -> None:
    """Its buffer fills, then it is not asked again and again."""
    master, slave = os.openpty()
    tty.setraw(slave)
    ends = Ends(master, slave, most=10_000)
    for _ in range(200):
        ends.terminal.put(b"x" * 2000)
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.25
    assert ends.terminal.dropped > 200_000
    got = await read_all(slave, 400_000 - ends.terminal.dropped)
    assert len(got) == 400_000 - ends.terminal.dropped
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.25, "all is read, and it is asked again and again"
    assert not ends.lost
    ends.close()
    os.close(slave)


async def test_a_pty_that_is_hung_up_is_let_go() -> None:
    master, slave = os.openpty()
    ends = Ends(master, slave)
    ends.terminal.listen(100)
    os.close(slave)  # nobody has it open: the master reads EIO
    for _ in range(1000):
        if ends.lost:
            break
        await asyncio.sleep(0.005)
    assert ends.lost == 1
    ends.terminal.put(b"into nowhere")
    ends.close()


# ---- guests and workers --------------------------------------------------------------------------------------------


CONFIG = """
[console]
scrollback_bytes = 1000
buffer_bytes = 65536
clients = 3
log_dir = "{folder}"
log_bytes = 65536
log_rate_bytes = 1048576

[limits]
detach_s = 0.5
"""


class World:
    """A daemon, and a guest of it with its primary console."""

    def __init__(self, daemon: Running) -> None:
        self.daemon = daemon
        self.vm = SoftVmm(daemon.folder / "vmm.sock", 7, memory=32 * MIB, name="guest")
        self.console = Console(self.vm, self.vm.console_gfn, self.vm.console_port, timeout=TIMEOUT)
        self.domain = Domain(self.vm)
        self._store: XenStore | None = None
        self._closed = False

    @property
    def store(self) -> XenStore:
        if self._store is None:
            self._store = XenStore(self.domain)
        return self._store

    def info(self) -> Any:
        return json.loads(ctl(self.daemon.folder, "info", "7", "-o", "json").stdout)

    def row(self, devid: int = 0) -> Any:
        return next(row for row in self.info()["consoles"] if row["devid"] == devid)

    def tty(self, devid: int = 0) -> int:
        fd = os.open(self.row(devid)["tty"], os.O_RDWR | os.O_NOCTTY)
        os.set_blocking(fd, False)
        return fd

    def client(self, devid: int = 0) -> socket.socket:
        """As evtchnctl has it, without a terminal."""
        with Client(self.daemon.folder / "control.sock", timeout=TIMEOUT) as client:
            sock, first = client.upgrade("io.evtchnd.Console", domid=7, devid=devid)
        sock.settimeout(TIMEOUT)
        self.first = first
        return sock

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.console.close()
            if self._store is not None:
                self._store.close()
            self.domain.close()
            self.vm.close()

    def said(self) -> str:
        """The daemon's whole log; guest and daemon have ended."""
        self.close()
        assert self.daemon.end() == 0
        return self.daemon.said


@contextmanager
def world(folder: Path, *arguments: str, config: str = CONFIG) -> Iterator[World]:
    file = folder / "evtchnd.toml"
    file.write_text(config.format(folder=folder))
    daemon = Running(folder / "run", "--config", str(file), *arguments)
    # its pipe is read to the end, or the daemon would wait for us
    try:
        daemon.wait_until_ready()
        it = World(daemon)
        try:
            yield it
        finally:
            it.close()
            if daemon.process.poll() is None:
                assert daemon.end() == 0
            assert "Traceback" not in daemon.said, daemon.said
            assert "defect" not in daemon.said, daemon.said
    finally:
        daemon.close()


@pytest.fixture(params=[[], ["--single-process"]], ids=["workers", "single"])
def it(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, *request.param) as made:
        yield made


def receive(sock: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        piece = sock.recv(65536)
        assert piece, got
        got += piece
    return got


def read_until(fd: int, end: bytes) -> bytes:
    got = b""
    deadline = time.monotonic() + TIMEOUT
    while end not in got:
        left = deadline - time.monotonic()
        assert left > 0, got[-500:]
        if select.select([fd], [], [], left)[0]:
            got += os.read(fd, 65536)
    return got


def read_count(fd: int, count: int) -> bytes:
    got = b""
    while len(got) < count:
        assert select.select([fd], [], [], TIMEOUT)[0], len(got)
        got += os.read(fd, 65536)
    return got


def test_a_guest_and_its_pty(it: World) -> None:
    it.console.write(b"login: ")
    fd = it.tty()
    assert read_until(fd, b"login: ") == b"login: "
    os.write(fd, b"root\r")
    assert it.console.read(100) == b"root\r"
    everything = bytes(range(256)) * 20  # raw: no byte means anything to the terminal
    it.console.write(everything)
    assert read_count(fd, len(everything)) == everything
    os.write(fd, everything[:1000])
    got = b""
    while len(got) < 1000:
        got += it.console.read(1000)
    assert got == everything[:1000]
    os.close(fd)
    counters = it.row()["counters"]
    assert counters["out_bytes"] == 7 + len(everything)
    assert counters["in_bytes"] == 5 + 1000
    assert counters["dropped_bytes"] == counters["clients"] == counters["stopped"] == 0


def test_what_xl_writes_of_it(it: World) -> None:
    """Its own tools find the terminal there (xenconsole, virt-manager)."""
    nodes = {name: it.store.read(f"/local/domain/7/console/{name}") for name in it.store.ls("/local/domain/7/console")}
    tty = it.row()["tty"]
    assert nodes == {
        "backend": "/local/domain/0/backend/console/7/0",
        "backend-id": "0",
        "limit": "65536",
        "output": "pty",
        "port": str(CONSOLE_PORT),
        "ring-ref": str(CONSOLE_GFN),
        "tty": tty,
        "type": "xenconsoled",
    }
    assert it.store.read("/local/domain/0/backend/console/7/0/frontend") == "/local/domain/7/console"


def test_two_clients_see_the_same_and_type_both(it: World) -> None:
    it.console.write(b"a" * 3000 + b"prompt# ")
    until(lambda: it.row()["counters"]["out_bytes"] == 3008, "not taken")
    first = it.client()
    assert it.first + (receive(first, b"prompt# ") if not it.first else b"") == b"a" * 992 + b"prompt# "
    second = it.client()
    assert (it.first or receive(second, b"prompt# ")).endswith(b"prompt# ")
    first.send(b"ls\r")
    assert it.console.read(10) == b"ls\r"
    it.console.write(b"ls\r\nfile\r\n")
    assert receive(first, b"file\r\n") == receive(second, b"file\r\n") == b"ls\r\nfile\r\n"
    second.send(b"exit\r")
    assert it.console.read(10) == b"exit\r"
    third = it.client()
    with pytest.raises(OperatorError, match=r"console 0: 3 look at it already \(console.clients\)"):
        it.client()
    third.close()
    until(lambda: it.row()["counters"]["clients"] == 2, "it is still counted")
    it.client().close()
    first.close()
    second.close()


def test_stalled_readers_never_stall_the_guest(it: World) -> None:
    """Nobody opens the pty, one client does not read, one reads: megabytes are written without a wait for any."""
    stalled, reads = it.client(), it.client()
    lines = b"".join(b"%09d\n" % n for n in range(scaled(2_000_000, least=100_000)))
    seen = bytearray()
    done = asyncio.run(_write_and_read(it.console, lines, reads, seen))
    assert done
    assert seen.endswith(lines[-1000:])
    numbers = [int(line) for line in bytes(seen).split(b"\n")[1:-1] if len(line) == 9]
    assert numbers == sorted(numbers)
    counters = it.row()["counters"]
    assert counters["out_bytes"] == len(lines)
    assert counters["dropped_bytes"] > 0
    # the one that did not read goes on with what was kept for it
    assert receive(stalled, lines[-1000:])
    stalled.close()
    reads.close()


async def _write_and_read(console: Console, lines: bytes, sock: socket.socket, seen: bytearray) -> bool:
    def read() -> bool:
        while not seen.endswith(lines[-1000:]):
            piece = sock.recv(65536)
            if not piece:
                return False
            seen.extend(piece)
        return True

    reading = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.to_thread(console.write, lines)
    return await reading


def test_typing_waits_for_a_guest_that_does_not_read(it: World) -> None:
    sock = it.client()
    sock.setblocking(False)
    sent = 0
    data = b"".join(b"%07d\n" % n for n in range(200_000))
    until(lambda: it.row()["counters"]["clients"] == 1, "no client")
    idle = 0
    while idle < 20:
        try:
            sent += sock.send(data[sent : sent + 65536])
            idle = 0
        except BlockingIOError:
            idle += 1
            time.sleep(0.01)
    assert sent < len(data), "somebody has taken it all"
    it.console.write(b"still talks")
    sock.settimeout(TIMEOUT)
    assert (it.first + receive(sock, b"still talks")).endswith(b"still talks")
    got = b""
    while len(got) < sent:
        got += it.console.read(1024)
    assert got == data[:sent]
    sock.close()


def word(it: World, offset: int, value: int | None = None) -> int:
    at = CONSOLE_GFN * 4096 + offset
    if value is not None:
        it.vm.ram.write(at, struct.pack("<I", value & 0xFFFFFFFF))
    return int(struct.unpack("<I", it.vm.ram.read(at, 4))[0])


@pytest.mark.parametrize("jump", [2049, 2**31, -1, -2048])
def test_impossible_indices_stop_this_console_until_they_are_possible(it: World, jump: int) -> None:
    more = json.loads(ctl(it.daemon.folder, "console-attach", "7", "-o", "json").stdout)
    other = Console.connect(it.domain, it.store, more["devid"])
    fd = it.tty()
    it.console.write(b"before")
    read_until(fd, b"before")
    good = word(it, CONSOLE.to_back.prod)
    word(it, CONSOLE.to_back.prod, word(it, CONSOLE.to_back.cons) + jump)
    for _ in range(5):
        it.vm.send(CONSOLE_PORT)
    until(lambda: it.row()["counters"]["stopped"] == 1, "it goes on")
    other.write(b"others do not notice")
    other_fd = it.tty(more["devid"])
    read_until(other_fd, b"others do not notice")
    word(it, CONSOLE.to_back.prod, good)
    it.vm.send(CONSOLE_PORT)
    until(lambda: it.row()["counters"]["stopped"] == 0, "it stays stopped")
    it.console.write(b"after")
    assert read_until(fd, b"after") == b"after"
    other.close()
    os.close(fd)
    os.close(other_fd)
    said = it.said()
    lines = [line for line in said.splitlines() if "stopped until" in line]
    assert len(lines) == 1, said
    assert "domain 7: console 0: stopped until its indices are possible: console ring: producer" in lines[0]


def test_a_guest_that_starts_over_on_the_same_page(it: World) -> None:
    """A VMM that keeps the domain over a reboot zeroes the page; nobody has to be told."""
    fd = it.tty()
    it.console.write(b"first boot")
    read_until(fd, b"first boot")
    it.console.close()
    it.vm.ram.write(CONSOLE_GFN * 4096, bytes(4096))
    it.console = Console(it.vm, CONSOLE_GFN, CONSOLE_PORT)
    it.console.write(b"second boot")
    assert read_until(fd, b"second boot") == b"second boot"
    os.write(fd, b"typed")
    assert it.console.read(10) == b"typed"
    os.close(fd)


def test_indices_may_wrap(it: World) -> None:
    it.console.close()
    for ring in (CONSOLE.to_back, CONSOLE.to_front):
        for offset in (ring.cons, ring.prod):
            word(it, offset, 2**32 - 700)
    it.console = Console(it.vm, CONSOLE_GFN, CONSOLE_PORT)
    fd = it.tty()
    data = bytes(range(256)) * 16
    it.console.write(data)
    assert read_count(fd, len(data)) == data
    os.write(fd, data[:1000])
    got = b""
    while len(got) < 1000:
        got += it.console.read(1000)
    assert got == data[:1000]
    os.close(fd)


# ---- a worker that dies --------------------------------------------------------------------------------------------


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def test_a_worker_that_dies_loses_nothing_that_was_not_taken(workers: World) -> None:
    it = workers
    fd = it.tty()
    more = json.loads(ctl(it.daemon.folder, "console-attach", "7", "-o", "json").stdout)
    other = Console.connect(it.domain, it.store, more["devid"])
    other_fd = it.tty(more["devid"])
    for _ in range(3):
        pid = it.info()["worker"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        it.console.write(b"o" * 2000)
        other.write(b"p" * 2000)
        os.write(fd, b"typed while nobody served")
        restarts = it.info()["worker"]["restarts"]
        os.kill(pid, signal.SIGKILL)
        it.console.write(b"o" * 3000 + b"END")  # spins until the next one empties the ring
        assert read_until(fd, b"END") == b"o" * 5000 + b"END"
        assert it.console.read(100) == b"typed while nobody served"
        other.write(b"END")
        assert read_until(other_fd, b"END") == b"p" * 2000 + b"END"
        assert it.info()["worker"]["restarts"] == restarts + 1
    other.close()
    os.close(fd)
    os.close(other_fd)


# ---- further consoles ----------------------------------------------------------------------------------------------


def test_further_consoles_come_and_go(it: World) -> None:
    folder = it.daemon.folder
    for devid in (1, 2):
        done = ctl(folder, "console-attach", "guest")
        assert re.fullmatch(rf"domain 7: console {devid}: /dev/pts/\d+\n", done.stdout), done
    assert "console 2 is there already" in ctl(folder, "console-attach", "7", "-n", "2").stderr
    assert "not in 1..9" in ctl(folder, "console-attach", "7", "-n", "10").stderr
    consoles = [Console.connect(it.domain, it.store, devid) for devid in (1, 2)]
    fds = [it.tty(devid) for devid in (1, 2)]
    for n, console in enumerate(consoles):
        console.write(b"console %d" % n)
        assert read_until(fds[n], b"console %d" % n) == b"console %d" % n
        os.write(fds[n], b"for %d" % n)
        assert console.read(10) == b"for %d" % n
    assert it.store.read("/local/domain/7/device/console/1/tty") == os.ttyname(fds[0])
    busy = ctl(folder, "console-detach", "7", "1")
    assert busy.returncode == 1
    assert "the guest did not let it go in 0.5 s" in busy.stderr
    consoles[0].close()  # as its driver does, late
    until(lambda: [row["devid"] for row in it.info()["consoles"]] == [0, 2], "it stays")
    assert "the primary console stays" in ctl(folder, "console-detach", "7", "0").stderr
    assert ctl(folder, "console-detach", "7", "2", "--force").stdout == "domain 7: console 2: detached by force\n"
    assert it.store.get("/local/domain/7/device/console/2") is None
    with pytest.raises(OperatorError, match="domain 7: no console 2"):
        it.client(2)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ({"ring-ref": "x", "port": "9"}, "ring-ref: 'x' is no number"),
        ({"ring-ref": "100"}, "port: missing"),
        ({"ring-ref": "99999999", "port": "9"}, "grant 99999999"),
    ],
)
def test_a_further_console_that_breaks_the_rules_may_begin_again(
    workers: World, nodes: dict[str, str], reason: str
) -> None:
    it = workers
    ctl(it.daemon.folder, "console-attach", "7")
    front = "/local/domain/7/device/console/1"
    back = "/local/domain/0/backend/console/7/1"
    it.store.wait_for(f"{back}/state", lambda text: text == "2", TIMEOUT)
    it.store.write_all(front, {**nodes, "state": "3"})
    it.store.wait_for(f"{back}/state", lambda text: text == "5", TIMEOUT)
    it.store.write_all(front, {"state": "1"})
    it.store.wait_for(f"{back}/state", lambda text: text == "2", TIMEOUT)
    console = Console.connect(it.domain, it.store, 1)
    fd = it.tty(1)
    console.write(b"well")
    assert read_until(fd, b"well") == b"well"
    # its indices lie: the connection goes, the primary console does not notice
    console._stream._mem.store(CONSOLE.to_back.prod, 12345)
    it.vm.send(console.port)
    it.store.wait_for(f"{back}/state", lambda text: text == "5", TIMEOUT)
    it.console.write(b"here")
    primary = it.tty()
    read_until(primary, b"here")
    os.close(primary)
    os.close(fd)
    console._stream.close()
    console._view.release()
    said = it.said()
    assert f"domain 7: console 1: stopped: {reason}" in said
    assert "domain 7: console 1: stopped: console ring: producer 0x3039" in said


def test_logs_have_a_size(workers: World) -> None:
    it = workers
    path = Path(it.row()["log"])
    assert path.parent == it.daemon.folder.parent
    data = b"".join(b"%07d\n" % n for n in range(12_000))
    it.console.write(data)
    old = Path(f"{path}.1")
    until(lambda: path.exists() and path.read_bytes().endswith(data[-8:]), "the log is late")
    assert path.stat().st_size <= 65536
    assert old.stat().st_size == 65536
    assert data.endswith(old.read_bytes() + path.read_bytes())


def test_without_a_log_folder_there_is_a_console_all_the_same(tmp_path: Path) -> None:
    config = CONFIG.replace("{folder}", "{folder}/nowhere")
    with world(tmp_path, config=config) as it:
        assert it.row()["log"] == ""
        fd = it.tty()
        it.console.write(b"well")
        read_until(fd, b"well")
        os.close(fd)
        assert "domain 7: console 0: no log: " in it.said()


# ---- evtchnctl console ---------------------------------------------------------------------------------------------


class AtTerminal:
    """`evtchnctl console` on a terminal of its own, as a person has it."""

    def __init__(self, it: World, *arguments: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", it.daemon.folder, "console"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=ENVIRONMENT,
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def see(self, text: bytes) -> bytes:
        return read_until(self.master, text)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def ended(self) -> tuple[int, str]:
        """Exit status and what it said; the terminal has to be as it was."""
        _, said = self.process.communicate(timeout=TIMEOUT)
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.master)
        os.close(self.slave)
        return self.process.returncode, said.decode()


def test_a_person_at_a_console(it: World) -> None:
    it.console.write(b"Debian GNU/Linux hvc0\r\nlogin: ")
    person = AtTerminal(it, "guest")
    assert person.see(b"login: ") == b"Debian GNU/Linux hvc0\r\nlogin: ", "what was said before, as it was said"
    assert not termios.tcgetattr(person.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    person.type(b"root\r\x03")
    got = b""
    while len(got) < 6:
        got += it.console.read(10)
    assert got == b"root\r\x03"
    it.console.write(b"root\r\n")
    assert person.see(b"root\r\n") == b"root\r\n"
    person.type(b"x\x1dnot for the guest")
    assert person.ended() == (0, "evtchnctl: left console 0 of domain 7\n")
    assert it.console.read(10) == b"x"


def test_the_console_ends_with_its_domain(it: World) -> None:
    it.console.write(b"# ")
    person = AtTerminal(it, "7")
    person.see(b"# ")
    it.console.write(b"reboot: Power down\r\n")
    it.vm.client.release()
    person.see(b"Power down\r\n")
    assert person.ended() == (0, "evtchnctl: domain 7 has ended\n")


def test_the_console_outlives_its_worker(workers: World) -> None:
    it = workers
    it.console.write(b"# ")
    person = AtTerminal(it, "7")
    person.see(b"# ")
    os.kill(it.info()["worker"]["pid"], signal.SIGKILL)
    until(lambda: it.row()["counters"].get("clients") == 1, "it did not come back")
    it.console.write(b"still here")
    person.see(b"still here")
    person.type(b"\x1d")
    assert person.ended()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(workers: World, number: int) -> None:
    workers.console.write(b"# ")
    person = AtTerminal(workers, "7")
    person.see(b"# ")
    person.process.send_signal(number)
    assert person.ended()[0] == 128 + number


def test_there_is_no_such_console(workers: World) -> None:
    assert ctl(workers.daemon.folder, "console", "7", "-n", "3").stderr == "evtchnctl: domain 7: no console 3\n"
    assert ctl(workers.daemon.folder, "console", "8").stderr == "evtchnctl: domain 8 is not there\n"
    assert "invalid choice: 'serial'" in ctl(workers.daemon.folder, "console", "7", "-t", "serial").stderr
    said = json.loads(ctl(workers.daemon.folder, "console", "7", "-o", "json").stdout)
    assert said == {"devid": 0, "tty": workers.row()["tty"]}


def test_a_pipe_is_no_terminal_and_reads_to_the_end(workers: World) -> None:
    command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", workers.daemon.folder, "console", "7"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    until(lambda: workers.row()["counters"].get("clients") == 1, "it does not look")
    workers.console.write(b"to the end")
    until(lambda: workers.row()["counters"]["out_bytes"] == 10, "not taken")
    workers.vm.client.release()
    assert process.communicate(timeout=TIMEOUT)[0] == b"to the end"
    assert process.returncode == 0
