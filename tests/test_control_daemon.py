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
from evtchnd.guest.blkfront import Blkfront, Queue
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

    def __init__(self, front: Blkfront | Queue, model: bytearray, seed: int, blocks: range | None = None) -> None:
        super().__init__()
        self.front = front
        self.blocks = blocks or range(SECTORS // 8)
        self.model = model
        self.answers = 0
        self.overtaken = 0
        self.whole = False  # only whole pages
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
                block = self._chance.choice(self.blocks)
                if block in busy:
                    continue
                content = hashlib.blake2b(b"%d %d" % (block, self.answers)).digest()
                data = content * (64 if self.whole or self._chance.random() < 0.5 else 8 * self._chance.randrange(1, 8))
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


def test_a_worker_with_four_queues_is_killed_under_load(tmp_path: Path) -> None:
    """Each queue has a load of its own, in flight in all of them: every request of each is answered once."""
    path = image(tmp_path)
    model = bytearray(path.read_bytes())
    with DaemonProcess(tmp_path) as daemon:
        before = daemon.descriptors()
        with Guest(daemon) as guest:
            front = guest.connect(daemon.attach(7, path), queues=4, depth=32, segments=1)
            share = SECTORS // 8 // 4
            loads = [
                Load(queue, model, number, range(number * share, (number + 1) * share))
                for number, queue in enumerate(front.queues)
            ]
            for load in loads:
                load.start()

            def all_above(answers: list[int]) -> bool:
                return any(load.error for load in loads) or all(
                    load.answers > least for load, least in zip(loads, answers, strict=True)
                )

            for kill in range(1, 5):
                until(lambda: all_above([kill * 100] * 4), "no progress")  # noqa: B023
                worker = daemon.worker(7)
                seen = [load.answers + 30 for load in loads]
                os.kill(worker, signal.SIGKILL)
                until(lambda: all_above(seen), "no progress after the kill")  # noqa: B023
                assert [load.error for load in loads] == [None] * 4
                assert daemon.worker(7) != worker
            for load in loads:
                load.stop.set()
            for load in loads:
                load.join(60)
                assert load.error is None and not load.is_alive()
                assert load.overtaken
            front.flush()
            info = daemon.call("info", 7)
            assert info["worker"]["restarts"] == 4
            assert info["ports"] == 6
            assert info["devices"][0]["counters"]["queues"] == 4
            front.disconnect()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        assert daemon.descriptors() == before
    assert path.read_bytes() == model


def test_a_kernel_after_kexec_has_fewer_queues(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Linux' blkfront with one queue writes no `multi-queue-num-queues`: that of the kernel before must be gone."""
    path = image(tmp_path)
    with Guest(daemon) as guest:
        devid = daemon.attach(7, path)
        old = guest.connect(devid, queues=4, depth=4, ring_pages=2)
        old.queues[2].submit_read(0, 8)
        old.queues[2].push()
        for state, wanted in ((5, 5), (6, 6), (1, 2)):  # what the new kernel drives the old one's device through
            old.bus.switch(state)  # type: ignore[arg-type]
            old.bus.wait_backend(wanted)  # type: ignore[arg-type]
        assert sorted(guest.store.ls(f"device/vbd/{devid}")) == [
            *("backend", "backend-id", "device-type", "protocol", "state", "virtual-device")
        ]
        old.release()
        new = guest.connect(devid)
        assert new.read(8, 8) == path.read_bytes()[4096:8192]
        assert daemon.call("info", 7)["ports"] == 3
        new.disconnect()
        more = guest.connect(devid, queues=2)
        assert more.queues[1].read(8, 8) == path.read_bytes()[4096:8192]
        more.disconnect()


def test_a_disk_grows_under_its_guest(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    with Guest(daemon) as guest:
        devid = daemon.attach(7, path)
        front = guest.connect(devid, queues=2)
        load = Load(front.queues[0], bytearray(path.read_bytes()), 3)
        load.start()
        until(lambda: load.answers > 50 or load.error, "no progress")
        state = f"{front.bus.backend_path}/state"
        with guest.store.watch(state) as changed:
            assert changed(10.0) == state  # the first one comes at once
            now = daemon.call("resize_block", 7, "xvda", 20 * MiB)
            assert now == {"domid": 7, "devid": devid, "vdev": "xvda", "sectors": 40960, "sector_size": 512}
            # written anew with its same value: that is how the guest learns of it
            assert changed(10.0) == state and guest.store.read(state) == "4"
        front.read_features()
        assert front.sectors == 40960
        front.queues[1].write(40952, b"e" * 4096)
        with pytest.raises(OSError, match="status -1"):
            front.queues[1].read(40960, 1)
        # its owner makes it longer, and says so
        os.truncate(path, 24 * MiB)
        with pytest.raises(OSError, match="status -1"):
            front.queues[1].write(45056, b"f" * 512)
        assert daemon.call("resize_block", 7, str(devid))["sectors"] == 49152
        front.queues[1].write(45056, b"f" * 512)
        # a worker that replaces this one knows it, too
        worker = daemon.worker(7)
        if worker != daemon.process.pid:
            os.kill(worker, signal.SIGKILL)
            until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
        assert front.queues[1].read(45056, 1) == b"f" * 512
        load.stop.set()
        load.join(60)
        assert load.error is None and not load.is_alive()
        for size, reason in (
            (8 * MiB, "8388608 bytes are less than the image has (25165824): it is not cut short"),
            (24 * MiB + 100, "25165924 bytes are no whole sectors of 512"),
        ):
            with pytest.raises(RuntimeError) as refused:
                daemon.call("resize_block", 7, "xvda", size)
            assert str(refused.value).endswith(reason)
        os.truncate(path, 12 * MiB)
        with pytest.raises(RuntimeError, match="not made smaller while it is connected"):
            daemon.call("resize_block", 7, "xvda")
        os.truncate(path, 24 * MiB)
        front.disconnect()
        os.truncate(path, 12 * MiB)
        assert daemon.call("resize_block", 7, "xvda")["sectors"] == 24576
        again = guest.connect(devid)
        assert again.sectors == 24576
        again.disconnect()


def test_a_passed_disk_grows_too(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    with Guest(daemon) as guest:
        with path.open("r+b") as file:
            guest.vm.client.disk(51728, "xvdb", file.fileno())
        front = guest.connect(51728)
        daemon.call("resize_block", 7, "xvdb", 20 * MiB)
        front.read_features()
        assert front.sectors == 40960 and path.stat().st_size == 20 * MiB
        front.disconnect()


def test_several_disks_each_with_a_manner_of_its_own(daemon: DaemonProcess, tmp_path: Path) -> None:
    """One comes and goes while others work."""
    paths = [image(tmp_path, f"{name}.img") for name in "abc"]
    with Guest(daemon) as guest:
        specs = [
            f"vdev=xvda,sector-size=4096,target={paths[0]}",
            f"vdev=xvdb,cache=none,no-discard,target={paths[1]}",
            f"vdev=xvdc,devtype=cdrom,target={paths[2]}",
        ]
        devids = [daemon.call("attach_block", 7, spec)["devid"] for spec in specs]
        first, second, third = (
            guest.connect(devid, queues=queues) for devid, queues in zip(devids, (2, 1, 1), strict=True)
        )
        assert (first.sector_size, first.sectors, first.info, first.can_discard) == (4096, SECTORS, 0, True)
        assert (second.sector_size, second.info, second.can_discard) == (512, 0, False)
        assert (third.info, third.readonly, third.can_discard) == (7, True, False)
        backend = [guest.store.read(f"device/vbd/{devid}/backend") for devid in devids]
        assert [guest.store.read(f"{path}/discard-enable") for path in backend] == ["1", "0", "0"]
        assert [guest.store.read(f"{path}/removable") for path in backend] == ["0", "0", "1"]
        assert [guest.store.read(f"{path}/mode") for path in backend] == ["w", "w", "r"]
        assert [guest.store.read(f"device/vbd/{devid}/device-type") for devid in devids] == ["disk", "disk", "cdrom"]
        cache = [(each["cache"], each["sector_size"], each["sectors"]) for each in daemon.call("info", 7)["devices"]]
        assert cache == [("writeback", 4096, SECTORS), ("none", 512, SECTORS), ("writeback", 512, SECTORS)]

        loads = [Load(first.queues[1], bytearray(paths[0].read_bytes()), 1)]
        loads[0].whole = True
        loads.append(Load(second, bytearray(paths[1].read_bytes()), 2))
        for load in loads:
            load.start()
        for _ in range(3):
            seen = [load.answers + 20 for load in loads]
            assert third.read(0, 8) == paths[2].read_bytes()[:4096]
            detach = threading.Thread(target=daemon.call, args=("detach_block", 7, "xvdc"))
            detach.start()
            third.bus.wait_backend(5)  # type: ignore[arg-type]
            third.disconnect()
            detach.join(60)
            until(lambda: all(x.error or x.answers > n for x, n in zip(loads, seen, strict=True)), "no progress")  # noqa: B023
            third = guest.connect(daemon.call("attach_block", 7, specs[2])["devid"])
        for load, path, front in zip(loads, paths, (first, second), strict=False):
            load.stop.set()
            load.join(60)
            assert load.error is None, load.error
            front.flush()
            assert path.read_bytes() == load.model
            front.disconnect()
        third.disconnect()


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
