"""A network namespace of a test's own, with what is made in it; all of it goes with the namespace."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_numbers = itertools.count()


class Namespace:
    """`name`: as below /run/netns."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *words: str, check: bool = True) -> str:
        """A command in it; its standard output."""
        done = subprocess.run(["ip", "netns", "exec", self.name, *words], capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def ip(self, text: str) -> str:
        """`ip TEXT` in it."""
        done = subprocess.run(["ip", "-n", self.name, *text.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {text}: {done.stderr}"
        return done.stdout

    def link(self, name: str) -> str:
        """`ip -d link show`, "" where there is none."""
        done = subprocess.run(["ip", "-n", self.name, "-d", "link", "show", name], capture_output=True, text=True)
        return done.stdout

    def bridge(self, name: str, more: str = "") -> None:
        self.ip(f"link add {name} type bridge {more}")
        self.ip(f"link set {name} up")


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Skips the test where none can be made."""
    name = f"evtchnd-{os.getpid()}-{next(_numbers)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode or not Path("/dev/net/tun").exists():
        pytest.skip(f"no network namespace with TAPs can be made here: {made.stderr.strip()}")
    try:
        yield Namespace(name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def until(ready: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Waits for a condition; no test depends on how long it takes."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
