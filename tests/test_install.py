"""The install where there is no compiler: it works, says so, and runs as Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked_copy(to: Path) -> Path:
    """The tree as a clone would have it: a stale build/ or .so would hide a compile failure."""
    listing = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    return to


@pytest.mark.timeout(300)
def test_without_a_compiler_it_installs_says_so_and_runs(tmp_path: Path) -> None:
    source, target = tracked_copy(tmp_path / "source"), tmp_path / "site"
    environment = {k: v for k, v in os.environ.items() if k != "EVTCHND_REQUIRE_EXT"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", target, source],
        env=environment | {"CC": "/nonexistent/cc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the core is not compiled" in done.stdout + done.stderr
    assert not list(target.rglob("*.so"))
    code = "import evtchnd, evtchnd._core as c; print(evtchnd.__file__, c.COMPILED)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == [str(target / "evtchnd/__init__.py"), "False"]


@pytest.mark.timeout(300)
def test_a_required_extension_is_an_error(tmp_path: Path) -> None:
    source = tracked_copy(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=source,
        env=os.environ | {"CC": "/nonexistent/cc", "EVTCHND_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
