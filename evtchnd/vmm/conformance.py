"""Does the other end of the VMM's socket speak docs/protocol.md?

    python -m evtchnd.vmm.conformance --socket /run/evtchnd/vmm.sock --role daemon
    python -m evtchnd.vmm.conformance --socket ./vmm.sock --role vmm

`--role daemon` tests the daemon that listens there, and acts as VMMs, good and bad; it uses the domain ids from
`--domid` on, which must be free. `--role vmm` listens there, and tests the VMM that connects: one that registers a
domain, gives it memory, grant frames and a XenStore page, starts it, and answers questions until it is cut off.
One line a case: PASS, FAIL or SKIP, name, and why. Exit status: 0 no case failed, 1 one did, 2 it could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from evtchnd.errors import EvtchndError
from evtchnd.vmm import conform_daemon, conform_vmm
from evtchnd.vmm.conform_line import CaseFailed, Skipped


def report(name: str, run: Callable[[], None]) -> bool:
    """Runs one case and prints its line. False: it failed."""
    try:
        run()
    except Skipped as e:
        print(f"SKIP  {name}: {e}", flush=True)
    except (CaseFailed, EvtchndError, OSError) as e:
        print(f"FAIL  {name}: {e}", flush=True)
        return False
    else:
        print(f"PASS  {name}", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evtchnd.vmm.conformance", description="Tests one end of vmm.sock.")
    parser.add_argument("--socket", required=True, metavar="PATH")
    parser.add_argument("--role", required=True, choices=("daemon", "vmm"), help="which end is tested")
    parser.add_argument("--domid", type=int, default=30000, help="first of the domain ids to use (role daemon)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for each answer (default 10)")
    parser.add_argument("--slow", action="store_true", help="also the cases that wait for deadlines")
    args = parser.parse_args(argv)
    try:
        if args.role == "daemon":
            cases = conform_daemon.cases(args.socket, args.domid, args.timeout, slow=args.slow)
        else:
            cases = conform_vmm.cases(args.socket, args.timeout)
        results = [report(name, run) for name, run in cases]
    except (EvtchndError, OSError) as e:
        print(f"{args.socket}: {e}", file=sys.stderr)
        return 2
    print(f"{sum(results)} of {len(results)} cases without a fault")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
