"""A soft guest on a bridge, attached by `evtchnctl`, reached from a veth's other end: daemon, worker and kernel."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemonprocess import until
from evtchnd.guest.domain import Domain
from evtchnd.guest.netfront import Netfront
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm
from hostnetwork import Namespace, answering, namespace
from test_cli import Running, ctl, running

MIB = 1 << 20
MAC = "00:16:3e:00:00:07"
GUEST, FAR = "10.77.0.7", "10.77.0.1"


@pytest.fixture(params=[[], ["--single-process"]], ids=["workers", "single"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "run", *request.param) as it:
        yield it
        it.ends_well()


@contextmanager
def bridged() -> Iterator[tuple[Namespace, Namespace]]:
    """A namespace with a bridge, and the one at the other end of a veth that is a port of it."""
    with namespace() as here, namespace() as far:
        here.bridge("br0")
        here.ip(f"link add near type veth peer name far netns {far.name}")
        here.ip("link set near master br0 up")
        far.netns.up("far", f"{FAR}/24")
        yield here, far


@contextmanager
def soft_guest(daemon: Running) -> Iterator[tuple[Domain, XenStore]]:
    with SoftVmm(daemon.folder / "vmm.sock", 7, memory=32 * MIB, name="guest") as vm:
        domain = Domain(vm)
        store = XenStore(domain)
        try:
            yield domain, store
        finally:
            store.close()
            domain.close()


def said(daemon: Running, *arguments: str) -> Any:
    done = ctl(daemon.folder, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def vif(daemon: Running) -> dict[str, Any]:
    (one,) = said(daemon, "network-list", "guest")
    assert isinstance(one, dict)
    return one


def workers(daemon: Running) -> set[str]:
    """Descriptors of TAPs in the daemon and what it has forked."""
    tree = [str(daemon.process.pid)]
    for pid in tree:
        tree += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {f"{pid}:{fd}" for pid in tree for fd in os.listdir(f"/proc/{pid}/fd") if _is_tap(pid, fd)}


def _is_tap(pid: str, fd: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/net/tun"
    except OSError:
        return False


def test_a_guest_on_a_bridge_from_first_to_last(daemon: Running) -> None:
    with bridged() as (here, far), soft_guest(daemon) as (domain, store):
        spec = [f"mac={MAC}", "bridge=br0", f"netns={here.name}", "rate=100MB/s"]
        dry = ctl(daemon.folder, "network-attach", "guest", *spec, "--dry-run")
        assert dry.stdout.startswith(f"would attach mac={MAC},bridge=br0,rate=100000000B/s@50000us,")
        assert here.link("vif7.0") == ""

        made = said(daemon, "network-attach", "guest", *spec)
        assert (made["devid"], made["vifname"], made["mtu"], made["link"]) == (0, "vif7.0", 1500, "up")
        assert "master br0" in here.link("vif7.0")
        back, front = made["backend"], made["frontend"]
        nodes = {name: store.read(f"{back}/{name}") for name in ("mac", "bridge", "handle", "type", "rate", "script")}
        assert nodes == {
            "mac": MAC,
            "bridge": "br0",
            "handle": "0",
            "type": "vif",
            "rate": "5000000,50000",
            "script": "vif-bridge",
        }
        assert [store.read(f"{front}/{name}") for name in ("mac", "handle", "mtu", "trusted")] == [
            MAC,
            "0",
            "1500",
            "1",
        ]

        card = Netfront(domain, store, queues=2)
        card.connect()
        with answering(card):
            far.ping(GUEST, 20)
            far.ping(GUEST, 5, 1400)
            now = vif(daemon)
            assert (now["state"], now["link"], now["queues"], now["reason"]) == (4, "up", 4, "")
            assert now["counters"]["rx_packets"] >= 26 and now["counters"]["tx_packets"] >= 26
            head, line = ctl(daemon.folder, "network-list", "7").stdout.splitlines()
            assert head.split()[:5] == ["Devid", "MAC", "State", "Link", "Carrier"]
            assert line.split()[:5] == ["0", MAC, "connected", "up", "up"]
            assert line.endswith("vif7.0 on br0")
            assert f"vif 0 vif7.0 connected up {MAC}\n" in ctl(daemon.folder, "info", "7").stdout
            assert said(daemon, "info", "7")["domain"]["devices"] == 1

            # live changes
            slow = ctl(daemon.folder, "network-set", "7", "vif7.0", "--rate", "10Mb/s")
            assert slow.stdout == "domain 7: vif 0: rate 1250000B/s@50000us, carrier up\n"
            assert store.read(f"{back}/rate") == "62500,50000"
            assert said(daemon, "network-set", "7", MAC, "--rate", "unlimited")["rate_usec"] == 0
            assert said(daemon, "network-set", "7", "0", "--carrier", "down")["carrier"] is False
            assert store.read(f"{back}/carrier") == "0"
            until(lambda: "NO-CARRIER" in here.link("vif7.0"), "the host sees it")
            said(daemon, "network-set", "7", "0", "--carrier", "up")
            until(lambda: "NO-CARRIER" not in here.link("vif7.0"), "and that it is back")
            until(lambda: "state forwarding" in here.ip("-d link show vif7.0"), "the bridge takes it")
            far.ping(GUEST, 5)
        card.disconnect()
        gone = ctl(daemon.folder, "network-detach", "guest", "0")
        assert gone.stdout == "domain 7: vif 0: detached\n"
        assert here.link("vif7.0") == ""
        assert said(daemon, "network-list", "7") == []
        assert store.ls(front.rpartition("/")[0]) == []
        assert not workers(daemon)


def test_addresses_are_routes_or_told_to_have_no_effect(daemon: Running) -> None:
    with bridged() as (here, _), soft_guest(daemon) as (domain, store):
        bridge = ctl(daemon.folder, "network-attach", "7", f"bridge=br0,ip={GUEST},netns={here.name}")
        warning = f"ip={GUEST} is told to XenStore and filters nothing (script=vif-route makes routes of it)"
        assert bridge.returncode == 0
        assert bridge.stderr == f"evtchnctl: {warning}\n"
        said(daemon, "network-detach", "7", "0")
        spec = f"mac={MAC},script=vif-route,ip={GUEST},address={FAR}/32,netns={here.name}"
        routed = ctl(daemon.folder, "network-attach", "7", spec)
        assert (routed.returncode, routed.stderr) == (0, "")
        card = Netfront(domain, store)
        card.connect()
        with answering(card):
            here.ping(GUEST, 3)
        card.disconnect()
        assert daemon.end() == 0
        assert f"warning domain 7: vif 0: {warning}\n" in daemon.said


def test_a_tap_that_is_deleted_under_traffic(daemon: Running) -> None:
    with bridged() as (here, far), soft_guest(daemon) as (domain, store):
        said(daemon, "network-attach", "7", f"mac={MAC},bridge=br0,netns={here.name}")
        card = Netfront(domain, store, queues=2)
        card.connect()
        with answering(card):
            far.ping(GUEST, 5)
            here.ip("link set vif7.0 down")
            until(lambda: vif(daemon)["link"] == "down", "seen")
            here.ip("link set vif7.0 up")
            until(lambda: vif(daemon)["link"] == "up", "seen")
            until(lambda: "state forwarding" in here.ip("-d link show vif7.0"), "the bridge takes it")
            far.ping(GUEST, 5)
            first = here.link("vif7.0").partition(":")[0]
            here.ip("link del vif7.0")
            # it may be back before a command has seen that it was gone
            until(lambda: here.link("vif7.0").partition(":")[0] not in ("", first), "made again")
            until(lambda: vif(daemon)["link"] == "up", "wired")
            until(lambda: "state forwarding" in here.ip("-d link show vif7.0"), "the bridge takes it")
            far.ping(GUEST, 5)
            # the bridge goes, and comes again
            here.ip("link del br0")
            here.bridge("br0")
            here.ip("link set near master br0")
            until(lambda: "master br0" in here.link("vif7.0"), "back on its bridge")
            until(lambda: "state forwarding" in here.ip("-d link show vif7.0"), "the bridge takes it")
            far.ping(GUEST, 5)
        card.disconnect()


def test_a_deleted_tap_costs_no_cpu(daemon: Running) -> None:
    """Somebody else's TAP, which is waited for: POLLERR for ever, for whoever polled it."""
    with namespace() as here, soft_guest(daemon) as (domain, store):
        make = "tuntap add dev tap0 mode tap multi_queue vnet_hdr"
        here.ip(make)
        said(daemon, "network-attach", "7", f"mac={MAC},script=none,vifname=tap0,netns={here.name}")
        card = Netfront(domain, store)
        card.connect()
        here.netns.up("tap0", f"{FAR}/24")
        with answering(card):
            here.ping(GUEST, 3)
            here.ip("link del tap0")
            until(lambda: vif(daemon)["link"] == "deleted", "seen")
            before = _cpu(daemon)
            time.sleep(1)
            ticks = _cpu(daemon) - before
            here.ip(make)
            until(lambda: vif(daemon)["link"] == "up", "back")
            here.netns.up("tap0", f"{FAR}/24")
            here.ping(GUEST, 3)
        assert ticks < os.sysconf("SC_CLK_TCK") // 2, "a loop spun"
        card.disconnect()


def _cpu(daemon: Running) -> int:
    """Clock ticks of the daemon and of all that it has forked."""
    tree, ticks = [str(daemon.process.pid)], 0
    for pid in tree:
        tree += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks


def test_a_worker_that_dies_is_not_noticed(tmp_path: Path) -> None:
    with running(tmp_path / "run") as daemon, bridged() as (here, far), soft_guest(daemon) as (domain, store):
        said(daemon, "network-attach", "7", f"mac={MAC},bridge=br0,netns={here.name}")
        card = Netfront(domain, store, queues=2)
        card.connect()
        with answering(card):
            for _ in range(3):
                far.ping(GUEST, 5)
                pid = said(daemon, "info", "7")["worker"]["pid"]
                os.kill(pid, 9)
                until(lambda pid=pid: said(daemon, "info", "7")["worker"]["pid"] not in (0, pid), "another one")
                until(lambda: vif(daemon)["counters"].get("queues") == 2, "serves")
            assert "vif7.0" in here.link("vif7.0")
            far.ping(GUEST, 5)
        card.disconnect()


def test_a_guest_that_does_not_let_go(tmp_path: Path) -> None:
    file = tmp_path / "evtchnd.toml"
    file.write_text("[limits]\ndetach_s = 0.3\n")
    with running(tmp_path / "run", "--config", str(file)) as daemon, namespace() as here, soft_guest(daemon) as guest:
        attach = ["network-attach", "7", f"mac={MAC},script=none,netns={here.name}"]
        for force in (False, True):
            said(daemon, *attach)
            card = Netfront(*guest)
            card.connect()
            held = ctl(daemon.folder, "network-detach", "7", "0")
            assert held.stderr == (
                "evtchnctl: domain 7: vif 0: the guest did not let it go in 0.3 s: it is removed when the guest does\n"
            )
            assert here.link("vif7.0") != ""
            if force:
                assert said(daemon, "network-detach", "7", MAC, "--force") == {"devid": 0, "forced": True}
                card.release()
            else:
                card.disconnect()
            until(lambda: said(daemon, "network-list", "7") == [], "removed")
            assert here.link("vif7.0") == ""
            assert not workers(daemon)


def test_vifs_of_the_config(tmp_path: Path) -> None:
    with bridged() as (here, far):
        file = tmp_path / "evtchnd.toml"
        good, bad = f"mac={MAC},bridge=br0,netns={here.name}", f"bridge=br9,netns={here.name}"
        file.write_text(f"[[domains]]\ndomid = 7\nvifs = ['{good}', '{bad}']\n[vif]\nmax_queues = 1\n")
        with running(tmp_path / "run", "--config", str(file)) as it:
            with soft_guest(it) as (domain, store):
                card = Netfront(domain, store)
                card.connect()
                with answering(card):
                    far.ping(GUEST, 3)
                assert vif(it)["queues"] == 1
                card.disconnect()
            until(lambda: here.link("vif7.0") == "", "its host's end goes along")
            assert it.end() == 0
            assert re.search(r"error domain 7: vif 1: not attached: .*bridge br9 is not there", it.said)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["network-attach", "7", "bridge=br9", "netns={here}"],
            "domain 7: vif 0: bridge br9 is not there (ip link add",
        ),
        (["network-attach", "7", "script=none", "netns=nowhere"], "vif 0: netns nowhere: No such file or directory"),
        (["network-attach", "7", "brigde=br0"], "'brigde' is no key of a vif"),
        (["network-attach", "8", "script=none"], "domain 8 is not there"),
        (["network-detach", "7", "0"], "domain 7: no vif 0"),
        (["network-set", "7", "0", "--rate", "fast"], "'fast' is no rate"),
        (["network-set", "7", "vif7.0", "--carrier", "up"], "domain 7: no vif vif7.0"),
        (["network-list", "8"], "domain 8 is not there"),
    ],
)
def test_what_is_refused_is_one_line_with_its_reason(daemon: Running, arguments: list[str], reason: str) -> None:
    with namespace() as here, SoftVmm(daemon.folder / "vmm.sock", 7, memory=8 * MIB):
        done = ctl(daemon.folder, *(text.format(here=here.name) for text in arguments))
        assert here.link("vif7.0") == ""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"evtchnctl: [^\n]+\n", done.stderr)
    assert reason in done.stderr


def test_a_place_is_taken_once(daemon: Running) -> None:
    with namespace() as here, SoftVmm(daemon.folder / "vmm.sock", 7, memory=8 * MIB):
        place = f"netns={here.name},script=none"
        assert said(daemon, "network-attach", "7", f"mac={MAC},{place}")["devid"] == 0
        assert said(daemon, "network-attach", "7", place)["devid"] == 1
        assert said(daemon, "network-attach", "7", f"devid=5,{place}")["devid"] == 5
        for text, reason in [
            (f"devid=5,{place}", "domain 7: vif 5 is there already"),
            (f"mac={MAC},{place}", f"domain 7: vif 0 has {MAC} already"),
            (f"vifname=vif7.1,{place}", "domain 7: vif 2: vif7.1: another vif has it"),
        ]:
            assert ctl(daemon.folder, "network-attach", "7", text).stderr == f"evtchnctl: {reason}\n"
        assert [each["devid"] for each in said(daemon, "network-list", "7")] == [0, 1, 5]
        assert said(daemon, "network-attach", "7", f"vifname=0,{place}")["devid"] == 2
        assert said(daemon, "network-set", "7", "0", "--carrier", "up")["vifname"] == "vif7.0"  # a number is a number
        said(daemon, "network-detach", "7", "2")
        said(daemon, "network-detach", "7", "1")
        assert said(daemon, "network-attach", "7", place)["devid"] == 1
