"""A systemd of our own: PID 1 of new namespaces, with the units of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

from unit.render import ROOT, SOURCE, render

TIMEOUT = 60.0
BOOT = Path(__file__).parent / "boot.py"
NAMESPACES = ["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup"]
_UNSHARE = ["unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--net", "--mount-proc", "--kill-child"]
# Removes the cgroup that boot.py made: from outside, where the machine may not even have cgroup v2 mounted.
_REMOVE_CGROUP = """
import os, subprocess, sys, time
subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/mnt"], check=True)
ours = next(l[3:] for l in open("/proc/self/cgroup").read().splitlines() if l.startswith("0::"))
top = os.path.join("/mnt", ours.lstrip("/"), sys.argv[1])
for _ in range(100):
    for folder, _, _ in os.walk(top, topdown=False):
        try: os.rmdir(folder)
        except OSError: time.sleep(0.05)
"""


def why_not() -> str:
    """Why a private systemd cannot be booted here, "" if it can."""
    if os.geteuid():
        return "needs root"
    for program in ("systemd-analyze", "unshare", "nsenter", "systemd-sysusers"):
        if not shutil.which(program):
            return f"{program} is missing (packages systemd, util-linux)"
    if not Path("/lib/systemd/systemd").exists():
        return "package systemd is missing"
    tried = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount", "--net", "--mount-proc", "mount", "-t", "cgroup2", "x", "/mnt"],
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip() and f"no namespaces or no cgroup v2 here: {tried.stderr.strip()}"


class PrivateSystemd:
    """`run()` runs a command inside; `folder` is seen on both sides. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Boots. RuntimeError with what systemd or its preparation said."""
        self.folder = folder
        self._cgroup = f"evtchnd-unit-{uuid.uuid4().hex}"
        folder.chmod(0o755)
        render(folder / "units")
        # what the service has to read may lie where a service sees nothing
        hidden = {"ProtectHome": ["/home", "/root", "/run/user"], "PrivateTmp": ["/tmp", "/var/tmp"]}
        lines = [
            f"{setting}=no"
            for setting, places in hidden.items()
            if any(path.is_relative_to(place) for path in (ROOT, *_interpreter()) for place in places)
        ]
        for service in ("evtchnd.service", "evtchnd-fd.service"):
            overrides = folder / f"units/{service}.d"
            overrides.mkdir()
            (overrides / "place.conf").write_text("\n".join(["[Service]", *lines, ""]))
        shutil.copy(SOURCE / "sysusers.d/evtchnd.conf", folder / "sysusers.conf")
        shutil.copy(SOURCE / "tmpfiles.d/evtchnd.conf", folder / "tmpfiles.conf")
        self._log = (folder / "boot.log").open("w")
        paths = [str(path) for path in (ROOT, *_interpreter())]
        self._outer = subprocess.Popen(
            [*_UNSHARE, sys.executable, str(BOOT), self._cgroup, str(folder), *paths],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._pid = self._wait_for_pid_1()
            self.wait_for(lambda: self.run("systemctl", "is-active", "test.target", check=False).strip() == "active")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PrivateSystemd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills PID 1 and with it all that runs inside; removes the cgroup."""
        # --kill-child: PID 1 dies with it
        self._outer.kill()
        self._outer.wait()
        self._log.close()
        subprocess.run(
            ["unshare", "--mount", sys.executable, "-c", _REMOVE_CGROUP, self._cgroup], check=True, timeout=TIMEOUT
        )

    def run(self, *command: str, check: bool = True, script: str = "") -> str:
        """Standard output of a command inside; RuntimeError with its standard error where it fails."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._pid), *NAMESPACES, "--", *command],
            capture_output=True,
            text=True,
            input=script,
            timeout=TIMEOUT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT}/backends:{ROOT}/tests"},
            cwd="/",
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.report()}")
        return done.stdout

    def python(self, script: str) -> str:
        """Standard output of a Python script that runs inside as root, with this checkout on its path."""
        return self.run(sys.executable, "-", script=script)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").strip()

    def wait_for(self, condition: object, seconds: float = TIMEOUT) -> None:
        """Until `condition()` holds. RuntimeError with the state of things after `seconds`."""
        assert callable(condition)
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError(f"waited {seconds:g} s in vain\n{self.report()}")
            time.sleep(0.05)

    def report(self) -> str:
        """For the one who reads a failure."""
        self._log.flush()
        parts = [(self.folder / "boot.log").read_text()]
        if hasattr(self, "_pid") and self._outer.poll() is None:
            for command in (
                ["systemctl", "--no-pager", "status", "evtchnd.service"],
                ["journalctl", "--no-pager", "-n40"],
            ):
                done = subprocess.run(
                    ["nsenter", "--target", str(self._pid), *NAMESPACES, "--", *command], capture_output=True, text=True
                )
                parts.append(done.stdout + done.stderr)
        return "\n".join(parts)

    def _wait_for_pid_1(self) -> int:
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if self._outer.poll() is not None:
                raise RuntimeError(f"no private systemd\n{(self.folder / 'boot.log').read_text()}")
            for entry in Path("/proc").iterdir():
                if entry.name.isdecimal() and _is_systemd_below(entry, self._outer.pid):
                    return int(entry.name)
            time.sleep(0.02)
        raise RuntimeError(f"no private systemd\n{self.report()}")


def _is_systemd_below(entry: Path, parent: int) -> bool:
    try:
        status = (entry / "status").read_text()
        return f"\nPPid:\t{parent}\n" in status and status.startswith("Name:\tsystemd\n")
    except OSError:
        return False


def _interpreter() -> list[Path]:
    """What a Python of this virtual environment reads."""
    return sorted({Path(sys.prefix), Path(sys.base_prefix)})
