"""What systemd is given (units, and how it rates them) and what it is told (sd_notify, descriptors, the journal)."""

from __future__ import annotations

import array
import asyncio
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evtchnd.control import logs
from evtchnd.control.listening import KINDS
from evtchnd.control.sdnotify import Notifier, inherited, watchdog_period
from evtchnd.errors import HostError
from unit.render import SOURCE, render

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="package systemd is missing")

# ---- units ---------------------------------------------------------------------------------------------------------


@needs_systemd
@pytest.mark.parametrize("tap", [False, True], ids=["plain", "tap"])
def test_units_are_without_fault(tmp_path: Path, tap: bool) -> None:
    units = render(tmp_path, tap=tap)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "evtchnd" in line or str(tmp_path) in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd
@pytest.mark.parametrize(
    ("name", "tap", "most"),
    [("evtchnd", False, 0.7), ("evtchnd", True, 1.7), ("evtchnd-fd", False, 0.5)],
    ids=["plain", "tap", "fd"],
)
def test_systemd_rates_the_service_as_safe(tmp_path: Path, name: str, tap: bool, most: float) -> None:
    service = next(unit for unit in render(tmp_path, tap=tap) if unit.name == f"{name}.service")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={round(most * 10)}", service],
        capture_output=True,
        text=True,
    )
    found = re.search(rf"Overall exposure level for {name}.service: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= most, "\n".join(line for line in done.stdout.splitlines() if line.startswith("✗"))
    assert done.returncode == 0


def test_the_drop_in_is_what_grants_the_capability(tmp_path: Path) -> None:
    assert "CAP_NET_ADMIN" not in (SOURCE / "evtchnd.service.in").read_text()
    assert "CAP_NET_ADMIN" in (SOURCE / "evtchnd.service.d/tap.conf").read_text()


def test_socket_units_are_named_as_the_daemon_names_them() -> None:
    found = {}
    for unit in SOURCE.glob("*.socket"):
        said = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
        kind = socket.SOCK_SEQPACKET if "ListenSequentialPacket" in said else socket.SOCK_STREAM
        path = said.get("ListenSequentialPacket") or said["ListenStream"]
        assert path == f"/run/evtchnd/{said['FileDescriptorName']}.sock"
        found[said["FileDescriptorName"]] = kind
    assert found == KINDS
    for template in ("evtchnd.service.in", "evtchnd-fd.service.in"):
        service = (SOURCE / template).read_text()
        assert sorted(re.findall(r"evtchnd-\w+\.socket", service.split("\nSockets=")[1].splitlines()[0])) == sorted(
            unit.name for unit in SOURCE.glob("*.socket")
        )


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="package systemd is missing")
def test_users_and_folders_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", SOURCE / "sysusers.d/evtchnd.conf"], check=True)
    groups = {line.split(":")[0] for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert groups == {"evtchnd", "evtchnd-vmm", "evtchnd-operator"}
    assert (tmp_path / "etc/passwd").read_text().startswith("evtchnd:")
    wanted = set(re.findall(r"^SocketGroup=(.*)$", "".join(u.read_text() for u in SOURCE.glob("*.socket")), re.M))
    assert wanted <= groups


# ---- sd_notify -----------------------------------------------------------------------------------------------------


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(path)
        self.sock.settimeout(20)

    def take(self) -> tuple[list[str], list[int]]:
        data, control, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, raw in control:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(raw)
        return data.decode().split("\n"), list(fds)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify") if request.param == "path" else f"\0evtchnd-test-{os.getpid()}"
    it = Manager(path)
    yield it
    it.sock.close()


def notifier(manager: Manager) -> Notifier:
    name = manager.sock.getsockname()
    return Notifier("@" + name[1:].decode() if isinstance(name, bytes) else name)


def test_states(manager: Manager) -> None:
    it = notifier(manager)
    it.ready("serving")
    it.status("busy")
    it.watchdog()
    it.stopping()
    assert [manager.take()[0] for _ in range(4)] == [
        ["READY=1", "STATUS=serving"],
        ["STATUS=busy"],
        ["WATCHDOG=1"],
        ["STOPPING=1", "STATUS=stopping"],
    ]


def test_the_descriptor_store(manager: Manager) -> None:
    it = notifier(manager)
    one, two = os.memfd_create("one"), os.memfd_create("two")
    os.write(one, b"kept")
    it.store("journal", one, two)
    it.store("client", one, poll=True)
    it.forget("journal")
    lines, fds = manager.take()
    assert lines == ["FDSTORE=1", "FDNAME=journal", "FDPOLL=0"]
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(one).st_ino, os.fstat(two).st_ino]
    assert os.pread(fds[0], 9, 0) == b"kept"
    again, more = manager.take()
    assert again == ["FDSTORE=1", "FDNAME=client"]
    assert manager.take() == (["FDSTOREREMOVE=1", "FDNAME=journal"], [])
    for fd in (one, two, *fds, *more):
        os.close(fd)


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "é", "x" * 256])
def test_a_name_that_would_break_the_message_is_refused(manager: Manager, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        notifier(manager).store(name, 0)


async def test_the_barrier_waits_until_its_descriptor_is_closed(manager: Manager) -> None:
    barrier = asyncio.create_task(notifier(manager).barrier(20))
    await asyncio.sleep(0)
    lines, fds = await asyncio.to_thread(manager.take)
    assert lines == ["BARRIER=1"]
    await asyncio.sleep(0.05)
    assert not barrier.done()
    os.close(fds[0])
    await barrier


async def test_a_barrier_that_nobody_answers_is_an_error(manager: Manager) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="has not answered BARRIER=1"):
        await notifier(manager).barrier(0.05)
    _, fds = manager.take()
    os.close(fds[0])
    assert len(os.listdir("/proc/self/fd")) == before


async def test_without_a_manager_nothing_happens() -> None:
    it = Notifier()
    assert not it
    it.ready("x")
    it.store("x", 0)
    await it.barrier()


def test_a_manager_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not take READY=1: No such file"):
        Notifier(str(tmp_path / "none")).ready("x")


def test_the_environment_is_taken_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/x")
    assert Notifier.from_environment()
    assert "NOTIFY_SOCKET" not in os.environ
    assert not Notifier.from_environment()


@pytest.mark.parametrize(
    ("micros", "pid", "period"),
    [
        ("30000000", None, 15.0),
        ("30000000", "self", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("x", None, None),
    ],
)
def test_half_of_watchdogsec(monkeypatch: pytest.MonkeyPatch, micros: str, pid: str | None, period: float) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", micros)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)
    assert watchdog_period() == period
    assert "WATCHDOG_USEC" not in os.environ


# ---- sd_listen_fds -------------------------------------------------------------------------------------------------

ASK = """
import fcntl, json, os, sys
from evtchnd.control.sdnotify import inherited
from evtchnd.errors import HostError
try:
    found = inherited()
except HostError as exc:
    print(json.dumps(str(exc)))
    sys.exit()
safe = all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fds in found.values() for fd in fds)
print(json.dumps([found, safe, [key for key in os.environ if key.startswith("LISTEN")], inherited()]))
"""


def ask(environment: str, *, fds: int) -> object:
    """`inherited()` in a process that a shell starts with descriptors from 3 on; $$ is its pid."""
    opened = " ".join(f"{3 + n}</dev/null" for n in range(fds))
    done = subprocess.run(
        ["bash", "-c", f'{environment} exec "$0" -c "$1" {opened}', sys.executable, ASK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("environment", "fds", "answer"),
    [
        (
            "LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=vmm:control:vmm",
            3,
            [{"vmm": [3, 5], "control": [4]}, True, [], {}],
        ),
        ("LISTEN_PID=$$ LISTEN_FDS=1", 1, [{"unknown": [3]}, True, [], {}]),
        ("LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=vmm", 1, [{}, True, [], {}]),
        ("", 0, [{}, True, [], {}]),
        ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=vmm", 2, "LISTEN_FDNAMES has 1 names for 2 descriptors"),
        ("LISTEN_PID=$$ LISTEN_FDS=x", 0, "LISTEN_FDS=x is no number"),
        ("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vmm", 0, "LISTEN_FDS=1: descriptor 3 (vmm) is not open"),
    ],
)
def test_descriptors_come_by_name(environment: str, fds: int, answer: object) -> None:
    assert ask(environment, fds=fds) == answer


def test_no_descriptors_were_passed_to_this_process() -> None:
    assert inherited() == {}


# ---- the journal ---------------------------------------------------------------------------------------------------


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("evtchnd.x", level, "/src/x.py", 7, text, None, None, "f")


def test_a_line_carries_its_domain_and_device() -> None:
    known = logs.fields(record("x"), "domain 7: vbd 51712: ring-ref: 'abc' is no number")
    assert (known["DOMID"], known["DEVICE"], known["PRIORITY"]) == ("7", "vbd 51712", "4")
    assert (known["CODE_FILE"], known["CODE_LINE"], known["CODE_FUNC"]) == ("/src/x.py", "7", "f")
    other = logs.fields(record("x", logging.ERROR), "domain 7: it ended")
    assert (other["DOMID"], other["PRIORITY"], "DEVICE" in other) == ("7", "3", False)
    assert "DOMID" not in logs.fields(record("x"), "a domain 7")


def decode(datagram: bytes) -> dict[str, str]:
    """The native protocol, read as its documentation says."""
    found, at = {}, 0
    while at < len(datagram):
        end = datagram.index(b"\n", at)
        key, equals, value = datagram[at:end].partition(b"=")
        at = end + 1
        if not equals:
            (size,) = struct.unpack_from("<Q", datagram, at)
            value = datagram[at + 8 : at + 8 + size]
            assert datagram[at + 8 + size : at + 9 + size] == b"\n"
            at += 9 + size
        found[key.decode()] = value.decode()
    return found


@pytest.mark.parametrize("text", ["one line", "two\nlines=x\n", "", "\n", "é"])
def test_the_encoding_leads_back(text: str) -> None:
    entry = {"MESSAGE": text, "PRIORITY": "6"}
    assert decode(logs.encode(entry)) == entry


def test_the_handler_sends_datagrams_and_large_ones_as_memfd(tmp_path: Path) -> None:
    journal = Manager(str(tmp_path / "journal"))
    handler = logs.JournalHandler(str(tmp_path / "journal"))
    handler.handle(record("domain 7: small"))
    handler.handle(record("domain 8: " + "x" * 3_000_000))
    data = journal.sock.recv(1 << 20)
    assert decode(data)["MESSAGE"] == "domain 7: small"
    _, fds = journal.take()
    with os.fdopen(fds[0], "rb") as large:
        large.seek(0)
        assert decode(large.read())["DOMID"] == "8"
    handler.close()
    journal.sock.close()


def test_without_a_journal_the_line_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logs.JournalHandler(str(tmp_path / "none"))
    handler.handle(record("domain 7: said"))
    handler.close()
    assert capsys.readouterr().err == "<4>domain 7: said\n"


def test_text_and_json_lines() -> None:
    text = logs.TextFormatter().format(record("domain 7: vbd 1: no"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d warning domain 7: vbd 1: no", text)
    line = json.loads(logs.JsonFormatter().format(record("domain 7: vbd 1: no")))
    assert (line["level"], line["domid"], line["device"]) == ("warning", "7", "vbd 1")
    assert line["message"] == "domain 7: vbd 1: no"
