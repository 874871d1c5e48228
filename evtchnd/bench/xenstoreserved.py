"""The processes of `evtchnd-bench xenstore`: servers on one CPU, the load on another."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from evtchnd.bench.program import cpu_us
from evtchnd.bench.wakeupserved import BACK_CPU, END_S, FRONT_CPU
from evtchnd.bench.xenstoreserver import Given
from evtchnd.errors import HostError


class Served(Protocol):
    """A server process that listens at `path`."""

    path: Path

    def cpu_us(self) -> float: ...


class Server:
    """One server process (xenstoreserver.py); `filled` is what it said of its store."""

    def __init__(self, path: Path, nodes: int) -> None:
        """path: of its socket; nodes: about so many; -1: an echo server."""
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evtchnd.bench.xenstoreserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        given = Given(str(path), nodes, BACK_CPU)
        self.filled = self.ask(json.dumps(asdict(given)))

    def ask(self, line: str) -> dict[str, Any]:
        """One line there, one back. HostError if the process has ended."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise HostError("the benchmark's server has ended; its reason is on standard error")
        told: dict[str, Any] = json.loads(answer)
        return told

    def cpu_us(self) -> float:
        return cpu_us(self._process.pid)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Load:
    """xenstoreload.c, running: from its construction to `result()`."""

    def __init__(self, program: Path, server: Served, words: dict[str, Any]) -> None:
        self._server = server
        self._what = words["op"]
        self._before = server.cpu_us()
        path = f"{server.path}.guests" if words["op"] == "boot" else server.path
        arguments = {"path": path, "cpu": FRONT_CPU, **words}
        self._process = subprocess.Popen(
            [program, *(f"{key}={value}" for key, value in arguments.items())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> dict[str, Any]:
        """Ends it early."""
        self._process.terminate()
        return self.result()

    def result(self) -> dict[str, Any]:
        """What it saw, and the CPU time of the server for a request. HostError if requests failed."""
        out, err = self._process.communicate()
        if self._process.returncode or not out:
            raise HostError(f"{self._what}: the load failed: {err.strip()}")
        reading: dict[str, Any] = json.loads(out)
        if reading["errors"]:
            raise HostError(f"{self._what}: {reading['errors']} requests were refused: {err.strip()}")
        if self._what == "fire":
            # what its watches cost to set is in there
            return reading
        reading["per_second"] = reading["requests"] / reading["seconds"]
        reading["server_cpu_us"] = (self._server.cpu_us() - self._before) / reading["served"]
        return reading
