"""The host fails: storages, descriptors, memory, the clock.

A guest gets an error or waits, never wrong data, never OKAY for a lie; one line says what and what to do; other disks,
other guests and the control plane go on.
"""

from __future__ import annotations

import ast
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import faultyfs
from daemonprocess import DaemonProcess, until
from evtchnd.blkif import Op, Status
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import GuestFault
from evtchnd_backends.geometry import is_local, length
from faultyfs import FSYNC, GETATTR, READ, WRITE, FaultyFs
from test_control_daemon import Guest

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts are root's to make")
needs_fuse = pytest.mark.skipif(bool(faultyfs.why_not()), reason=faultyfs.why_not())
NAME = "domain 7: vbd 51712"
PAGE = b"page" * 1024


@pytest.fixture(params=["io_uring", "threads"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, vbd={"engine": request.param}) as it:
        yield it


@contextmanager
def faulty(folder: Path, size: int = MIB) -> Iterator[FaultyFs]:
    with FaultyFs(folder / "faulty", size) as fs:
        fs.data[:] = random.Random(3).randbytes(size)
        yield fs


def image(folder: Path, name: str = "good.img", size: int = MIB) -> Path:
    path = folder / name
    path.write_bytes(random.Random(name).randbytes(size))
    return path


@contextmanager
def disks(daemon: DaemonProcess, *targets: Path) -> Iterator[list[Blkfront]]:
    """xvda, xvdb ... of domain 7, connected."""
    with Guest(daemon) as guest:
        fronts = [guest.connect(daemon.attach(7, path, f"xvd{'abc'[at]}")) for at, path in enumerate(targets)]
        yield fronts
        for front in fronts:
            front.disconnect()


def status(front: Blkfront, op: int, sector: int = 0, data: bytes = PAGE) -> int:
    """One request's answer."""
    if op == Op.READ:
        ident = front.submit_read(sector, 8)
    elif op == Op.WRITE:
        ident = front.submit_write(sector, data)
    else:
        ident = front.submit_flush()
    (done,) = front.complete()
    assert done.ident == ident
    return int(done.status)


def said(daemon: DaemonProcess, text: str) -> list[str]:
    return [line for line in daemon.text().splitlines() if text in line]


def works(front: Blkfront, model: Callable[[], bytes]) -> None:
    """Reads what its storage has, writes and flushes."""
    assert front.read(16, 8) == model()[8192:12288]
    new = random.randbytes(4096)
    front.write(24, new)
    front.flush()
    assert model()[12288:16384] == new


# ---- storages --------------------------------------------------------------------------------------------------------


@needs_fuse
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (5, "Input/output error: look at the storage (dmesg)"),
        (28, "No space left on device: make room where the image lies"),
        (30, "Read-only file system: the file system went read-only: look at the storage (dmesg)"),
        (122, "Disk quota exceeded: raise the quota of the image's owner"),
    ],
    ids=["EIO", "ENOSPC", "EROFS", "EDQUOT"],
)
def test_a_write_that_fails(daemon: DaemonProcess, tmp_path: Path, code: int, text: str) -> None:
    with faulty(tmp_path) as fs, disks(daemon, fs.image, good := image(tmp_path)) as (bad, other):
        before = bytes(fs.data)
        fs.fail[WRITE] = code
        for sector in (0, 9, 160):  # a whole page, and none
            assert status(bad, Op.WRITE, sector) == Status.ERROR
        assert fs.data == before
        assert bad.read(16, 8) == before[8192:12288]
        assert len(said(daemon, f"{NAME}: write at byte")) == len(said(daemon, f"{NAME}: write at byte 0: {text}")) == 1
        works(other, good.read_bytes)
        fs.fail.clear()
        works(bad, lambda: bytes(fs.data))


@needs_fuse
def test_a_read_that_fails(daemon: DaemonProcess, tmp_path: Path) -> None:
    with faulty(tmp_path) as fs, disks(daemon, fs.image, good := image(tmp_path)) as (bad, other):
        fs.fail[READ] = 5
        assert status(bad, Op.READ, 512) == Status.ERROR
        assert len(said(daemon, f"{NAME}: read at byte 262144: Input/output error: look at the storage")) == 1
        works(other, good.read_bytes)
        fs.fail.clear()
        assert status(bad, Op.READ, 512) == Status.OKAY
        works(bad, lambda: bytes(fs.data))


@needs_fuse
def test_a_flush_that_fails_once_fails_until_the_disk_is_attached_again(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Also by the next worker: the kernel has told of the lost write, and will say yes from then on."""
    with faulty(tmp_path) as fs, Guest(daemon) as guest:
        front = guest.connect(daemon.attach(7, fs.image))
        front.write(0, PAGE)
        fs.fail[FSYNC] = 5
        assert status(front, Op.FLUSH_DISKCACHE) == Status.ERROR
        fs.fail.clear()
        assert status(front, Op.FLUSH_DISKCACHE) == Status.ERROR
        assert status(front, Op.READ) == Status.OKAY
        worker = daemon.worker(7)
        os.kill(worker, signal.SIGKILL)
        until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
        assert status(front, Op.READ) == Status.OKAY
        assert status(front, Op.FLUSH_DISKCACHE) == Status.ERROR
        told = said(
            daemon, f"{NAME}: fdatasync: Input/output error: every flush fails until the disk is attached again"
        )
        assert len(told) == 1
        detach = threading.Thread(target=lambda: daemon.call("detach_block", 7, "xvda"))
        detach.start()
        front.disconnect()
        detach.join(30)
        front = guest.connect(daemon.attach(7, fs.image))
        works(front, lambda: bytes(fs.data))
        front.disconnect()


@needs_fuse
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE], ids=lambda op: op.name)
def test_a_storage_that_hangs_holds_up_its_disk_alone(daemon: DaemonProcess, tmp_path: Path, op: Op) -> None:
    held = {Op.READ: READ, Op.WRITE: WRITE, Op.FLUSH_DISKCACHE: FSYNC}[op]
    with faulty(tmp_path) as fs, ExitStack() as undo:
        good, far = image(tmp_path), image(tmp_path, "far.img")
        bad, other = undo.enter_context(disks(daemon, fs.image, good))
        guest = undo.enter_context(Guest(daemon, 8))
        theirs = guest.connect(daemon.attach(8, far))
        # whatever else its server is asked hangs, too
        fs.held |= {held, GETATTR}
        if op == Op.READ:
            bad.submit_read(512, 8)
        elif op == Op.WRITE:
            bad.submit_write(512, PAGE)
        else:
            bad.submit_flush()
        bad.push()
        until(lambda: fs.seen.get(held, 0) > 0, "it has not come to the storage")
        for _ in range(3):
            works(other, good.read_bytes)
            works(theirs, far.read_bytes)
        assert len(daemon.call("list")) == 2
        assert [each["vdev"] for each in daemon.call("info", 7)["devices"]] == ["xvda", "xvdb"]
        assert bad.in_flight == 1
        fs.release()
        (done,) = bad.complete()
        assert done.status == Status.OKAY
        if op == Op.READ:
            assert done.data == fs.data[262144:266240]
        if op == Op.WRITE:
            assert fs.data[262144:266240] == PAGE
        works(bad, lambda: bytes(fs.data))
        theirs.disconnect()


@needs_fuse
def test_which_file_systems_may_be_waited_for(tmp_path: Path) -> None:
    """Inline writes are for those that answer from this host; a length is known of the others, too, without asking."""
    path = image(tmp_path)
    with faulty(tmp_path) as fs, path.open("rb") as here, fs.image.open("rb") as there:
        assert is_local(here.fileno())
        assert not is_local(there.fileno())
        fs.held.add(GETATTR)
        assert length(here.fileno()) == length(there.fileno()) == (MIB, 1)
        path.unlink()
        assert length(here.fileno()) == (MIB, 0)


@needs_fuse
def test_short_writes_go_on_behind_what_is_done(daemon: DaemonProcess, tmp_path: Path) -> None:
    with faulty(tmp_path) as fs, disks(daemon, fs.image) as (front,):
        fs.most = 1000
        data = random.Random(5).randbytes(20480)
        front.write(8, data)
        front.flush()
        assert fs.data[4096:24576] == data
        fs.most = 1 << 30
        works(front, lambda: bytes(fs.data))


def test_a_write_beyond_a_limit_of_file_sizes(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A write ends short in the middle, and its rest fails: ERROR for all of it."""
    path = image(tmp_path)
    model = bytearray(path.read_bytes())
    with disks(daemon, path, good := image(tmp_path, "other.img")) as (front, other):
        worker = daemon.worker(7)
        before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (524288 + 2048, before[1]))
        assert status(front, Op.WRITE, 1024, random.randbytes(20480)) == Status.ERROR
        assert status(front, Op.WRITE, 1025, random.randbytes(4096)) == Status.ERROR
        front.write(0, PAGE)
        model[:4096] = PAGE
        assert len(said(daemon, f"{NAME}: write at byte 526336: File too large: a limit of file sizes")) == 1
        works(other, good.read_bytes)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, before)
        front.write(1024, PAGE * 6)
        model[524288:548864] = PAGE * 6
        front.flush()
        assert daemon.worker(7) == worker
    assert path.read_bytes() == model


@needs_root
def test_a_file_system_that_is_full(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A sparse image on a tmpfs that is smaller than it."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], check=True)
    try:
        path = small / "disk.img"
        path.write_bytes(PAGE)
        os.truncate(path, 4 * MIB)
        with disks(daemon, path, good := image(tmp_path)) as (front, other):
            written = [sector for sector in range(8, 8192, 8) if status(front, Op.WRITE, sector) == Status.OKAY]
            assert 64 < len(written) < 128
            for sector in [0, *written]:
                assert front.read(sector, 8) == PAGE
            assert len(said(daemon, "No space left on device: make room where the image lies")) == 1
            works(other, good.read_bytes)
            subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
            front.write(8000, PAGE)
            assert front.read(8000, 8) == PAGE
            front.flush()
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_image_that_is_cut_short_is_not_made_long_again(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    content = path.read_bytes()
    with disks(daemon, path, good := image(tmp_path, "other.img")) as (front, other):
        os.truncate(path, MIB // 2)
        assert status(front, Op.READ, 0) == Status.OKAY
        for op in (Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE):
            assert status(front, op, 1536) == Status.ERROR
        assert path.stat().st_size == MIB // 2
        assert len(said(daemon, f"{NAME}: read at byte 786432: no data: the image is shorter than its disk")) == 1
        works(other, good.read_bytes)
        with path.open("ab") as file:
            file.write(content[MIB // 2 :])
        works(front, path.read_bytes)


def test_an_image_that_is_deleted_is_told_of_and_can_be_rescued(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = image(tmp_path)
    with disks(daemon, path) as (front,):
        front.write(0, PAGE)
        path.unlink()
        image(tmp_path)  # another one of its name is none of this guest's business
        model = path.read_bytes()
        front.write(8, PAGE)
        front.flush()
        front.flush()
        (line,) = said(daemon, f"{NAME}: the image was deleted: it is gone when the disk is; until then it is /proc/")
        rescued = Path(line.rsplit(" ", 1)[1]).read_bytes()
        assert rescued[:8192] == PAGE * 2
        assert front.read(0, 16) == PAGE * 2
        assert path.read_bytes() == model


def test_an_image_that_never_had_a_name_is_no_fault(daemon: DaemonProcess, tmp_path: Path) -> None:
    with Guest(daemon) as guest:
        memory = os.memfd_create("image")
        os.truncate(memory, MIB)
        guest.vm.client.disk(51712, "xvda", memory)
        front = guest.connect(51712)
        works(front, lambda: os.pread(memory, MIB, 0))
        front.disconnect()
        os.close(memory)
        assert said(daemon, "deleted") == []


@needs_root
def test_a_block_device_whose_storage_goes_away(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A loop device reads nothing behind the end of its file: EIO."""
    backing = image(tmp_path, "backing.img", 4 * MIB)
    try:
        made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device can be made here")
    device = Path(made.stdout.strip())
    try:
        with disks(daemon, device, good := image(tmp_path)) as (front, other):
            assert front.read(0, 8) == backing.read_bytes()[:4096]
            os.truncate(backing, 2 * MIB)
            assert status(front, Op.READ, 6144) == Status.ERROR
            assert len(said(daemon, f"{NAME}: read at byte 3145728: Input/output error: look at the storage")) == 1
            assert status(front, Op.READ, 64) == Status.OKAY
            works(other, good.read_bytes)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@needs_root
def test_an_image_on_a_read_only_file_system(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        path = image(place)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
            with pytest.raises(RuntimeError, match=r"Read-only file system \(attach it read-only\?\)"):
                daemon.attach(7, path)
            front = guest.connect(daemon.attach(7, path, readonly=True))
            assert front.read(0, 8) == path.read_bytes()[:4096]
            assert status(front, Op.WRITE) == Status.ERROR
            front.disconnect()
    finally:
        subprocess.run(["umount", place], check=True)


# ---- descriptors, memory, the clock ----------------------------------------------------------------------------------


def test_a_worker_without_a_free_descriptor(tmp_path: Path) -> None:
    """What comes with a message is lost to it: it ends in order, and the next one has all of it."""
    with DaemonProcess(tmp_path) as daemon, disks(daemon, path := image(tmp_path)) as (front,):
        worker = daemon.worker(7)
        used = len(os.listdir(f"/proc/{worker}/fd"))
        limit = max(int(each) for each in os.listdir(f"/proc/{worker}/fd")) + 1
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))
        assert used <= limit
        with Guest(daemon, 8) as guest:
            theirs = guest.connect(daemon.attach(8, image(tmp_path, "theirs.img")))
            daemon.attach(7, image(tmp_path, "more.img"), "xvdb")
            theirs.read(0, 8)
            until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
            works(front, path.read_bytes)
            theirs.read(0, 8)
            theirs.disconnect()
        assert len(said(daemon, "starting another")) == 1


def test_a_worker_without_memory(tmp_path: Path) -> None:
    """The device that needs more is off, with a line; what is served goes on, in the same worker."""
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest, Guest(daemon, 8) as neighbour:
        path, far = image(tmp_path), image(tmp_path, "far.img")
        front = guest.connect(daemon.attach(7, path))
        theirs = neighbour.connect(daemon.attach(8, far))
        worker = daemon.worker(7)
        pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
        resource.prlimit(worker, resource.RLIMIT_AS, (pages * 4096 + 65536, -1))
        devid = daemon.attach(7, image(tmp_path, "more.img"), "xvdb")
        more = Blkfront(guest.domain, guest.store, devid, timeout=3.0)  # nobody answers it
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                more.connect()
            except GuestFault as exc:
                failed.append(exc)

        waiting = threading.Thread(target=connect)
        waiting.start()
        until(lambda: said(daemon, "domain 7: vbd 51728: journal: "), "no line")
        (line,) = said(daemon, "domain 7: vbd 51728: journal: ")
        assert line.endswith("of address space: Cannot allocate memory: off")
        works(theirs, far.read_bytes)
        assert len(daemon.call("list")) == 2
        waiting.join(60)
        assert len(failed) == 1
        more.release()
        works(front, path.read_bytes)
        assert daemon.call("info", 7)["worker"] == {"pid": worker, "restarts": 0, "failing": ""}
        theirs.disconnect()
        front.disconnect()


ROOT = Path(__file__).parent.parent
# The hour of a log line and of a captured packet is people's; nothing is decided by it.
OF_THE_HOUR = {"time_ns": {"backends/evtchnd_backends/capture.py", "evtchnd/_core/framelog.py"}}


def test_nothing_is_decided_by_the_wall_clock() -> None:
    """Every deadline, pause and rate is of the monotonic clock: neither NTP nor `date -s` is seen by a guest."""
    found: dict[str, set[str]] = {}
    for path in [*ROOT.glob("evtchnd/**/*.py"), *ROOT.glob("backends/**/*.py")]:
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [node.attr] if node.value.id in ("time", "datetime") else []
            for name in names:
                if name in ("time", "time_ns", "datetime", "now", "utcnow", "date", "CLOCK_REALTIME"):
                    found.setdefault(name, set()).add(where)
    assert found == OF_THE_HOUR


JUMPS = """
import itertools, time
import daemonprocess
real, turns = time.time, itertools.count()
time.time = lambda: real() + (3e8 if next(turns) % 2 else -3e8)
time.time_ns = lambda: int(time.time() * 1e9)
daemonprocess.main()
"""


def test_a_clock_that_jumps_by_years(tmp_path: Path) -> None:
    script = tmp_path / "jumps.py"
    script.write_text(JUMPS)
    with DaemonProcess(tmp_path, script=str(script)) as daemon, disks(daemon, path := image(tmp_path)) as (front,):
        works(front, path.read_bytes)
        worker = daemon.worker(7)
        os.kill(worker, signal.SIGKILL)
        until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
        works(front, path.read_bytes)
        for _ in range(20):
            os.truncate(path, 4096)
            assert status(front, Op.READ, 512) == Status.ERROR
        # one line a minute, by a clock that goes on
        assert len(said(daemon, "no data: the image is shorter")) == 1
        os.truncate(path, MIB)
