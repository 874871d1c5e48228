"""`evtchnctl capture` of a soft guest on a bridge: daemon, worker, command and tshark."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemonprocess import until
from evtchnd.guest.netfront import Netfront
from evtchnd_backends import pcapng
from hostnetwork import Namespace, answering
from test_capture import blocks, counted, packets, tshark
from test_cli import Running, ctl, running
from test_network import GUEST, MAC, bridged, said, soft_guest

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[[], ["--single-process"]], ids=["workers", "single"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "run", *request.param) as it:
        yield it
        it.ends_well()


@contextmanager
def connected(daemon: Running) -> Iterator[tuple[Namespace, Netfront]]:
    """A namespace, and a guest's card on the same bridge."""
    with bridged() as (here, far), soft_guest(daemon) as (domain, store):
        said(daemon, "network-attach", "7", f"mac={MAC},bridge=br0,netns={here.name}")
        card = Netfront(domain, store)
        card.connect()
        until(lambda: "state forwarding" in here.ip("-d link show vif7.0"), "the bridge takes it")
        yield far, card


@contextmanager
def served(daemon: Running) -> Iterator[Namespace]:
    """A guest that answers pings from the namespace."""
    with connected(daemon) as (far, card):
        with answering(card):
            far.ping(GUEST, 1)
            yield far
        card.disconnect()


@contextmanager
def capture(daemon: Running, *arguments: str, out: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it captures."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "backends"))
    with subprocess.Popen(
        [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(daemon.folder), "capture", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=out,
        stderr=subprocess.PIPE,
    ) as command:
        try:
            until(lambda: captures(daemon) == 1, "it captures")
            yield command
        finally:
            command.kill()


def captures(daemon: Running) -> int:
    (vif,) = said(daemon, "network-list", "7")
    return int(vif["counters"].get("captures", 0))


def fields(*names: str) -> list[str]:
    return ["-T", "fields", *(word for name in names for word in ("-e", name))]


def test_into_a_file_until_it_is_interrupted(daemon: Running, tmp_path: Path) -> None:
    file = tmp_path / "out.pcapng"
    with served(daemon) as far, capture(daemon, "vif7.0", "-w", str(file), "-s", "200") as command:
        far.ping(GUEST, 5)
        command.send_signal(signal.SIGINT)
        _, told = command.communicate(timeout=30)
        assert command.returncode == 0
        until(lambda: captures(daemon) == 0, "it is over")
    data = file.read_bytes()
    seen = len(packets(data))
    assert told == f"evtchnctl: vif7.0: {seen} packets, 0 dropped\n".encode()
    assert counted(data) == (seen, 0)
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    shown = tshark(file, "-Y", "icmp", *fields("icmp.type", "frame.packet_flags_direction", "ip.src"))
    assert shown.splitlines() == ["8\t0x00000002\t10.77.0.1", "0\t0x00000001\t10.77.0.7"] * 5
    assert {len(each.data) for each in packets(data) if each.data[12:14] == b"\x08\x00"} == {200}


def test_into_tshark_so_many_packets(daemon: Running) -> None:
    with served(daemon) as far, capture(daemon, "vif7.0", "-w", "-", "-c", "6") as command:
        with subprocess.Popen(
            ["tshark", "-n", "-l", "-r", "-", *fields("frame.interface_name", "frame.len")],
            stdin=command.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as reader:
            far.ping(GUEST, 5)
            lines = reader.communicate(timeout=30)[0].decode().splitlines()
        assert command.wait(30) == 0
        assert command.stderr is not None
        assert command.stderr.read() == b"evtchnctl: vif7.0: 6 packets, 0 dropped\n"
        assert len(lines) == 6
        assert all(line.startswith("vif7.0\t") for line in lines)


def test_a_reader_that_goes_away(daemon: Running) -> None:
    """As `| head -c 1`: the command ends without a word of Python's."""
    with served(daemon) as far, capture(daemon, "vif7.0") as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.read(1)
        command.stdout.close()
        while command.poll() is None:
            far.ping(GUEST, 1)
        assert command.returncode == 0
        assert re.fullmatch(rb"evtchnctl: vif7\.0: \d+ packets, 0 dropped\n", command.stderr.read())
        until(lambda: captures(daemon) == 0, "it is over")


def test_it_ends_with_the_vif(daemon: Running) -> None:
    with connected(daemon) as (far, card), capture(daemon, "vif7.0") as command:
        with answering(card):
            far.ping(GUEST, 3)
        card.disconnect()
        said(daemon, "network-detach", "7", "0")
        out, told = command.communicate(timeout=30)
        assert command.returncode == 0
        assert told == f"evtchnctl: vif7.0: {len(packets(out))} packets, 0 dropped\n".encode()
        assert len(packets(out)) >= 6


def test_a_worker_that_dies_begins_a_section(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with running(tmp_path / "run") as daemon:
        with served(daemon) as far, capture(daemon, "vif7.0", "-w", str(file)) as command:
            far.ping(GUEST, 3)
            pid = said(daemon, "info", "7")["worker"]["pid"]
            os.kill(pid, 9)
            until(lambda: said(daemon, "info", "7")["worker"]["pid"] not in (0, pid), "another one")
            until(lambda: captures(daemon) == 1, "and it captures")
            far.ping(GUEST, 3)
            command.send_signal(signal.SIGTERM)
            assert command.wait(30) == 0
        assert daemon.end() == 0
    assert [kind for kind, _ in blocks(file.read_bytes())].count(pcapng.SECTION) == 2
    assert len(tshark(file, "-Y", "icmp").splitlines()) == 12


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["vif7.1"], "no domain has a vif vif7.1 (evtchnctl network-list DOM)"),
        (["vif7.0", "-w", "/nowhere/file"], "/nowhere/file: No such file or directory"),
    ],
)
def test_what_is_refused(daemon: Running, arguments: list[str], reason: str) -> None:
    with served(daemon):
        done = ctl(daemon.folder, "capture", *arguments)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"evtchnctl: {reason}"
        until(lambda: captures(daemon) == 0, "none runs")
