"""The host's ends of vifs: TAPs in a namespace of the test's own, on both loops, changed by `ip` behind our back."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evtchnd import transport, vifspec
from evtchnd.control import netlink, network, tap
from evtchnd.control.network import Network, Port
from evtchnd.errors import OperatorError
from hostnetwork import Namespace, namespace

MAC = "00:16:3e:00:00:07"


class Owner:
    """Of a port: what it was told."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.mtus: list[int] = []
        self.again = 0

    def taps_changed(self, fds: list[int]) -> None:
        transport.close_all(self.fds)
        self.fds = fds
        self.again += 1

    def mtu_changed(self, mtu: int) -> None:
        self.mtus.append(mtu)


class Nowhere:
    name = "nowhere"


class Held:
    """A port that is open."""

    def __init__(self, there: Namespace | Nowhere, text: str, name: str = "vif7.0", queues: int = 2) -> None:
        self.owner = Owner()
        spec = vifspec.parse(f"mac={MAC},netns={there.name},{text}")
        self.port = Port("domain 7: vif 0", name, queues, spec, self.owner)
        self.network = Network()

    async def __aenter__(self) -> Held:
        self.owner.fds = await self.network.open(self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.network.close(self.port)
        transport.close_all(self.owner.fds)
        assert not self.network._namespaces


@pytest.fixture
def there() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_PAUSE_S", 0.05)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd))
    yield
    after = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd))
    assert [each for each in after if "tun" in each or "net:" in each] == [
        each for each in before if "tun" in each or "net:" in each
    ]


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def socket_in(there: Namespace, groups: int) -> socket.socket:
    place = tap.open_namespace(there.name)
    try:
        return tap.netlink_socket(place, groups)
    finally:
        os.close(place)


async def come(ready: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(20):
        while not ready():
            await asyncio.sleep(0.01)
    assert ready(), what


# ---- the adapter ---------------------------------------------------------------------------------------------------


async def test_requests_of_pyroute2_on_this_loop(there: Namespace) -> None:
    asked = netlink.Netlink(socket_in(there, 0))
    try:
        lo = await asked.link_named("lo")
        assert lo is not None
        assert (lo.index, lo.mtu, lo.up) == (1, 65536, True)
        assert await asked.link_named("nobody") is None
        assert await asked.link_of("?", 9999) is None
        await asked.link("add", ifname="br0", kind="bridge")
        bridge = await asked.link_named("br0")
        assert bridge is not None
        # many at a time: each has its own answer
        every = await asyncio.gather(*(asked.link_of("?", 1 if n % 2 else bridge.index) for n in range(200)))
        assert [link and link.name for link in every] == ["br0", "lo"] * 100
        names = [link.get("ifname") async for link in await asked.link("dump")]
        assert {"lo", "br0"} <= set(names)
        with pytest.raises(OperatorError, match=r"^br0: File exists$"):
            await asked.ask("br0", asked.link("add", ifname="br0", kind="bridge"))
        await asked.addr("add", index=bridge.index, address="10.1.2.3", prefixlen=24)
        assert "10.1.2.3/24" in there.ip("addr show br0")
    finally:
        asked.close()
        asked.close()


async def test_an_answer_that_does_not_come_is_not_waited_for(
    there: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = netlink.Netlink(socket_in(there, 0))
    monkeypatch.setattr(asked, "enqueue", lambda data, addr: None)
    try:
        with pytest.raises(OperatorError, match="netlink does not answer"):
            await asked.ask("lo", asked.link("get", index=1), 0.1)
    finally:
        asked.close()


async def test_news_of_links_and_of_news_that_is_lost(there: Namespace) -> None:
    news: list[netlink.Link] = []
    missed: list[int] = []
    sock = socket_in(there, netlink.LINKS)
    links = netlink.Links(sock, news.append, lambda: missed.append(1))
    try:
        there.ip("link add br0 type bridge")
        await come(lambda: any(link.name == "br0" and link.here for link in news), "made")
        there.ip("link set br0 mtu 1300")
        await come(lambda: any(link.mtu == 1300 for link in news), "mtu")
        there.ip("link del br0")
        await come(lambda: any(not link.here for link in news), "deleted")
        sock.setsockopt(1, 8, 4096)  # SO_RCVBUF: a storm has no room there
        there.netns.run(lambda: subprocess.run("for n in `seq 9`; do ip link add a$n type bridge; done", shell=True))
        await come(lambda: missed, "the kernel says that it dropped some")
        before = len(news)
        there.ip("link add last type bridge")
        await come(lambda: any(link.name == "last" for link in news[before:]), "and goes on")
    finally:
        links.close()
        links.close()


def test_pyroute2_alone_does_not_run_on_uvloop() -> None:
    """What the adapter is for; when this fails, it may go."""
    code = "import uvloop, pyroute2\nuvloop.run(pyroute2.AsyncIPRoute().link('get', index=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot open a UDP handle, invalid family 16" in done.stderr


# ---- TAPs ----------------------------------------------------------------------------------------------------------


async def test_a_port_of_a_bridge(there: Namespace) -> None:
    there.bridge("br0")
    there.ip("link set br0 mtu 1400")
    async with Held(there, "bridge=br0") as held:
        shown = there.link("vif7.0")
        assert "master br0" in shown
        assert "mtu 1400" in shown
        assert "fe:16:3e:00:00:07" in shown
        assert "alias domain 7: vif 0" in shown
        assert re.search(r"<.*\bUP\b.*>", shown)
        assert "vnet_hdr on multi_queue numqueues 2 " in shown
        assert (held.port.mtu, held.port.state, held.port.made) == (1400, "up", True)
        assert "inet" not in there.ip("addr show vif7.0")
    assert there.link("vif7.0") == ""


async def test_routed_with_an_address(there: Namespace) -> None:
    text = "script=vif-route,ip=10.7.0.2 fd07::2 10.8.0.0/24,address=10.7.0.1/32 fd07::1/128,mtu=1300"
    async with Held(there, text):
        assert re.search(r"inet 10\.7\.0\.1/32 ", there.ip("addr show vif7.0"))
        assert re.search(r"inet6 fd07::1/128 ", there.ip("addr show vif7.0"))
        assert "10.7.0.2 dev vif7.0" in there.ip("route")
        assert "10.8.0.0/24 dev vif7.0" in there.ip("route")
        assert "fd07::2 dev vif7.0" in there.ip("-6 route")
        assert "mtu 1300" in there.link("vif7.0")


async def test_nothing_is_left_where_it_cannot_be(there: Namespace) -> None:
    with pytest.raises(OperatorError, match=r"^bridge br0 is not there \(ip link add br0 type bridge\)$"):
        async with Held(there, "bridge=br0"):
            pass
    assert there.link("vif7.0") == ""
    with pytest.raises(OperatorError, match=r"^vif7\.0: bridge lo: "):
        async with Held(there, "bridge=lo,mtu=1500"):
            pass
    with pytest.raises(OperatorError, match=r"^netns nowhere: No such file or directory \(ip netns list\)$"):
        async with Held(Nowhere(), "script=none"):
            pass
    there.ip("link add vif7.0 type bridge")
    with pytest.raises(
        OperatorError, match=r"^vif7\.0: Invalid argument \(it is there and is no TAP with multi_queue\)"
    ):
        async with Held(there, "script=none"):
            pass
    with pytest.raises(OperatorError, match=r"^tap9: Argument list too long \(it has no more queues"):
        async with Held(there, "script=none", "tap9", 257):
            pass


async def test_two_vifs_do_not_share_a_tap(there: Namespace) -> None:
    async with Held(there, "script=none") as held:
        spec = vifspec.parse(f"netns={there.name},script=none")
        with pytest.raises(OperatorError, match=r"^vif7\.0: another vif has it$"):
            await held.network.open(Port("domain 8: vif 0", "vif7.0", 1, spec, Owner()))
        assert held.port.state == "up"
        # another daemon's
        other = Held(there, "script=none")
        with pytest.raises(OperatorError, match=r"^vif7\.0: Device or resource busy \(somebody else serves it\)$"):
            await other.network.open(other.port)


async def test_somebody_elses_tap_is_taken_as_it_is(there: Namespace) -> None:
    """Persistent, on its bridge, up: nothing is left to be done, and nothing is done."""
    there.bridge("br0")
    there.ip("tuntap add dev tap0 mode tap multi_queue vnet_hdr")
    there.ip("link set tap0 master br0 up address fe:00:00:00:00:01 alias mine")
    async with Held(there, "bridge=br0", "tap0") as held:
        assert not held.port.made
        assert "fe:00:00:00:00:01" in there.link("tap0")
        assert "alias mine" in there.link("tap0")
    assert "tap0" in there.link("tap0")


async def test_a_name_may_be_another_namespaces_tomorrow(tmp_path: Path) -> None:
    """`ip netns del X; ip netns add X`, while a vif is in the first: each has its own."""
    network = Network()
    held: list[Port] = []
    name = tmp_path / "net"
    with namespace() as first, namespace() as second:
        for there in (first, second):
            there.bridge("br0")
            name.unlink(missing_ok=True)
            name.symlink_to(there.name)
            held.append(Port("a vif", "vif7.0", 1, vifspec.parse(f"bridge=br0,netns={name}"), Owner()))
            held[-1].owner.fds = await network.open(held[-1])  # type: ignore[attr-defined]
        for port, there in zip(held, (first, second), strict=True):
            assert "master br0" in there.link("vif7.0")
            there.ip("link set vif7.0 down")
            await come(lambda port=port: port.state == "down", "its own news")
        for port in held:
            await network.close(port)
            transport.close_all(port.owner.fds)  # type: ignore[attr-defined]
        assert not network._namespaces


def test_without_the_capability_one_line_says_what_to_do() -> None:
    code = "from evtchnd.control import tap\ntry: tap.open_tap('vif7.0', 1)\nexcept Exception as e: print(e)"
    paths = {**os.environ, "PYTHONPATH": str(Path(tap.__file__).parents[2])}
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = subprocess.run([*drop, sys.executable, "-c", code], capture_output=True, text=True, env=paths)
    if done.returncode:
        pytest.skip(f"no capability can be dropped here: {done.stderr}")
    assert done.stdout == (
        "vif7.0: Operation not permitted (a TAP is made with CAP_NET_ADMIN, which systemd/evtchnd.service.d/tap.conf "
        "gives; without it: ip tuntap add dev vif7.0 mode tap user 0 multi_queue vnet_hdr)\n"
    )


# ---- what happens to them ------------------------------------------------------------------------------------------


async def test_down_up_mtu_and_name(there: Namespace) -> None:
    async with Held(there, "script=none") as held:
        there.ip("link set vif7.0 down")
        await come(lambda: held.port.state == "down", "down")
        there.ip("link set vif7.0 up mtu 1300")
        await come(lambda: held.port.state == "up" and held.owner.mtus == [1300], "up")
        there.ip("link set vif7.0 down")
        there.ip("link set vif7.0 name other")
        await come(lambda: held.port.name == "other", "name")
        assert held.owner.again == 0


async def test_one_that_is_deleted_is_made_again(there: Namespace) -> None:
    there.bridge("br0")
    async with Held(there, "bridge=br0,mtu=1300") as held:
        for round in (1, 2, 3):
            first = held.port.index
            await asyncio.sleep(0.2)  # the news of its making is over
            there.ip("link del vif7.0")
            await come(lambda round=round: held.owner.again == round and held.port.state == "up", "again")
            assert held.port.index != first
            shown = there.link("vif7.0")
            assert "master br0" in shown and "mtu 1300" in shown and "numqueues 2 " in shown


async def test_somebody_elses_that_is_deleted_is_waited_for(there: Namespace) -> None:
    make = "tuntap add dev tap0 mode tap multi_queue vnet_hdr"
    there.ip(make)
    async with Held(there, "script=none", "tap0") as held:
        there.ip("link del tap0")
        await come(lambda: held.port.state == "deleted", "deleted")
        await asyncio.sleep(0.2)
        assert there.link("tap0") == ""
        there.ip(make)
        await come(lambda: held.owner.again == 1 and held.port.state == "up", "again")
        assert not held.port.made


async def test_a_bridge_that_is_made_anew_gets_its_port_back(there: Namespace) -> None:
    there.bridge("br0")
    async with Held(there, "bridge=br0") as held:
        there.ip("link del br0")
        await come(lambda: held.port.state == "br0 is not there", "gone")
        there.bridge("br0")
        await come(lambda: held.port.state == "up", "back")
        assert "master br0" in there.link("vif7.0")
        assert held.owner.again == 0


async def test_who_takes_a_port_out_of_its_bridge_is_not_contradicted(there: Namespace) -> None:
    there.bridge("br0")
    async with Held(there, "bridge=br0") as held:
        there.ip("link set vif7.0 nomaster")
        await come(lambda: held.port.state == "no port of br0 any more", "out")
        there.ip("link set br0 mtu 1400")
        await asyncio.sleep(0.2)
        assert "master" not in there.link("vif7.0")
        there.ip("link set vif7.0 master br0")
        await come(lambda: held.port.state == "up", "in")
        there.bridge("br1")
        there.ip("link set vif7.0 master br1")
        there.ip("link del br0")
        await come(lambda: held.port.state == "br0 is not there", "elsewhere")
        there.bridge("br0")
        await asyncio.sleep(0.2)
        assert "master br1" in there.link("vif7.0")


async def test_lost_news_is_looked_up(there: Namespace) -> None:
    there.bridge("br0")
    async with Held(there, "bridge=br0") as held:
        (place,) = held.network._namespaces.values()
        place._links._reader.abort()  # nobody hears any more
        there.ip("link del vif7.0")
        there.ip("link del br0")
        there.bridge("br0")
        place._missed()
        await come(lambda: held.owner.again == 1 and held.port.state == "up", "found out")
        assert "master br0" in there.link("vif7.0")


async def test_news_that_is_lost_during_the_look_is_looked_up_too(
    there: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Held(there, "script=none") as held:
        (place,) = held.network._namespaces.values()
        place._links._reader.abort()
        look, looks = place._look_once, []

        async def looking() -> None:
            looks.append(1)
            await look()
            if len(looks) == 1:  # this one is behind us
                there.ip("link del vif7.0")
                place._missed()

        monkeypatch.setattr(place, "_look_once", looking)
        place._missed()
        await come(lambda: held.owner.again == 1 and held.port.state == "up", "found out")
        assert len(looks) == 2


async def test_one_that_ends_while_it_is_wired_is_not_taken_for_being_there(
    there: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted behind the last request, whose answer comes after the news."""
    ask, deleted = netlink.Netlink.ask, []

    async def late(self: netlink.Netlink, what: str, request: object, *limit: float) -> object:
        answer = await ask(self, what, request, *limit)  # type: ignore[arg-type, var-annotated]
        if what.endswith(": up") and not deleted:
            deleted.append(1)
            there.ip("link del vif7.0")
            await asyncio.sleep(0.2)
        return answer

    monkeypatch.setattr(netlink.Netlink, "ask", late)
    with pytest.raises(OperatorError, match=r"^vif7\.0: is gone again$"):
        async with Held(there, "script=none"):
            pass
    there.bridge("br0")
    async with Held(there, "bridge=br0") as held:
        # the same when it is made anew: tried again
        deleted.clear()
        there.ip("link del vif7.0")
        await come(lambda: deleted and held.owner.again == 1 and held.port.state == "up", "again")
        assert "master br0" in there.link("vif7.0")


async def test_a_name_of_15_bytes_and_a_guests_address_that_begins_with_fe(there: Namespace) -> None:
    there.bridge("br0")
    async with Held(there, "bridge=br0", "fifteen-letters"):
        assert "master br0" in there.link("fifteen-letters")
    spec = vifspec.parse(f"mac=fe:16:3e:00:00:07,bridge=br0,netns={there.name}")
    port, network = Port("a vif", "vif7.0", 1, spec, Owner()), Network()
    fds = await network.open(port)
    assert "fa:16:3e:00:00:07" in there.link("vif7.0")  # the bridge would take the guest's for its own
    await network.close(port)
    transport.close_all(fds)


def test_without_a_free_descriptor_one_line_says_so(there: Namespace) -> None:
    place = tap.open_namespace(there.name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(place)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        with pytest.raises(OperatorError, match=r"^netns: the own one: Too many open files$"):
            tap.open_tap("vif7.0", 1, place)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(place)
