"""Trees of Debian packages by debootstrap, and what lies in one; files named by a key of what they are made of."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from lab.machine import HERE, LabMissing

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def say(line: str) -> None:
    print(f"lab: {line}", flush=True)


def version(path: Path) -> list[int]:
    """To compare releases of kernels by."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


def modules_of(tree: Path) -> Path:
    """The modules of the tree's newest kernel."""
    return max((tree / "usr/lib/modules").iterdir(), key=version)


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


def run(folder: Path, *command: str, private: bool = False) -> None:
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


def debootstrap(folder: Path, suite: str, packages: Sequence[str], tree: Path) -> None:
    """Installs the packages into `tree`, which must not be there. LabMissing."""
    if os.geteuid():
        again = f"sudo EVTCHND_LAB={folder} {sys.executable} {HERE} prepare"
        raise LabMissing(f"the lab cannot be made without root (debootstrap); once is enough: {again}")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if not shutil.which("debootstrap", path=path) or not KEYRING.exists():
        if not shutil.which("apt-get"):
            raise LabMissing("the lab cannot be made: no debootstrap, and no apt-get to install it with")
        run(folder, "apt-get", "update", "-qq")
        run(folder, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap", KEYRING.stem)
    arguments = ["--variant=minbase", f"--include={','.join(packages)}", f"--keyring={KEYRING}"]
    arguments += [suite, str(tree), mirror()]
    if not Path("/usr/share/debootstrap/scripts", suite).exists():
        arguments.append("/usr/share/debootstrap/scripts/sid")  # a debootstrap older than the suite
    run(folder, "debootstrap", *arguments, private=True)
    for package in (tree / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    for image in (tree / "boot").glob("initrd*"):
        image.unlink()


class Packages:
    """What is installed in a tree: dpkg's database (deb822 paragraphs, and one list of files a package)."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._installed: dict[str, str] = {}  # name -> its Depends and Pre-Depends
        self._provided: dict[str, str] = {}  # virtual name -> who provides it
        for paragraph in (tree / "var/lib/dpkg/status").read_text().split("\n\n"):
            fields = dict(re.findall(r"^([A-Z][\w-]*): *(.*)$", paragraph, re.MULTILINE))
            if "Package" in fields:
                name = fields["Package"]
                self._installed[name] = f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}"
                for virtual in _names(fields.get("Provides", "")):
                    self._provided.setdefault(virtual, name)

    def with_needed(self, names: Sequence[str], without: Sequence[str]) -> list[str]:
        """`names` and all that they depend on, but nothing of `without`, nor what only those need."""
        found: list[str] = []
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            name = name if name in self._installed else self._provided.get(name, "")
            if not name or name in found or name in without:
                continue
            found.append(name)
            for alternatives in self._installed[name].split(","):
                there = [n for n in _names(alternatives, "|") if n in self._installed or n in self._provided]
                waiting += there[:1]
        return found

    def files(self, name: str) -> Iterator[PurePosixPath]:
        """Paths from the tree's root, folders before what is in them, as they lie there: /bin/x is usr/bin/x."""
        info = self._tree / "var/lib/dpkg/info"
        listed = next(path for path in (info / f"{name}.list", info / f"{name}:amd64.list") if path.exists())
        for line in listed.read_text().splitlines():
            path = self._tree / line.lstrip("/")
            if line != "/." and os.path.lexists(path):
                yield PurePosixPath((path.parent.resolve() / path.name).relative_to(self._tree.resolve()))


def _names(relation: str, between: str = ",") -> list[str]:
    """Package names of a dependency field, without versions and architectures."""
    found = [re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", part) for part in relation.split(between)]
    return [match[1] for match in found if match]
