"""The core's two forms, compiled and Python: the same tests, and installs without compiler, Cython or libatomic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evtchnd._core import COMPILED

ROOT = Path(__file__).parents[1]
SHARED_TESTS = [
    "words",
    "channel",
    "memory",
    "grants",
    "ring",
    "stream",
    "journal",
    "blk",
    "crash_points",
    "answers",
    "netback_hostile",
    "capture",
    "xenstore_tree",
    "xenstore_store",
]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not COMPILED, reason="this run is in the Python form already")
@pytest.mark.timeout(600)
def test_the_python_form_passes_the_same_tests() -> None:
    assert python("from evtchnd._core import *; assert not COMPILED", EVTCHND_PURE="1").returncode == 0
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in SHARED_TESTS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "EVTCHND_PURE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_the_forms_agree_in_every_module() -> None:
    names = [
        "words",
        "frames",
        "pins",
        "req",
        "blk",
        "answered",
        "nettx",
        "netrx",
        "rxslots",
        "toeplitz",
        "framelog",
        "nodes",
    ]
    code = f"import importlib; print({{importlib.import_module('evtchnd._core.' + n).COMPILED for n in {names}}})"
    assert python(code).stdout.strip() == f"{{{COMPILED}}}"
    assert python(code, EVTCHND_PURE="1").stdout.strip() == "{False}"


def test_without_cython_at_run_time() -> None:
    code = "import sys; sys.modules['cython'] = None; from evtchnd._core import blk; print(blk.cython.__name__)"
    run = python(code, EVTCHND_PURE="1")
    assert run.stdout.strip() == "evtchnd._core.nocython", run.stderr


def test_without_libatomic_the_package_is_named() -> None:
    code = """
import ctypes
real = ctypes.PyDLL
def missing(name, *args):
    if name and "atomic" in name:
        raise OSError("cannot open shared object file")
    return real(name, *args)
ctypes.PyDLL = missing
from evtchnd._core import Mem, full_fence
from evtchnd.errors import HostError
from evtchnd.grants import GrantTable
from evtchnd.memory import GuestMemory
full_fence()                       # a fence there is, and loads and stores
Mem(bytearray(8)).store(0, 1)
for call in (lambda: Mem(bytearray(8)).swap(0, 0, 1), lambda: GrantTable(GuestMemory(), 7)):
    try:
        call()
    except HostError as error:
        print(error)
"""
    run = python(code, EVTCHND_PURE="1")
    assert run.stdout.count("install Debian's libatomic1") == 2, run.stdout + run.stderr


def test_without_libatomic_the_daemon_says_so_at_its_start(tmp_path: Path) -> None:
    code = f"""
import ctypes, sys
def missing(name, *args):
    raise OSError("cannot open shared object file")
ctypes.PyDLL = missing
from evtchnd.__main__ import main
sys.exit(main(["--runtime-dir", {str(tmp_path / "run")!r}]))
"""
    run = python(code, EVTCHND_PURE="1")
    assert run.returncode == 1
    assert "install Debian's libatomic1" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.timeout(600)
def test_a_build_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "evtchnd", tmp_path / "evtchnd", ignore=ignore)
    shutil.copytree(ROOT / "backends", tmp_path / "backends", ignore=ignore)
    environment = {**os.environ, "CC": "/no/compiler", "LDSHARED": "/no/compiler -shared"}
    environment.pop("EVTCHND_REQUIRE_EXT", None)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING: the core is not compiled, it runs as Python" in run.stderr
    assert "/no/compiler" in run.stderr
    assert [path.name for path in (tmp_path / "evtchnd/_core").glob("*.so")] == []
    environment["EVTCHND_REQUIRE_EXT"] = "1"
    run = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
