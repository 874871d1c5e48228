"""Where log lines go: the journal with fields where systemd listens, else standard error as text or JSON.

A line that begins `domain 7: vbd 51712:` also gets the fields DOMID and DEVICE (`journalctl DOMID=7`). However a domain
causes its lines, there are only so many of them: journald drops by unit, which would hide another domain's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic

_JOURNAL = "/run/systemd/journal/socket"
_WHO = re.compile(r"domain (?P<DOMID>\d+)(?:: (?P<DEVICE>[a-z]+ \d+))?\b")
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
# Of one domain, in one process: a domain with 64 disks and 16 vifs says some 250 lines when it comes; journald's own
# default is 10,000 in 30 s for the whole unit.
BURST = 500
PER_SECOND = 5.0
MOST_DOMAINS = 1024
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def setup(level: str, form: str = "auto") -> None:
    """Logs to the place that `form` names: auto, text, json, journal. auto: the journal if standard error is it.

    Once a process, before the first line; forked children inherit it. Calling it again replaces what was set.
    """
    if form == "auto":
        form = "journal" if _stderr_is_journal(os.environ.get("JOURNAL_STREAM", "")) else "text"
    handler: logging.Handler
    if form == "journal":
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Share())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a log that cannot be written ends nobody


def connect() -> None:
    """What a fork's lines go through, opened now: from within a sandbox it cannot be."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, JournalHandler):
            with suppress(OSError):  # then they go to standard error
                handler.connect()


def fields(record: logging.LogRecord, text: str) -> dict[str, str]:
    """What is known of a line beside its text, named as the journal names it (systemd.journal-fields(7))."""
    found = _WHO.match(text)
    known = {
        "PRIORITY": str(_PRIORITY.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": "evtchnd",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    return known | {key: value for key, value in (found.groupdict() if found else {}).items() if value}


class Share(logging.Filter):
    """Of the lines about one domain `burst`, then `per_second`. The next one counts those that were left out."""

    def __init__(
        self, *, burst: int = BURST, per_second: float = PER_SECOND, clock: Callable[[], float] = monotonic
    ) -> None:
        super().__init__()
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._domains: dict[str, tuple[float, float, int]] = {}  # lines that may come, when that was so, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        who = _WHO.match(text)
        if who is None:
            return True
        domid, now = who["DOMID"], self._clock()
        may, then, left_out = self._domains.pop(domid, (float(self._burst), now, 0))
        may = min(self._burst, may + (now - then) * self._per_second)
        if may < 1:
            self._domains[domid] = may, now, left_out + 1
            return False
        self._domains[domid] = may - 1, now, 0
        if len(self._domains) > MOST_DOMAINS:
            del self._domains[next(iter(self._domains))]  # the one that has been silent longest
        if left_out:
            record.msg, record.args = f"{text} ({left_out} more lines of domain {domid} were left out)", ()
        return True


class TextFormatter(logging.Formatter):
    """`2025-01-31 12:00:00 warning domain 7: vbd 51712: ...`; without the time where something else adds it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(record.levelname, record.levelname.lower(), 1)


class JsonFormatter(logging.Formatter):
    """One object a line: time (seconds), level, logger, message, and domid, device where they are known."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        line = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": text,
        }
        known = fields(record, text)
        line |= {name.lower(): known[name] for name in ("DOMID", "DEVICE") if name in known}
        return json.dumps(line, ensure_ascii=False)


class JournalHandler(logging.Handler):
    """The journal's native protocol : a datagram of fields, or a memfd where that is too large."""

    def __init__(self, address: str = _JOURNAL) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._address = address
        self._sock: socket.socket | None = None
        self._pid = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self._send(encode({"MESSAGE": text} | fields(record, text)))
        except OSError:
            # journald restarts, too: the next line tries again
            sys.stderr.write(f"<{_PRIORITY.get(record.levelno, 6)}>{record.getMessage()}\n")
        except Exception:
            self.handleError(record)

    def connect(self) -> None:
        """Makes this process' own socket. OSError: there is no journal."""
        if self._sock is not None:
            # a forked worker may have closed the descriptor, and its number may be another's by now
            self._sock.detach()
        self._sock = None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._address)
        except OSError:
            sock.close()
            raise
        self._sock, self._pid = sock, os.getpid()

    def _send(self, datagram: bytes) -> None:
        if self._sock is None or self._pid != os.getpid():
            self.connect()
        sock = self._sock
        if sock is None:
            return
        try:
            sock.send(datagram)
        except ConnectionRefusedError:  # it is another one's by now
            self._sock = None
            sock.close()
            raise
        except OSError as exc:
            if exc.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_large(sock, datagram)

    def _send_large(self, sock: socket.socket, datagram: bytes) -> None:
        fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, datagram)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            sock.sendmsg([b""], rights)
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._sock is not None and self._pid == os.getpid():
            self._sock.close()
        self._sock = None
        super().close()


def encode(entry: Mapping[str, str]) -> bytes:
    """`KEY=value\\n` a field; a value with line breaks as `KEY\\n`, its length (u64, little-endian), value, `\\n`."""
    parts = []
    for key, value in entry.items():
        raw = value.encode("utf-8", "surrogateescape")
        parts.append(
            f"{key}\n".encode() + struct.pack("<Q", len(raw)) + raw if b"\n" in raw else f"{key}=".encode() + raw
        )
    return b"\n".join(parts) + b"\n"


def _stderr_is_journal(stream: str) -> bool:
    """JOURNAL_STREAM is `device:inode` of the stream that systemd connected; a shell may have redirected it since."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return stream == f"{stat.st_dev}:{stat.st_ino}" and Path(_JOURNAL).exists()
