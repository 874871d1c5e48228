"""The ext4 reader against images made by mkfs.ext4."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from evtchnd.guest.ext4 import Ext4, Ext4Error

PATH = os.environ["PATH"] + ":/usr/sbin"
pytestmark = pytest.mark.skipif(
    not shutil.which("mkfs.ext4", path=PATH), reason="no mkfs.ext4: apt-get install e2fsprogs"
)


def make_image(tmp_path: Path, tree: dict[str, bytes], *options: str) -> Path:
    folder = tmp_path / "tree"
    for name, data in tree.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    image = tmp_path / "disk.img"
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", *options, "-d", folder, image, "64M"],
        check=True,
        env={"PATH": PATH},
    )
    return image


@pytest.mark.parametrize("options", [(), ("-b", "1024"), ("-O", "^64bit"), ("-I", "128")], ids=str)
def test_every_file_is_found_and_equal(tmp_path: Path, options: tuple[str, ...]) -> None:
    tree = {f"d{i % 7}/f{i}": os.urandom(i * 977) for i in range(120)} | {"big": os.urandom(9 << 20), "empty": b""}
    image = make_image(tmp_path, tree, *options)
    with image.open("rb") as file:
        fs = Ext4(lambda offset, length: os.pread(file.fileno(), length, offset))
        found = {path.lstrip("/"): fs.contents(inode) for path, inode in fs.walk()}
    assert found == tree


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Ext4Error, match="magic number"):
        Ext4(lambda offset, length: bytes(length))
