"""A worker's sandbox: it has its descriptors, and nothing else of the host.

What a guest could make of a defect in a worker is bounded here, before the first message of the control plane (and so
the first byte of a guest) is read. In the zygote, once (`prepare`), since every fork keeps it:

- no_new_privs; no capability: bounding, ambient, inheritable, permitted and effective sets empty; no core file.

In each worker (`enter`), for it alone:

- Landlock without a rule: nothing can be opened or made, no TCP port bound or connected to, no signal sent and no
  abstract socket reached outside, as far as the kernel's Landlock goes. It also holds for what an io_uring opens.
- seccomp: the calls in the tables below; everything else, any other architecture's calls and x32 get EPERM. An error,
  not a signal: glibc and libuv try newer calls first, and fall back.

An io_uring's operations pass no seccomp filter. Opening goes to Landlock, memory is the worker's own anyway; what is
left is IORING_OP_SOCKET: a worker that is not itself any more could reach sockets that its user may reach. The unit's
user may reach none of the daemon's, and PrivateNetwork= leaves it no network.

Not done, and why: RLIMIT_NPROC counts all processes of the user, also other domains' threads and io_uring's own;
processes cannot be made because of the filter. RLIMIT_FSIZE would end at the disks. PR_SET_DUMPABLE 0 would keep the
control plane from the worker's io_uring (pidfd_getfd asks as ptrace does); no worker can trace another because of
Landlock and the filter, cores are off, and guest memory is MADV_DONTDUMP.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from evtchnd.errors import HostError

# ---- what a worker calls: asm/unistd_64.h of x86, asm-generic/unistd.h for aarch64 (None: not there) ----------------

CALLS: dict[str, tuple[int | None, int | None]] = {
    # the data path
    "epoll_pwait": (281, 22),
    "epoll_wait": (232, None),
    "io_uring_enter": (426, 426),
    "lseek": (8, 62),
    "preadv": (295, 69),
    "preadv2": (327, 286),
    "pwritev": (296, 70),
    "pwritev2": (328, 287),
    "read": (0, 63),
    "readv": (19, 65),
    "write": (1, 64),
    "writev": (20, 66),
    # disks' threads, journals, consoles' logs
    "fallocate": (285, 47),
    "fdatasync": (75, 83),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "sendfile": (40, 71),
    # sockets that others made
    "getpeername": (52, 205),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "sendmsg": (46, 211),
    "shutdown": (48, 210),
    # descriptors
    "close": (3, 57),
    "dup": (32, 23),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "eventfd2": (290, 19),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "poll": (7, None),
    "ppoll": (271, 73),
    # memory; mmap and mprotect below
    "brk": (12, 214),
    "madvise": (28, 233),
    "mremap": (25, 216),
    "munmap": (11, 215),
    # threads, signals, time, what glibc and CPython ask
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "membarrier": (324, 283),
    "nanosleep": (35, 101),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "set_robust_list": (273, 99),
    "sigaltstack": (131, 132),
    "sysinfo": (99, 179),
    "uname": (63, 160),
}

IOCTLS = {
    # asm-generic/ioctls.h; TCGETS is how isatty() asks
    "FIOCLEX": 0x5451,
    "FIONBIO": 0x5421,
    "TCGETS": 0x5401,
    # linux/fs.h
    "BLKGETSIZE64": 0x80081272,
    "BLKPBSZGET": 0x127B,
    "BLKSSZGET": 0x1268,
    # linux/if_tun.h
    "TUNGETIFF": 0x800454D2,
    "TUNSETCARRIER": 0x400454E2,
    "TUNSETOFFLOAD": 0x400454D0,
    "TUNSETQUEUE": 0x400454D9,
    "TUNSETVNETHDRSZ": 0x400454D8,
    "TUNSETVNETLE": 0x400454DC,
}

# linux/fcntl.h: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS; not F_SETOWN
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1033, 1034)
# linux/prctl.h: PR_SET_NAME, PR_SET_VMA (malloc names its memory)
_PRCTLS = (15, 0x53564D41)
_PROT_EXEC = 4
_CLONE_THREAD = 0x10000
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000

# Those of which an argument decides: (x86_64, aarch64), how it is judged
JUDGED: dict[str, tuple[int, int]] = {
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "clone": (56, 220),
    "clone3": (435, 435),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "sendto": (44, 206),
}

# ---- classic BPF over struct seccomp_data: linux/filter.h, linux/seccomp.h, linux/audit.h ----------------------------

_LD_W_ABS, _JMP_JEQ_K, _ALU_AND_K, _RET_K = 0x20, 0x15, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_REFUSE = _ERRNO | errno.EPERM
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# BPF_MAXINSNS
_MOST = 4096

_Insn = tuple[int, int, int, int]  # code, jump if true, jump if false, k


def _answer(verdict: int) -> _Insn:
    return (_RET_K, 0, 0, verdict)


def _load(at: int) -> _Insn:
    return (_LD_W_ABS, 0, 0, at)


def _if_equal(value: int) -> list[_Insn]:
    """ALLOW if the loaded word is `value`, else on."""
    return [(_JMP_JEQ_K, 0, 1, value), _answer(_ALLOW)]


def _one_of(argument: int, values: Sequence[int]) -> list[_Insn]:
    """Of a command the kernel looks at 32 bits only."""
    each = [insn for value in values for insn in _if_equal(value)]
    return [_load(_ARGS + 8 * argument), *each, _answer(_REFUSE)]


def _with_bits(argument: int, mask: int, value: int) -> list[_Insn]:
    return [_load(_ARGS + 8 * argument), (_ALU_AND_K, 0, 0, mask), *_if_equal(value), _answer(_REFUSE)]


def _null(argument: int) -> list[_Insn]:
    low, high = _ARGS + 8 * argument, _ARGS + 8 * argument + 4
    return [_load(low), (_JMP_JEQ_K, 1, 0, 0), _answer(_REFUSE), _load(high), *_if_equal(0), _answer(_REFUSE)]


def _judgements() -> Iterator[tuple[str, list[_Insn]]]:
    yield "ioctl", _one_of(1, sorted(IOCTLS.values()))
    yield "fcntl", _one_of(1, _FCNTLS)
    # no code but what is there
    yield "mmap", _with_bits(2, _PROT_EXEC, 0)
    yield "mprotect", _with_bits(2, _PROT_EXEC, 0)
    # fstat() of newer glibc; a path beside the flag tells no more than whether it is there
    yield "newfstatat", _one_of(3, (_AT_EMPTY_PATH,))
    # what this host knows of a file
    yield "statx", _one_of(2, (_AT_EMPTY_PATH | _AT_STATX_DONT_SYNC,))
    # threads, no processes. clone3 has its flags in memory, where a filter does not see them: glibc takes clone then
    yield "clone", _with_bits(0, _CLONE_THREAD, _CLONE_THREAD)
    yield "clone3", [_answer(_ERRNO | errno.ENOSYS)]
    yield "prctl", _one_of(0, _PRCTLS)
    # to ask, not to set
    yield "prlimit64", _null(2)
    # send(): to the other end, whoever that is
    yield "sendto", _null(4)


def program(machine: str) -> bytes:
    """The filter, an array of struct sock_filter. HostError for a machine that is in no table."""
    if machine not in _AUDIT_ARCH:
        raise HostError(f"sandbox: no table of system calls for {machine}: sandbox = false starts workers without it")
    column = 0 if machine == "x86_64" else 1
    code: list[_Insn] = [
        _load(_ARCH),
        (_JMP_JEQ_K, 1, 0, _AUDIT_ARCH[machine]),
        _answer(_REFUSE),
        _load(_NR),
    ]
    # all 32 bits are compared: x32's numbers have one (0x40000000) that none in the tables has
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            code += _if_equal(number)
    for name, body in _judgements():
        code += [(_JMP_JEQ_K, 0, len(body), JUDGED[name][column]), *body]
    code.append(_answer(_REFUSE))
    if len(code) > _MOST:
        raise ValueError(f"{len(code)} instructions")
    return b"".join(struct.pack("=HBBI", *insn) for insn in code)


# ---- Landlock: linux/landlock.h --------------------------------------------------------------------------------------

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_VERSION_FLAG = 1
# how many of the file system's rights each version knows: up to MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_RIGHTS_5 = 16
# from version 4: BIND_TCP, CONNECT_TCP; from version 6: ABSTRACT_UNIX_SOCKET, SIGNAL
_NET_RIGHTS, _SCOPES = 0b11, 0b11


def ruleset(abi: int) -> bytes:
    """struct landlock_ruleset_attr with everything that version `abi` can forbid."""
    fs = (1 << _FS_RIGHTS.get(abi, _FS_RIGHTS_5)) - 1
    return struct.pack("=QQQ", fs, _NET_RIGHTS if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0: it has none."""
    return max(0, _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG))


# ---- the calls -------------------------------------------------------------------------------------------------------

_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 23, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_NR_CAPGET = {"x86_64": 125, "aarch64": 90}
_NR_CAPSET = {"x86_64": 126, "aarch64": 91}
_NR_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER = 1
# TSYNC: all threads. SPEC_ALLOW: kernels before 5.16 would else slow every branch down, for programs that run others'
# code; a worker runs none.
_SECCOMP_FLAGS = 1 | 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(number: int, *args: object) -> int:
    """What it returns, or -errno."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    return -ctypes.get_errno() if result < 0 else result


def _prctl(option: int, argument: int = 0) -> int:
    result = int(_libc.prctl(option, *(ctypes.c_ulong(each) for each in (argument, 0, 0, 0))))
    return -ctypes.get_errno() if result < 0 else result


def prepare() -> None:
    """What the zygote's forks keep. HostError where this kernel or machine cannot."""
    machine = os.uname().machine
    program(machine)
    with suppress(ValueError):  # EPERM: the unit's filter takes no prlimit64, and has LimitCORE=0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (failed := _prctl(_PR_SET_NO_NEW_PRIVS, 1)) < 0:
        raise HostError(f"sandbox: no_new_privs: {os.strerror(-failed)}")
    for capability in range(64):
        there = _prctl(_PR_CAPBSET_READ, capability)
        if there < 0:
            break
        # without CAP_SETPCAP it stays; nothing below can gain it, since execve() of a set-uid program gives nothing
        if there and _prctl(_PR_CAPBSET_DROP, capability) == -errno.EPERM:
            break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    now = ctypes.create_string_buffer(24)
    # the unit's filter takes no capset, and has left nothing to give away
    failed = _syscall(_NR_CAPGET[machine], header, now)
    if failed == 0 and any(now.raw):
        failed = _syscall(_NR_CAPSET[machine], header, bytes(24))
    if failed < 0:
        raise HostError(f"sandbox: capabilities cannot be dropped: {os.strerror(-failed)}")


def enter() -> None:
    """From here on this process, with all of its threads, is in the sandbox. HostError where it cannot be."""
    machine = os.uname().machine
    if abi := landlock_abi():
        rules = ruleset(abi)
        fd = _syscall(_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
        failed = fd if fd < 0 else _syscall(_RESTRICT_SELF, fd, 0)
        if failed < 0:
            raise HostError(f"sandbox: Landlock: {os.strerror(-failed)}")
        os.close(fd)
    code = program(machine)
    held = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog
    filters = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    failed = _syscall(_NR_SECCOMP[machine], _SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAGS, filters)
    if failed:
        hint = f"{os.strerror(-failed)} (CONFIG_SECCOMP_FILTER?)" if failed < 0 else "another thread is in the way"
        raise HostError(f"sandbox: seccomp: {hint}: sandbox = false starts workers without it")
