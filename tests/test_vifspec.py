"""xl's vif strings: the examples of xl-network-configuration(5), and what is refused."""

from __future__ import annotations

import re
from ipaddress import ip_interface
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.errors import OperatorError
from evtchnd.vifspec import VifSpec, parse, parse_rate, rate_text

MAC = "00:16:3e:00:00:07"
PLAIN = VifSpec(mac=MAC, bridge="xenbr0")


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("bridge=br0", {"bridge": "br0"}),
        ("bridge=br0, vifname=tap0 ,", {"bridge": "br0", "vifname": "tap0"}),
        ("type=vif,model=rtl8139,backend=0,script=vif-bridge", {}),
        ("script=/etc/xen/scripts/vif-bridge", {}),
        ("script=none", {"bridge": "", "wiring": "none"}),
        ("script=none,address=10.0.0.1/24 fd00::1/64", {"bridge": "", "wiring": "none"}),
        ("script=vif-route,ip=10.0.0.7 fd00::7", {"bridge": "", "wiring": "vif-route", "ip": ("10.0.0.7", "fd00::7")}),
        ("ip=10.0.7.1/24", {"ip": ("10.0.7.0/24",)}),
        ("rate=1MB/s@20ms", {"rate": (20_000, 20_000)}),
        ("mtu=9000", {"mtu": 9000}),
        ("bridge=fifteen-letters", {"bridge": "fifteen-letters"}),
        ("devid=3", {"devid": 3}),
        ("untrusted", {"trusted": False}),
        ("trusted", {}),
        ("netns=blue,queues=2", {"netns": "blue", "queues": 2}),
    ],
)
def test_what_is_taken(text: str, changes: dict[str, Any]) -> None:
    if "address=" in text:
        changes = {**changes, "address": (ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64"))}
    assert parse(f"mac={MAC},{text}") == VifSpec(**{**PLAIN.__dict__, **changes})


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        # the manual's examples; the interval is 50 ms where none is said
        ("10Mb/s", (62_500, 50_000)),
        ("250KB/s", (12_500, 50_000)),
        ("1MB/s@20ms", (20_000, 20_000)),
        ("1GB/s@1s", (10**9, 10**6)),
        ("8b/s@1", (1, 10**6)),
        ("1000B/s@1000us", (1, 1000)),
    ],
)
def test_rates(text: str, rate: tuple[int, int]) -> None:
    assert parse_rate(text) == rate
    assert parse_rate(rate_text(rate)) == rate


def test_a_missing_mac_is_made_up() -> None:
    for text in ("", "mac=", "mac=00:00:00:00:00:00"):
        mac = parse(text).mac
        assert re.fullmatch(r"00:16:3e:[0-7][0-9a-f]:[0-9a-f]{2}:[0-9a-f]{2}", mac)
        assert mac != parse(text).mac
    assert parse("mac=00:16:3E:74:3D:76").mac == "00:16:3e:74:3d:76"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mac=1", "'1' is no MAC address"),
        ("mac=01:00:00:00:00:00", "is a multicast address"),
        ("bridge=a/b", "bridge 'a/b' is no name of an interface"),
        ("bridge=sixteen-letters-", "is longer than 15 bytes"),
        ("vifname=vif%d", "vifname 'vif%d' is no name"),
        ("vifname=..", "vifname '..' is no name"),
        ("rate=10", "'10' is no rate"),
        ("rate=10Mb/s@", "is no rate"),
        ("rate=0b/s", "0 bytes in each interval"),
        ("rate=1B/s", "0 bytes in each interval"),
        ("rate=10Mb/s@0ms", "its interval is not between"),
        ("rate=10Mb/s@5000s", "its interval is not between"),
        ("rate=9999999999GB/s", "bytes in each interval are not between"),
        ("mtu=67", "mtu '67' is not in 68..65521"),
        ("mtu=+5", "mtu '+5' is not in"),
        ("devid=-1", "devid '-1' is not in 0..65535"),
        ("queues=0", "queues '0' is not in 1..64"),
        ("script=vif-nat", "script vif-nat: hotplug scripts are not run (vif-bridge, vif-route, none"),
        ("script=vif-route", "script=vif-route wants the guest's addresses"),
        ("script=none,bridge=br0", "bridge=br0 and script=none are both said"),
        ("address=10.0.0.1/24", "a port of a bridge has no address"),
        ("script=none,address=10.0.0.1", "address '10.0.0.1' is no address with its prefix"),
        ("ip=10.0.0.300", "ip '10.0.0.300' is no IP address"),
        ("netns=../x", "netns '../x' is neither a name nor an absolute path"),
        ("type=ioemu", "type ioemu: an emulated card is the VMM's"),
        ("backend=7", "backend 7: this daemon serves as domain 0"),
        ("vlan=7", "vlan is not served"),
        ("gatewaydev=eth0", "gatewaydev is not served"),
        ("brigde=br0", "'brigde' is no key of a vif"),
        ("br0", "'br0' is no key=value of a vif"),
        ("mtu=1500,mtu=9000", "mtu is given twice: '1500' and '9000'"),
        ("trusted,untrusted", "trusted and untrusted are both said"),
        ("bridge=a\nb", "a vif string has a control character"),
        ("bridge=\udcff", "a vif string has a control character"),
    ],
)
def test_what_is_refused_and_why(text: str, reason: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(reason)) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


RATES = st.tuples(st.integers(1, 10**12), st.integers(1, 0xFFFFFFFF)).filter(
    lambda said: 0 < said[0] * said[1] // 10**6 <= 0xFFFFFFFF
)


@given(
    bridge=st.sampled_from(["br0", "xenbr0", "a.b-c"]),
    rate=st.none() | RATES,
    mtu=st.sampled_from([0, 68, 1500, 9000, 65521]),
    devid=st.none() | st.integers(0, 65535),
    vifname=st.sampled_from(["", "tap0"]),
    trusted=st.booleans(),
    netns=st.sampled_from(["", "blue", "/proc/1/ns/net"]),
    ip=st.lists(st.ip_addresses().map(str), max_size=3),
    queues=st.integers(0, 64),
)
def test_the_canonical_string_is_read_as_the_same(rate: tuple[int, int] | None, ip: list[str], **rest: Any) -> None:
    pair = None if rate is None else (rate[0] * rate[1] // 10**6, rate[1])
    spec = VifSpec(mac=MAC, rate=pair, ip=tuple(ip), **rest)
    assert parse(str(spec)) == spec


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        spec = parse(text)
    except OperatorError as exc:
        assert str(exc).isprintable() or "control character" in str(exc)
    else:
        assert parse(str(spec)) == spec


def test_addresses_that_do_nothing_are_said() -> None:
    assert parse("ip=10.0.0.7 fd00::7").idle == (
        "ip=10.0.0.7 fd00::7 is told to XenStore and filters nothing (script=vif-route makes routes of it)"
    )
    assert parse("script=none,ip=10.0.0.7").idle != ""
    assert parse("script=vif-route,ip=10.0.0.7").idle == parse("bridge=br0").idle == ""
