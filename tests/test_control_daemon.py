"""The whole path: a soft VMM, the daemon in its own process, its worker, blkback, an image file."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

MiB = 1 << 20
SECTORS = 16 * MiB // 512


class Guest:
    """A soft domain and its drivers. A context manager: what it took of the machine is given back."""

    def __init__(self, daemon: DaemonProcess, domid: int = 7) -> None:
        self.undo = ExitStack()
        with ExitStack() as undo:
            self.vm = undo.enter_context(SoftVmm(daemon.vmm_socket, domid, memory=32 * MiB))
            self.domain = Domain(self.vm)
            undo.callback(self.domain.close)
            self.store = XenStore(self.domain)
            undo.callback(self.store.close)
            self.undo = undo.pop_all()

    def connect(self, devid: int, **how: Any) -> Blkfront:
        """A frontend, connected."""
        front = Blkfront(self.domain, self.store, devid, **how)
        front.connect()
        return front

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # a test that fails leaves frontends connected: what that breaks here must not hide why
        with suppress(Exception) if kind is not None else nullcontext():
            self.undo.close()


def image(folder: Path, name: str = "disk.img", size: int = 16 * MiB) -> Path:
    path = folder / name
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.fixture(params=[False, True], ids=["workers", "single"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, single=request.param) as running:
        yield running


def test_a_disk_from_attach_to_detach(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    model = bytearray(path.read_bytes())
    before = daemon.descriptors()
    with Guest(daemon) as guest:
        assert [each["state"] for each in daemon.call("list")] == ["running"]
        assert guest.store.read("name") == "soft7"
        devid = daemon.attach(7, path)
        front = guest.connect(devid)
        assert front.sectors == SECTORS
        chance = random.Random(1)
        for _ in range(50):
            sector, count = chance.randrange(SECTORS - 88), chance.randrange(1, 88)
            if chance.random() < 0.5:
                data = chance.randbytes(count * 512)
                front.write(sector, data)
                model[sector * 512 : sector * 512 + len(data)] = data
            else:
                assert front.read(sector, count) == model[sector * 512 : (sector + count) * 512]
        front.flush()
        info = daemon.call("info", 7)
        assert info["devices"][0]["counters"]["requests"] >= 51
        assert info["devices"][0]["state"] == 4
        assert info["ports"] == 3  # store, console, disk
        gone: dict[str, object] = {}
        detach = threading.Thread(target=lambda: gone.update(daemon.call("detach_block", 7, "xvda")))
        detach.start()
        front.disconnect()
        detach.join(60)
        assert gone == {"domid": 7, "devid": devid, "vdev": "xvda", "forced": False}
        assert guest.store.get(f"device/vbd/{devid}/backend") is None
    assert path.read_bytes() == model
    until(lambda: daemon.call("list") == [], "the domain is still there")
    assert daemon.descriptors() == before


def test_domains_come_and_go_and_leave_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    counts = set()
    for _ in range(3):
        with Guest(daemon) as guest:
            devid = daemon.attach(7, path)
            front = guest.connect(devid)
            front.read(0, 8)
            front.disconnect()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        counts.add(daemon.descriptors())
    assert len(counts) == 1


def test_what_cannot_be_attached(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    with Guest(daemon, 7), Guest(daemon, 8):
        before = daemon.descriptors()
        for target, vdev, reason in (
            (tmp_path / "missing.img", "xvda", "missing.img: No such file"),
            (tmp_path, "xvda", "Is a directory"),
            (Path("/dev/null"), "xvda", "neither a file nor a block device"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                daemon.attach(7, target, vdev)
        assert daemon.descriptors() == before
        daemon.attach(7, path)
        with pytest.raises(RuntimeError, match="xvda is there already"):
            daemon.attach(7, path)
        with pytest.raises(RuntimeError, match="in use by another disk"):
            daemon.attach(8, path)
        with pytest.raises(RuntimeError, match="domain 9 is not there"):
            daemon.attach(9, path)
        with pytest.raises(RuntimeError, match="no disk xvdb"):
            daemon.call("detach_block", 7, "xvdb")
        # nobody is connected to it: it goes at once
        assert daemon.call("detach_block", 7, "xvda")["forced"] is False
        daemon.attach(8, path)


def test_domains_of_one_uuid_have_their_own_vm(daemon: DaemonProcess) -> None:
    """Soft domains say none, which is a uuid of zeros."""

    def name(guest: Guest) -> str:
        return guest.store.read(guest.store.read("vm") + "/name")

    with Guest(daemon, 7) as guest:
        with Guest(daemon, 8) as other:
            assert [name(guest), name(other)] == ["soft7", "soft8"]
        until(lambda: len(daemon.call("list")) == 1, "the domain is still there")
        assert name(guest) == "soft7"


def test_a_vmm_that_dies_ends_its_domain_alone(daemon: DaemonProcess, tmp_path: Path) -> None:
    other = image(tmp_path, "other.img")
    path = image(tmp_path)
    with Guest(daemon, 8) as guest:
        front = guest.connect(daemon.attach(8, other))
        before = daemon.descriptors()
        vm = SoftVmm(daemon.vmm_socket, 7, memory=32 * MiB)
        daemon.attach(7, path)
        vm.close(release=False)
        until(lambda: len(daemon.call("list")) == 1, "the domain is still there")
        assert daemon.descriptors() == before
        assert front.read(0, 8) == other.read_bytes()[:4096]
        front.disconnect()


class Load(threading.Thread):
    """A checked write load: every write has content of its own, the model has what was answered.

    Whole pages are written at once, others by the io_uring: so answers come in another order than requests, which is
    what makes a ring alone too little to know what is due.
    """

    def __init__(self, front: Blkfront, model: bytearray, seed: int) -> None:
        super().__init__()
        self.front = front
        self.model = model
        self.answers = 0
        self.overtaken = 0
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._chance = random.Random(seed)

    def run(self) -> None:
        try:
            self._run()
        except BaseException as exc:
            self.error = exc

    def _run(self) -> None:
        open_: dict[int, tuple[int, bytes]] = {}  # by ident, in the order of submission
        busy: set[int] = set()
        while not self.stop.is_set() or open_:
            while len(open_) < 24 and not self.stop.is_set() and self.front.room:
                block = self._chance.randrange(SECTORS // 8)
                if block in busy:
                    continue
                content = hashlib.blake2b(b"%d %d" % (block, self.answers)).digest()
                data = content * (64 if self._chance.random() < 0.5 else 8 * self._chance.randrange(1, 8))
                open_[self.front.submit_write(block * 8, data)] = (block, data)
                busy.add(block)
            self.front.push()
            for done in self.front.complete(30.0):
                self.overtaken += done.ident != next(iter(open_))
                block, data = open_.pop(done.ident)  # KeyError: answered twice
                assert done.status == 0
                busy.remove(block)
                self.model[block * 4096 : block * 4096 + len(data)] = data
                self.answers += 1


def test_a_worker_that_is_killed_under_load_is_replaced(tmp_path: Path) -> None:
    path = image(tmp_path)
    model = bytearray(path.read_bytes())
    with DaemonProcess(tmp_path) as daemon:
        before = daemon.descriptors()
        with Guest(daemon) as guest:
            front = guest.connect(daemon.attach(7, path), depth=32, segments=1)
            load = Load(front, model, 5)
            load.start()
            for kill in range(1, 4):
                until(lambda: load.answers > kill * 200 or load.error, "no progress")  # noqa: B023
                worker = daemon.worker(7)
                seen = load.answers
                os.kill(worker, signal.SIGKILL)
                until(lambda: load.answers > seen + 100 or load.error, "no progress after the kill")  # noqa: B023
                assert load.error is None, load.error
                assert daemon.worker(7) != worker
            load.stop.set()
            load.join(60)
            assert load.error is None, load.error
            assert not load.is_alive()
            front.flush()
            assert load.overtaken
            assert front.read(0, 8) == model[:4096]
            info = daemon.call("info", 7)
            assert info["worker"]["restarts"] == 3
            assert daemon.text().count("killed by SIGKILL: starting another") == 3
            front.disconnect()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        assert daemon.descriptors() == before
    assert path.read_bytes() == model


def test_no_process_is_left_when_the_control_plane_dies(tmp_path: Path) -> None:
    path = image(tmp_path)
    daemon = DaemonProcess(tmp_path)
    vm = SoftVmm(daemon.vmm_socket, 7, memory=32 * MiB)
    daemon.attach(7, path)
    worker = daemon.worker(7)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(daemon.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    daemon.process.kill()
    daemon.process.wait()
    for pid in [worker, *map(int, children)]:
        until(lambda: not _runs(pid), f"process {pid} runs still")  # noqa: B023
    vm.close(release=False)
    for pipe in (daemon.process.stdin, daemon.process.stdout):
        assert pipe is not None
        pipe.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_the_zygote_and_a_line_says_so(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, Guest(daemon):
        worker = daemon.worker(7)
        stat = Path(f"/proc/{worker}/stat").read_text()
        zygote = int(stat.rpartition(")")[2].split()[1])
        os.kill(zygote, signal.SIGKILL)
        until(lambda: not _runs(worker), "the worker runs still")
        until(lambda: "the process that starts workers has ended: restart evtchnd" in daemon.text(), "no line")
        assert daemon.call("info", 7)["worker"]["pid"] == 0
