"""Xen's xenstored, the server in C, beside which `evtchnd-bench xenstore --xenstored PROGRAM` reads evtchnd's.

It is Debian's program as it is (package xen-utils-4.17: /usr/lib/xen-4.17/bin/xenstored), without a hypervisor below
it: xenstoredalone.c stands in for that. Its store is small, and has no log: it does not survive its end.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from evtchnd.bench.program import build, cpu_us
from evtchnd.bench.wakeupserved import BACK_CPU, END_S
from evtchnd.bench.xenstorefill import VALUE
from evtchnd.errors import HostError
from evtchnd.xenstore import wire
from evtchnd.xenstore.wire import Op

_STANDS_IN = Path(__file__).with_name("xenstoredalone.c")
_START_S = 5.0


class Xenstored:
    """The process, with about 1,000 nodes of xenstorefill.py."""

    def __init__(self, program: str, folder: Path) -> None:
        """HostError if it does not start."""
        library = folder / "xenstoredalone.so"
        build(_STANDS_IN, library, "-shared", "-fPIC")
        self.path = folder / "socket"
        environment = {"LD_PRELOAD": str(library), "XENSTORED_RUNDIR": str(folder), "XENSTORED_ROOTDIR": str(folder)}
        try:
            self._process = subprocess.Popen(
                [program, "-N"], env={**os.environ, **environment, "XENSTORED_PATH": str(self.path)}
            )
        except OSError as error:
            raise HostError(f"{program}: {error.strerror}") from None
        os.sched_setaffinity(self._process.pid, {BACK_CPU})
        try:
            self._fill(1_000)
        except BaseException:
            self.close()
            raise

    def _fill(self, nodes: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            end = time.monotonic() + _START_S
            while client.connect_ex(str(self.path)):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise HostError("xenstored has not come up; its reason is on standard error")
                time.sleep(0.01)
            paths = [b"/bench/%d/%d/%d" % (k // 1000, k // 10 % 100, k % 10) for k in range(nodes)]
            paths += [b"/thousand/%03d" % k for k in range(1000)]
            for path in [*paths, b"/made", b"/watched/this"]:
                client.sendall(wire.pack(Op.WRITE, 0, 0, path + b"\0" + VALUE))
                reply = client.recv(wire.HEADER_SIZE + len(b"OK\0"), socket.MSG_WAITALL)
                if reply[: wire.HEADER_SIZE] != wire.HEADER.pack(Op.WRITE, 0, 0, 3):
                    raise HostError(f"xenstored refuses {path.decode()}: {reply!r}")

    def cpu_us(self) -> float:
        return cpu_us(self._process.pid)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
