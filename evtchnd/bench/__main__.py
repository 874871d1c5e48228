"""evtchnd-bench: what a request costs, beside its limit, in one interleaved run."""

from __future__ import annotations

import argparse
import sys

from evtchnd.bench import blk, guest, net, netguest, reliability, report, wakeup, xenstore
from evtchnd.errors import EvtchndError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="evtchnd-bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    block = commands.add_parser("blk", help="reads of a soft guest's disk, beside a backend in C on the same rings")
    blk.add_arguments(block)
    waking = commands.add_parser("wakeup", help="from a guest's kick to the answer it sees, beside a server in C")
    wakeup.add_arguments(waking)
    store = commands.add_parser("xenstore", help="XenStore's requests, beside an echo server on the same loop")
    xenstore.add_arguments(store)
    network = commands.add_parser("net", help="packets of a soft guest's vif, beside a C program on such a TAP")
    net.add_arguments(network)
    real = commands.add_parser("guest", help="fio in a real guest in the lab, beside QEMU's own Xen backends")
    guest.add_arguments(real)
    wired = commands.add_parser(
        "netguest", help="iperf3 and ping in a real guest in the lab, beside QEMU's xen-net-device"
    )
    netguest.add_arguments(wired)
    lasting = commands.add_parser(
        "reliability", help="workers and daemons that die, guests that attack: what others see"
    )
    reliability.add_arguments(lasting)
    for command, run in (
        (block, blk.run),
        (waking, wakeup.run),
        (store, xenstore.run),
        (network, net.run),
        (real, guest.run),
        (wired, netguest.run),
        (lasting, reliability.run),
    ):
        command.set_defaults(run=run)
        command.add_argument("--json", metavar="FILE", help="readings and ratios; -: alone on standard output")
        command.add_argument("--plot", metavar="FILE.svg", help="bar charts (extra `bench`)")
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        done = arguments.run(arguments)
        report.write(done, json_file=arguments.json, plot_file=arguments.plot)
    except EvtchndError as exc:
        print(f"evtchnd-bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
