"""The io_uring, in both forms: the Python form runs this file again in a process of its own."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evtchnd._core import uring
from evtchnd._core.uring import Uring, descriptor_of, inflight_of, transfer
from evtchnd.errors import HostError
from scale import scaled


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def ring(event: int) -> Iterator[Uring]:
    try:
        ring = Uring(8, eventfd=event)
    except HostError as error:
        pytest.skip(str(error))
    yield ring
    ring.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, bytes(range(256)) * 64, 0)
    yield fd
    os.close(fd)


class Vectors:
    """An array of struct iovec over private buffers."""

    def __init__(self, *parts: bytes | int) -> None:
        self.buffers = [
            ctypes.create_string_buffer(part) if isinstance(part, int) else ctypes.create_string_buffer(part, len(part))
            for part in parts
        ]
        self.array = (ctypes.c_uint64 * (2 * len(parts)))()
        for index, buffer in enumerate(self.buffers):
            self.array[2 * index] = ctypes.addressof(buffer)
            self.array[2 * index + 1] = len(buffer)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.array)

    @property
    def count(self) -> int:
        return len(self.buffers)

    def data(self) -> bytes:
        return b"".join(bytes(buffer) for buffer in self.buffers)


def reaped(ring: Uring, count: int) -> dict[int, int]:
    """The results of `count` completions, by tag; each tag once."""
    found: dict[int, int] = {}
    while len(found) < count:
        if not ring.pending():
            select.select([ring.eventfd], [], [], 10)
        for tag, result in ring.reap():
            assert tag not in found
            found[tag] = result
    return found


def test_reads_and_writes(ring: Uring, file: int) -> None:
    out = Vectors(b"a" * 512, b"b" * 1024)
    back = Vectors(1024, 512)
    assert ring.writev(file, out.address, out.count, 512, 2**64 - 1)
    assert ring.submit() == 1
    assert reaped(ring, 1) == {2**64 - 1: 1536}
    assert ring.readv(file, back.address, back.count, 512, 0)
    assert ring.submit() == 1
    assert reaped(ring, 1) == {0: 1536}
    assert back.data() == out.data()
    assert os.pread(file, 2048, 0) == bytes(range(256)) * 2 + out.data()
    assert ring.inflight == 0


def test_offsets_above_four_gigabytes(ring: Uring, file: int) -> None:
    offset = (1 << 40) + 512
    out = Vectors(b"far away")
    assert ring.writev(file, out.address, 1, offset, 1)
    assert reaped(ring, 1) == {1: 8}
    assert os.pread(file, 8, offset) == b"far away"


def test_sync_and_holes(ring: Uring, file: int) -> None:
    assert ring.fsync(file, 1)
    assert ring.fsync(file, 2, datasync=False)
    assert ring.fallocate(file, 1 | 2, 4096, 4096, 3)
    assert reaped(ring, 3) == {1: 0, 2: 0, 3: 0}
    assert os.pread(file, 16384, 0) == bytes(range(256)) * 16 + bytes(4096) + bytes(range(256)) * 32


def test_errors_are_results(ring: Uring, file: int) -> None:
    back = Vectors(16)
    assert ring.readv(9999, back.address, 1, 0, 1)
    assert ring.readv(file, 1, 1, 0, 2)  # an array of iovecs at a bad address
    assert ring.readv(file, back.address, 1, 1 << 40, 3)  # behind the end
    assert ring.readv(file, back.address, 1, 0, 4)
    assert reaped(ring, 4) == {1: -errno.EBADF, 2: -errno.EFAULT, 3: 0, 4: 16}


def test_is_bounded_and_goes_on_when_there_is_room(ring: Uring, file: int) -> None:
    back = Vectors(16)
    for tag in range(ring.entries):
        assert ring.readv(file, back.address, 1, 0, tag)
    assert not ring.readv(file, back.address, 1, 0, 99)
    assert not ring.fsync(file, 99)
    assert ring.inflight == ring.queued == ring.entries == 8
    assert sorted(reaped(ring, 8)) == list(range(8))
    assert ring.fsync(file, 99)
    assert reaped(ring, 1) == {99: 0}


def test_one_submission_for_a_batch_and_one_eventfd(ring: Uring, file: int, event: int) -> None:
    back = [Vectors(16) for _ in range(5)]
    for tag, vectors in enumerate(back):
        assert ring.readv(file, vectors.address, 1, 16 * tag, tag)
    assert not select.select([event], [], [], 0)[0]
    assert ring.submit() == 5
    assert ring.submit() == 0
    assert len(reaped(ring, 5)) == 5
    assert 1 <= os.eventfd_read(event) <= 5
    assert b"".join(vectors.data() for vectors in back) == bytes(range(80))


def test_a_look_submits_what_is_queued(ring: Uring, file: int) -> None:
    assert not ring.pending()
    assert ring.fsync(file, 7)
    ring.pending()
    assert ring.queued == 0
    assert reaped(ring, 1) == {7: 0}
    assert not ring.pending()


def test_every_tag_comes_back_once(ring: Uring, file: int) -> None:
    count, sent, seen = scaled(200_000), 0, 0
    back = Vectors(16)
    while seen < count:
        while sent < count and ring.readv(file, back.address, 1, 0, sent):
            sent += 1
        ring.submit()
        for tag, result in ring.reap():
            assert result == 16
            assert seen <= tag < sent
            seen += 1
    assert ring.inflight == 0


def test_leaves_no_descriptor(event: int, ring: Uring) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(scaled(1000)):
        other = Uring(8, eventfd=event)
        other.close()
        other.close()
    assert count() == before


def test_a_closed_ring_does_nothing(ring: Uring, file: int) -> None:
    ring.close()
    assert not ring.fsync(file, 1)
    assert ring.submit() == 0
    assert not ring.pending()
    assert ring.reap() == []
    assert ring.fd == -1


def test_refused_by_the_host(event: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(HostError, match="io_uring: Too many open files"):
            Uring(8, eventfd=event)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refused_eventfd(file: int, ring: Uring) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="eventfd"):
        Uring(8, eventfd=file)
    assert len(os.listdir("/proc/self/fd")) == before


def test_transfer(file: int, tmp_path: Path) -> None:
    out, back = Vectors(b"x" * 100, b"y" * 28), Vectors(28, 100)
    assert transfer(file, True, out.address, 2, 1000) == 128
    assert transfer(file, False, back.address, 2, 1000) == 128
    assert back.data() == out.data()
    assert transfer(file, False, back.address, 2, 1 << 40) == 0
    assert transfer(9999, False, back.address, 2, 0) == -errno.EBADF
    assert transfer(file, False, back.address, 2, 0, 1 << 20) == -errno.EOPNOTSUPP


def in_child(run: Callable[[int], None]) -> tuple[int, int, int]:
    """Forks; -> its pid, pidfd and the number it writes to the pipe it gets."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(tell)
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    number = int(os.read(told, 16))
    os.close(told)
    return pid, os.pidfd_open(pid), number


def drained(fd: int) -> None:
    for _ in range(3000):
        if inflight_of(fd) == 0:
            return
        time.sleep(0.01)
    pytest.fail("still in flight after 30 s")


def test_another_process_sees_what_is_in_flight(ring: Uring) -> None:
    empty, fill = os.pipe()

    def run(tell: int) -> None:
        own = Uring(8, eventfd=os.eventfd(0))
        back = Vectors(16)
        own.readv(empty, back.address, 1, 0, 1)
        own.readv(empty, back.address, 1, 0, 2)
        own.submit()
        own.fsync(empty, 3)  # queued only: never runs, does not count
        os.write(tell, b"%d" % own.fd)
        signal.pause()

    pid, pidfd, number = in_child(run)
    try:
        copy = descriptor_of(pidfd, number)
        assert not os.get_inheritable(copy)
        assert inflight_of(copy) == 2
        os.write(fill, b"x")
        for _ in range(3000):
            if inflight_of(copy) == 1:
                break
            time.sleep(0.01)
        assert inflight_of(copy) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # A read that waits for a pipe outlives its process, as a write that the storage holds up does.
    assert inflight_of(copy) <= 1
    os.write(fill, b"x")
    drained(copy)
    with pytest.raises(HostError, match="pidfd_getfd"):
        descriptor_of(pidfd, number)
    for fd in (copy, pidfd, empty, fill):
        os.close(fd)


def test_writes_of_a_killed_process_end_before_a_replay(ring: Uring, tmp_path: Path) -> None:
    """Once nothing is in flight, nothing of the old writes comes later: the newer data stays."""
    size, depth = 1 << 20, 8
    path = tmp_path / "image"
    path.write_bytes(bytes(size * depth))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    old, new = mmap.mmap(-1, size), mmap.mmap(-1, size)
    old.write(b"o" * size)
    new.write(b"n" * size)

    def run(tell: int) -> None:
        own = Uring(depth, eventfd=os.eventfd(0))
        array = (ctypes.c_uint64 * 2)(ctypes.addressof(ctypes.c_char.from_buffer(old)), size)
        for tag in range(depth):
            own.writev(fd, ctypes.addressof(array), 1, tag * size, tag)
        os.write(tell, b"%d" % own.fd)
        own.submit()
        signal.pause()

    for _ in range(scaled(100)):
        pid, pidfd, number = in_child(run)
        copy = descriptor_of(pidfd, number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        drained(copy)
        for tag in range(depth):
            assert os.pwritev(fd, [new], tag * size) == size
        time.sleep(0.005)
        assert path.read_bytes() == b"n" * (size * depth)
        os.close(copy)
        os.close(pidfd)
    os.close(fd)


@pytest.mark.skipif(not uring.COMPILED, reason="this is the Python form")
def test_the_python_form_passes_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "EVTCHND_PURE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout
