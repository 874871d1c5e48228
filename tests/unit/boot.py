"""Becomes PID 1 of a private systemd: runs as root in new pid, mount, uts, ipc and net namespaces.

    unshare --fork --pid --mount --uts --ipc --net --mount-proc --kill-child python boot.py CGROUP FOLDER PATH...

CGROUP is the name of a new one below ours; FOLDER (seen inside, too) holds `units/`, `sysusers.conf`, `tmpfiles.conf`;
PATHs are what the service has to read. Nothing of the machine is written to: /etc is a copy; /run, /tmp, /var and
whatever folder only root may enter are empty file systems with the PATHs bound into them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLONE_NEWCGROUP = 0x02000000
HOLD = Path("/mnt")
EMPTY = ["/run", "/tmp", "/var"]
TARGETS = ["sysinit", "basic", "sockets", "shutdown", "umount", "multi-user", "test"]
SYSTEMD = "/lib/systemd/systemd"


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def enter_cgroup(name: str) -> None:
    """A cgroup of our own (v2), which becomes the root that systemd sees."""
    tree = HOLD / "cgroup"
    tree.mkdir()
    mount("-t", "cgroup2", "cgroup2", str(tree))
    ours = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    private = tree / ours.lstrip("/") / name
    private.mkdir()
    (private / "cgroup.procs").write_text("0")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWCGROUP):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWCGROUP)")
    subprocess.run(["umount", str(tree)], check=True)
    mount("-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")


def closed_folders(paths: list[Path]) -> list[str]:
    """Folders on the way to `paths` that only their owner may enter, and that will not be made anew anyway."""
    found = []
    for path in paths:
        if any(path.is_relative_to(place) for place in EMPTY):
            continue
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                found.append(str(parent))
                break
    return found


def main() -> None:
    folder = Path(sys.argv[2])
    paths = [folder, *(Path(path) for path in sys.argv[3:])]
    empty = [*EMPTY, *closed_folders(paths)]
    mount("-t", "tmpfs", "tmpfs", str(HOLD))
    enter_cgroup(sys.argv[1])
    for number, path in enumerate(paths):
        (HOLD / str(number)).mkdir()
        mount("--bind", str(path), str(HOLD / str(number)))
    # whatever vanishes meanwhile (a package is being installed) is not missed
    subprocess.run(["cp", "--archive", "/etc", str(HOLD / "etc")], stderr=subprocess.DEVNULL)
    mount("--bind", str(HOLD / "etc"), "/etc")
    for place in empty:
        mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", place)
    for number, path in enumerate(paths):
        if any(path.is_relative_to(place) for place in empty):
            path.mkdir(parents=True, exist_ok=True)
            mount("--bind", str(HOLD / str(number)), str(path))
    Path("/tmp").chmod(0o1777)
    for name in ("/run/lock", "/run/units", "/var/lib", "/var/log", "/var/tmp", "/var/cache"):
        Path(name).mkdir(exist_ok=True)  # one may be on the way to the checkout
    mount("--bind", "-o", "ro", "/proc/sys", "/proc/sys")
    mount("-o", "remount,bind,ro", "/proc/sys")
    Path("/etc/machine-id").write_text(os.urandom(16).hex() + "\n")
    shutil.copytree(folder / "units", "/run/units", dirs_exist_ok=True)
    for target in TARGETS:
        Path(f"/run/units/{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    for unit in ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"):
        shutil.copy(f"/lib/systemd/system/{unit}", "/run/units")
    # the machine's kernel log is none of ours
    Path("/etc/systemd/journald.conf.d").mkdir(exist_ok=True)
    Path("/etc/systemd/journald.conf.d/unit.conf").write_text("[Journal]\nReadKMsg=no\nStorage=volatile\n")
    subprocess.run(["systemd-sysusers", str(folder / "sysusers.conf")], check=True)
    subprocess.run(["systemd-tmpfiles", "--create", str(folder / "tmpfiles.conf")], check=True)
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "container": "evtchnd-test",  # systemd then leaves clocks, modules and sysctls alone
        "SYSTEMD_UNIT_PATH": "/run/units",
    }
    os.execve(SYSTEMD, [SYSTEMD, "--system", "--unit=test.target", "--log-target=null"], environment)


if __name__ == "__main__":
    main()
