"""The core's tests on trixie's own Python, in a chroot of the lab's tree: no compiled module for it. Root."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile

import pytest

from lab import outside, prepare
from lab.machine import ROOT
from scale import SCALE

TESTS = [
    "words",
    "memory",
    "grants",
    "ring",
    "stream",
    "journal",
    "blk",
    "ports",
    "settings",
    "protocol",
    "transport",
    "channel",
    "xenstore_wire",
    "xenstore_tree",
    "xenstore_store",
]
# Counts here: what is found by many examples is found on the host.
FRACTION = 0.2


@pytest.mark.timeout(240)
def test_the_core_on_the_next_python() -> None:
    folder = prepare.cache()
    tree, packages = prepare.tree_of(folder), prepare.packages_of(folder)
    if not packages.is_dir() or os.geteuid() != 0:
        reason = f"no root, or no packages for Python {prepare.PYTHON} in {folder}: make lab"
        (pytest.fail if outside.required() else pytest.skip)(reason)
    binds = {
        ROOT: tree / "mnt/checkout",
        packages: tree / "mnt/packages",
        tempfile.gettempdir(): tree / "tmp",
        "/dev": tree / "dev",
        "/proc": tree / "proc",
    }
    lines = ["set -e", f"mount -t tmpfs mnt {shlex.quote(str(tree / 'mnt'))}"]
    for source, target in binds.items():
        lines += [f"mkdir -p {shlex.quote(str(target))}", shlex.join(["mount", "--rbind", str(source), str(target)])]
    inside = "cd /mnt/checkout; exec python3 -m pytest -q -p no:cacheprovider -o timeout=1000 "
    inside += " ".join(f"tests/test_{name}.py" for name in TESTS)
    lines.append(shlex.join(["exec", "chroot", str(tree), "sh", "-c", inside]))
    environment = {key: value for key, value in os.environ.items() if key.startswith("EVTCHND_")}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "\n".join(lines)],
        env={
            **environment,
            "EVTCHND_SCALE": str(SCALE * FRACTION),
            "HOME": "/root",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": "/mnt/packages",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
