"""TAPs that the daemon has not opened: a VMM's, by VIF, and systemd's, by name; real ones, in a namespace."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest

from daemonprocess import until
from evtchnd import transport
from evtchnd.control import tap
from evtchnd.errors import OperatorError
from evtchnd.guest.netfront import Netfront
from evtchnd.vmm.client import Refused
from hostnetwork import Namespace, answering, namespace
from test_cli import Running, ctl
from test_network import GUEST, MAC, said, soft_guest, vif

HOST = "10.77.0.1"
BYTES = bytes.fromhex(MAC.replace(":", ""))


@contextmanager
def daemon_in(
    there: Namespace | None, folder: Path, passed: Sequence[tuple[str, int]] = (), *arguments: str
) -> Iterator[Running]:
    """A daemon in that namespace; `passed`: descriptors that it gets as systemd's, with their names."""
    names, fds = ":".join(name for name, _ in passed), [fd for _, fd in passed]
    moves = " ".join(f"{3 + number}<&{fd}" for number, fd in enumerate(fds))
    code = f'exec {moves}; LISTEN_PID=$$ LISTEN_FDS={len(fds)} LISTEN_FDNAMES={names} exec "$@"'
    before = ["bash", "-c", code, "bash"] if passed else []

    def start() -> Running:
        return Running(folder, *arguments, before=before, fds=fds)

    it = there.netns.run(start) if there is not None else start()
    try:
        it.wait_until_ready()
        yield it
        it.ends_well()
    finally:
        it.close()


@contextmanager
def queues(there: Namespace, name: str, count: int = 1) -> Iterator[list[int]]:
    fds = there.netns.tap(name, count)
    try:
        yield fds
    finally:
        transport.close_all(fds)


@pytest.mark.parametrize("arguments", [[], ["--single-process"]], ids=["workers", "single"])
def test_a_vmm_passes_the_queues_of_a_tap(tmp_path: Path, arguments: list[str]) -> None:
    """It is in a network namespace that the daemon is not in and knows nothing of."""
    with (
        namespace() as there,
        queues(there, "tap0", 2) as fds,
        daemon_in(None, tmp_path / "run", (), *arguments) as daemon,
        soft_guest(daemon) as (domain, store),
    ):
        there.netns.up("tap0", f"{HOST}/24")
        domain.vm.client.vif(3, BYTES, fds, mtu=1400)
        transport.close_all(fds)
        fds.clear()
        shown = vif(daemon)
        assert (shown["devid"], shown["mac"], shown["vifname"]) == (3, MAC, "tap0")
        assert (shown["mtu"], shown["queues"], shown["link"]) == (1400, 2, "not watched")
        assert shown["tap"].startswith("descriptor of ")
        with pytest.raises(Refused, match="vif 3 is there already"), queues(there, "tap1") as other:
            domain.vm.client.vif(3, BYTES, other)
        card = Netfront(domain, store, 3, queues=2)
        card.connect()
        with answering(card):
            there.ping(GUEST, 5)
        card.disconnect()
        domain.vm.client.vif_remove(3)
        with pytest.raises(Refused, match="no vif 3"):
            domain.vm.client.vif_remove(3)
        assert there.link("tap0") == ""  # nobody has it open any more


def test_one_in_the_daemons_namespace_is_watched_and_left_alone(tmp_path: Path) -> None:
    with namespace() as there, daemon_in(there, tmp_path / "run") as daemon:
        there.bridge("br0")
        with queues(there, "tap0") as fds, soft_guest(daemon) as (domain, _):
            there.ip("link set tap0 mtu 1300 alias mine master br0")
            domain.vm.client.vif(0, BYTES, fds)
            shown = vif(daemon)
            assert (shown["mtu"], shown["link"], shown["bridge"]) == (1300, "down", "")
            assert "alias mine" in there.link("tap0")
            assert "state DOWN" in there.link("tap0")
            there.ip("link set tap0 mtu 1350 up")
            until(lambda: (vif(daemon)["mtu"], vif(daemon)["link"]) == (1350, "up"), "its changes are seen")
            with pytest.raises(Refused, match="vif 1: tap0: another vif has it"):
                domain.vm.client.vif(1, bytes([0, 0x16, 0x3E, 0, 0, 8]), fds)
            there.ip("link del tap0")
            until(lambda: vif(daemon)["link"] == "deleted", "and its end")
            there.ip("tuntap add dev tap0 mode tap multi_queue vnet_hdr")  # another one, not ours
            said(daemon, "network-detach", "7", "0")
            assert there.link("tap0") != ""


TUN = "/dev/net/tun"


def opened(there: Namespace, name: str, flags: int) -> int:
    def make() -> int:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
        return fd

    return there.netns.run(make)


TAP_, PI, VNET, MULTI, TUN_ = 0x2, 0x1000, 0x4000, 0x100, 0x1


@pytest.mark.parametrize(
    ("flags", "count", "reason"),
    [
        (None, 1, "descriptor 0 is no TAP's queue"),
        (TUN_ | PI | VNET, 1, "descriptor 0: the TAP was made without IFF_TAP"),
        (TAP_ | PI, 1, "descriptor 0: the TAP was made without IFF_VNET_HDR"),
        (TAP_ | PI | VNET, 2, "descriptor 0: the TAP was made without IFF_MULTI_QUEUE"),
        (TAP_ | PI | VNET | MULTI, 5, "5 queues of a TAP, 4 are the most (vif.max_queues)"),
    ],
)
def test_what_is_no_such_tap_is_refused_with_one_line(
    tmp_path: Path, flags: int | None, count: int, reason: str
) -> None:
    with namespace() as there, daemon_in(None, tmp_path / "run") as daemon, soft_guest(daemon) as (domain, _):
        fds: list[int] = []
        try:
            for _ in range(count):
                if flags is None:
                    fds.append(os.open(TUN, os.O_RDWR))
                elif flags & MULTI or not fds:
                    fds.append(opened(there, "tap0", flags))
                else:
                    fds.append(os.dup(fds[0]))
            with pytest.raises(Refused) as refused:
                domain.vm.client.vif(0, BYTES, fds)
            assert reason in str(refused.value)
        finally:
            transport.close_all(fds)
        assert said(daemon, "network-list", "7") == []
        assert there.link("tap0") == ""  # the daemon has closed its copies
        assert daemon_holds(daemon) == 0


def daemon_holds(daemon: Running) -> int:
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    return sum(os.readlink(each) == TUN for each in folder.iterdir() if os.path.lexists(each))


def test_queues_of_two_taps_are_refused() -> None:
    several = r"^the descriptors are queues of several TAPs: tap0, tap1$"
    with namespace() as there, queues(there, "tap0") as one, queues(there, "tap1") as other:
        both = [*one, *other]
        with pytest.raises(OperatorError, match=several):
            tap.check_passed(both)


def test_systemd_passes_taps_by_name(tmp_path: Path) -> None:
    """As OpenFile= or a socket unit with FileDescriptorName=tap-NAME would."""
    with namespace() as there, queues(there, "tap0", 2) as fds:
        there.bridge("br0")
        passed = [("tap-net0", fd) for fd in fds]
        with daemon_in(there, tmp_path / "run", passed) as daemon, soft_guest(daemon) as (domain, store):
            for _ in range(2):  # what was passed is there again after a detach
                said(daemon, "network-attach", "7", f"mac={MAC},bridge=br0,vifname=net0")
                shown = vif(daemon)
                assert (shown["vifname"], shown["tap"], shown["queues"], shown["link"]) == ("tap0", "systemd", 2, "up")
                assert "master br0" in there.link("tap0")
                there.ip("addr replace 10.77.0.1/24 dev br0")
                card = Netfront(domain, store, queues=2)
                card.connect()
                until(lambda: "state forwarding" in there.ip("-d link show tap0"), "the bridge takes it")
                with answering(card):
                    there.ping(GUEST, 3)
                card.disconnect()
                said(daemon, "network-detach", "7", "0")
            assert there.link("tap0") != ""
            taken = ctl(daemon.folder, "network-attach", "7", f"mac={MAC},bridge=br0,vifname=net0,netns=nowhere")
            assert taken.stderr.startswith("evtchnctl: domain 7: vif 0: netns nowhere: ")
