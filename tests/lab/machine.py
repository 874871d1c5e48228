"""The lab: an emulated machine whose /dev/kvm has everything of KVM_CAP_XEN_HVM. One object is one boot.

QEMU 10 and the kernel are trixie's (prepare.py); `-cpu max,+svm` makes kvm_amd load in it. The host's whole file system
is there, read-only below a tmpfs, and an ext4 disk at /images. Host and lab talk through files of one folder (`start`):
the command goes in; its output, its exit status and signs of life come out.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

KVM_CHECK_EXTENSION = 0xAE03
KVM_CAP_XEN_HVM = 38
EVERYTHING = 0x1FF  # all flags of 6.12

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSIDE = os.environ.get("EVTCHND_LAB_INSIDE") == "1"

# Up in 7-10 s where two cores are free; a machine that is busy elsewhere takes several times that.
BOOT_S = 120.0
# The lab tells every 2 s that it lives.
QUIET_S = 120.0
# An emulated machine that resets itself, or whose QEMU ends by an assertion of its own, is started again.
BOOTS = 4
LOOK_S = 0.2
MEMORY_MIB = 3072
CPUS = 2
# Sparse: it costs what is written.
IMAGES_BYTES = 16 << 30
# What a command inside needs of our environment, besides EVTCHND_*.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "CI")
CONSOLE_LINES = 40
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class LabMissing(Exception):
    """The lab is not there, and why: one line."""


class LabDied(Exception):
    """A boot that did not end in order. `came_up`: it had begun to run its command."""

    def __init__(self, reason: str, console: str, *, came_up: bool) -> None:
        super().__init__(reason)
        self.console = console
        self.came_up = came_up

    def __str__(self) -> str:
        return f"{self.args[0]}; its console ended with:\n{self.console}"


def xen_capability() -> int:
    """The flags of KVM_CAP_XEN_HVM of this machine's /dev/kvm; 0 where there is none."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_XEN_HVM)
    except OSError:
        return 0
    finally:
        os.close(kvm)


@dataclass(frozen=True)
class Lab:
    """What prepare.py has made."""

    folder: Path
    tree: Path  # trixie
    kernel: Path
    initramfs: Path
    qemu: Path  # emulator.py; the tree's own is for use inside

    def program(self, name: str, *arguments: str) -> list[str]:
        """A command line for one of the tree's programs, by the tree's own libraries."""
        libraries = self.tree / "usr/lib/x86_64-linux-gnu"
        loader = self.tree / "lib64/ld-linux-x86-64.so.2"
        return [str(loader), "--library-path", f"{libraries}:{libraries}/pulseaudio", str(self.tree / name), *arguments]

    def mkfs(self, image: Path, *options: str) -> None:
        """An ext4 file system, by the tree's mke2fs. CalledProcessError, with what it said."""
        command = self.program("usr/sbin/mke2fs", "-t", "ext4", "-q", "-F", *options, str(image))
        environment = os.environ | {"MKE2FS_CONFIG": str(self.tree / "etc/mke2fs.conf")}
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


class Machine:
    """One boot that runs one command; a context manager that ends with QEMU dead and its files gone."""

    def __init__(
        self,
        lab: Lab,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        cwd: Path = ROOT,
        memory: int = MEMORY_MIB,
        cpus: int = CPUS,
        images: int = IMAGES_BYTES,
        limit: float = 3600.0,
        terminal: bool = False,
    ) -> None:
        """`terminal`: the lab has a second serial line, whose other end is a Unix socket, `self.terminal`."""
        self.lab = lab
        self.limit = limit
        self.folder = Path(tempfile.mkdtemp(prefix="evtchnd-lab-"))
        self.out = self.folder / "out"
        self.out.mkdir()
        self.console = self.folder / "console"
        self.terminal = self.folder / "terminal" if terminal else None
        self._read: dict[str, int] = {}
        self._beat = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._fill(command, environment or {}, files or {}, cwd)
            self._process = self._start(memory, cpus, self._disk(images))
        except BaseException:
            self.close()
            raise
        self._began = self._sign = time.monotonic()

    def _fill(
        self, command: Sequence[str], environment: Mapping[str, str], files: Mapping[str, bytes], cwd: Path
    ) -> None:
        passed = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("EVTCHND_")}
        passed.setdefault("HOME", "/root")
        passed["PATH"] = f"{passed.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"
        passed |= {
            "EVTCHND_LAB": str(self.lab.folder),
            "EVTCHND_LAB_INSIDE": "1",
            "EVTCHND_LAB_TREE": str(self.lab.tree),
            # Python is about eight times slower in there
            "EVTCHND_PATIENCE": "10",
            "TMPDIR": "/images/tmp",
            **environment,
        }
        lines = [f"export {key}={shlex.quote(value)}\n" for key, value in passed.items()]
        (self.out / "environment").write_text("".join(lines))
        (self.out / "command").write_text(f"cd {shlex.quote(str(cwd))} || exit 126\nexec {shlex.join(command)}\n")
        for name, data in files.items():
            (self.out / name).write_bytes(data)

    def _disk(self, size: int) -> Path:
        disk = self.folder / "images"
        with disk.open("wb") as file:
            file.truncate(size)
        self.lab.mkfs(disk, "-m0", "-E", "nodiscard")
        return disk

    def _start(self, memory: int, cpus: int, disk: Path) -> subprocess.Popen[bytes]:
        share = self.lab.tree / "usr/share"
        command = self.lab.program(
            str(self.lab.qemu),
            *("-L", f"{share}/qemu", "-L", f"{share}/seabios", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi", "-cpu", "max,+svm,-la57", "-smp", str(cpus), "-m", str(memory)),
            *("-kernel", str(self.lab.kernel), "-initrd", str(self.lab.initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
            *("-serial", f"file:{_escape(self.console)}"),
            *("-drive", f"file={_escape(disk)},if=virtio,format=raw,cache=unsafe"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
            *("-virtfs", f"local,path={_escape(self.out)},mount_tag=out,security_model=none,multidevs=remap"),
        )
        if self.terminal is not None:
            socket = f"socket,id=terminal,server=on,wait=off,path={_escape(self.terminal)}"
            command += ["-chardev", socket, "-serial", "chardev:terminal"]
        with (self.folder / "qemu").open("wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )

    def new(self, name: str) -> bytes:
        """What a file of /run/out has grown by since the last call."""
        at = self._read.get(name, 0)
        try:
            with (self.out / name).open("rb") as file:
                file.seek(at)
                data = file.read()
        except FileNotFoundError:
            return b""
        self._read[name] = at + len(data)
        if data:
            self._sign = time.monotonic()
        return data

    def look(self) -> int | None:
        """The command's exit status once it has ended. LabDied when it can end no more."""
        assert self._process is not None
        gone = self._process.poll() is not None  # before the status, which is written first
        self._beat += len(self.new("beat"))
        try:
            return int((self.out / "status").read_text())
        except FileNotFoundError:
            pass
        now = time.monotonic()
        if gone:
            raise self._died(f"QEMU ended ({self._process.returncode}) before the command did")
        if not self._beat and now > self._began + BOOT_S:
            raise self._died(f"it did not come up within {BOOT_S:.0f} s")
        if self._beat and now > self._sign + QUIET_S:
            raise self._died(f"no sign of life for {QUIET_S:.0f} s")
        if now > self._began + self.limit:
            raise self._died(f"over its limit of {self.limit:.0f} s")
        return None

    def wait(self, each: Callable[[], object] = lambda: None) -> int:
        """The exit status; `each` is called between looks, and once after the last."""
        while (status := self.look()) is None:
            each()
            time.sleep(LOOK_S)
        each()
        return status

    def tail(self, name: str = "output", lines: int = 60) -> str:
        """The last lines of a file of /run/out."""
        try:
            return _last_lines(self.out / name, lines)
        except FileNotFoundError:
            return ""

    def _died(self, reason: str) -> LabDied:
        """Ends it; the whole console stays in the cache."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        parts = [_last_lines(path, CONSOLE_LINES) for path in (self.folder / "qemu", self.console) if path.exists()]
        if self.console.exists():
            kept = self.lab.folder / "consoles" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(self.console, kept)
            parts.append(f"(all of it: {kept})")
        return LabDied(f"the machine died: {reason}", "\n".join(part for part in parts if part), came_up=self._beat > 0)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _escape(path: Path) -> str:
    """In QEMU's options a comma is written twice."""
    return str(path).replace(",", ",,")


def _last_lines(path: Path, count: int) -> str:
    text = path.read_text(errors="replace").replace("\r", "")
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
