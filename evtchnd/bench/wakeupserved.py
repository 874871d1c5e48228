"""Who answers requests in `evtchnd-bench wakeup`: a process like a worker, and the limit in C, on the same words."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from evtchnd.bench.program import cpu_us
from evtchnd.bench.wakeupserver import ANSWER_EVENT, REQUEST_EVENT, WORDS_BYTES, Given
from evtchnd.errors import HostError

SOURCE = Path(__file__).with_name("wakeup.c")
FRONT_CPU, BACK_CPU = 0, 1
END_S = 10.0


class Channels:
    """Eventfds and fresh words of `count` channels, from `offset` of a memfd: its own, or `ram`, the caller's."""

    def __init__(self, count: int, *, ram: int | None = None, offset: int = 0) -> None:
        self.count = count
        self.offset = offset
        self._files = contextlib.ExitStack()
        if ram is None:
            ram = os.memfd_create("bench-words", os.MFD_CLOEXEC)
            self._files.callback(os.close, ram)
            os.ftruncate(ram, offset + count * WORDS_BYTES)
        self.ram = ram
        with mmap.mmap(ram, 0) as memory:
            for at in range(offset, offset + count * WORDS_BYTES, WORDS_BYTES):
                memory[at : at + WORDS_BYTES] = bytes(WORDS_BYTES)
                struct.pack_into("<I", memory, at + REQUEST_EVENT, 1)
                struct.pack_into("<I", memory, at + ANSWER_EVENT, 1)
        self.kicks = [self._eventfd() for _ in range(count)]
        self.notifies = [self._eventfd() for _ in range(count)]

    def _eventfd(self) -> int:
        try:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            self.close()
            raise HostError(f"{2 * self.count} eventfds: {error.strerror} (RLIMIT_NOFILE)") from None
        self._files.callback(os.close, fd)
        return fd

    def close(self) -> None:
        self._files.close()


class Server:
    """A process that answers `channels`, which it then owns; `polling`: for `poll_us` before it sleeps."""

    def __init__(self, channels: Channels, command: Sequence[str], given: str = "") -> None:
        self.channels = channels
        self._process = subprocess.Popen(
            command,
            pass_fds=(channels.ram, *channels.kicks, *channels.notifies),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(given)
            self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "ready":
            self.close()
            raise HostError("what answers the kicks did not start; its reason is on standard error")

    @classmethod
    def evtchnd(cls, channels: Channels, poll_us: int) -> Self:
        """evtchnd's own way from an eventfd to a handler: wakeupserver.py."""
        words = Given(channels.ram, channels.offset, channels.kicks, channels.notifies, poll_us, BACK_CPU)
        command = [sys.executable, "-m", "evtchnd.bench.wakeupserver"]
        return cls(channels, command, json.dumps(asdict(words)) + "\n")

    @classmethod
    def limit(cls, channels: Channels, poll_us: int, program: Path) -> Self:
        """One channel, in C."""
        words = {"ram": channels.ram, "offset": channels.offset, "poll_us": poll_us, "cpu": BACK_CPU}
        words |= {"kick": channels.kicks[0], "notify": channels.notifies[0]}
        return cls(channels, [str(program), "back", *(f"{k}={v}" for k, v in words.items())])

    def cpu_us(self) -> float:
        return cpu_us(self.pid)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self.channels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
