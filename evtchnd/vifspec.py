"""xl's vif strings (xl-network-configuration(5)): `mac=00:16:3e:00:00:07,bridge=br0,rate=10Mb/s`; "" is one, too.

`script` says how the interface is wired, by the names of Xen's own scripts, none of which is run:
    vif-bridge (the default)     a port of `bridge=` (xenbr0)
    vif-route                    no bridge; the host has a route to each address of `ip=`
    none                         neither: somebody else wires it
With the others `ip=` is told to XenStore and does nothing more: nothing is filtered, as with xl's vif-bridge where the
host's firewall lets a bridge forward. Nothing else of vif-route's script is done either (proxy ARP, iptables).

Three keys are evtchnd's own, xl does not know them:
    netns=NAME                   network namespace of the host's end and its bridge: below /run/netns, or a path
    address=10.0.0.1/24          address of the host's end, with vif-route or none; several with spaces between them
    queues=N                     the most that the guest may use; without it the configuration's
The command line uses this too: it imports nothing but errors.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from evtchnd.errors import OperatorError

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

# linux/if.h: IFNAMSIZ, with its NUL
_NAME_BYTES = 15
# xen/io/netif.h and Linux' netback: ETH_MIN_MTU, and ETH_MAX_MTU less an Ethernet header
_MTU = range(68, 65535 - 14 + 1)
# Linux' netfront numbers them in an int; a device's node is one of a guest's 1,000
_DEVIDS = range(1 << 16)
_QUEUES = range(1, 65)
_XEN_OUI = "00:16:3e"
_DEFAULT_BRIDGE = "xenbr0"
# libxlu_vif.c: how often the credit is filled up, and how long that may take
_INTERVAL_US, _MOST_US = 50_000, 0xFFFFFFFF
_MOST_BYTES = 0xFFFFFFFF
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_MICROSECONDS = {"": 10**6, "s": 10**6, "ms": 10**3, "m": 10**3, "us": 1, "u": 1}

_WIRINGS = ("vif-bridge", "vif-route", "none")
_KEYS = frozenset(
    {
        *("mac", "bridge", "ip", "rate", "mtu", "vifname", "devid", "script", "type", "model", "backend"),
        *("netns", "address", "queues"),
    }
)
# What xl knows and this daemon does not serve gets an answer of its own.
_NOT_SERVED = {
    "gatewaydev": "the host's own routes are used",
    "netdev": "the host's own routes are used",
    "vlan": "give the port its VLAN where the bridge is set up",
    "accel": "xl does not serve it either",
}
_FLAGS = {"trusted": True, "untrusted": False}


@dataclass(frozen=True)
class VifSpec:
    """One network interface of a domain."""

    mac: str  # of the guest's end, aa:bb:cc:dd:ee:ff
    bridge: str = ""  # the host's end is a port of it; "": of none
    wiring: str = "vif-bridge"  # vif-bridge, vif-route, none
    ip: tuple[str, ...] = ()  # the guest's addresses, as far as somebody said them
    rate: tuple[int, int] | None = None  # (bytes, microseconds): so many bytes in each such interval; None: unlimited
    mtu: int = 0  # bytes of an IP packet; 0: the bridge's, or 1500
    vifname: str = ""  # of the host's end; "": vifDOMID.DEVID
    devid: int | None = None  # None: the first free one
    trusted: bool = True  # what the guest is told of its backend
    netns: str = ""  # "": the daemon's own
    address: tuple[Interface, ...] = ()  # of the host's end
    queues: int = 0  # the most; 0: as the configuration has it

    def __str__(self) -> str:
        """The canonical string: `parse(str(spec)) == spec`."""
        words = [f"mac={self.mac}"]
        words += [f"bridge={self.bridge}"] if self.bridge else []
        words += [f"script={self.wiring}"] if self.wiring != "vif-bridge" else []
        words += [f"ip={' '.join(self.ip)}"] if self.ip else []
        words += [f"rate={rate_text(self.rate)}"] if self.rate else []
        words += [f"mtu={self.mtu}"] if self.mtu else []
        words += [f"vifname={self.vifname}"] if self.vifname else []
        words += [f"devid={self.devid}"] if self.devid is not None else []
        words += [] if self.trusted else ["untrusted"]
        words += [f"netns={self.netns}"] if self.netns else []
        words += [f"address={' '.join(map(str, self.address))}"] if self.address else []
        words += [f"queues={self.queues}"] if self.queues else []
        return ",".join(words)

    @property
    def idle(self) -> str:
        """One line about what was said and has no effect; "" where there is nothing of it."""
        if self.ip and self.wiring != "vif-route":
            return (
                f"ip={' '.join(self.ip)} is told to XenStore and filters nothing (script=vif-route makes routes of it)"
            )
        return ""

    def name(self, domid: int, devid: int) -> str:
        """Of the host's end."""
        return self.vifname or f"vif{domid}.{devid}"


def parse(text: str) -> VifSpec:
    """One vif string. OperatorError names the offending word. Without `mac=` a new one is made up, in Xen's range.

    `type=vif` and `backend=0` say what is so anyway; `model` is of an emulated card, which is the VMM's.
    """
    said: dict[str, str] = {}
    trusted: bool | None = None
    if not text.isprintable():
        # it goes into log lines, XenStore and JSON
        raise OperatorError("a vif string has a control character, or a byte that is no UTF-8")
    for word in (word.strip() for word in text.split(",")):
        key, equals, value = word.partition("=")
        if word in _FLAGS:
            if trusted not in (None, _FLAGS[word]):
                raise OperatorError("trusted and untrusted are both said")
            trusted = _FLAGS[word]
        elif key in _NOT_SERVED and equals:
            raise OperatorError(f"{key} is not served: {_NOT_SERVED[key]}")
        elif equals and key in _KEYS:
            if key in said:
                raise OperatorError(f"{key} is given twice: '{said[key]}' and '{value}'")
            said[key] = value.strip()
        elif word:
            raise OperatorError(f"'{key}' is no key of a vif" if equals else f"'{word}' is no key=value of a vif")
    return _spec(said, trusted is not False)


def _spec(said: dict[str, str], trusted: bool) -> VifSpec:
    if said.get("type", "vif") != "vif":
        raise OperatorError(f"type {said['type']}: an emulated card is the VMM's, type=vif is served")
    if said.get("backend", "0") not in ("0", "Domain-0"):
        raise OperatorError(f"backend {said['backend']}: this daemon serves as domain 0")
    wiring = said.get("script", "").removeprefix("/etc/xen/scripts/") or "vif-bridge"
    if wiring not in _WIRINGS:
        raise OperatorError(f"script {wiring}: hotplug scripts are not run ({', '.join(_WIRINGS)} say what is done)")
    bridge = said.get("bridge", "")
    if bridge and wiring != "vif-bridge":
        raise OperatorError(f"bridge={bridge} and script={wiring} are both said")
    ip = tuple(_address(word) for word in said.get("ip", "").split())
    if wiring == "vif-route" and not ip:
        raise OperatorError("script=vif-route wants the guest's addresses (ip=)")
    address = tuple(_interface(word) for word in said.get("address", "").split())
    if address and wiring == "vif-bridge":
        raise OperatorError("a port of a bridge has no address: give it to the bridge, or say script=none")
    return VifSpec(
        mac=_mac(said.get("mac", "")),
        bridge=_name("bridge", bridge or _DEFAULT_BRIDGE) if wiring == "vif-bridge" else "",
        wiring=wiring,
        ip=ip,
        rate=parse_rate(said["rate"]) if said.get("rate") else None,
        mtu=_number("mtu", said["mtu"], _MTU) if said.get("mtu") else 0,
        vifname=_name("vifname", said["vifname"]) if said.get("vifname") else "",
        devid=_number("devid", said["devid"], _DEVIDS) if said.get("devid") else None,
        trusted=trusted,
        netns=_netns(said.get("netns", "")),
        address=address,
        queues=_number("queues", said["queues"], _QUEUES) if said.get("queues") else 0,
    )


def parse_rate(text: str) -> tuple[int, int]:
    """`10Mb/s`, `250KB/s`, `1MB/s@20ms` as (bytes, microseconds). OperatorError. K, M and G are powers of 1000."""
    found = re.fullmatch(r"([0-9]{1,20})([GMK]?)([Bb])/s(?:@([0-9]{1,10})(m?s?|us?))?", text)
    if not found:
        raise OperatorError(f"'{text}' is no rate (10Mb/s, 250KB/s, 1MB/s@20ms)")
    number, thousands, unit, interval, of = found.groups()
    a_second = int(number) * _THOUSANDS[thousands] // (8 if unit == "b" else 1)
    usec = int(interval) * _MICROSECONDS[of] if interval else _INTERVAL_US
    if not 0 < usec <= _MOST_US:
        raise OperatorError(f"rate {text}: its interval is not between 1 us and {_MOST_US // 10**6} s")
    credit = a_second * usec // 10**6
    if not 0 < credit <= _MOST_BYTES:
        # Linux' netback, too, counts the credit in 32 bits
        raise OperatorError(f"rate {text}: {credit} bytes in each interval are not between 1 and {_MOST_BYTES}")
    return credit, usec


def limit(text: str) -> tuple[int, int]:
    """As `parse_rate`, and `unlimited` as (0, 0)."""
    return (0, 0) if text == "unlimited" else parse_rate(text)


def rate_text(rate: tuple[int, int] | None) -> str:
    """The other way: what `limit` reads as the same pair; "" for none."""
    if rate is None:
        return ""
    if rate == (0, 0):
        return "unlimited"
    credit, usec = rate
    a_second = -(-credit * 10**6 // usec)
    return f"{a_second}B/s@{usec}us"


def _mac(text: str) -> str:
    mac = text.lower()
    if mac in ("", "00:00:00:00:00:00"):
        low = os.urandom(3)
        return f"{_XEN_OUI}:{low[0] & 0x7F:02x}:{low[1]:02x}:{low[2]:02x}"
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise OperatorError(f"'{text}' is no MAC address (00:16:3e:00:00:07)")
    if int(mac[:2], 16) & 1:
        raise OperatorError(f"mac {text} is a multicast address: the first byte must be even")
    return mac


def _name(key: str, text: str) -> str:
    """What Linux takes for an interface (dev_valid_name)."""
    if len(text.encode()) > _NAME_BYTES:
        raise OperatorError(f"{key} '{text}' is longer than {_NAME_BYTES} bytes")
    # Linux would take % for a number of its own choice
    if text in (".", "..") or re.search(r"[\s/:%]", text):
        raise OperatorError(f"{key} '{text}' is no name of an interface")
    return text


def _netns(text: str) -> str:
    if text and not text.startswith("/") and ("/" in text or text in (".", "..")):
        raise OperatorError(f"netns '{text}' is neither a name nor an absolute path")
    return text


def _number(key: str, text: str, among: range) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) not in among:
        raise OperatorError(f"{key} '{text}' is not in {among[0]}..{among[-1]}")
    return int(text)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False) if "/" in text else ipaddress.ip_address(text))
    except ValueError:
        raise OperatorError(f"ip '{text}' is no IP address (10.0.0.7, 2001:db8::7, 10.0.7.0/24)") from None


def _interface(text: str) -> Interface:
    try:
        if "/" not in text:
            raise ValueError
        return ipaddress.ip_interface(text)
    except ValueError:
        raise OperatorError(f"address '{text}' is no address with its prefix (10.0.0.1/24)") from None
