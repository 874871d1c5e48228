"""`evtchnctl network-*`: a domain's network interfaces. Verbs and vif strings are xl's, network-set is our own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from evtchnd import vifspec
from evtchnd.cli import capture
from evtchnd.cli.varlink import Client
from evtchnd.netif import MOST_SNAP

Asked = argparse.Namespace
# What evtchnctl.py lends: a client; a domain's number; an answer as text or JSON; a table.
Connect = Callable[[Asked], Client]
Number = Callable[[Client, str], int]
Say = Callable[[Asked, Any, str], None]
Table = Callable[..., None]

# Each the sum of the counters that begin so: packets are dropped for several reasons.
_COUNTED = ("tx_packets", "tx_bytes", "tx_dropped", "rx_packets", "rx_bytes", "rx_dropped")


class Verbs:
    """The verbs, as evtchnctl.py adds them to its own."""

    def __init__(self, connect: Connect, number: Number, say: Say, table: Table, state: Callable[..., str]) -> None:
        self._connect = connect
        self._number = number
        self._say = say
        self._table = table
        self._state = state

    def add(self, verb: Callable[..., argparse.ArgumentParser]) -> None:
        """`verb`: adds one to the parser (name, function, help, changes=)."""
        attach = verb("network-attach", self._attach, "give a domain a network interface", changes=True)
        detach = verb("network-detach", self._detach, "take a network interface away from a domain", changes=True)
        change = verb("network-set", self._set, "change what a live interface may send, or its link", changes=True)
        shown = verb("network-list", self._list, "a domain's network interfaces and what they have done")
        taken = verb("capture", self._capture, "what crosses an interface, as pcapng, until ^C")
        for added in (attach, detach, change, shown):
            added.add_argument("domain", metavar="DOM", help="its number or name")
        attach.add_argument("vif", metavar="SPEC", nargs="*", help="mac=00:16:3e:00:00:07 bridge=br0 rate=10Mb/s ...")
        for added in (detach, change):
            added.add_argument("device", metavar="DEV", help="0, its MAC address, or vif7.0")
        detach.add_argument("--force", action="store_true", help="take it away from a guest that does not let it go")
        change.add_argument("--rate", metavar="RATE", help="10Mb/s, 1MB/s@20ms, unlimited")
        change.add_argument("--carrier", choices=("up", "down"), help="the link, as the guest sees it")
        taken.add_argument("device", metavar="VIF", help="the name of its host's end, or vifDOMID.DEVID: vif7.0")
        taken.add_argument("-w", "--write", metavar="FILE", default="-", help="where to; -: standard output (a pipe)")
        taken.add_argument("-s", "--snap", type=_count(MOST_SNAP), default=0, metavar="BYTES", help="keep of a packet")
        taken.add_argument("-c", "--count", type=_count(1 << 62), default=0, metavar="N", help="end after N packets")

    def _attach(self, args: Asked) -> None:
        spec = vifspec.parse(",".join(args.vif))
        if spec.idle:
            print(f"evtchnctl: {spec.idle}", file=sys.stderr)
        with self._connect(args) as client:
            domid = self._number(client, args.domain)
            if args.dry_run:
                return self._say(args, {"domid": domid, "vif": str(spec)}, f"would attach {spec}")
            vif = client.call("io.evtchnd.NetworkAttach", domid=domid, vif=str(spec))["vif"]
        return self._say(args, vif, f"domain {domid}: vif {vif['devid']}: {_wired(vif)}")

    def _detach(self, args: Asked) -> None:
        with self._connect(args) as client:
            domid = self._number(client, args.domain)
            if args.dry_run:
                return self._say(args, {"domid": domid, "device": args.device}, f"would detach {args.device}")
            gone = client.call("io.evtchnd.NetworkDetach", domid=domid, device=args.device, force=args.force)
        end = "detached by force" if gone["forced"] else "detached"
        return self._say(args, gone, f"domain {domid}: vif {gone['devid']}: {end}")

    def _set(self, args: Asked) -> None:
        said: dict[str, Any] = {}
        if args.rate is not None:
            said["rate"] = vifspec.rate_text(vifspec.limit(args.rate))
        if args.carrier is not None:
            said["carrier"] = args.carrier == "up"
        with self._connect(args) as client:
            domid = self._number(client, args.domain)
            if args.dry_run:
                what = ", ".join(f"{key} {value}" for key, value in said.items()) or "nothing"
                return self._say(args, {"domid": domid, "device": args.device, **said}, f"would set {what}")
            vif = client.call("io.evtchnd.NetworkSet", domid=domid, device=args.device, **said)["vif"]
        text = f"domain {domid}: vif {vif['devid']}: rate {_rate(vif)}, carrier {_carrier(vif)}"
        return self._say(args, vif, text)

    def _capture(self, args: Asked) -> None:
        capture.show(lambda: self._connect(args), args.device, args.write, snap=args.snap, most=args.count)

    def _list(self, args: Asked) -> None:
        with self._connect(args) as client:
            vifs = client.call("io.evtchnd.NetworkList", domid=self._number(client, args.domain))["vifs"]
        if args.output == "json":
            return self._say(args, vifs, "")
        rows = [
            [
                *(vif["devid"], vif["mac"], self._state(vif), vif["link"], _carrier(vif), vif["mtu"]),
                *(vif["queues"], _rate(vif)),
                *(sum(count for key, count in vif["counters"].items() if key.startswith(name)) for name in _COUNTED),
                _wired(vif),
            ]
            for vif in vifs
        ]
        head = ["Devid", "MAC", "State", "Link", "Carrier", "MTU", "Queues", "Rate"]
        head += ["TxPackets", "TxBytes", "TxDropped", "RxPackets", "RxBytes", "RxDropped", "Host"]
        return self._table(head, rows, right=(0, 5, 6, *range(8, 14)))


def _count(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number = int(text)
        if not 0 <= number <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not in 0..{most}")
        return number

    return count


def _wired(vif: Mapping[str, Any]) -> str:
    place = f"{vif['netns']}:{vif['vifname']}" if vif["netns"] else str(vif["vifname"])
    return f"{place} on {vif['bridge']}" if vif["bridge"] else place


def _carrier(vif: Mapping[str, Any]) -> str:
    return "up" if vif["carrier"] else "down"


def _rate(vif: Mapping[str, Any]) -> str:
    return vifspec.rate_text((vif["rate_bytes"], vif["rate_usec"]))
