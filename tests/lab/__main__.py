"""The lab by hand: `python tests/lab prepare [--if-possible]`, `run [--memory MIB] -- COMMAND...`, `guest [SUITE]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from lab import guestimage, machine, prepare, terminal  # noqa: E402

A_DAY_S = 86400.0


def run(arguments: argparse.Namespace) -> int:
    """Boots, streams the command's output, -> its exit status."""
    lab = prepare.find()
    for boot in range(1, machine.BOOTS + 1):
        options = {"memory": arguments.memory, "cpus": arguments.cpus, "limit": arguments.limit}
        with machine.Machine(lab, arguments.command, cwd=Path.cwd(), **options) as lab_machine:

            def pass_on(source: machine.Machine = lab_machine) -> None:
                sys.stdout.buffer.write(source.new("output"))
                sys.stdout.buffer.flush()

            try:
                return lab_machine.wait(pass_on)
            except machine.LabDied as died:
                pass_on()
                # what has run may have had effects that the caller sees: only a boot is tried again
                if died.came_up or boot == machine.BOOTS:
                    raise
                print(died, file=sys.stderr)
    raise AssertionError("not reached")


def guest(suite: str) -> int:
    """A real guest's console in this terminal, until it powers off or ^]."""
    lab = prepare.prepare()
    rows, columns = shutil.get_terminal_size()[::-1]
    inside = [sys.executable, str(machine.HERE / "prompt.py"), suite, f"--rows={rows}", f"--columns={columns}"]
    print("The lab boots, then the guest in it: half a minute. Leave with ^] or poweroff.", flush=True)
    with machine.Machine(lab, inside, terminal=True, limit=A_DAY_S) as lab_machine, terminal.raw():
        assert lab_machine.terminal is not None
        line = terminal.Terminal(lab_machine.terminal)
        try:
            status = None
            while status is None:
                line.relay()
                status = lab_machine.look()
            line.relay()
        finally:
            line.close()
        said = lab_machine.tail()
    if status:
        print(said, file=sys.stderr)
    return status


def guests() -> None:
    """JSON: {"qemu", "iperf3": command lines' beginnings, "guests": {suite: {release, kernel, initramfs, root}}}."""
    lab = prepare.find()
    share = lab.tree / "usr/share"
    firmware = ("-L", f"{share}/qemu", "-L", f"{share}/seabios")
    found = {suite: guestimage.find(lab, suite) for suite in guestimage.SUITES}
    told = {suite: {name: str(value) for name, value in vars(guest).items()} for suite, guest in found.items()}
    programs = {"qemu": lab.program("usr/bin/qemu-system-x86_64", *firmware), "iperf3": lab.program("usr/bin/iperf3")}
    print(json.dumps({**programs, "guests": told}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    preparing = verbs.add_parser("prepare", help="make the lab, if it is not there")
    preparing.add_argument("--if-possible", action="store_true", help="exit status 0 where it cannot be made, too")
    running = verbs.add_parser("run", help="boot the lab and run a command in this folder, as root")
    running.add_argument("--memory", type=int, default=machine.MEMORY_MIB, help="MiB (%(default)s)")
    running.add_argument("--cpus", type=int, default=machine.CPUS, help="(%(default)s)")
    running.add_argument("--limit", type=float, default=3600.0, help="seconds for all of it (%(default)s)")
    running.add_argument("command", nargs="+", metavar="COMMAND", help="after a --, with its arguments")
    prompting = verbs.add_parser("guest", help="boot the lab and a real guest in it, its console in this terminal")
    prompting.add_argument("suite", nargs="?", choices=guestimage.SUITES, default=guestimage.SUITES[0])
    verbs.add_parser("guests", help="where kernels and root file systems of real guests lie, and QEMU: JSON")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "run":
            return run(arguments)
        if arguments.verb == "guest":
            return guest(arguments.suite)
        if arguments.verb == "guests":
            guests()
            return 0
        lab = prepare.prepare()
        print(f"lab: ready in {lab.folder}")
    except machine.LabMissing as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 0 if arguments.verb == "prepare" and arguments.if_possible else 1
    except machine.LabDied as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
