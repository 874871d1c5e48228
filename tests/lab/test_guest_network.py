"""Unmodified Linux kernels on evtchnd's vifs: what xen-netfront sends and receives, and what becomes of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest

from evtchnd.bench.evtchndguest import EvtchndGuest
from evtchnd.bench.qemuguest import Disk
from lab import guestimage
from lab.patience import patient
from lab.realguest import MIB, VCPUS, RealGuest, until
from lab.wire import BACKEND, FAR, FAR6, GUEST, GUEST6, MAC, VIF, Wire, Wires
from scale import scaled

pytestmark = pytest.mark.timeout(120)
# More than one TCP segment: what crosses the ring has not been cut.
SUPER = 3000
DROPPED = ("tx_dropped_bad", "tx_dropped_grant", "tx_dropped_header", "tx_dropped_refused", "rx_bad_grants")


@pytest.fixture(scope="module")
def wires() -> Iterator[Wires]:
    found = Wires()
    yield found
    found.close()


@pytest.fixture
def wire(guest: RealGuest, wires: Wires) -> Iterator[Wire]:
    """A guest with eth0 on a bridge. Afterwards nothing was refused, and its kernel has nothing to say."""
    it = wires.get(guest)
    it.reaches()
    yield it
    counters = it.counters()
    assert {name: counters[name] for name in DROPPED if counters[name]} == {}
    assert it.complaints() == ""


def test_what_the_frontend_negotiated(wire: Wire) -> None:
    guest = wire.guest

    def node(path: str) -> str:
        return guest.xenstore("read", path)

    assert node(f"{VIF}/multi-queue-num-queues") == str(VCPUS)
    for number in range(VCPUS):
        tx, rx = (node(f"{VIF}/queue-{number}/event-channel-{way}") for way in ("tx", "rx"))
        assert tx != rx
    for feature in ("sg", "gso-tcpv4", "gso-tcpv6", "ipv6-csum-offload", "rx-notify"):
        assert node(f"{VIF}/feature-{feature}") == "1"
    for feature in ("split-event-channels", "rx-copy", "sg", "gso-tcpv4", "gso-tcpv6"):
        assert node(f"{BACKEND}/feature-{feature}") == "1"
    assert node(f"{VIF}/state") == node(f"{BACKEND}/state") == "4"
    assert guest.run("cat /sys/class/net/eth0/address") == MAC
    features = guest.run("ethtool -k eth0")
    for feature in ("scatter-gather", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-checksum-ipv4"):
        assert re.search(rf"^\s*{feature}: on", features, re.MULTILINE), features
    told = wire.vif()
    assert (told["link"], told["carrier"], told["bridge"], told["counters"]["queues"]) == ("up", True, "br0", VCPUS)
    channels = [what for what in guest.interrupts() if re.search(r"-q\d-[tr]x\b", what)]
    assert len(channels) == 2 * VCPUS
    # queues that nobody uses are detached
    assert "numqueues 2" in wire.here.link("vif1.0").replace("numtxqueues", "")


def test_ping(wire: Wire) -> None:
    """Sizes around pages and fragments, both ways."""
    for size in (0, 56, 1472, 1473, 4000, 20000, 65000):
        wire.guest.run(f"ping -c2 -i0.01 -q -s {size} {FAR}")
        wire.far_run("usr/bin/ping", "-c2", "-i0.01", "-q", "-s", str(size), GUEST)


def test_ping_flood(wire: Wire) -> None:
    """Both ends at once; each gets its answers."""
    count = scaled(6000, least=300)
    flood = ["-f", "-q", "-c", str(count)]
    with wire.started("usr/bin/ping", *flood, GUEST) as far:
        said = wire.guest.run(f"ping {' '.join(flood)} {FAR}", 120)
        assert far.wait(patient(120)) == 0
        assert far.stdout is not None
        for text in (said, far.stdout.read()):
            assert f"{count} received" in text, text


def test_every_processor_sends(wire: Wire) -> None:
    """Each queue is used, both ways."""
    with wire.counted() as gained:
        wire.iperf("-n", "256K", "-P", "6")
        wire.iperf("-n", "256K", "-P", "6", "-R")
    for number in range(VCPUS):
        assert gained[f"queue-{number}/tx_packets"] > 0
        assert gained[f"queue-{number}/rx_packets"] > 0


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_tcp_at_full_offload(wire: Wire, family: str) -> None:
    """What was sent crosses in packets of more than one segment, and so does what comes."""
    to = FAR if family == "v4" else FAR6
    size = scaled(400, least=8) * MIB
    with wire.counted() as sent:
        end = wire.iperf("-n", str(size), to=to)
    # how much of it had been read when the sender was through depends
    assert end["sum_sent"]["bytes"] >= size
    assert sent["tx_bytes"] / sent["tx_packets"] > SUPER
    with wire.counted() as received:
        end = wire.iperf("-n", str(size), "-R", to=to)
    assert end["sum_sent"]["bytes"] >= size
    assert received["rx_bytes"] / received["rx_packets"] > SUPER


def test_udp(wire: Wire) -> None:
    """What is too much is lost, and by nobody in between: netback and netfront have counted the same packets."""
    guest = wire.guest
    size = scaled(100, least=4) * MIB

    def apart() -> list[int]:
        counters = wire.counters()
        theirs = guest.run("cat /sys/class/net/eth0/statistics/[rt]x_packets").split()
        return [counters[f"{way}_packets"] - int(count) for way, count in zip(("rx", "tx"), theirs, strict=True)]

    before = apart()
    for way in ([], ["-R"]):
        with wire.counted() as gained:
            end = wire.iperf("-u", "-b", "20M", "-l", "1400", "-n", str(size), *way)
        arrived = end["sum"]["packets"] - end["sum"]["lost_packets"]
        assert arrived > 0
        assert gained["rx_packets" if way else "tx_packets"] >= arrived
        until(lambda: apart() == before)


def test_tcp_both_ways_at_once(wire: Wire) -> None:
    """SHA-256 at both ends."""
    size = scaled(100, least=4) * MIB
    down, up = wire.tcp(size)
    assert (down.count, up.count) == (size, size)
    assert down.here == down.told
    assert up.here == up.told


def test_ipv6(wire: Wire) -> None:
    for size in (56, 1452, 1453, 8000):
        wire.guest.run(f"ping -6 -c2 -i0.01 -q -s {size} {FAR6}")
        wire.far_run("usr/bin/ping", "-6", "-c2", "-i0.01", "-q", "-s", str(size), GUEST6)


def test_jumbo_frames(wire: Wire) -> None:
    """The bridge's frames grow while the guest is there, and shrink again."""
    guest = wire.guest

    def mtu(size: int) -> None:
        for name in ("near", "vif1.0", "br0"):
            wire.here.ip(f"link set {name} mtu {size}")
        wire.far.ip(f"link set far mtu {size}")
        until(lambda: guest.xenstore("read", f"{BACKEND}/mtu") == str(size))
        guest.run(f"ip link set eth0 mtu {size}")

    mtu(9000)
    try:
        guest.run(f"ping -c5 -i0.01 -q -M do -s 8972 {FAR}")
        guest.fails(f"ping -c1 -W1 -q -M do -s 8973 {FAR}")
        wire.far_run("usr/bin/ping", "-c5", "-i0.01", "-q", "-M", "do", "-s", "8972", GUEST)
        # one by one, too: frames of three pages
        guest.run("ethtool -K eth0 tso off gso off")
        with wire.counted() as gained:
            wire.iperf("-n", "2M")
            wire.iperf("-n", "2M", "-R")
        assert 3000 < gained["tx_bytes"] / gained["tx_packets"] < 9100
    finally:
        guest.run("ethtool -K eth0 tso on gso on")
        mtu(1500)
    guest.fails(f"ping -c1 -W1 -q -M do -s 8972 {FAR}")
    wire.reaches()


def test_dhcp(wire: Wire) -> None:
    """An address from a server at the far end, by checksums that nobody has computed."""
    guest = wire.guest
    folder = guest.folder
    (folder / "leases").write_bytes(b"")
    (folder / "dhcp").write_text(
        f"interface far\nstart 10.88.0.77\nend 10.88.0.77\nlease_file {folder}/leases\npidfile {folder}/dhcp.pid\n"
        "option subnet 255.255.255.0\noption router 10.88.0.1\n"
    )
    script = '#!/bin/sh\\n[ "$1" != bound ] || ip address add $ip/$mask dev $interface\\n'
    guest.run(f"printf '{script}' >/tmp/bound; chmod +x /tmp/bound; ip address flush dev eth0")
    try:
        with wire.started("usr/bin/busybox", "udhcpd", "-f", str(folder / "dhcp")):
            guest.run("busybox udhcpc -i eth0 -n -q -t 20 -s /tmp/bound 2>&1", 60)
        assert "10.88.0.77/24" in guest.run("ip -4 address show dev eth0 | cat")
        wire.reaches()
    finally:
        guest.run("ip address flush dev eth0")
        wire.address("eth0", GUEST, GUEST6)


def test_rate(wire: Wire) -> None:
    """Live: what the guest may send. What it receives has no limit."""
    wire.set(rate="4Mb/s")
    assert wire.guest.xenstore("read", f"{BACKEND}/rate") == "25000,50000"
    try:
        end = wire.iperf("-t", "3")
        # the burst that a limit lets through is in it
        assert end["sum_received"]["bits_per_second"] < 6e6
    finally:
        wire.set(rate="unlimited")
    assert "rate" not in wire.guest.xenstore("list", BACKEND).split()
    wire.iperf("-n", "8M")


def test_carrier(wire: Wire) -> None:
    guest = wire.guest
    wire.set(carrier=False)
    guest.fails(f"ping -c2 -W1 -i0.2 -q {FAR}")
    assert guest.xenstore("read", f"{BACKEND}/carrier") == "0"
    assert "NO-CARRIER" in wire.here.link("vif1.0")
    wire.set(carrier=True)
    wire.reaches()
    assert "NO-CARRIER" not in wire.here.link("vif1.0")


def test_attached_and_detached_under_traffic(wire: Wire) -> None:
    """A second interface comes and goes while the first one is busy, and while it is busy itself."""
    guest = wire.guest
    guest.run(f"ping -f -q {FAR} >/tmp/first 2>&1 & first=$!")
    for round in range(3):
        wire.attach(f"devid=1,bridge=br0,netns={wire.here.name}", "eth1")
        wire.address("eth1", f"10.88.1.{round + 2}")
        guest.run(f"ping -f -q -I eth1 {FAR} >/dev/null 2>&1 & second=$!; sleep 0.3")
        wire.detach("1", "eth1")
        assert wire.here.link("vif1.1") == ""
        guest.run("kill $second; wait $second || true")
    said = guest.run("kill -INT $first; wait $first; cat /tmp/first")
    sent, received = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", said)[0])
    # what was under way when ping was told to end; a flood has more than one
    assert received > 100 and sent - received <= 5, said


def test_pulled_under_traffic_and_put_back(wire: Wire) -> None:
    """eth0 itself, in the middle of a transfer: the transfer ends with an error, and nothing else does."""
    guest = wire.guest
    with wire.iperf_server():
        guest.run(f"iperf3 -c {FAR} -t 60 >/dev/null 2>&1 & job=$!; sleep 1")
        wire.detach("0")
        guest.run("kill $job; wait $job || true")
    wire.attach(f"mac={MAC},bridge=br0,netns={wire.here.name}")
    wire.address("eth0", GUEST, GUEST6)
    wire.reaches()
    wire.iperf("-n", "4M")


def test_the_bridge_goes_and_comes_back(wire: Wire) -> None:
    """Down and up; deleted and made again, under the guest's traffic."""
    guest = wire.guest
    wire.here.ip("link set br0 down")
    guest.fails(f"ping -c1 -W1 -q {FAR}")
    wire.here.ip("link set br0 up")
    wire.reaches()
    guest.run(f"ping -f -q {FAR} >/dev/null 2>&1 & job=$!")
    wire.here.ip("link del br0")
    until(lambda: wire.vif()["link"] != "up")
    wire.bridge()
    wire.join("near")
    until(lambda: wire.vif()["link"] == "up")
    wire.reaches()
    guest.run("kill $job; wait $job || true")
    wire.iperf("-n", "4M")


def test_the_tap_is_deleted(wire: Wire) -> None:
    """It is made again, and the guest goes on."""
    wire.here.ip("link del vif1.0")
    until(lambda: wire.vif()["link"] == "up" and "vif1.0" in wire.here.link("vif1.0"))
    wire.reaches()
    wire.iperf("-n", "4M")


def test_the_worker_dies(wire: Wire) -> None:
    """A transfer goes on with the next one."""
    guest = wire.guest
    size = scaled(200, least=16) * MIB
    with wire.iperf_server():
        guest.run(f"iperf3 -J -c {FAR} -n {size} >/tmp/goes-on & job=$!; sleep 0.5")
        pid = guest.call("Info")["worker"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: guest.call("Info")["worker"]["pid"] not in (0, pid))
        assert guest.vmm is not None
        guest.vmm.rejoined(patient(20))
        guest.run("wait $job", 60)
    wire.reaches()


@pytest.mark.parametrize("guests", guestimage.SUITES[:1], indirect=True, scope="session")
def test_two_guests_on_one_bridge(wire: Wire) -> None:
    """The other one, of another release, has its vif from its VMM's command line, since it was switched on."""
    image = guestimage.find(wire.guest.lab, guestimage.SUITES[1])
    vif = f"mac=00:16:3e:88:00:03,bridge=br0,netns={wire.here.name}"
    other = EvtchndGuest(
        wire.guest.daemon,
        wire.guest.folder,
        kernel=image.kernel,
        initramfs=image.initramfs,
        append="console=hvc0 quiet root=/dev/xvda ro driven",
        disks=[Disk("xvda", image.root, readonly=True)],
        vifs=[vif],
        memory_mib=256,
        vcpus=1,
        domid=2,
    )
    with other:
        other.booted(patient(30))
        assert wire.here.link("vif2.0") != ""
        other.console.run("ip address add 10.88.0.3/24 dev eth0; ip link set eth0 up", patient(10))
        wire.reaches("10.88.0.3")
        wire.guest.run("ping -f -q -c 500 10.88.0.3", 30)
        other.console.send("iperf3 -s -1 >/tmp/served")
        wire.guest.run("for i in $(seq 50); do (echo >/dev/tcp/10.88.0.3/22) 2>/dev/null; sleep 0.1; done", 30)
        said = wire.guest.run("iperf3 -c 10.88.0.3 -n 16M", 60)
        assert "receiver" in said
        status, _ = other.console.status(patient(30))
        assert status == 0
    until(lambda: wire.here.link("vif2.0") == "")
