"""evtchnd-micro: runs one Xen guest on this machine's KVM, served by evtchnd.

    evtchnd-micro --kernel vmlinuz --initrd initrd.img --memory 512M --vcpus 2 \\
        --append 'root=/dev/xvda console=hvc0' --disk disk.img,raw,xvda,rw --vif bridge=br0 --console

The kernel is any with a PVH entry: a distribution's vmlinuz as it is, or an ELF file. The guest's disks, XenStore,
console and network interfaces are the daemon's. This process opens the images and hands them over; what a vif is wired
to is the operator's affair: it is attached as `evtchnctl network-attach` does it.

Exit status: 0 the guest has powered off (or rebooted, with --reboot exit, or was ended by a signal), 1 it has crashed
or could not begin, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from evtchnd import diskspec, vifspec
from evtchnd.errors import EvtchndError, OperatorError
from evtchnd.vmm import elf, kernel_image
from evtchnd.vmm.guest_words import GuestWords
from evtchnd.vmm.hypercalls import Shutdown
from evtchnd.vmm.microvm import MAX_VCPUS, Disk, Ended, Guest, MicroVm
from evtchnd.vmm.pvh import Module
from evtchnd.vmm.tally import Tally

log = logging.getLogger("evtchnd-micro")

_UNITS = {"K": 10, "M": 20, "G": 30, "": 20}
_MIN_MEMORY, _MAX_MEMORY = 4 << 20, 1 << 40
# A guest that dies as soon as it lives would keep a processor, and the log, busy.
_SHORT_LIFE_S, _SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 0.05, 1.0
# What is left of the guest's last words is read in no time.
_REST_S, _WORDS_S = 10.0, 1.0
_IN_ORDER = (Shutdown.POWEROFF, Shutdown.REBOOT)


class Stats:
    """Exits and hypercalls of all runs of the guest, for --stats."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._began = time.monotonic()
        self._boots = 0
        self._past = {name: Tally() for name in ("exits", "hypercalls", "accesses")}
        self._vm: MicroVm | None = None

    def follow(self, vm: MicroVm | None) -> None:
        """Counts what `vm` does from now on; what the last one did is kept."""
        self._past = self._counts()
        self._vm = vm
        self._boots += vm is not None

    def _counts(self) -> dict[str, Tally]:
        """Of all runs together: names are bounded over a guest that reboots for ever, too."""
        if self._vm is None:
            return self._past
        vm = self._vm
        now = {"exits": vm.exits(), "hypercalls": vm.hypercalls.counts, "accesses": vm.accesses.counts}
        together = {name: Tally() for name in now}
        for name, tally in together.items():
            tally.add(self._past[name].counts)
            tally.add(now[name].copy())
        return together

    def json(self, ended: Ended | None) -> str:
        told = {
            "domid": self._guest.domid,
            "name": self._guest.name,
            "seconds": round(time.monotonic() - self._began, 3),
            "boots": self._boots,
            "ended": ended and ended.reason.name.lower(),
            **{name: dict(tally.counts.most_common()) for name, tally in self._counts().items()},
        }
        return json.dumps(told, indent=1) + "\n"

    def table(self) -> str:
        lines = []
        for name, tally in self._counts().items():
            lines.append(f"{name}: {tally.counts.total()}")
            lines += [f"{count:10} {what}" for what, count in tally.counts.most_common()]
        return "\n".join(lines)


def size_of(text: str) -> int:
    """512M, 2G, 65536K, 512 (MiB): bytes, in whole MiB or pages."""
    found = re.fullmatch(r"([0-9]{1,9})([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no size (512M, 2G)")
    size = int(found[1]) << _UNITS[found[2].upper()]
    if not _MIN_MEMORY <= size <= _MAX_MEMORY or size % 4096:
        raise argparse.ArgumentTypeError(f"{text}: memory is 4M to 1024G, in pages of 4K")
    return size


def uuid_of(text: str) -> bytes:
    """Its 16 bytes. The module uuid knows much more, and is slow to import."""
    digits = text.replace("-", "")
    if not re.fullmatch(r"[0-9a-fA-F]{32}", digits):
        raise argparse.ArgumentTypeError(f"'{text}' is no UUID")
    return bytes.fromhex(digits)


def parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").splitlines()[0]
    parse = argparse.ArgumentParser(prog="evtchnd-micro", description=text, allow_abbrev=False)
    add = parse.add_argument
    add("--socket", type=Path, default=Path("/run/evtchnd/vmm.sock"), help="the daemon's (%(default)s)")
    add("--domid", type=int, default=1, help="(%(default)s)")
    add("--name", default="", help="(gDOMID)")
    add("--uuid", type=uuid_of, default=bytes(16), metavar="UUID", help="of the guest (none)")
    add("--kernel", type=Path, required=True, help="bzImage or ELF file with a PVH entry")
    add("--initrd", type=Path, help="the first module")
    add("--module", action="append", default=[], metavar="FILE[ ARGUMENTS]", help="another module; can be repeated")
    add("--append", default="", metavar="LINE", help="the kernel's command line")
    add("--memory", type=size_of, default="512M", metavar="SIZE", help="(%(default)s)")
    add("--vcpus", type=int, default=1, choices=range(1, MAX_VCPUS + 1), help="(%(default)s)")
    add("--disk", action="append", default=[], metavar="SPEC", help="as xl: disk.img,raw,xvda,rw; can be repeated")
    add("--disk-cache", choices=("none", "writeback"), default="writeback", help="none: O_DIRECT (%(default)s)")
    add("--vif", action="append", default=[], metavar="SPEC", help="as xl: bridge=br0,rate=10Mb/s; can be repeated")
    add("--console", action="store_true", help="this terminal is the guest's console; ^] leaves it, the guest goes on")
    add("--grant-frames", type=int, default=32, choices=range(1, 65), metavar="1..64", help="(%(default)s)")
    add("--reboot", choices=("restart", "exit"), default="restart", help="what a reboot does (%(default)s)")
    add("--timeout", type=float, default=30.0, metavar="S", help="for an answer of the daemon's (%(default)s)")
    add("--resume", type=float, default=60.0, metavar="S", help="a daemon that has gone is waited for (%(default)s)")
    add("--stats", action="store_true", help="at the end: why vCPUs left the guest, hypercalls by name")
    add("--stats-json", type=Path, metavar="FILE", help="the same in JSON; at every SIGUSR1 too")
    return parse


def open_disk(text: str, cache: str) -> Disk:
    """OperatorError."""
    spec = diskspec.parse(text)
    flags = os.O_RDONLY if spec.readonly else os.O_RDWR
    try:
        fd = os.open(spec.target, flags | os.O_CLOEXEC | (os.O_DIRECT if cache == "none" else 0))
    except OSError as error:
        direct = " (no O_DIRECT there?)" if cache == "none" and error.errno == errno.EINVAL else ""
        raise OperatorError(f"disk {spec.vdev}: {spec.target}: {error.strerror}{direct}") from None
    return Disk(spec.devid, spec.vdev, spec.target, fd, spec.readonly, spec.cdrom)


def read_module(text: str) -> Module:
    path, _, arguments = text.partition(" ")
    try:
        return Module(Path(path).read_bytes(), arguments)
    except OSError as error:
        raise OperatorError(f"module {path}: {error.strerror}") from None


def guest_of(args: argparse.Namespace, disks: tuple[Disk, ...]) -> Guest:
    """OperatorError in one line."""
    if not 0 < args.domid < 0x7FF0:
        raise OperatorError(f"domid {args.domid}: 1 to {0x7FEF}")
    initrd = [os.fspath(args.initrd)] if args.initrd else []
    try:
        image = elf.parse(kernel_image.elf_image(args.kernel))
    except OperatorError as error:
        said = str(error)
        raise OperatorError(said if said.startswith("kernel ") else f"kernel {args.kernel}: {said}") from None
    return Guest(
        socket=args.socket,
        domid=args.domid,
        name=args.name or f"g{args.domid}",
        image=image,
        command_line=args.append,
        modules=tuple(read_module(text) for text in (*initrd, *args.module)),
        memory=args.memory,
        vcpus=args.vcpus,
        disks=disks,
        # with a MAC address that stays over reboots
        vifs=tuple(str(vifspec.parse(text)) for text in args.vif),
        attach_vif=functools.partial(attach_vif, args.socket, args.domid),
        grant_frames=args.grant_frames,
        uuid=args.uuid,
        timeout=args.timeout,
        resume=args.resume,
    )


def attach_vif(socket: Path, domid: int, spec: str) -> None:
    """At the operator's socket, which is beside the VMMs'. OperatorError in the daemon's words."""
    import subprocess  # as below

    done = subprocess.run(
        [*_evtchnctl(socket), "network-attach", str(domid), spec], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OperatorError(f"--vif: {done.stderr.strip().removeprefix('evtchnctl: ')}")


def _evtchnctl(socket: Path) -> list[str]:
    return [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", os.fspath(socket.parent)]


def pause_after(lived: float, last: float) -> float:
    """How many seconds a guest that lived so long waits for its next life; `last`: how many it waited for this one."""
    return min(max(2 * last, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S) if lived < _SHORT_LIFE_S else 0.0


@contextlib.contextmanager
def _console(guest: Guest) -> Iterator[None]:
    """`evtchnctl console` in this terminal, as long as the guest runs or until ^]."""
    import subprocess  # slow to import, and most guests run without

    child = subprocess.Popen([*_evtchnctl(guest.socket), "console", str(guest.domid)])
    try:
        yield
    finally:
        # the domain has ended: it shows the rest and goes by itself
        try:
            child.wait(_REST_S)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()


class Signals:
    """SIGTERM and SIGINT end the guest, also while it is being started; SIGUSR1 writes the statistics."""

    def __init__(self, stats: Stats, stats_file: Path | None) -> None:
        self.asked: Ended | None = None
        self._heard = threading.Event()
        self.vm: MicroVm | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        if stats_file is not None:
            signal.signal(signal.SIGUSR1, lambda *_: _write(stats_file, stats.json(None)))

    def _end(self, number: int, _: object) -> None:
        self.asked = Ended(Shutdown.POWEROFF, f"by {signal.Signals(number).name}")
        self._heard.set()
        self.follow(self.vm)

    def wait(self, timeout: float) -> Ended | None:
        """What was asked, `timeout` s at most are waited for that."""
        self._heard.wait(timeout)
        return self.asked

    def follow(self, vm: MicroVm | None) -> None:
        self.vm = vm
        if vm is not None and self.asked is not None:
            vm.end(self.asked.reason, self.asked.text)


def run(guest: Guest, words: GuestWords, stats: Stats, signals: Signals, *, restart: bool, console: bool) -> Ended:
    """Until the guest has ended for good."""
    label = f"domain {guest.domid} ({guest.name})"
    patience = pause = 0.0  # at the start another's domid is another's
    while True:
        with contextlib.ExitStack() as running:
            terminal = running.enter_context(contextlib.ExitStack())  # ends after the domain
            try:
                vm = MicroVm(guest, words.write, patience=patience, stopped=lambda: signals.asked is not None)
            except EvtchndError:
                if signals.asked is not None:
                    return signals.asked
                raise
            running.enter_context(vm)
            patience, began = guest.resume, time.monotonic()
            stats.follow(vm)
            signals.follow(vm)
            if console:
                if not vm.has_console:
                    raise OperatorError(f"{label}: --console: this daemon serves no consoles")
                terminal.enter_context(_console(guest))
            ended = vm.run()
        stats.follow(None)
        signals.follow(None)
        words.drain(_WORDS_S)
        level = logging.INFO if ended.reason in _IN_ORDER and not ended.fault else logging.ERROR
        log.log(level, "%s: %s: %s", label, ended.reason.name.lower(), ended.text)
        if ended.reason is not Shutdown.REBOOT or not restart or signals.asked is not None:
            return ended
        pause = pause_after(time.monotonic() - began, pause)
        if asked := signals.wait(pause):
            return asked


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists() and not path.is_file():  # /dev/stderr, a FIFO
            path.write_text(text)
            return
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with contextlib.ExitStack() as opened:
        try:
            disks = []
            for text in args.disk:
                disks.append(open_disk(text, args.disk_cache))
                opened.callback(os.close, disks[-1].fd)
            guest = guest_of(args, tuple(disks))
            stats = Stats(guest)
            signals = Signals(stats, args.stats_json)
            words = opened.enter_context(GuestWords(2))
            ended = run(guest, words, stats, signals, restart=args.reboot == "restart", console=args.console)
        except (EvtchndError, OSError) as error:
            print(f"evtchnd-micro: {error}", file=sys.stderr)
            return 1
    if args.stats:
        print(stats.table(), file=sys.stderr)
    if args.stats_json:
        _write(args.stats_json, stats.json(ended))
    return 0 if ended.reason in _IN_ORDER else 1


if __name__ == "__main__":
    sys.exit(main())
