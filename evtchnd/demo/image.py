"""The demo's disk: an ext4 image with real files, made and checked by e2fsprogs."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from pathlib import Path

from evtchnd.errors import HostError

# A tenth of it is the file that the guest overwrites; the rest of the tree is what it reads.
IMAGE_BYTES = 160 << 20
SCRATCH = "guest.dat"
SCRATCH_BYTES = 16 << 20
FILLER = b"\xa5" * 4096


def tool(name: str) -> str:
    """Path of one of e2fsprogs' programs (they are in sbin). HostError if it is not there."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise HostError(f"{name} is missing: apt-get install e2fsprogs")
    return found


def make(folder: Path, image: Path) -> dict[str, str]:
    """An ext4 image with the tree that it makes in `folder`. Returns path in the image -> SHA-256 (hex)."""
    source = random.Random(1)
    for number in range(60):
        file = folder / f"dir{number % 6}" / f"file{number:02}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.randbytes(source.choice((3_000, 70_000, 900_000, 3_000_000))))
    (folder / "README").write_text("Read by a Xen domain over a blkif ring.\n")
    # written to the end, so that every block of it is allocated
    (folder / SCRATCH).write_bytes(FILLER * (SCRATCH_BYTES // len(FILLER)))
    with image.open("wb") as file_:
        file_.truncate(IMAGE_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-L", "evtchnd", "-d", str(folder), str(image))
    return {f"/{file.relative_to(folder)}": sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def check(image: Path) -> str:
    """`e2fsck -fn`: its last line. HostError with what it found."""
    return _run("e2fsck", "-fn", str(image)).strip().splitlines()[-1]


def extract(image: Path, path: str, to: Path) -> str:
    """Takes one file out of the image with debugfs; its SHA-256."""
    _run("debugfs", "-R", f"dump {path} {to}", str(image))
    return sha256(to)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return done.stdout
