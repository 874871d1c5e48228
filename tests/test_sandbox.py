"""Workers in their sandbox: what the filter says of each call, what a real worker can still do, guests being served."""

from __future__ import annotations

import errno
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm
from evtchnd.worker import sandbox
from evtchnd_backends import geometry, tap

MIB = 1 << 20
INTRUDER = str(Path(__file__).parent / "intruder.py")
X86_64 = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
GENERIC = Path("/usr/include/asm-generic/unistd.h")
needs_landlock = pytest.mark.skipif(not sandbox.landlock_abi(), reason="this kernel has no Landlock")

# ---- the filter ------------------------------------------------------------------------------------------------------

ALLOWED, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003


def judge(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """The filter, run as the kernel runs it (classic BPF: linux/bpf_common.h) over struct seccomp_data."""
    code = [struct.unpack("=HBBI", raw) for raw in _instructions(sandbox.program(machine))]
    data = struct.pack("=IIQ6Q", number, arch or ARCH[machine], 0, *[*arguments, *[0] * 6][:6])
    at = word = 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == 0x20:
            (word,) = struct.unpack_from("=I", data, k)
        elif op == 0x54:
            word &= k
        elif op == 0x15:
            at += yes if word == k else no
        else:
            assert op == 0x06
            return k


def _instructions(program: bytes) -> Iterator[bytes]:
    return (program[at : at + 8] for at in range(0, len(program), 8))


def header(path: Path) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}


@pytest.mark.skipif(not X86_64.exists() or not GENERIC.exists(), reason="no kernel headers (linux-libc-dev)")
def test_the_tables_are_the_kernel_s() -> None:
    x86_64, generic = header(X86_64), header(GENERIC)
    generic["newfstatat"] = generic["fstatat"]
    for name, numbers in {**sandbox.CALLS, **sandbox.JUDGED}.items():
        assert numbers == (x86_64.get(name), generic.get(name)), name


def test_ioctls_are_those_that_backends_make() -> None:
    made = {
        value
        for module in (tap, geometry)
        for name, value in vars(module).items()
        if re.match(r"_?(TUN[GS]ET|BLK)", name) and isinstance(value, int)
    }
    assert made <= set(sandbox.IOCTLS.values())


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_is_in_no_table_is_refused(machine: str) -> None:
    column = ["x86_64", "aarch64"].index(machine)
    known = {numbers[column] for numbers in sandbox.CALLS.values()}
    judged = {numbers[column] for numbers in sandbox.JUDGED.values()}
    assert not known & judged
    for number in range(600):
        if number not in judged:
            assert judge(machine, number) == (ALLOWED if number in known else EPERM), number


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_other_architectures_and_x32_are_refused(machine: str) -> None:
    for arch in {*ARCH.values(), I386, 0} - {ARCH[machine]}:
        for number in range(600):
            assert judge(machine, number, arch=arch or 1) == EPERM
    if machine == "x86_64":
        assert {judge(machine, 0x40000000 | number) for number in range(600)} == {EPERM}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arguments_decide(machine: str) -> None:
    column = ["x86_64", "aarch64"].index(machine)

    def verdict(name: str, *arguments: int) -> int:
        return judge(machine, sandbox.JUDGED[name][column], *arguments)

    high = 1 << 32
    assert verdict("ioctl", 3, sandbox.IOCTLS["TUNSETQUEUE"]) == ALLOWED
    assert verdict("ioctl", 3, 0x5412) == EPERM  # TIOCSTI
    assert verdict("ioctl", 3, 0x400454CA) == EPERM  # TUNSETIFF
    assert verdict("fcntl", 3, 1030) == ALLOWED
    assert verdict("fcntl", 3, 8) == EPERM
    assert verdict("mmap", 0, 4096, 3) == ALLOWED
    assert verdict("mmap", 0, 4096, 5) == EPERM
    assert verdict("mprotect", 0, 4096, 4) == EPERM
    assert verdict("newfstatat", 3, 0, 0, 0x1000) == ALLOWED
    assert verdict("newfstatat", 3, 0, 0, 0) == EPERM
    assert verdict("clone", 0x3D0F00) == ALLOWED  # as glibc begins a thread
    assert verdict("clone", 0x1200011) == EPERM  # as it forks
    assert verdict("clone3") == ENOSYS
    assert verdict("prctl", 15) == ALLOWED
    assert verdict("prctl", 4, 1) == EPERM
    assert verdict("prlimit64", 0, 7, 0) == ALLOWED
    assert {verdict("prlimit64", 0, 7, pointer) for pointer in (1, high, high | 1)} == {EPERM}
    assert verdict("sendto", 3, 1, 1, 0, 0) == ALLOWED
    assert {verdict("sendto", 3, 1, 1, 0, pointer) for pointer in (1, high)} == {EPERM}


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(HostError, match="no table of system calls for riscv64: sandbox = false"):
        sandbox.program("riscv64")


@pytest.mark.parametrize(
    ("abi", "rights", "net", "scopes"),
    [
        (1, 0x1FFF, 0, 0),
        (2, 0x3FFF, 0, 0),
        (3, 0x7FFF, 0, 0),
        (4, 0x7FFF, 3, 0),
        (5, 0xFFFF, 3, 0),
        (6, 0xFFFF, 3, 3),
        (9, 0xFFFF, 3, 3),
    ],
)
def test_everything_that_a_version_of_landlock_knows_is_forbidden(abi: int, rights: int, net: int, scopes: int) -> None:
    assert struct.unpack("=QQQ", sandbox.ruleset(abi)) == (rights, net, scopes)


# ---- real workers ----------------------------------------------------------------------------------------------------


def image(folder: Path) -> Path:
    path = folder / "disk.img"
    path.write_bytes(random.Random(9).randbytes(MIB))
    return path


@contextmanager
def disk(daemon: DaemonProcess, spec: str) -> Iterator[Blkfront]:
    with SoftVmm(daemon.vmm_socket, 7, memory=32 * MIB) as vm:
        domain = Domain(vm)
        store = XenStore(domain)
        front = Blkfront(domain, store, daemon.call("attach_block", 7, spec)["devid"])
        front.connect()
        try:
            yield front
            front.disconnect()
        finally:
            store.close()
            domain.close()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@needs_landlock
def test_what_a_worker_tries_in_vain(tmp_path: Path) -> None:
    """From within a worker of a daemon; it lives, and then serves its guest."""
    path = image(tmp_path)
    with DaemonProcess(tmp_path, script=INTRUDER) as daemon:
        with disk(daemon, f"vdev=xvda,target={path}") as front:
            worker = daemon.worker(7)
            assert front.read(0, 8) == path.read_bytes()[:4096]
            front.write(8, bytes(4096))
            front.flush()
            assert path.read_bytes()[4096:8192] == bytes(4096)
            assert daemon.call("info", 7)["worker"] == {"pid": worker, "restarts": 0, "failing": ""}
        tried = dict(re.findall(r"tried (.*): (\w+)", daemon.text()))
    assert tried.pop("thread") == "done"
    assert tried.pop("clone3") == "ENOSYS"
    assert tried.pop("io_uring openat") == "EACCES"
    assert tried.pop("io_uring mkdirat") == "EACCES"
    assert len(tried) > 30
    assert {name: result for name, result in tried.items() if result != "EPERM"} == {}


def test_a_worker_of_a_daemon_is_confined(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, disk(daemon, f"vdev=xvda,target={image(tmp_path)}"):
        worker = daemon.worker(7)
        found = status(worker)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(found[name], 16) == 0, name
        if int(status(daemon.process.pid)["CapEff"], 16) & 1 << 8:  # CAP_SETPCAP: it can be emptied
            assert int(found["CapBnd"], 16) == 0
        assert (found["NoNewPrivs"], found["Seccomp"], found["Seccomp_filters"]) == ("1", "2", "1")
        core = next(line for line in Path(f"/proc/{worker}/limits").read_text().splitlines() if "core" in line)
        assert core.split()[4:6] == ["0", "0"]
        # the control plane, which opens what operators name, is not
        assert status(daemon.process.pid)["Seccomp"] == "0"
        assert "Landlock" not in daemon.text() or not sandbox.landlock_abi()


def test_no_core_has_guest_memory(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, disk(daemon, f"vdev=xvda,target={image(tmp_path)}"):
        guest = []
        flags: list[str] = []
        for line in Path(f"/proc/{daemon.worker(7)}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                guest.append("/memfd:" in line)
            elif line.startswith("VmFlags:"):
                flags.append(line)
        shared = [each for each, is_guest in zip(flags, guest, strict=True) if is_guest]
        assert len(shared) >= 3  # RAM, the grant table's frames, the journal
        assert all(" dd" in each for each in shared)


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_disks_of_each_engine(tmp_path: Path, engine: str, cache: str) -> None:
    path = image(tmp_path)
    content = bytearray(path.read_bytes())
    with DaemonProcess(tmp_path, vbd={"engine": engine}) as daemon:
        with disk(daemon, f"vdev=xvda,cache={cache},target={path}") as front:
            assert front.read(0, 88) == content[: 88 * 512]
            front.write(3, b"odd!" * 384)
            front.write(160, b"page" * 1024)
            content[1536:3072] = b"odd!" * 384
            content[81920:86016] = b"page" * 1024
            front.flush()
            if front.can_discard:
                front.submit_discard(1024, 8)
                (done,) = front.complete()
                assert done.status == 0
                content[524288:528384] = bytes(4096)
            assert front.read(0, 88) == content[: 88 * 512]
        assert "served by threads" not in daemon.text()
    assert path.read_bytes() == content


def test_without_it_for_debugging(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, sandbox=False) as daemon, disk(daemon, f"vdev=xvda,target={image(tmp_path)}"):
        found = status(daemon.worker(7))
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("0", "0")


@pytest.mark.parametrize(("key", "flag"), [("sandbox = false", []), ("", ["--single-process"])])
def test_a_line_says_that_it_is_off(tmp_path: Path, key: str, flag: list[str]) -> None:
    config = tmp_path / "evtchnd.toml"
    config.write_text(key)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "evtchnd", "--config", config, "--runtime-dir", tmp_path / "run", *flag], stderr=file
        )
    try:
        until(lambda: "serves in" in log.read_text(), "it does not start")
    finally:
        process.terminate()
        assert process.wait(30) == 0
    lines = [line for line in log.read_text().splitlines() if "for debugging only" in line]
    assert len(lines) == 1
    assert f"({key or 'single_process = true'})" in lines[0]


WITHOUT = """
import sys
import daemonprocess
from evtchnd.worker import sandbox
sandbox.landlock_abi = lambda: 0
daemonprocess.main()
"""


def test_a_kernel_without_landlock_has_the_filter_and_a_line(tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(WITHOUT)
    with DaemonProcess(tmp_path, script=str(script)) as daemon:
        with disk(daemon, f"vdev=xvda,target={image(tmp_path)}"):
            assert status(daemon.worker(7))["Seccomp"] == "2"
        assert daemon.text().count("this kernel has no Landlock") == 1
