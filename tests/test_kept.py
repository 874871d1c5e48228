"""What outlives a control plane: its state of a domain, the lock that says that old requests have ended, the store."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evtchnd._core.uring import Uring
from evtchnd.control.config import Vbd
from evtchnd.control.disk import Disk, Image
from evtchnd.control.fdstore import DescriptorStore
from evtchnd.control.kept import left_of
from evtchnd.control.sdnotify import Notifier
from evtchnd.control.state import OLDEST, VERSION, DiskState, DomainState, State, VersionError
from evtchnd.errors import HostError
from faultyfs import WRITE, FaultyFs, why_not
from keptdaemon import until
from scale import scaled


def a_disk(devid: int = 51712, **values: object) -> DiskState:
    said = {"vdev": "xvda", "target": "/x", "sectors": 8, "sector_size": 512, "readonly": False, "cdrom": False}
    return DiskState(devid=devid, direct=False, discard=True, **{**said, **values})  # type: ignore[arg-type]


def a_domain(*disks: DiskState, domid: int = 7) -> DomainState:
    return DomainState(domid=domid, uuid="0-0", uid=0, disks=list(disks))


@pytest.fixture
def state() -> Iterator[State]:
    made = State.create("state")
    yield made
    made.close()
    os.close(made.fd)


def read_again(state: State) -> DomainState:
    """As the next process does."""
    other = State(state.fd)
    try:
        return other.read()
    finally:
        other.close()


class Dies(Exception):
    pass


class Words:
    """The shared words, of which only the first `most` stores happen."""

    def __init__(self, words: object, most: int) -> None:
        self._words, self._left = words, most

    def load(self, at: int) -> int:
        return self._words.load(at)  # type: ignore[attr-defined, no-any-return]

    def store(self, at: int, value: int) -> None:
        if not self._left:
            raise Dies
        self._left -= 1
        self._words.store(at, value)  # type: ignore[attr-defined]


def test_a_process_that_dies_leaves_what_was_said_before_or_now(state: State) -> None:
    """At each store. (The data itself is written before any of them.)"""
    before, now = a_domain(), a_domain(a_disk(connected={"queues": [1]}))
    words = state._words
    outcomes = []
    for most in range(6):
        state._words = words
        state.write(before)
        state.write(before)  # both areas say it
        state._words = Words(words, most)  # type: ignore[assignment]
        with contextlib.suppress(Dies):
            state.write(now)
        outcomes.append(read_again(state))
    state._words = words
    assert outcomes == [before] * 4 + [now] * 2


def test_what_cannot_be_read_says_why(state: State) -> None:
    with pytest.raises(HostError, match="is empty"):
        read_again(state)
    state.write(a_domain(a_disk()))
    assert read_again(state) == a_domain(a_disk())
    for version in (VERSION + 1, OLDEST - 1):
        os.pwrite(state.fd, version.to_bytes(4, "little"), 128)
        with pytest.raises(VersionError, match=f"has version {version}, and this evtchnd reads {OLDEST} to {VERSION}"):
            read_again(state)
    os.pwrite(state.fd, VERSION.to_bytes(4, "little"), 128)
    os.pwrite(state.fd, (1 << 31).to_bytes(4, "little"), 132)
    with pytest.raises(HostError, match="damaged"):
        read_again(state)
    os.pwrite(state.fd, (7).to_bytes(4, "little"), 64)
    with pytest.raises(HostError, match="damaged"):
        read_again(state)


@pytest.mark.parametrize("size", [0, 100, 4096, 5000, 4096 + (4 << 20)])
def test_a_truncated_one_is_none(size: int) -> None:
    whole = State.create("whole")
    whole.write(a_domain())
    fd = os.memfd_create("short", os.MFD_ALLOW_SEALING)
    os.write(fd, os.pread(whole.fd, size, 0))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(HostError):
        State(fd)
    whole.close()
    os.close(whole.fd)
    os.close(fd)


def test_one_that_can_be_cut_short_is_not_trusted() -> None:
    whole = State.create("whole")
    fd = os.memfd_create("open")
    os.ftruncate(fd, os.fstat(whole.fd).st_size)
    os.pwrite(fd, os.pread(whole.fd, 4096, 0), 0)
    with pytest.raises(HostError, match="cut short"):
        State(fd)
    whole.close()
    os.close(whole.fd)
    os.close(fd)


def test_fields_that_this_version_does_not_know_are_passed_over(state: State) -> None:
    """And those that are missing have defaults: most changes need no new version."""
    import msgspec

    said = msgspec.json.decode(msgspec.json.encode(a_domain(a_disk())))
    said["later"] = {"x": 1}
    del said["disks"][0]["passed"]
    assert msgspec.json.decode(msgspec.json.encode(said), type=DomainState) == a_domain(a_disk())


def test_what_was_left_is_sorted_and_what_is_missing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    state = State.create("state")
    state.write(a_domain(a_disk(), a_disk(51728)))
    state.close()
    made = Disk(
        7, 51712, "xvda", Image(os.memfd_create("image"), 4096), target="/x", readonly=False, cdrom=False, vbd=Vbd()
    )
    passed = {
        "domain-7": [state.fd],
        "domain-7/vbd-51712/image": [made.fd],
        "domain-7/vbd-51712/journal": [made.journal],
    }
    passed |= {"domain-7/vbd-51728/journal": [os.memfd_create("journal")], "domain-7/strange": [os.memfd_create("x")]}
    before = len(list(Path("/proc/self/fd").iterdir()))
    left = left_of(passed)[7]
    assert list(left.disks) == [51712]
    assert "domain 7: vbd 51728: cannot be resumed: its image is not among what was kept" in caplog.text
    assert left.names == set(passed)
    left.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 5


# ---- the lock


def test_requests_of_a_killed_worker_end_before_the_journal_is_free(tmp_path: Path) -> None:
    """Of a worker whose io_uring nobody has a copy of. The newer data stays, as after a replay."""
    size, depth = 1 << 20, 8
    path = tmp_path / "image"
    path.write_bytes(bytes(size * depth))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    disk = Disk(7, 51712, "xvda", Image(fd, size * depth), target="x", readonly=False, cdrom=False, vbd=Vbd())
    old, new = mmap.mmap(-1, size), mmap.mmap(-1, size)
    old.write(b"o" * size)
    new.write(b"n" * size)
    for _ in range(scaled(60)):
        assert disk.free()
        lent = disk.lend()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                own = Uring(depth, eventfd=os.eventfd(0))
                own.hold(lent)
                array = (ctypes.c_uint64 * 2)(ctypes.addressof(ctypes.c_char.from_buffer(old)), size)
                for tag in range(depth):
                    own.writev(fd, ctypes.addressof(array), 1, tag * size, tag)
                own.submit()
                os.write(tell, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(lent)
        os.read(told, 1)
        assert not disk.free()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        end = time.monotonic() + 30
        while not disk.free():
            assert time.monotonic() < end
            time.sleep(0.001)
        for tag in range(depth):
            assert os.pwritev(fd, [new], tag * size) == size
        time.sleep(0.005)
        assert path.read_bytes() == b"n" * (size * depth)
        os.close(told)
        os.close(tell)
    for each in disk.close():
        os.close(each)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_write_that_outlives_its_worker_keeps_the_journal_locked(tmp_path: Path) -> None:
    """Of a storage that takes its time: the process is long gone, and nobody may replay yet."""
    with FaultyFs(tmp_path / "slow", 1 << 20) as slow:
        fd = os.open(slow.image, os.O_RDWR | os.O_DIRECT)
        disk = Disk(7, 51712, "xvda", Image(fd, 1 << 20), target="x", readonly=False, cdrom=False, vbd=Vbd())
        page = mmap.mmap(-1, 4096)
        page.write(b"o" * 4096)
        slow.held.add(WRITE)
        lent = disk.lend()
        pid = os.fork()
        if pid == 0:
            try:
                own = Uring(8, eventfd=os.eventfd(0))
                own.hold(lent)
                array = (ctypes.c_uint64 * 2)(ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096)
                own.writev(fd, ctypes.addressof(array), 1, 8192, 1)
                own.submit()
                signal.pause()
            finally:
                os._exit(1)
        os.close(lent)
        until(lambda: slow.waiting, "the write was not begun")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for _ in range(20):
            assert not disk.free()
            time.sleep(0.01)
        slow.release()
        until(disk.free, "the journal is locked for ever")
        assert slow.data[8192:12288] == b"o" * 4096
        page.close()
        for each in disk.close():
            os.close(each)


def test_the_io_uring_alone_keeps_the_journal_locked() -> None:
    """Whoever has it, and whatever else is closed: requests that the kernel goes on with hold it."""
    disk = Disk(7, 51712, "xvda", Image(os.memfd_create("x"), 512), target="x", readonly=False, cdrom=False, vbd=Vbd())
    eventfd = os.eventfd(0)
    lent = disk.lend()
    ring = Uring(8, eventfd=eventfd)
    ring.hold(lent)
    os.close(lent)
    assert not disk.free()
    again = disk.lend()  # a worker of the same control plane, which has seen the old one's ring run dry
    ring.close()
    assert not disk.free()
    os.close(again)
    end = time.monotonic() + 30
    while not disk.free():
        assert time.monotonic() < end
        time.sleep(0.001)
    for each in disk.close():
        os.close(each)
    os.close(eventfd)


# ---- the store


class Manager:
    """The service manager's end: what it was told, in order; barriers are answered unless `deaf`."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        self.address = str(path)
        self.said: list[str] = []
        self.deaf = False
        asyncio.get_running_loop().add_reader(self.sock.fileno(), self._read)

    def _read(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 253)
        text = data.decode()
        if not (self.deaf and text == "BARRIER=1"):
            for fd in fds:
                os.close(fd)
        self.said.append(text.replace("\n", " "))

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.sock.fileno())
        self.sock.close()


async def test_the_store_is_told_and_waited_for(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    store = DescriptorStore(Notifier(manager.address), ["vmm"], 4)
    with (tmp_path / "file").open("wb") as file:
        await store.keep({"a": file.fileno(), "b": file.fileno()}, "domain 7")
        assert manager.said == ["FDSTORE=1 FDNAME=a FDPOLL=0", "FDSTORE=1 FDNAME=b FDPOLL=0", "BARRIER=1"]
        with pytest.raises(HostError, match=r"domain 8: 2 descriptors more do not fit .* it holds 3 of 4"):
            await store.keep({"c": file.fileno(), "d": file.fileno()}, "domain 8")
        await store.forget(["a"])
        manager.said.clear()
        await store.keep({"c": file.fileno(), "d": file.fileno()}, "domain 8")
        assert manager.said[-1] == "BARRIER=1"
        store.over = True
        manager.said.clear()
        await store.keep({"e": file.fileno()}, "domain 9")
        await store.forget(["c"])
        await asyncio.sleep(0.05)
        assert manager.said == []
    manager.close()


async def test_what_the_manager_does_not_take_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evtchnd.control.fdstore._TAKEN_S", 0.2)
    manager = Manager(tmp_path / "notify")
    manager.deaf = True
    store = DescriptorStore(Notifier(manager.address), [], 4)
    with (tmp_path / "file").open("wb") as file, pytest.raises(HostError, match=r"domain 7: .*BARRIER=1"):
        await store.keep({"a": file.fileno()}, "domain 7")
    await asyncio.sleep(0.05)
    assert manager.said[-1] == "FDSTOREREMOVE=1 FDNAME=a"
    store.require(4, "all of it")
    manager.close()


async def test_a_manager_that_has_gone_costs_what_it_would_have_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DescriptorStore(Notifier(str(tmp_path / "nobody")), ["a"], 4)
    await store.forget(["a"])
    assert "a and what belongs to it is not let go: the service manager does not take FDSTOREREMOVE=1" in caplog.text
    with pytest.raises(HostError, match="domain 7: the service manager does not take FDSTORE=1"):
        await store.keep({"b": 0}, "domain 7")


async def test_without_a_manager_nothing_is_kept_and_nothing_refused() -> None:
    store = DescriptorStore(Notifier(), [], 0)
    assert not store
    store.require(100, "domain 7")
    await store.keep({"a": 0}, "domain 7")
    await store.forget(["a"])
