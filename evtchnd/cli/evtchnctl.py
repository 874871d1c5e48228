"""`evtchnctl`: what an operator asks a running evtchnd. Verbs and disk strings are xl's."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evtchnd import diskspec
from evtchnd.cli import console, network, xenstore
from evtchnd.cli.varlink import Client
from evtchnd.errors import OperatorError

_RUNTIME_DIR = "/run/evtchnd"
_LONGEST_S = 86400
# io/xenbus.h
_STATES = ("unknown", "initialising", "waits", "initialised", "connected", "closing", "closed", "reconfig", "reconfig")

Asked = argparse.Namespace
Reply = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or nobody there (one line on standard error), 2 wrong usage."""
    args = _arguments(argv)
    try:
        args.verb(args)
    except OperatorError as exc:
        print(f"evtchnctl: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # whoever read the output has seen enough; keeps Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _list(args: Asked) -> None:
    with _client(args) as client:
        reply = client.call("io.evtchnd.List")
    if args.output == "json":
        return _json(reply["domains"])
    rows = [
        [row["domid"], row["name"], f"{row['memory'] / 2**20:g}", row["vcpus"], row["devices"], row["state"]]
        for row in reply["domains"]
    ]
    return _table(["ID", "Name", "Mem MiB", "VCPUs", "Devices", "State"], rows, right=(0, 2, 3, 4))


def _upgrade(args: Asked) -> None:
    with _client(args) as client:
        reply = client.call("io.evtchnd.Upgrade")
    if args.output == "json":
        return _json(reply)
    print(f"evtchnd {reply['version']} has handed over")
    return None


def _info(args: Asked) -> None:
    with _client(args) as client:
        reply = client.call("io.evtchnd.Info", domid=_domid(client, args.domain))
    if args.output == "json":
        return _json(reply)
    domain, worker = reply["domain"], reply["worker"]
    lines = {
        "domain": f"{domain['domid']} {domain['name']}".rstrip(),
        "uuid": domain["uuid"],
        "state": domain["state"],
        "memory": f"{domain['memory'] / 2**20:g} MiB in {reply['slots']} slots, {reply['grant_frames']} grant frames",
        "vcpus": domain["vcpus"],
        "ports": reply["ports"],
        "vmm": f"pid {reply['vmm_pid']}",
        "worker": f"pid {worker['pid']}, {worker['restarts']} restarts"
        + (f", failing: {worker['failing']}" if worker["failing"] else ""),
    }
    for key, value in lines.items():
        print(f"{key:8} {value}")
    for row in reply["consoles"]:
        print(f"\nconsole {row['devid']} {row['tty'] or 'no pty'} {row['state']} {row['log']}".rstrip())
        for name, count in row["counters"].items():
            print(f"  {name:24} {count:>14}")
    for vif in reply["vifs"]:
        print(
            f"\nvif {vif['devid']} {vif['vifname']} {_state(vif)} {vif['link']} {vif['mac']} {vif['reason']}".rstrip()
        )
        for name, count in vif["counters"].items():
            print(f"  {name:24} {count:>14}")
    for device in reply["devices"]:
        access = "ro" if device["readonly"] else "rw"
        print(f"\n{device['kind']} {device['devid']} {device['vdev']} {_state(device)} {access} {device['target']}")
        for name, count in device["counters"].items():
            print(f"  {name:24} {count:>14}")
    return None


def _block_attach(args: Asked) -> None:
    # seen from here: the daemon has a current folder of its own
    spec = diskspec.parse(",".join(args.disk)).absolute(Path.cwd())
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.dry_run:
            return _say(args, {"domid": domid, "devid": spec.devid, "disk": str(spec)}, f"would attach {spec}")
        disk = client.call("io.evtchnd.BlockAttach", domid=domid, disk=str(spec))["disk"]
    size = disk["sectors"] * 512 / 2**20
    return _say(args, disk, f"domain {domid}: {disk['vdev']} ({disk['devid']}): {disk['target']}, {size:g} MiB")


def _block_detach(args: Asked) -> None:
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.dry_run:
            devid = diskspec.devid_of(args.device)
            return _say(args, {"domid": domid, "devid": devid}, f"would detach {args.device} ({devid})")
        gone = client.call("io.evtchnd.BlockDetach", domid=domid, device=args.device, force=args.force)
    end = "detached by force" if gone["forced"] else "detached"
    return _say(args, gone, f"domain {domid}: {gone['vdev']} ({gone['devid']}): {end}")


def _console(args: Asked) -> None:
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.output == "json":
            return _json(client.call("io.evtchnd.Console", domid=domid, devid=args.num))
    why = console.show(lambda: _client(args), domid, args.num)
    print(f"evtchnctl: {why or f'left console {args.num} of domain {domid}'}", file=sys.stderr)
    return None


def _console_attach(args: Asked) -> None:
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.dry_run:
            return _say(args, {"domid": domid, "devid": args.num}, "would attach a console")
        made = client.call("io.evtchnd.ConsoleAttach", domid=domid, devid=args.num)
    return _say(args, made, f"domain {domid}: console {made['devid']}: {made['tty'] or 'no pty'}")


def _console_detach(args: Asked) -> None:
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.dry_run:
            return _say(args, {"domid": domid, "devid": args.num}, f"would detach console {args.num}")
        gone = client.call("io.evtchnd.ConsoleDetach", domid=domid, devid=args.num, force=args.force)
    end = "detached by force" if gone["forced"] else "detached"
    return _say(args, gone, f"domain {domid}: console {gone['devid']}: {end}")


def _block_resize(args: Asked) -> None:
    size = None if args.size is None else _bytes(args.size)
    with _client(args) as client:
        domid = _domid(client, args.domain)
        if args.dry_run:
            devid = diskspec.devid_of(args.device)
            how = "take over the size of the image of" if size is None else f"make {size} bytes of"
            return _say(args, {"domid": domid, "devid": devid, "size": size}, f"would {how} {args.device} ({devid})")
        more = {} if size is None else {"size": size}
        now = client.call("io.evtchnd.BlockResize", domid=domid, device=args.device, **more)
    text = f"domain {domid}: {now['vdev']} ({now['devid']}): {now['sectors'] * 512 / 2**20:g} MiB"
    return _say(args, now, text)


def _block_list(args: Asked) -> None:
    with _client(args) as client:
        reply = client.call("io.evtchnd.Info", domid=_domid(client, args.domain))
    disks = [device for device in reply["devices"] if device["kind"] == "vbd"]
    if args.output == "json":
        return _json(disks)
    counted = ("requests", "sectors_read", "sectors_written", "sectors_discarded", "flushes", "errors", "in_flight")
    rows = [
        [
            *(disk["vdev"], disk["devid"], _state(disk), "ro" if disk["readonly"] else "rw"),
            *(f"{disk['sectors'] / 2048:g}", disk["sector_size"], disk["counters"].get("queues", 0)),
            *(disk["counters"].get(name, 0) for name in counted),
            disk["target"],
        ]
        for disk in disks
    ]
    head = ["Vdev", "Devid", "State", "Access", "MiB", "Sector", "Queues", "Requests"]
    head += ["Read", "Written", "Discarded", "Flushes", "Errors", "InFlight", "Target"]
    return _table(head, rows, right=(1, *range(4, 14)))


def _bytes(text: str) -> int:
    """A size such as 10G: a number of bytes, or with K, M, G or T of powers of 1024."""
    found = re.fullmatch(r"([1-9][0-9]{0,17})([KMGT]?)(?:i?B)?", text)
    size = int(found[1]) << 10 * " KMGT".index(found[2] or " ") if found else 0
    if not 0 < size < 1 << 63:
        raise OperatorError(f"'{text}' is no size (10G, 512M, 1073741824)")
    return size


def _arguments(argv: Sequence[str] | None) -> Asked:
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_mutually_exclusive_group()
    # SUPPRESS: said before the verb or behind it, the later parser must not put its default over it
    where.add_argument("--runtime-dir", metavar="DIR", default=argparse.SUPPRESS, help=f"the daemon's ({_RUNTIME_DIR})")
    where.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help="the daemon's control.sock itself")
    common.add_argument("-o", "--output", choices=("text", "json"), default=argparse.SUPPRESS)
    common.add_argument("--timeout", type=_seconds, metavar="S", default=argparse.SUPPRESS, help="for each answer")
    change = argparse.ArgumentParser(add_help=False)
    change.add_argument("--dry-run", action="store_true", help="check, say what would be done, do nothing")

    parser = argparse.ArgumentParser(prog="evtchnctl", description="Asks a running evtchnd.", parents=[common])
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[Asked], None], text: str, *, changes: bool = False) -> argparse.ArgumentParser:
        parents = [common, change] if changes else [common]
        added = verbs.add_parser(name, parents=parents, help=text, description=text)
        added.set_defaults(verb=run)
        return added

    verb("list", _list, "every domain")
    verb("upgrade", _upgrade, "let the evtchnd that is installed now take over from the one that runs")
    info = verb("info", _info, "one domain and its devices")
    attach = verb("block-attach", _block_attach, "give a domain a disk", changes=True)
    detach = verb("block-detach", _block_detach, "take a disk away from a domain", changes=True)
    shown = verb("console", _console, "be at a domain's console; ^] leaves it (-o json: say its terminal)")
    more = verb("console-attach", _console_attach, "give a domain a further console", changes=True)
    less = verb("console-detach", _console_detach, "take a further console away from a domain", changes=True)
    disks = verb("block-list", _block_list, "a domain's disks and what they have done (sectors of 512 bytes)")
    resize = verb("block-resize", _block_resize, "tell a domain the new size of a disk", changes=True)
    for added in (info, attach, detach, disks, resize, shown, more, less):
        added.add_argument("domain", metavar="DOM", help="its number or name")
    attach.add_argument("disk", metavar="SPEC", nargs="+", help="vdev=xvda,target=disk.img or file:disk.img,xvda,w")
    for added in (detach, resize):
        added.add_argument("device", metavar="DEV", help="xvda or 51712")
    resize.add_argument(
        "size", metavar="SIZE", nargs="?", help="make its image so long (10G); without it, the size that the image has"
    )
    detach.add_argument("--force", action="store_true", help="take it away from a guest that does not let it go")
    less.add_argument("--force", action="store_true", help="take it away from a guest that does not let it go")
    shown.add_argument("-n", "--num", type=int, default=0, metavar="NUM", help="which of its consoles (0)")
    # xl has serial, too: an emulated serial line is the VMM's
    shown.add_argument("-t", "--type", choices=("pv",), default="pv", help="only PV consoles are served here")
    more.add_argument("-n", "--num", type=int, metavar="NUM", help="1 to 9 (the first that is free)")
    less.add_argument("num", type=int, metavar="NUM", help="1 to 9")
    network.Verbs(_client, _domid, _say, _table, _state).add(verb)
    xenstore.add(verbs, common, change, _control_socket, _domid_of)
    return parser.parse_args(argv, Asked(output="text", runtime_dir=None, socket=None, timeout=None))


def _seconds(text: str) -> float:
    """More than none, and no more than a socket takes."""
    seconds = float(text)
    if not 0 < seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and {_LONGEST_S} seconds")
    return seconds


def _client(args: Asked) -> Client:
    return Client(_control_socket(args), timeout=args.timeout)


def _control_socket(args: Asked) -> Path:
    folder = args.runtime_dir or os.environ.get("EVTCHND_RUNTIME_DIR") or _RUNTIME_DIR
    return Path(args.socket or Path(folder) / "control.sock")


def _domid_of(args: Asked, domain: str) -> int:
    if domain.isascii() and domain.isdecimal():
        return int(domain)
    with _client(args) as client:
        return _domid(client, domain)


def _domid(client: Client, domain: str) -> int:
    """A number is a domid, anything else a name."""
    if domain.isascii() and domain.isdecimal():
        return int(domain)
    found = [row["domid"] for row in client.call("io.evtchnd.List")["domains"] if row["name"] == domain]
    if len(found) != 1:
        raise OperatorError(f"{len(found) or 'no'} domain{'s' if found else ''} named '{domain}' (evtchnctl list)")
    return int(found[0])


def _say(args: Asked, reply: Mapping[str, Any], text: str) -> None:
    _json(reply) if args.output == "json" else print(text)


def _json(reply: Any) -> None:
    json.dump(reply, sys.stdout, indent=2)
    print()


def _state(device: Mapping[str, Any]) -> str:
    state = device["state"]
    return _STATES[state] if 0 <= state < len(_STATES) else str(state)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int]) -> None:
    """Columns as wide as their widest cell; `right`: those that are aligned there."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


if __name__ == "__main__":
    sys.exit(main())
