"""A daemon whose workers are somebody else's: before they serve a disk they try what a worker must not be able to do.

Run as a script it is daemonprocess.py's; each attempt is a line in its log: `tried NAME: ERRNO`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import daemonprocess
from evtchnd.worker import main
from evtchnd_backends import blkback

AT_FDCWD = -100
# linux/io_uring.h
OPENAT, MKDIRAT = 18, 37
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
log = logging.getLogger("intruder")


def call(number: int, *arguments: Any) -> None:
    """A system call of x86_64. OSError."""
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")


def execute() -> None:
    if (
        _libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        == 2**64 - 1
    ):
        raise OSError(ctypes.get_errno(), "")


def by_uring(op: int, *, flags: int = 0, to: int = AT_FDCWD, offset: int = 0, path: bytes = b"") -> None:
    """One operation by an io_uring of its own, which no seccomp filter sees. OSError."""
    params = ctypes.create_string_buffer(120)
    ring = _libc.syscall(ctypes.c_long(425), 4, params)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "")
    words = struct.unpack("=30I", params.raw)
    rings, entries = (mmap.mmap(ring, 4096, offset=at) for at in (0, 0x10000000))
    name = ctypes.create_string_buffer(path)
    struct.pack_into("=BBHiQQIIQ", entries, 0, op, 0, 0, to, offset, ctypes.addressof(name), 0, flags, 1)
    struct.pack_into("=I", rings, words[11], 1)  # sq_off.tail; the array begins with zeros
    call(426, ring, 1, 1, 1, None, 0)  # IORING_ENTER_GETEVENTS
    _, result = struct.unpack_from("=Qi", rings, words[25])
    os.close(ring)
    if result < 0:
        raise OSError(-result, "")


ATTEMPTS: dict[str, Callable[[], object]] = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "create": lambda: os.open(f"{sys.argv[1]}/intruder", os.O_WRONLY | os.O_CREAT),
    "stat": lambda: os.stat("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "unlink": lambda: os.unlink(f"{sys.argv[1]}/intruder"),
    "chmod": lambda: os.chmod(sys.argv[1], 0o700),
    "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "socketpair": socket.socketpair,
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "kill": lambda: os.kill(os.getppid(), 0),
    "kill 1": lambda: os.kill(1, signal.SIGCONT),
    "signal itself": lambda: call(234, os.getpid(), os.getpid(), 0),  # tgkill
    "ptrace": lambda: call(101, 16, os.getppid(), None, None),  # PTRACE_ATTACH
    "process_vm_readv": lambda: call(310, os.getppid(), None, 0, None, 0, 0),
    "pidfd_open": lambda: os.pidfd_open(os.getppid()),
    "pidfd_getfd": lambda: call(438, 0, 0, 0),
    "mount": lambda: call(165, b"none", b"/mnt", b"tmpfs", 0, None),
    "unshare": lambda: call(272, 0x20000000),  # CLONE_NEWNS
    "setns": lambda: call(308, 0, 0),
    "bpf": lambda: call(321, 0, None, 0),
    "userfaultfd": lambda: call(323, 0),
    "keyctl": lambda: call(250, 0, 0),
    "chroot": lambda: os.chroot("/"),
    "setuid": lambda: os.setuid(0),
    "capset": lambda: call(126, None, None),
    "setrlimit": lambda: call(302, 0, 7, bytes(16), None),
    "prctl dumpable": lambda: call(157, 4, 1, 0, 0, 0),
    "ioctl TIOCSTI": lambda: call(16, 2, 0x5412, b"x"),
    "fcntl F_SETOWN": lambda: call(72, 2, 8, 1),
    "executable memory": execute,
    "x32": lambda: call(0x40000000 | 39),  # getpid
    "clone3": lambda: call(435, None, 0),
    "io_uring openat": lambda: by_uring(OPENAT, path=b"/etc/passwd", flags=os.O_RDONLY),
    "io_uring mkdirat": lambda: by_uring(MKDIRAT, path=f"{sys.argv[1]}/intruder".encode()),
}


async def run(device: Any) -> None:
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            result = "done"
        except OSError as exc:
            result = errno.errorcode[exc.errno]
        log.warning("tried %s: %s", name, result)
    thread = threading.Thread(target=lambda: log.warning("tried thread: done"))
    thread.start()
    thread.join()
    await blkback.run(device)


if __name__ == "__main__":
    main.BACKENDS["vbd"] = run
    daemonprocess.main()
