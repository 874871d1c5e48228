"""The demo: a Xen domain does block I/O on an ext4 image, served by evtchnd. Exit status 0: everything was equal.

Processes: this one, the daemon (`python -m evtchnd`) with its workers, and the guest (`python -m evtchnd.demo.guest`),
a domain without KVM. The disk is attached and detached with `evtchnctl`, as an operator does it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evtchnd.cli.process import evtchnctl
from evtchnd.demo import image
from evtchnd.errors import EvtchndError, HostError

DOMID = 1
VDEV = "xvda"
START_S = 20.0
QUIET_S = 60.0


class Demo:
    """One run: what was started, in `folder`."""

    def __init__(self, folder: Path, show: Show) -> None:
        self.folder = folder
        self.show = show
        # not below `folder`, which may be deep: a socket's path ends at 107 bytes
        self.runtime = Path(tempfile.mkdtemp(prefix="evtchnd-"))
        self.disk = folder / "disk.img"
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """A process of its own session; what it says on standard error goes to NAME.log."""
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stderr=log, text=True, start_new_session=True, **options
            )
        self.processes.append(process)
        return process

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text().strip()

    def start_daemon(self) -> None:
        daemon = self.start("evtchnd", "evtchnd", "--runtime-dir", str(self.runtime), stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        while not (self.runtime / "control.sock").exists():
            if daemon.poll() is not None or time.monotonic() > begin + START_S:
                raise HostError(f"the daemon did not start:\n{self.log_of('evtchnd')}")
            time.sleep(0.01)

    def start_guest(self) -> Iterator[dict[str, Any]]:
        """Starts the guest; what it tells, one object a line."""
        guest = self.start(
            "guest",
            "evtchnd.demo.guest",
            *("--socket", str(self.runtime / "vmm.sock"), "--domid", str(DOMID)),
            stdout=subprocess.PIPE,
        )
        if guest.stdout is not None:
            for line in guest.stdout:
                yield json.loads(line)
        raise HostError(f"the guest ended early:\n{self.log_of('guest')}")

    def evtchnctl(self, *arguments: str) -> Any:
        """Runs the operator's command; what it prints with `-o json`."""
        self.show.line(f"$ evtchnctl {' '.join(arguments)}")
        return evtchnctl(self.runtime, *arguments)

    def stop(self) -> None:
        """Ends what was started, the guest first."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


class Show:
    """What the user sees: progress bars with rich on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

                self._bars = Progress(
                    TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
                )
                self._bars.start()

    def line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total)
            self._bars.update(self._tasks[phase], completed=done)
        elif done >= total:
            self.line(f"  guest: {phase} {done >> 20} MiB")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def run(demo: Demo, *, keep: bool) -> bool:
    """The whole story; True if everything was equal at the end."""
    say = demo.show.line
    tree = demo.folder / "tree"
    tree.mkdir()
    say(f"mkfs.ext4: {image.IMAGE_BYTES >> 20} MiB image with real files")
    hashes = image.make(tree, demo.disk)
    demo.start_daemon()
    say("daemon is up; starting a soft guest in its own process")
    told = demo.start_guest()
    expect(told, "ready", demo.show)
    disk = f"format=raw,vdev={VDEV},access=rw,target={demo.disk}"
    demo.evtchnctl("block-attach", str(DOMID), disk)
    result = expect(told, "result", demo.show)
    counters = next(d for d in demo.evtchnctl("info", str(DOMID))["devices"] if d["vdev"] == VDEV)["counters"]
    demo.show.close()
    print_table(result, counters, say)

    kept_as_made = {path: digest for path, digest in hashes.items() if path != f"/{image.SCRATCH}"}
    wrong = sorted(path for path, digest in kept_as_made.items() if result["read"].get(path) != digest)
    say(f"files that the guest read: {len(result['read'])} of {len(kept_as_made)}, wrong: {len(wrong)}")
    say(f"blocks that it wrote and read back: {result['blocks']}, wrong: {result['bad_blocks']}")
    good = not wrong and len(result["read"]) == len(kept_as_made) and result["bad_blocks"] == 0
    if not keep:
        demo.evtchnctl("block-detach", str(DOMID), VDEV)
        expect(told, "detached", demo.show)
    say(f"$ e2fsck -fn: {image.check(demo.disk)}")
    written = image.extract(demo.disk, f"/{image.SCRATCH}", demo.folder / "extracted")
    same = written == result["written"]
    say(
        f"file that the guest wrote, taken out of the image: {'equal' if same else 'DIFFERENT'} (sha256 {written[:16]})"
    )
    return good and same


def expect(told: Iterator[dict[str, Any]], event: str, show: Show) -> dict[str, Any]:
    """The next `event` that the guest tells; progress on the way is shown."""
    for message in told:
        if message["event"] == "progress":
            show.progress(message["phase"], message["done"], message["total"])
        elif message["event"] == event:
            return message
    raise HostError(f"the guest did not tell '{event}'")


def print_table(result: dict[str, Any], counters: dict[str, int], say: Callable[[str], None]) -> None:
    """What happened: the guest's side, then the worker's counters."""
    say("")
    say(f"  {'':12}{'requests':>10}{'MiB':>8}{'MB/s':>9}{'p50 us':>9}{'p99 us':>9}")
    for phase in result["phases"]:
        size = f"{phase['bytes'] / (1 << 20):.1f}"
        rate = f"{phase['bytes'] / phase['seconds'] / 1e6:.0f}"
        times = f"{phase['p50_us']:>9.0f}{phase['p99_us']:>9.0f}"
        say(f"  {phase['name']:12}{phase['requests']:>10}{size:>8}{rate:>9}{times}")
    say("")
    shown = ("requests", "kicks", "wakeups", "notifications")
    say("  worker: " + ", ".join(f"{counters[name]} {name}" for name in shown))
    say(f"  kicks per request: {counters['kicks'] / max(1, counters['requests']):.3f}")
    say("")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evtchnd.demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave daemon and guest running, print their sockets")
    # Not below /tmp where that is a tmpfs: reads that are served without sleeping need a real file system.
    parser.add_argument("--dir", default="/var/tmp", help="where the image is made (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        folder = Path(tempfile.mkdtemp(prefix="evtchnd-demo-", dir=arguments.dir))
    except OSError as exc:
        print(f"demo: --dir {arguments.dir}: {exc.strerror}", file=sys.stderr)
        return 1
    show = Show()
    demo = Demo(folder, show)
    kept = False
    begin = time.monotonic()
    try:
        good = run(demo, keep=arguments.keep)
        show.line(f"{'everything is equal' if good else 'SOMETHING IS WRONG'} ({time.monotonic() - begin:.1f} s)")
        if arguments.keep:
            kept = True
            print_kept(demo)
        return 0 if good else 1
    except EvtchndError as exc:
        show.close()
        print(f"demo: {exc}", file=sys.stderr)
        if demo.processes:
            print(f"the daemon's log:\n{demo.log_of('evtchnd')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        show.close()
        if not kept:
            demo.stop()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(demo.runtime, ignore_errors=True)


def print_kept(demo: Demo) -> None:
    """How to look at what runs on, and how to end it."""
    pids = " ".join(str(process.pid) for process in reversed(demo.processes))
    bin_dir = Path(sys.executable).parent
    print("\nleft running:")
    for name in sorted(path.name for path in demo.runtime.iterdir() if path.is_socket()):
        print(f"  {demo.runtime / name}")
    print("look:")
    print(f"  {bin_dir}/evtchnctl --runtime-dir {demo.runtime} info {DOMID}")
    print(f"  XENSTORED_PATH={demo.runtime}/xenstored.sock xenstore-ls")
    print(f"end:\n  kill {pids}; rm -r {demo.folder} {demo.runtime}")


if __name__ == "__main__":
    sys.exit(main())
