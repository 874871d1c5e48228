"""Real guests: Debian's stock kernels, each with an ext4 root file system of its suite's packages, none of it changed.

    guest-SUITE-KEY/
        vmlinuz
        modules/    those that are loaded before the root file system is there, with what they need
        root        ext4, sparse: the files of PACKAGES and of what they depend on, busybox as init
    guestboot-SUITE-KEY/
        initramfs   busybox, the modules, guest/init; in /guest what busybox' init runs: inittab, rc, console

guest/init brings the initramfs' /guest to the root's /run/guest, where /etc/inittab points to: a change of it changes
no image. So does the script of a second archive (`with_script`), which guest/console runs on hvc0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lab import debian, initramfs
from lab.machine import HERE, Lab, LabMissing

# Of a guest's folder: another number where make() makes it otherwise.
LAYOUT = 1
SUITES = ("trixie", "bookworm")
KERNEL = "linux-image-amd64"
PACKAGES = [
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "e2fsprogs",
    "ethtool",
    "findutils",
    "fio",
    "grep",
    "gzip",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kexec-tools",
    "kmod",
    "mount",
    "sed",
    "tar",
    "util-linux",
    "xenstore-utils",
]
# fio's plots are in Python; the rest has work only where packages are installed
WITHOUT = ["debconf", "dpkg", "initramfs-tools", "libpam-runtime", "linux-base", "perl-base", "python3", "tzdata"]
NO_FILES_OF = [
    PurePosixPath("usr/share", name) for name in ("bash-completion", "doc", "info", "lintian", "locale", "man")
]
MODULES = ["xen_blkfront", "xen_netfront", "crc32c_generic", "ext4"]
FOLDERS = (
    "dev",
    "etc",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/sbin",
    "var",
)
MERGED = ("bin", "lib", "lib64", "sbin")
SCRIPTS = HERE / "guest"
RUN_BY_INIT = ("inittab", "rc", "console")
BUSYBOX_INIT = ("usr/sbin/init", "usr/sbin/poweroff", "usr/sbin/reboot", "usr/sbin/halt")
# For what a test writes into its root file system.
FREE_BYTES = 128 << 20


@dataclass(frozen=True)
class Guest:
    """What a VMM boots; `root` is copied before it is written to."""

    suite: str
    release: str  # of the kernel
    kernel: Path
    initramfs: Path
    root: Path

    def with_script(self, script: str) -> bytes:
        """An initramfs whose guest runs `script` with bash, says `@@ status N`, and powers off."""
        archive = initramfs.Archive()
        archive.folder("guest")
        archive.file("guest/script", script.encode(), 0o755)
        first = self.initramfs.read_bytes()
        # an archive that is not compressed begins at a multiple of 4
        return first + bytes(-len(first) % 4) + archive.end()


def folder_of(lab: Lab, suite: str) -> Path:
    """Where the guest of a suite lies, or would."""
    return lab.folder / f"guest-{suite}-{debian.key(lab.tree.name, LAYOUT, PACKAGES, WITHOUT, NO_FILES_OF, MODULES)}"


def find(lab: Lab, suite: str) -> Guest:
    """The guest of a suite, as it was prepared; LabMissing. Makes the initramfs when only that is not there."""
    folder = folder_of(lab, suite)
    if not folder.is_dir():
        raise LabMissing(f"the {suite} guest is not prepared in {lab.folder}: make lab")
    scripts = {"init": (SCRIPTS / "init").read_bytes()}
    scripts |= {f"guest/{name}": (SCRIPTS / name).read_bytes() for name in RUN_BY_INIT}
    maker = Path(initramfs.__file__).read_bytes()
    boot = lab.folder / f"guestboot-{suite}-{debian.key(folder.name, scripts, maker)}"
    if not boot.is_dir():
        part = boot.with_name(f"{boot.name}.part-{os.getpid()}")
        part.mkdir()
        data = initramfs.build(lab.tree / "usr/bin/busybox", folder / "modules", MODULES, scripts)
        (part / "initramfs").write_bytes(data)
        try:
            part.rename(boot)
        except OSError:  # somebody else was quicker
            shutil.rmtree(part)
    release = (folder / "release").read_text().strip()
    return Guest(suite, release, folder / "vmlinuz", boot / "initramfs", folder / "root")


def missing(lab: Lab) -> list[str]:
    """The suites whose guests are not there."""
    return [suite for suite in SUITES if not folder_of(lab, suite).is_dir()]


def make(lab: Lab, suite: str, own: str) -> None:
    """Makes the guest of a suite; `own` is the suite of the lab's tree. LabMissing."""
    if os.geteuid():
        raise LabMissing("the lab's guests cannot be made without root (their files' owners)")
    target = folder_of(lab, suite)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    tree = lab.tree
    if suite != own:
        debian.say(f"debootstrap of Debian {suite} for a guest (about a minute)")
        tree = part / "tree"
        debian.debootstrap(lab.folder, suite, [*PACKAGES, KERNEL], tree)
    modules = debian.modules_of(tree)
    (part / "release").write_text(f"{modules.name}\n")
    shutil.copy(tree / "boot" / f"vmlinuz-{modules.name}", part / "vmlinuz")
    needed = initramfs.module_files(modules, MODULES)
    for path in (modules / "modules.dep", modules / "modules.builtin", *needed):
        copy = part / "modules" / path.relative_to(modules)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    _fill(tree, part / "files", suite)
    _make_image(lab, part / "files", part / "root")
    shutil.rmtree(part / "files")
    if tree != lab.tree:
        shutil.rmtree(tree)
    part.rename(target)


def _fill(tree: Path, files: Path, suite: str) -> None:
    """The root file system as a folder; hard links to the tree where they are files."""
    for name in FOLDERS:
        (files / name).mkdir(parents=True)
    for name in MERGED:
        (files / name).symlink_to(f"usr/{name}")
    packages = debian.Packages(tree)
    for package in packages.with_needed(PACKAGES, WITHOUT):
        for path in packages.files(package):
            if any(path.is_relative_to(folder) for folder in NO_FILES_OF):
                continue
            source, copy = tree / path, files / path
            if source.is_dir() and not source.is_symlink():
                copy.mkdir(exist_ok=True, parents=True)
                shutil.copystat(source, copy)
            elif not os.path.lexists(copy):
                copy.parent.mkdir(exist_ok=True, parents=True)
                os.link(source, copy, follow_symlinks=False)
    for name in ("passwd", "group", "ld.so.cache"):
        shutil.copy(tree / "etc" / name, files / "etc" / name)
    (files / "etc/inittab").symlink_to("/run/guest/inittab")
    (files / "etc/hostname").write_text(f"{suite}\n")
    for name in BUSYBOX_INIT:
        (files / name).symlink_to("/usr/bin/busybox")


def _make_image(lab: Lab, files: Path, image: Path) -> None:
    size = sum(path.lstat().st_size + 4096 for path in files.rglob("*")) + FREE_BYTES
    with image.open("wb") as file:
        file.truncate(-(-size // (1 << 20)) << 20)
    try:
        lab.mkfs(image, "-m0", "-b", "4096", "-L", "root", "-d", str(files))
    except subprocess.CalledProcessError as exc:
        raise LabMissing(f"mke2fs of a guest's root: {exc.stderr.strip()}") from None
