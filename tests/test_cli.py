"""`evtchnd` and `evtchnctl` as processes: what they say, how they end, what they leave behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evtchnd.cli import evtchnctl
from evtchnd.vmm.soft import SoftVmm

TIMEOUT = 30.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
SOCKETS = ["control.sock", "vmm.sock", "xenstored.sock"]


def run(module: str, *arguments: str | Path, **rest: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=TIMEOUT,
        **rest,
    )


def ctl(folder: Path, *arguments: str | Path, **rest: Any) -> subprocess.CompletedProcess[str]:
    return run("evtchnd.cli.evtchnctl", "--runtime-dir", folder, *arguments, **rest)


class Running:
    """An evtchnd of ours."""

    def __init__(self, folder: Path, *arguments: str, before: Sequence[str] = (), fds: Sequence[int] = ()) -> None:
        """`before`: a command that becomes the daemon; `fds`: descriptors that it gets."""
        self.folder = folder
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "evtchnd", "--runtime-dir", str(folder), *arguments],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        self.said = ""

    def wait_until_ready(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if "serves in" in line:
                return
        pytest.fail(f"it ended: {self.process.wait(TIMEOUT)}\n{self.said}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        try:
            _, rest = self.process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.said += rest
        return self.process.returncode

    def ends_well(self) -> None:
        """In order, and it has said nothing of a defect."""
        assert self.end() == 0
        assert "Traceback" not in self.said
        assert "defect" not in self.said

    def close(self) -> None:
        if self.process.poll() is None:
            self.end()
        if self.process.stderr:
            self.process.stderr.close()


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Running]:
    it = Running(folder, *arguments)
    try:
        it.wait_until_ready()
        yield it
    finally:
        it.close()


@pytest.fixture(params=[[], ["--single-process"]], ids=["workers", "single"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "run", *request.param) as it:
        yield it


# ---- evtchnd -------------------------------------------------------------------------------------------------------


def test_it_serves_and_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "deep/run") as it:
        assert {name for name in SOCKETS if (it.folder / name).is_socket()} == set(SOCKETS)
        for name in SOCKETS:
            assert stat.S_IMODE((it.folder / name).stat().st_mode) == 0o660
        children = Path(f"/proc/{it.process.pid}/task/{it.process.pid}/children").read_text().split()
        assert it.end() == 0
        assert "stopping" in it.said
        assert "Traceback" not in it.said
        assert [name for name in os.listdir(it.folder) if name != "lock"] == []
        assert not [pid for pid in children if Path(f"/proc/{pid}/exe").exists()]


def test_ctrl_c_ends_it_in_order(daemon: Running) -> None:
    assert daemon.end(signal.SIGINT) == 0
    assert "Traceback" not in daemon.said


def test_kill_9_takes_the_zygote_along_and_the_next_start_clears_up(tmp_path: Path) -> None:
    with running(tmp_path) as it:
        children = Path(f"/proc/{it.process.pid}/task/{it.process.pid}/children").read_text().split()
        assert len(children) == 1
        it.process.kill()
        it.process.wait(TIMEOUT)
    end = time.monotonic() + TIMEOUT
    while any(_lives(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (tmp_path / "vmm.sock").is_socket()
    with running(tmp_path):
        assert ctl(tmp_path, "list").returncode == 0


def _lives(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_second_one_in_the_same_folder_is_refused(daemon: Running) -> None:
    second = run("evtchnd", "--runtime-dir", daemon.folder)
    assert second.returncode == 1
    assert f"{daemon.folder}: another evtchnd serves there" in second.stderr
    assert "Traceback" not in second.stderr
    assert ctl(daemon.folder, "list").returncode == 0


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    done = run("evtchnd", "--runtime-dir", "/proc/evtchnd")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_an_empty_folder_is_not_that_of_the_system() -> None:
    done = run("evtchnd", "--runtime-dir", "")
    assert done.returncode == 2
    assert "--runtime-dir: an empty name" in done.stderr


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("evtchnd", "--runtime-dir", tmp_path / "file")
    assert done.returncode == 1
    assert re.fullmatch(r".* error .*/file: File exists .*\n", done.stderr)


def test_check_config(tmp_path: Path) -> None:
    file = tmp_path / "evtchnd.toml"
    file.write_text("[limits]\ndomains = 4\n")
    good = run("evtchnd", "--check-config", "--config", file)
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    file.write_text("[limits]\ndomians = 4\n[vbd]\nengine = 'fast'\n")
    bad = run("evtchnd", "--check-config", "--config", file)
    assert bad.returncode == os.EX_CONFIG
    assert bad.stderr.splitlines() == [
        f"{file}:limits.domians: no such key",
        f"{file}:vbd.engine: invalid enum value 'fast'",
    ]
    # and it does not start with it
    assert run("evtchnd", "--config", file, "--runtime-dir", tmp_path).returncode == os.EX_CONFIG


def test_capabilities_are_json() -> None:
    done = run("evtchnd", "--print-capabilities")
    said = json.loads(done.stdout)
    assert done.returncode == 0
    assert (said["type"], said["devices"], said["disk-formats"]) == ("xen-backends", ["console", "vbd", "vif"], ["raw"])
    assert said["protocol"]["version"] == 1
    assert said["operator-interfaces"] == ["io.evtchnd"]


def listening(path: Path, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    sock.listen()
    return sock


def moved(sock: socket.socket) -> int:
    """Its number in a child: above those that get LISTEN_FDS' places."""
    return fcntl.fcntl(sock, fcntl.F_DUPFD, 50)


@contextmanager
def given(folder: Path, **sockets: socket.socket) -> Iterator[Running]:
    """A daemon that gets `sockets` as systemd gives them."""
    numbers = [moved(sock) for sock in sockets.values()]
    for number in numbers:
        os.set_inheritable(number, True)
    places = " ".join(f"{3 + place}<&{number}" for place, number in enumerate(numbers))
    names = ":".join(sockets)
    shell = f"exec {places}; export LISTEN_PID=$$ LISTEN_FDS={len(numbers)} LISTEN_FDNAMES={names}"
    it = Running(folder, before=["bash", "-c", f'{shell}; exec "$@"', "bash"], fds=numbers)
    try:
        yield it
    finally:
        it.close()
        for number in numbers:
            os.close(number)


def test_sockets_that_are_passed_in_are_used_and_stay(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with (
        listening(elsewhere / "c", socket.SOCK_STREAM) as control,
        listening(elsewhere / "v", socket.SOCK_SEQPACKET) as vmm,
        given(tmp_path / "run", control=control, vmm=vmm) as it,
    ):
        it.wait_until_ready()
        done = run("evtchnd.cli.evtchnctl", "--socket", elsewhere / "c", "list", "-o", "json")
        assert json.loads(done.stdout) == []
        # the third was made, beside its lock
        assert sorted(os.listdir(it.folder)) == ["lock", "xenstored.sock"]
        assert it.end() == 0
        assert sorted(os.listdir(elsewhere)) == ["c", "v"]


def test_a_socket_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with listening(tmp_path / "v", socket.SOCK_STREAM) as vmm, given(tmp_path / "run", vmm=vmm) as it:
        assert it.process.wait(TIMEOUT) == 1
        assert it.process.stderr is not None
        assert "socket 'vmm' was passed in and is no Unix SOCK_SEQPACKET socket" in it.process.stderr.read()


def test_a_socket_whose_file_is_gone_is_made_anew(tmp_path: Path) -> None:
    with listening(tmp_path / "control.sock", socket.SOCK_STREAM) as control:
        (tmp_path / "control.sock").unlink()
        with given(tmp_path, control=control) as it:
            it.wait_until_ready()
            assert ctl(tmp_path, "list").returncode == 0
            assert it.end() == 0
            assert "control.sock is gone: made anew" in it.said


# ---- evtchnctl -----------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_a_domain_and_its_disk_from_first_to_last(daemon: Running, image: Path) -> None:
    assert ctl(daemon.folder, "list").stdout.split() == ["ID", "Name", "Mem", "MiB", "VCPUs", "Devices", "State"]
    with SoftVmm(daemon.folder / "vmm.sock", 7, memory=8 << 20, name="guest"):
        (row,) = json.loads(ctl(daemon.folder, "list", "-o", "json").stdout)
        assert (row["domid"], row["name"], row["state"], row["devices"]) == (7, "guest", "running", 0)
        assert "7  guest" in ctl(daemon.folder, "list").stdout

        # seen from the client's folder; nothing happens yet
        dry = ctl(daemon.folder, "block-attach", "guest", "disk.img,raw,xvda,ro", "--dry-run", cwd=image.parent)
        assert dry.stdout == f"would attach format=raw,vdev=xvda,access=ro,target={image}\n"
        assert json.loads(ctl(daemon.folder, "info", "7", "-o", "json").stdout)["devices"] == []

        done = ctl(daemon.folder, "-o", "json", "block-attach", "guest", "disk.img,raw,xvda,ro", cwd=image.parent)
        disk = json.loads(done.stdout)
        assert disk["target"] == str(image)
        assert (disk["devid"], disk["sectors"], disk["readonly"]) == (51712, 2048, True)

        again = ctl(daemon.folder, "block-attach", "7", "vdev=xvda,target=disk.img", cwd=image.parent)
        assert again.returncode == 1
        assert again.stderr.startswith("evtchnctl: domain 7: ")

        info = json.loads(ctl(daemon.folder, "info", "guest", "-o", "json").stdout)
        assert [(d["kind"], d["vdev"], d["readonly"]) for d in info["devices"]] == [("vbd", "xvda", True)]
        assert info["domain"]["devices"] == 1
        assert info["vmm_pid"] == os.getpid()
        text = ctl(daemon.folder, "info", "7").stdout
        assert "domain   7 guest" in text
        assert f"vbd 51712 xvda initialising ro {image}" in text or f"vbd 51712 xvda waits ro {image}" in text

        (row,) = json.loads(ctl(daemon.folder, "block-list", "guest", "-o", "json").stdout)
        assert (row["vdev"], row["sectors"], row["sector_size"], row["cache"]) == ("xvda", 2048, 512, "writeback")
        head, line = ctl(daemon.folder, "block-list", "7").stdout.splitlines()
        assert head.split()[:7] == ["Vdev", "Devid", "State", "Access", "MiB", "Sector", "Queues"]
        assert line.split()[:2] == ["xvda", "51712"] and line.split()[3:6] == ["ro", "1", "512"]
        assert line.endswith(str(image))

        dry = ctl(daemon.folder, "block-resize", "7", "xvda", "2M", "--dry-run")
        assert dry.stdout == "would make 2097152 bytes of xvda (51712)\n"
        refused = ctl(daemon.folder, "block-resize", "7", "xvda", "2M")
        assert refused.stderr.endswith("vbd 51712: is attached read-only: its image is not made longer\n")
        os.truncate(image, 3 << 20)  # by its owner
        assert ctl(daemon.folder, "block-resize", "7", "xvda").stdout == "domain 7: xvda (51712): 3 MiB\n"
        assert json.loads(ctl(daemon.folder, "block-resize", "7", "xvda", "-o", "json").stdout)["sectors"] == 6144

        gone = json.loads(ctl(daemon.folder, "block-detach", "guest", "xvda", "-o", "json").stdout)
        assert gone["vdev"] == "xvda"
        missing = ctl(daemon.folder, "block-detach", "7", "xvda")
        assert (missing.returncode, missing.stderr) == (1, "evtchnctl: domain 7: no disk xvda\n")
    end = time.monotonic() + TIMEOUT
    while json.loads(ctl(daemon.folder, "list", "-o", "json").stdout):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["block-attach", "7", "vdev=xvda,target={image}.none"], "{image}.none: No such file or directory"),
        (["block-attach", "7", "vdev=xvda,target=/"], "/: "),
        (["block-attach", "7", "{image},qcow2,xvda"], "format qcow2 is not served"),
        (["block-attach", "7", "{image},raw,vda"], "'vda' is no virtual device"),
        (["block-attach", "none", "{image},raw,xvda"], "no domain named 'none'"),
        (["block-attach", "8", "{image},raw,xvda"], "domain 8 is not there"),
        (["info", "8"], "domain 8 is not there"),
        (["block-list", "8"], "domain 8 is not there"),
        (["block-resize", "7", "xvda"], "no disk xvda"),
        (["block-resize", "7", "xvda", "big"], "'big' is no size (10G, 512M, 1073741824)"),
        (["block-resize", "7", "xvda", "0"], "'0' is no size"),
        (["block-resize", "7", "xvda", "99999999T"], "'99999999T' is no size"),
        (["block-attach", "7", "vdev=xvda,cache=some,target={image}"], "'some' is no cache (writeback, none)"),
    ],
)
def test_what_is_refused_is_one_line_with_its_reason(
    daemon: Running, image: Path, arguments: list[str], reason: str
) -> None:
    with SoftVmm(daemon.folder / "vmm.sock", 7, memory=8 << 20):
        done = ctl(daemon.folder, *(text.format(image=image) for text in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"evtchnctl: [^\n]+\n", done.stderr)
    assert reason.format(image=image) in done.stderr


def test_disks_of_the_config_are_there_when_the_domain_is(tmp_path: Path, image: Path) -> None:
    file = tmp_path / "evtchnd.toml"
    file.write_text(f"[[domains]]\ndomid = 7\ndisks = ['vdev=xvda,target={image}', 'vdev=xvdb,target={image}.none']\n")
    with running(tmp_path / "run", "--config", str(file)) as it:
        with SoftVmm(it.folder / "vmm.sock", 7, memory=8 << 20):
            info = json.loads(ctl(it.folder, "info", "7", "-o", "json").stdout)
            assert [d["vdev"] for d in info["devices"]] == ["xvda"]
        assert it.end() == 0
        assert re.search(rf"error domain 7: xvdb: not attached: {image}.none: No such file", it.said)


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "1e300", "soon"])
def test_a_time_that_is_none_is_wrong_usage(tmp_path: Path, seconds: str) -> None:
    done = ctl(tmp_path, "--timeout", seconds, "list")
    assert done.returncode == 2
    assert re.search(rf"argument --timeout: .*'{seconds}'", done.stderr)
    assert "Traceback" not in done.stderr


def test_nobody_there(tmp_path: Path) -> None:
    done = ctl(tmp_path, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"evtchnctl: {tmp_path}/control.sock: no evtchnd serves there (--runtime-dir names its folder)\n"
    )


def test_where_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, place in [
        (["list"], "/run/evtchnd/control.sock"),
        (["--runtime-dir", "/a", "list"], "/a/control.sock"),
        (["list", "--runtime-dir", "/a"], "/a/control.sock"),
        (["--socket", "/b", "list"], "/b"),
    ]:
        if place.startswith("/run") and Path(place).exists():
            continue
        assert evtchnctl.main(arguments) == 1
        assert f"evtchnctl: {place}: " in capsys.readouterr().err
    monkeypatch.setenv("EVTCHND_RUNTIME_DIR", str(tmp_path))
    assert evtchnctl.main(["list"]) == 1
    assert f"{tmp_path}/control.sock" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"", b"no json\0", b'{"parameters":{"domains":'])
def test_a_daemon_that_answers_nonsense(tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path / "control.sock", socket.SOCK_STREAM) as sock:
        client = subprocess.Popen(
            [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(tmp_path), "list"],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = sock.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)
        _, said = client.communicate(timeout=TIMEOUT)
    assert client.returncode == 1
    assert re.fullmatch(r"evtchnctl: [^\n]+\n", said)


def test_an_answer_that_does_not_come_in_time(tmp_path: Path) -> None:
    with listening(tmp_path / "control.sock", socket.SOCK_STREAM):
        done = ctl(tmp_path, "--timeout", "0.2", "list")
    assert (done.returncode, done.stderr) == (1, f"evtchnctl: {tmp_path}/control.sock: no answer in 0.2 s\n")


def test_the_command_starts_without_the_daemons_imports() -> None:
    """A command that is typed: no event loop, no netlink, no compiled code."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "evtchnd.cli.evtchnctl", "--help"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert {"evtchnd.diskspec", "evtchnd.vifspec"} <= imported
    assert not imported & {
        "asyncio",
        "uvloop",
        "msgspec",
        "pyroute2",
        "rich",
        "evtchnd._core",
        "evtchnd.control.config",
    }
