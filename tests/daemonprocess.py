"""A daemon in its own process, driven by JSON lines: `call("info", 7)` is `await Daemon.info(7)`.

Run as a script it is that process: the zygote is forked first, as `evtchnd` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent


class DaemonProcess:
    """A context manager; ends with the daemon ended in order, and its exit status and log looked at."""

    def __init__(
        self, folder: Path, *, single: bool = False, broken: str = "", script: str = __file__, **limits: Any
    ) -> None:
        """`limits`: the configuration's keys. broken: a module of tests/ that the daemon imports first; it may log
        defects then. `script`: runs `main()` of this module, after what it does to it.
        """
        self.folder = folder
        self.vmm_socket = folder / "vmm.sock"
        self.log = folder / "log"
        self._broken = broken
        paths = os.pathsep.join(str(ROOT / name) for name in (".", "backends", "tests"))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, str(folder), "single" if single else "zygote", json.dumps(limits), broken],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": paths},
                text=True,
            )
        assert self.call("start") is None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result; RuntimeError with the daemon's text where it refuses."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, args, kwargs]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the daemon has ended:\n{self.log.read_text()}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def attach(self, domid: int, target: Path, vdev: str = "xvda", *, readonly: bool = False) -> int:
        """-> its device number."""
        mode = "r" if readonly else "w"
        return int(self.call("attach_block", domid, f"{target},raw,{vdev},{mode}")["devid"])

    def descriptors(self) -> int:
        """Open ones of the control plane."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def worker(self, domid: int) -> int:
        """The worker's pid."""
        return int(self.call("info", domid)["worker"]["pid"])

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text()

    def end_at_once(self) -> None:
        """SIGKILL, instead of an end in order."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        text = self.text()
        if kind is not None:
            print(text)
        else:
            assert status == 0, text
            if not self._broken:
                assert "defect" not in text, text
                assert "Traceback" not in text, text


def until(ready: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Waits for a condition; no test depends on how long it takes."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


async def serve(daemon: Any) -> None:
    from evtchnd import diskspec
    from evtchnd.errors import EvtchndError

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            method, args, kwargs = json.loads(line)
            if method == "attach_block":
                args[1] = diskspec.parse(args[1])
            if method == "tasks":
                print(json.dumps({"result": len(asyncio.all_tasks())}), flush=True)
                continue
            try:
                answer = {"result": await getattr(daemon, method)(*args, **kwargs)}
            except EvtchndError as exc:
                answer = {"error": str(exc)}
            print(json.dumps(answer), flush=True)
    finally:
        await daemon.stop()


def main() -> None:
    import msgspec
    import uvloop

    from evtchnd.control.config import Config
    from evtchnd.control.daemon import Daemon
    from evtchnd.control.zygote import Zygote

    if sys.argv[4]:
        importlib.import_module(sys.argv[4])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    config = msgspec.convert({"runtime_dir": sys.argv[1], **json.loads(sys.argv[3])}, Config)
    zygote = Zygote.fork(sandbox=config.sandbox) if sys.argv[2] == "zygote" else None
    uvloop.run(serve(Daemon(config, zygote=zygote)))


if __name__ == "__main__":
    main()
