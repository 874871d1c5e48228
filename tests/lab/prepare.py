"""Makes the lab from Debian packages, into a cache outside the tree; what is there already is used again.

    ${EVTCHND_LAB:-${XDG_CACHE_HOME:-~/.cache}/evtchnd/lab}/
        tree-KEY/       trixie by debootstrap (0.9 GB, one or two minutes, root), KEY from what it is made of
        boot-KEY/       its kernel and an initramfs
        python-KEY/     wheels for trixie's Python, unpacked (what of it pip can find)
        consoles/       of boots that died

Whatever Debian the host is: its own QEMU may be too old (7.2 with thread=multi dies in the kernel's code patching), and
its kernel may not have CONFIG_KVM_XEN (bookworm's has not).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lab import initramfs
from lab.machine import HERE, Lab, LabMissing

SUITE = "trixie"
PACKAGES = [
    "busybox-static",
    "e2fsprogs",
    "fio",
    "iperf3",
    "iproute2",
    "kmod",
    "libatomic1",
    "linux-image-amd64",
    "python3",
    "python3-venv",
    "qemu-system-x86",
    "xenstore-utils",
]
MODULES = ["9p", "9pnet_virtio", "overlay", "crc32c_generic", "ext4", "virtio_blk", "virtio_pci", "kvm_amd"]
MODULES += ["bridge", "loop", "tun", "veth"]
SCRIPTS = ["init", "start"]
PYTHON = "3.13"
# What the tests that run on trixie's Python import.
WHEELS = ["hypothesis", "msgspec", "pytest>=9", "pytest-asyncio", "pytest-timeout", "uvloop"]
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"


def cache() -> Path:
    """Where the lab lies."""
    if own := os.environ.get("EVTCHND_LAB"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evtchnd" / "lab"


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def tree_of(folder: Path) -> Path:
    return folder / f"tree-{key(SUITE, PACKAGES)}"


def packages_of(folder: Path) -> Path:
    """A sys.path entry for trixie's Python; absent where pip found no wheels."""
    return folder / f"python-{key(PYTHON, WHEELS)}"


def find() -> Lab:
    """The lab, as it was prepared; LabMissing. Makes the initramfs when only that is not there."""
    folder = cache()
    tree = tree_of(folder)
    if not tree.is_dir():
        raise LabMissing(f"the lab is not prepared in {folder}: make lab")
    modules = max((tree / "usr/lib/modules").iterdir(), key=_version)
    scripts = {name: (HERE / name).read_bytes() for name in SCRIPTS}
    maker = Path(initramfs.__file__).read_bytes()
    boot = folder / f"boot-{key(tree.name, modules.name, MODULES, scripts, maker)}"
    if not boot.is_dir():
        part = boot.with_name(f"{boot.name}.part-{os.getpid()}")
        part.mkdir()
        (part / "initramfs").write_bytes(initramfs.build(tree / "usr/bin/busybox", modules, MODULES, scripts))
        shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", part / "vmlinuz")
        try:
            part.rename(boot)
        except OSError:  # somebody else was quicker
            shutil.rmtree(part)
    return Lab(folder, tree, boot / "vmlinuz", boot / "initramfs")


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def prepare() -> Lab:
    """The lab, made if it is not there. LabMissing says in one line what is missing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise LabMissing(f"the lab wants Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    folder = cache()
    if tree_of(folder).is_dir() and packages_of(folder).is_dir():
        return find()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not tree_of(folder).is_dir():
                _make_tree(folder)
            lab = find()
            if not packages_of(folder).is_dir():
                _make_packages(folder)
    except OSError as exc:
        raise LabMissing(f"the lab cannot be made: {exc}") from exc
    return lab


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One preparation at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_tree(folder: Path) -> None:
    if os.geteuid():
        again = f"sudo EVTCHND_LAB={folder} {sys.executable} {HERE} prepare"
        raise LabMissing(f"the lab cannot be made without root (debootstrap); once is enough: {again}")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if not shutil.which("debootstrap", path=path) or not KEYRING.exists():
        if not shutil.which("apt-get"):
            raise LabMissing("the lab cannot be made: no debootstrap, and no apt-get to install it with")
        _run(folder, "apt-get", "update", "-qq")
        _run(folder, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap", KEYRING.stem)
    tree = tree_of(folder)
    part = tree.with_name(f"{tree.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _say(f"debootstrap of Debian {SUITE} into {tree} (about two minutes)")
    arguments = [
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        f"--keyring={KEYRING}",
        SUITE,
        str(part),
        mirror(),
    ]
    if not Path("/usr/share/debootstrap/scripts", SUITE).exists():
        arguments.append("/usr/share/debootstrap/scripts/sid")  # a debootstrap older than the suite
    _run(folder, "debootstrap", *arguments, private=True)
    for package in (part / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    for image in (part / "boot").glob("initrd*"):
        image.unlink()
    part.rename(tree)


def _make_packages(folder: Path) -> None:
    """Optional: without it the tests on trixie's Python are skipped."""
    target = packages_of(folder)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"--target={part}"]
    command += [f"--python-version={PYTHON}", "--implementation=cp", "--only-binary=:all:", *platforms, *WHEELS]
    try:
        _run(folder, *command)
        part.rename(target)
    except LabMissing as exc:
        _say(f"no packages for Python {PYTHON}, its tests are skipped: {exc}")


def mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    text = ""
    for file in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if file.suffix in (".list", ".sources") and file.exists():
            text += file.read_text() + "\n"
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    # "deb [options] URI suite main ...", and deb822's "URIs: URI ..."
    found = re.findall(r"^(?:deb\s+(?:\[[^]]*\]\s*)?|URIs:\s*)(\w+://\S+)", "\n".join(lines), re.MULTILINE)
    debian = [uri for uri in found if uri.rstrip("/").endswith("/debian")]
    return debian[0] if debian else MIRROR


def _run(folder: Path, *command: str, private: bool = False) -> None:
    """Runs it with its output in prepare.log; LabMissing with its last line when it fails.

    `private`: in a mount namespace, so that what it mounts goes with it, however it ends.
    """
    environment = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C",
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "INITRD": "No",  # the lab has its own
    }
    log = folder / "prepare.log"
    with log.open("ab") as file:
        begin = file.tell()
        line = ["unshare", "--mount", *command] if private else command
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        raise LabMissing(
            f"{Path(command[0]).name}: {said[-1] if said else f'exit status {done.returncode}'} (all: {log})"
        )


def _say(line: str) -> None:
    print(f"lab: {line}", flush=True)
