"""`evtchnctl xenstore`: its command line. What it does is in xenstoreverbs.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Asked = argparse.Namespace


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    change: argparse.ArgumentParser,
    control_socket: Callable[[Asked], Path],
    domid_of: Callable[[Asked, str], int],
) -> None:
    """Adds the verb to `verbs`, with the options in `common` and, where something is changed, `change`.

    `control_socket` finds the daemon's control.sock, `domid_of` a domain by name or number.
    """
    text = "nodes, watches and quotas of XenStore"
    parser = verbs.add_parser("xenstore", parents=[common], help=text, description=text)
    inner = parser.add_subparsers(metavar="WHAT", required=True)

    def verb(name: str, text: str, *more: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = inner.add_parser(name, parents=[common, *more], help=text, description=text)
        added.set_defaults(verb=lambda args: _run(name, args, control_socket(args)))
        return added

    ls = verb("ls", "a node and all below it")
    ls.add_argument("path", metavar="PATH", nargs="?", default="/")
    ls.add_argument("-p", "--perms", action="store_true", help="permissions, too")
    verb("read", "values of nodes").add_argument("paths", metavar="PATH", nargs="+")
    write = verb("write", "values, all of them or none", change)
    write.add_argument("pairs", metavar="PATH VALUE", nargs="+")
    verb("rm", "nodes and what is below them, all or none", change).add_argument("paths", metavar="PATH", nargs="+")
    watch = verb("watch", "says which nodes change, until it is interrupted")
    watch.add_argument("paths", metavar="PATH", nargs="+")
    watch.add_argument("-n", "--count", type=int, metavar="N", help="ends after so many")
    watch.add_argument("--depth", type=int, metavar="LEVELS", help="so far below each path only (0: itself)")
    dump = verb("dump", "nodes of one moment as Xen's migration stream")
    dump.add_argument("file", metavar="FILE", help="-: standard output")
    dump.add_argument("path", metavar="PATH", nargs="?", default="/", help="and what is below it (%(default)s)")
    load = verb("load", "writes the nodes of such a stream, all or none", change)
    load.add_argument("file", metavar="FILE", help="-: standard input")
    quota = verb("quota", "what a domain may hold, holds and was refused; sets a limit", change)
    quota.set_defaults(domid_of=domid_of)
    quota.add_argument("domain", metavar="DOM", help="its number or name, or `default`: of domains to come")
    quota.add_argument("name", metavar="NAME", nargs="?")
    quota.add_argument("value", metavar="VALUE", nargs="?", help="the new limit; 0: not checked")


def _run(name: str, args: Asked, control_socket: Path) -> None:
    # asyncio takes longer to import than the other verbs to run
    from evtchnd.cli import xenstoreverbs

    xenstoreverbs.run(name, args, control_socket)
