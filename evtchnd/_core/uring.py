# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""io_uring by raw system calls, in plain integers: the little that a disk needs.

One ring and one eventfd a disk, so that a disk whose storage hangs fills nobody else's. No SINGLE_ISSUER and no
DEFER_TASKRUN: the kernel goes on with what was submitted after a SIGKILL of the submitter, and that must complete
where another process sees it (`inflight_of`).

ABI: linux/io_uring.h. struct io_uring_params is 120 bytes, sq_off at 40 and cq_off at 80; an entry is
`{u8 opcode, flags; u16 ioprio; s32 fd; u64 off, addr; u32 len, op_flags; u64 user_data; u64 pad[3]}`, a completion
`{u64 user_data; s32 res; u32 flags}`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.words import Mem
from evtchnd.errors import HostError

COMPILED: bool = bool(cython.compiled)

_NR_SETUP, _NR_ENTER, _NR_REGISTER, _NR_PIDFD_GETFD = 425, 426, 427, 438
_OP_READV, _OP_WRITEV, _OP_FSYNC, _OP_FALLOCATE = 1, 2, 3, 17
_FSYNC_DATASYNC = 1
_ASYNC = 1 << 4 << 8  # IOSQE_ASYNC, in the byte behind the opcode
_SETUP_CLAMP = 1 << 4
_FEAT_SINGLE_MMAP = 1
_OFF_RINGS, _OFF_SQES = 0, 0x1000_0000
_REGISTER_FILES, _REGISTER_EVENTFD = 2, 4
_SQE_SIZE, _CQE_SIZE = 64, 16
_MASK32 = 0xFFFF_FFFF

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

if not cython.compiled:
    from evtchnd._core.words import get32, get64, ld32, put32, put64, st32

    _preadv2, _pwritev2 = _libc.preadv2, _libc.pwritev2
    _preadv2.restype = _pwritev2.restype = ctypes.c_ssize_t
    _preadv2.argtypes = _pwritev2.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
    )

    def enter(fd: int, submit: int) -> int:
        """Entries that the kernel took, or -errno."""
        taken: int = _syscall(_NR_ENTER, fd, submit, 0, 0, None, 0)
        return -ctypes.get_errno() if taken < 0 else taken


def _setup(entries: int) -> tuple[int, tuple[int, ...]]:
    """-> descriptor (close-on-exec), the 30 words of struct io_uring_params. HostError where it is refused."""
    params = ctypes.create_string_buffer(120)
    struct.pack_into("=I", params, 8, _SETUP_CLAMP)
    fd = _syscall(_NR_SETUP, ctypes.c_uint(entries), params)
    if fd < 0:
        error = ctypes.get_errno()
        hint = {
            errno.EPERM: " (see /proc/sys/kernel/io_uring_disabled, or a seccomp filter)",
            errno.ENOSYS: " (an old kernel, or a seccomp filter)",
            errno.ENOMEM: " (RLIMIT_MEMLOCK, on kernels before 5.12)",
        }.get(error, "")
        raise HostError(f"io_uring: {os.strerror(error)}{hint}")
    return fd, struct.unpack("=30I", params.raw)


def _map(fd: int, length: int, offset: int) -> int:
    """The address. Not Python's mmap, which keeps a copy of the descriptor for each mapping."""
    address = _mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise HostError(f"io_uring: mmap: {os.strerror(ctypes.get_errno())}")
    return int(address)


class Uring:
    """A submission and a completion ring of `entries` (the kernel rounds up to a power of two).

    eventfd: the kernel adds to it at every completion; the caller keeps and closes it. HostError where io_uring is
    refused: use threads then. `fd` is the ring's descriptor (Unix sockets refuse to carry it: see `descriptor_of`);
    `queued` entries wait for `submit()`; `inflight` counts those whose completion is not reaped, at most `entries`.

    `aside`: entries are not tried within `submit()` first; a file system with a server behind it may keep the caller
    waiting there (FUSE's is asked for poll() and attributes).

    A tag is any 64-bit number. Queued entries reach the kernel by `submit()`, at the latest by the next `pending()`.
    """

    if TYPE_CHECKING:
        fd: int
        eventfd: int
        entries: int
        inflight: int
        queued: int
        aside: bool
        rings: Mem
        sqes: Mem
        maps: list[tuple[int, int]]

    def __init__(self, entries: int = 256, *, eventfd: int) -> None:
        self.fd = -1
        self.eventfd = eventfd
        self.entries = self.inflight = self.queued = 0
        self.aside = False
        self.tail = self.head = 0  # both start at 0 in a new ring
        self.maps = []
        self.fd, words = _setup(entries)
        try:
            self._attach(words)
        except BaseException:
            self.close()
            raise

    def _attach(self, words: tuple[int, ...]) -> None:
        sq_entries, cq_entries, features = words[0], words[1], words[5]
        if not features & _FEAT_SINGLE_MMAP:
            raise HostError("io_uring: this kernel is too old (before 5.4)")
        sq_tail, sq_array = words[11], words[16]
        cq_head, cq_tail, cqes = words[20], words[21], words[25]
        self.rings = self._mem(max(sq_array + sq_entries * 4, cqes + cq_entries * _CQE_SIZE), _OFF_RINGS)
        self.sqes = self._mem(sq_entries * _SQE_SIZE, _OFF_SQES)
        self.sq_tail_at, self.cq_head_at, self.cq_tail_at, self.cqes_at = sq_tail, cq_head, cq_tail, cqes
        self.sq_mask, self.cq_mask = sq_entries - 1, cq_entries - 1
        # Entry i of the indirection array is entry i, once and for all.
        for index in range(sq_entries):
            self.rings.store(sq_array + index * 4, index)
        number = ctypes.c_int(self.eventfd)
        if _syscall(_NR_REGISTER, self.fd, _REGISTER_EVENTFD, ctypes.byref(number), 1) < 0:
            raise HostError(f"io_uring: eventfd {self.eventfd}: {os.strerror(ctypes.get_errno())}")
        self.entries = sq_entries

    def _mem(self, size: int, offset: int) -> Mem:
        size = (size + 7) & ~7
        address = _map(self.fd, size, offset)
        self.maps.append((address, size))
        return Mem((ctypes.c_char * size).from_address(address))

    def hold(self, fd: int) -> None:
        """The ring keeps the open file behind `fd` open until its last request has ended, whoever is killed. Once.

        A lock of that file (flock) is held for as long: who gets it knows that nothing of this ring comes any more. The
        kernel lets a ring's registered files go when it frees the ring (io_ring_ctx_free), and each request has a
        reference to that.
        """
        number = ctypes.c_int(fd)
        if _syscall(_NR_REGISTER, self.fd, _REGISTER_FILES, ctypes.byref(number), 1) < 0:
            raise HostError(f"io_uring: register files: {os.strerror(ctypes.get_errno())}")

    def readv(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool:
        """Queues a read into an array of struct iovec (valid until it completes). False: the ring is full."""
        return self.push(_OP_READV, fd, offset, iov_addr, iov_count, 0, tag)

    def writev(self, fd: int, iov_addr: int, iov_count: int, offset: int, tag: int) -> bool:
        return self.push(_OP_WRITEV, fd, offset, iov_addr, iov_count, 0, tag)

    def fsync(self, fd: int, tag: int, *, datasync: bool = True) -> bool:
        """Covers what had *completed* when it is submitted, not what is in flight beside it."""
        return self.push(_OP_FSYNC, fd, 0, 0, 0, _FSYNC_DATASYNC if datasync else 0, tag)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, tag: int) -> bool:
        return self.push(_OP_FALLOCATE, fd, offset, length, mode, 0, tag)

    def push(self, op: int, fd: int, off: int, addr: int, length: int, flags: int, tag: int) -> bool:
        # Bounded by the submission ring, which is half of the completion ring: that one never overflows.
        if self.inflight >= self.entries:
            return False
        at = (self.tail & self.sq_mask) * _SQE_SIZE
        # Private until the tail moves.
        put32(self.sqes.p, at, op | _ASYNC if self.aside else op)
        put32(self.sqes.p, at + 4, fd)
        put64(self.sqes.p, at + 8, off)
        put64(self.sqes.p, at + 16, addr)
        put32(self.sqes.p, at + 24, length)
        put32(self.sqes.p, at + 28, flags)
        put64(self.sqes.p, at + 32, tag)
        self.tail = (self.tail + 1) & _MASK32
        self.queued += 1
        self.inflight += 1
        return True

    def submit(self) -> int:
        """Hands every queued entry to the kernel; -> how many it took. What it did not take stays queued."""
        total = 0
        if self.queued and self.entries:
            # The kernel reads the tail within our own system call: program order is enough.
            st32(self.rings.p, self.sq_tail_at, self.tail)
            while self.queued:
                taken = enter(self.fd, self.queued)
                if taken <= 0:
                    # No memory now, or completions to take first: the next pending() tries again.
                    if -taken in (0, errno.EINTR, errno.EAGAIN, errno.EBUSY):
                        break
                    raise HostError(f"io_uring: enter: {os.strerror(-taken)}")
                self.queued -= taken
                total += taken
        return total

    def pending(self) -> bool:
        """Submits what is queued; True: there are completions, or entries that the kernel does not take now."""
        if self.queued:
            self.submit()
        return self.entries != 0 and (self.queued != 0 or ld32(self.rings.p, self.cq_tail_at) != self.head)

    def reap(self) -> list[tuple[int, int]]:
        """Every completion that is there: (tag, result or -errno)."""
        found: list[tuple[int, int]] = []
        if not self.entries:
            return found
        head = self.head
        tail = ld32(self.rings.p, self.cq_tail_at)
        if head == tail:
            return found
        while head != tail:
            at = self.cqes_at + (head & self.cq_mask) * _CQE_SIZE
            result = get32(self.rings.p, at + 8)
            found.append((get64(self.rings.p, at), result - (1 << 32) if result >> 31 else result))
            head = (head + 1) & _MASK32
        self.head = head
        self.inflight -= len(found)
        st32(self.rings.p, self.cq_head_at, head)
        return found

    def close(self) -> None:
        """Unmaps and closes; idempotent. What is in flight goes on in the kernel: wait for `inflight == 0` before."""
        if self.maps:
            # Attached, or failed half-way: a Mem is there for each mapping.
            self.rings.close()
            if len(self.maps) > 1:
                self.sqes.close()
        for address, size in self.maps:
            _munmap(address, size)
        self.maps = []
        self.entries = self.queued = self.inflight = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def inflight_of(fd: int) -> int:
    """How many requests of *another* process' ring, now dead, are not complete.

    fd: a copy of its `Uring.fd` (`descriptor_of`), kept open until this returns 0: only then no write of the old
    worker can come after a replayed one. Entries that it had queued and not submitted never run and do not count.
    """
    # The layout is the kernel's, the same for every ring: a tiny ring of our own tells.
    own, words = _setup(1)
    os.close(own)
    sq_head, cq_tail = words[10], words[21]
    length = mmap.PAGESIZE
    address = _map(fd, length, _OFF_RINGS)
    try:
        taken = ctypes.c_uint32.from_address(address + sq_head).value
        completed = ctypes.c_uint32.from_address(address + cq_tail).value
    finally:
        _munmap(address, length)
    return (taken - completed) & _MASK32


def descriptor_of(pidfd: int, number: int) -> int:
    """A copy of descriptor `number` of the process behind `pidfd` (pidfd_getfd, Linux 5.6); close-on-exec.

    The only way to a worker's io_uring: since Linux 6.7 and its stable siblings SCM_RIGHTS refuses those (EINVAL).
    The process must be alive, ours and dumpable, and the seccomp filter must allow the call.
    """
    fd = int(_syscall(_NR_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        raise HostError(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return fd


def transfer(fd: int, write: bool, iov_addr: int, iov_count: int, offset: int, flags: int = 0) -> int:
    """preadv2 or pwritev2 on an array of struct iovec, without the interpreter's lock: for threads.

    -> bytes or -errno.
    """
    if cython.compiled:
        with cython.nogil:
            if write:
                done = sys_pwritev(fd, iov_addr, iov_count, offset, flags)  # type: ignore[name-defined]  # noqa: F821
            else:
                done = sys_preadv(fd, iov_addr, iov_count, offset, flags)  # type: ignore[name-defined]  # noqa: F821
        return done  # type: ignore[no-any-return]
    result: int = (_pwritev2 if write else _preadv2)(fd, iov_addr, iov_count, offset, flags)
    return -ctypes.get_errno() if result < 0 else result
