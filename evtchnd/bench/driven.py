"""A real guest whose console takes commands: a line in; its output, then a line `@@ STATUS` (tests/lab/guest)."""

from __future__ import annotations

import json
import os
import re
import select
import time
from typing import Any

from evtchnd.errors import HostError

# A terminal's line in canonical mode: N_TTY_BUF_SIZE of Linux, less its end.
LINE_MAX = 4094
SHOWN = 2000


class Driven:
    """The console's two ends, `read` and `write`; they stay the caller's."""

    def __init__(self, read: int, write: int, first: bytes = b"") -> None:
        """`first`: what was read already."""
        self._read = read
        self._write = write
        self._unread = first
        self.log = bytearray(first)  # all that was said

    def wait(self, pattern: str, seconds: float) -> re.Match[bytes]:
        """Reads on until a whole line matches: that one, `string` being all that came before it. HostError."""
        wanted = re.compile(rb"^" + pattern.encode() + rb"\r?\n", re.MULTILINE)
        end = time.monotonic() + seconds
        while not (found := wanted.search(self._unread)):
            more = self._more(end)
            if more is None:
                raise HostError(f"the guest's console: no {pattern!r} within {seconds:.0f} s, but {self._tail()}")
            if not more:
                raise HostError(f"the guest's console ended before {pattern!r}, with {self._tail()}")
        self._unread = self._unread[found.end() :]
        return found

    def ends(self, seconds: float) -> None:
        """Reads on until nobody can write to the console any more. HostError."""
        end = time.monotonic() + seconds
        while more := self._more(end):
            pass
        if more is None:
            raise HostError(f"the guest's console has not ended within {seconds:.0f} s, but said {self._tail()}")

    def _more(self, end: float) -> bool | None:
        """Reads what is there; False: no more will come, None: nothing has until `end`."""
        left = end - time.monotonic()
        if left <= 0 or not select.select([self._read], [], [], left)[0]:
            return None
        try:
            data = os.read(self._read, 1 << 16)
        except OSError:  # a pty whose other end has gone
            data = b""
        self._unread += data
        self.log += data
        return bool(data)

    def send(self, command: str) -> None:
        """A command whose status nobody has asked for yet."""
        line = command.encode()
        if b"\n" in line or len(line) > LINE_MAX:
            raise ValueError(f"a command of {len(line)} bytes, or of two lines")
        while line := line[os.write(self._write, line) :]:
            pass
        os.write(self._write, b"\n")

    def status(self, seconds: float) -> tuple[int, str]:
        """Exit status and output of the command that was sent."""
        found = self.wait(r"@@ (\d+)", seconds)
        said = found.string[: found.start()].decode(errors="replace").replace("\r", "")
        return int(found[1]), said

    def run(self, command: str, seconds: float) -> str:
        """Its output. HostError where it fails."""
        self.send(command)
        status, said = self.status(seconds)
        if status:
            raise HostError(f"in the guest: {command}: exit status {status}: {said[-SHOWN:].strip()}")
        return said

    def run_json(self, command: str, seconds: float) -> Any:
        """The JSON object that it prints, whatever it says before."""
        said = self.run(command, seconds)
        return json.loads(said[said.index("{") :])

    def _tail(self) -> str:
        return repr(bytes(self.log[-SHOWN:]).decode(errors="replace"))
