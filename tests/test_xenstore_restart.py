"""A daemon that is killed, and the next one, with XenStore's log in a memfd that this process holds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm
from scale import scaled

ROOT = Path(__file__).parent.parent


class Daemon:
    """`evtchnd --state-fd`, started and killed again and again."""

    def __init__(self, folder: Path, config: str = "") -> None:
        self.folder = folder
        self.log = folder / "log"
        self.socket = folder / "xenstored.sock"
        (folder / "evtchnd.toml").write_text(config)
        self.state = os.memfd_create("state", os.MFD_ALLOW_SEALING)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        before = self.served()
        command = [sys.executable, "-m", "evtchnd", "--config", str(self.folder / "evtchnd.toml")]
        command += ["--runtime-dir", str(self.folder), "--state-fd", str(self.state)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, pass_fds=[self.state], cwd=ROOT)
        # its sockets are there before it has read its log
        until(lambda: self.served() > before)

    def served(self) -> int:
        """How often it has been ready."""
        return self.text().count(" serves in ") if self.log.exists() else 0

    def end(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(20)

    def text(self) -> str:
        return self.log.read_text()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, "[limits]\nresume_s = 2\n")
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.end(signal.SIGTERM)
    os.close(made.state)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_does_not_notice(daemon: Daemon, number: signal.Signals) -> None:
    """Its request is answered, once, and its watch still fires; nothing that it was told of is lost."""
    vm = SoftVmm(daemon.folder / "vmm.sock", 7)
    domain = Domain(vm)
    store = XenStore(domain)
    said: list[int] = []
    failed: list[BaseException] = []
    over = threading.Event()

    def work() -> None:
        try:
            for count in range(1 << 30):
                if over.is_set():
                    return
                store.write("data/count", str(count))
                said.append(count)
        except BaseException as exc:
            failed.append(exc)

    with store.watch("data/other") as changed:
        assert changed(10.0) is not None
        thread = threading.Thread(target=work)
        thread.start()
        rng = random.Random(number)
        for round in range(scaled(20, least=3)):
            before = len(said)
            until(lambda before=before: len(said) > before + 5 or bool(failed))  # type: ignore[misc]
            time.sleep(rng.random() / 20)
            daemon.end(number)
            assert not failed
            daemon.start()
            vm.resume()
            # before the guest's next step: what it was told of is there
            told = said[-1]
            assert int(store.read("data/count")) >= told
            store.write("data/other", str(round))
            assert changed(10.0) == "data/other"
        over.set()
        thread.join(30)
        assert not failed
        assert int(store.read("data/count")) == said[-1]
        assert said == list(range(len(said)))
        assert store.get_perms("data")[0] == "n7"
    store.close()
    domain.close()
    vm.close()
    assert "not served any more" not in daemon.text()


def call(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "evtchnd.cli.evtchnctl",
        "--runtime-dir",
        str(daemon.folder),
        "xenstore",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_domain_whose_vmm_does_not_come_back_is_released(daemon: Daemon) -> None:
    vm = SoftVmm(daemon.folder / "vmm.sock", 7, name="lost")
    assert call(daemon, "write", "/tool/kept", "yes").returncode == 0
    daemon.end(signal.SIGKILL)
    vm.close(release=False)
    daemon.start()
    assert call(daemon, "read", "/local/domain/7/name").stdout.strip() == "lost"
    until(lambda: "domain 7: its VMM has not come back: released" in daemon.text())
    assert call(daemon, "read", "/local/domain/7/name").returncode == 1
    assert "lost" not in call(daemon, "ls", "/vm").stdout
    assert call(daemon, "read", "/tool/kept").stdout.strip() == "yes"


def test_another_domain_of_the_number_inherits_nothing(daemon: Daemon) -> None:
    vm = SoftVmm(daemon.folder / "vmm.sock", 7, name="first")
    domain = Domain(vm)
    store = XenStore(domain)
    store.write("data/secret", "mine")
    daemon.end(signal.SIGKILL)
    store.close()
    domain.close()
    vm.close(release=False)
    daemon.start()
    with SoftVmm(daemon.folder / "vmm.sock", 7, name="second") as vm:
        domain = Domain(vm)
        store = XenStore(domain)
        assert store.read("name") == "second"
        assert store.get("data/secret") is None
        store.close()
        domain.close()


def test_a_damaged_log_is_told_and_the_store_begins_empty(daemon: Daemon) -> None:
    assert call(daemon, "write", "/tool/kept", "yes").returncode == 0
    daemon.end(signal.SIGKILL)
    os.pwrite(daemon.state, b"\xff\xff\xff\x7f", 4096 + 4)
    daemon.start()
    assert "the log is damaged" in daemon.text()
    assert call(daemon, "read", "/tool/kept").returncode == 1
    assert call(daemon, "write", "/tool/kept", "again").returncode == 0
    daemon.end(signal.SIGKILL)
    daemon.start()
    assert call(daemon, "read", "/tool/kept").stdout.strip() == "again"


@pytest.mark.parametrize("what", ["none", "a file"])
def test_what_cannot_hold_a_log_is_refused(tmp_path: Path, what: str) -> None:
    fds: list[int] = []
    with contextlib.ExitStack() as stack:
        if what == "a file":
            fds.append(stack.enter_context((tmp_path / "file").open("w+b")).fileno())
        number = fds[0] if fds else 99
        done = subprocess.run(
            [sys.executable, "-m", "evtchnd", "--runtime-dir", str(tmp_path), "--state-fd", str(number)],
            pass_fds=fds,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert str(number) in done.stderr
    assert "Traceback" not in done.stderr
