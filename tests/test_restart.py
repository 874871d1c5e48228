"""The daemon is killed, restarted, killed again while guests use their disks: a pause, and nothing else.

Real processes: `evtchnd --keep` holds the descriptors (tests/unit has the same under systemd), soft guests resume by
themselves, every block that a guest reads or wrote is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess
from evtchnd.control import operator
from evtchnd.control.state import VERSION, State
from evtchnd.errors import HostError
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.checkedload import BLOCK, CheckedLoad
from evtchnd.guest.domain import Domain
from evtchnd.guest.netfront import Netfront
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.client import Client
from evtchnd.vmm.soft import MiB, SoftVmm
from evtchnd.xenstore import client as xenstore
from faultyfs import WRITE, FaultyFs, why_not
from hostnetwork import answering, namespace
from keptdaemon import ROOT, KeptDaemon, until
from scale import scaled
from test_network import GUEST, bridged
from test_network_passed import BYTES, HOST, queues

BLOCKS = 256
DEVID = 51712


class Guest:
    """A soft guest with a disk, which is attached by an operator or passed by its VMM."""

    def __init__(self, daemon: KeptDaemon, domid: int, *, passed: bool = False, queues: int = 1) -> None:
        self.domid = domid
        self.path = daemon.folder / f"{domid}.img"
        self.path.write_bytes(bytes(BLOCKS * BLOCK))
        self._fd = os.open(self.path, os.O_RDWR) if passed else -1
        self.vm = SoftVmm(daemon.vmm_socket, domid, memory=16 * MiB, name=f"guest{domid}", come_back=True)
        self.domain = Domain(self.vm)
        self.store = XenStore(self.domain)
        if passed:
            self.vm.disk(DEVID, "xvda", self._fd)
        else:
            daemon.ctl("block-attach", str(domid), f"{self.path},raw,xvda,w")
        # a machine that does other things, too, may not start a daemon between two kills
        self.front = Blkfront(self.domain, self.store, DEVID, queues=queues, timeout=300.0)
        self.front.connect()
        self.load = CheckedLoad(self.front, BLOCKS, seed=domid)

    def run(self, requests: int = 50) -> None:
        """Until so many more requests are answered."""
        before = self.load.answered
        until(lambda: self.load.failed or self.load.answered >= before + requests, f"domain {self.domid} hangs", 60)
        if self.load.failed:
            raise self.load.failed

    def check(self) -> None:
        """Ends the load; the image is what the guest was told."""
        self.load.stop()
        self.front.flush()
        assert self.path.read_bytes() == self.load.image()

    def die(self) -> None:
        """As a VMM that is killed."""
        self.vm._come_back = False
        self.vm._link.close()

    def close(self) -> None:
        self.front.disconnect()
        self.store.close()
        self.domain.close()
        self.vm.close()
        if self._fd >= 0:
            os.close(self._fd)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[KeptDaemon]:
    with KeptDaemon(tmp_path) as made:
        yield made


@pytest.mark.parametrize("passed", [False, True], ids=["attached", "passed"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_s_disk_goes_on(daemon: KeptDaemon, number: signal.Signals, passed: bool) -> None:
    guest = Guest(daemon, 7, passed=passed)
    guest.load.start()
    rng = random.Random(number)
    for _ in range(scaled(40, least=2)):
        guest.run()
        time.sleep(rng.random() / 50)
        daemon.restart(number)
    guest.run()
    guest.check()
    (device,) = daemon.ctl("info", "7")["devices"]
    assert (device["state"], device["vdev"]) == (4, "xvda")
    guest.close()
    until(lambda: daemon.ctl("list") == [], "the domain is still there")


def test_a_crash_loop_under_several_guests(daemon: KeptDaemon) -> None:
    """Killed at any moment: also while it starts, while guests resume, while a disk is replayed."""
    guests = [Guest(daemon, domid, passed=domid % 2 == 0, queues=domid) for domid in range(1, 4)]
    for guest in guests:
        guest.load.start()
    rng = random.Random(1)
    for count in range(scaled(120, least=6)):
        daemon.kill(rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        time.sleep(rng.random() * 0.6)
        if count % 4 == 3:
            guests[count % 3].run(1)
    for guest in guests:
        guest.run()
    for guest in guests:
        guest.check()
    assert len(daemon.ctl("list")) == 3
    for guest in guests:
        guest.close()
    until(lambda: daemon.ctl("list") == [], "the domains are still there")


def test_what_was_changed_meanwhile_is_kept(daemon: KeptDaemon) -> None:
    """Disks come and go between restarts, one is made longer; watches and permissions are as they were."""
    guest = Guest(daemon, 7)
    other = daemon.folder / "other.img"
    other.write_bytes(bytes(1 << 20))
    daemon.restart()
    daemon.ctl("block-attach", "7", f"{other},raw,xvdb,r")
    daemon.restart()
    assert [each["vdev"] for each in daemon.ctl("info", "7")["devices"]] == ["xvda", "xvdb"]
    daemon.ctl("block-resize", "7", "xvda", str(2 * BLOCKS * BLOCK))
    second = Blkfront(guest.domain, guest.store, 51728)
    second.connect()
    assert second.readonly
    daemon.restart()
    until(lambda: daemon.ctl("list") != [])
    second.read(0, 8)
    guest.front.read_features()
    assert guest.front.sectors == 2 * BLOCKS * BLOCK // 512
    guest.front.write(2 * BLOCKS * 8 - 8, b"e" * 4096)
    second.disconnect()
    daemon.ctl("block-detach", "7", "xvdb")
    # its image is another's at once, although somebody holds a copy of what had it locked
    daemon.ctl("block-attach", "7", f"{other},raw,xvdc,w")
    daemon.restart()
    until(lambda: daemon.ctl("list") != [])
    assert [each["vdev"] for each in daemon.ctl("info", "7")["devices"]] == ["xvda", "xvdc"]
    assert guest.store.get_perms("device/vbd/51712")[0] == "n7"
    assert guest.store.read("console/tty") == daemon.ctl("info", "7")["consoles"][0]["tty"]
    guest.close()


async def releases(daemon: KeptDaemon) -> int:
    """How often @releaseDomain fires until domain 7 is gone, and a while longer."""
    store = await xenstore.Client.connect(str(daemon.folder / "xenstored.sock"))
    count = -1  # each watch fires once at its start
    async with store.watch("@releaseDomain") as watch:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30):
                while await store.exists("/local/domain/7") or count < 1:
                    await anext(watch)
                    count += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(watch)
                count += 1
    await store.close()
    return count


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_nothing_is_replayed_before_an_old_write_has_ended(tmp_path: Path, engine: str) -> None:
    """A storage that hangs while the daemon is killed: its disk waits, its neighbour does not, the newer data stays."""
    with (
        KeptDaemon(tmp_path, f"[vbd]\nengine = '{engine}'\n") as daemon,
        FaultyFs(daemon.folder / "slow", 1 << 20) as slow,
    ):
        vm = SoftVmm(daemon.vmm_socket, 7, memory=16 * MiB, come_back=True)
        domain = Domain(vm)
        store = XenStore(domain)
        other = daemon.folder / "other.img"
        other.write_bytes(bytes(1 << 20))
        daemon.ctl("block-attach", "7", f"format=raw,vdev=xvda,access=rw,cache=none,target={slow.image}")
        daemon.ctl("block-attach", "7", f"{other},raw,xvdb,w")
        front, beside = Blkfront(domain, store, DEVID), Blkfront(domain, store, 51728)
        front.connect()
        beside.connect()
        slow.held.add(WRITE)
        front.submit_write(8, b"o" * 4096)
        front.push()
        until(lambda: slow.waiting, "the write was not begun")
        # answered first: its answer lies where the write's request was, which only the journal knows now
        assert front.read(64, 8) == bytes(4096)
        daemon.restart()
        # it is not served, the old write may come at any time; its neighbour is, unless a thread keeps the old worker
        if engine == "io_uring":
            beside.write(0, b"b" * 4096)
        time.sleep(0.3)
        assert slow.waiting == 1
        assert "vbd 51712: attached again" not in daemon.text()
        assert front.in_flight == 1
        slow.release()
        (done,) = front.complete()  # once
        assert done.status == 0
        front.write(8, b"n" * 4096)
        time.sleep(0.1)
        assert slow.data[4096:8192] == b"n" * 4096
        front.disconnect()
        beside.disconnect()
        daemon.ctl("block-detach", "7", "xvda")
        store.close()
        domain.close()
        vm.close()


def test_a_vmm_that_died_meanwhile_is_released_with_all_it_had(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path, "[limits]\nresume_s = 1\n") as daemon:
        before = daemon.held()
        guest, stays = Guest(daemon, 7), Guest(daemon, 8)
        while_both = daemon.held()
        assert len(while_both) == len(before) + 6
        daemon.kill(signal.SIGSTOP)  # so that it does not see the VMM go
        guest.die()
        daemon.restart()
        assert asyncio.run(releases(daemon)) == 1
        assert "domain 7: its VMM has not come back: released" in daemon.text()
        until(lambda: len(daemon.held()) == len(before) + 3, "not all was let go")
        # nobody has its image locked any more
        daemon.ctl("block-attach", "8", f"{guest.path},raw,xvdb,w")
        stays.load.start()
        stays.run()
        stays.check()
        stays.close()
        until(lambda: daemon.held() == before, "not all was let go")


def test_another_guest_of_the_number_inherits_nothing(daemon: KeptDaemon) -> None:
    guest = Guest(daemon, 7)
    daemon.kill(signal.SIGSTOP)  # so that it does not see the VMM go
    guest.die()
    daemon.restart()
    with SoftVmm(daemon.vmm_socket, 7, memory=16 * MiB, name="second"):
        assert daemon.ctl("info", "7")["devices"] == []
        daemon.ctl("block-attach", "7", f"{guest.path},raw,xvda,w")


@pytest.mark.parametrize("how", ["damaged", "version", "empty"])
def test_a_state_that_cannot_be_read_costs_one_domain(daemon: KeptDaemon, how: str) -> None:
    bad, good = Guest(daemon, 7), Guest(daemon, 8)
    good.load.start()
    fd = daemon.state_of(7)
    daemon.kill(signal.SIGSTOP)
    active = int.from_bytes(os.pread(fd, 4, 64), "little")
    if how == "damaged":
        os.pwrite(fd, b"#", 4096 + (active - 1) * (4 << 20) + 5)
    elif how == "version":
        os.pwrite(fd, (99).to_bytes(4, "little"), 64 + 64 * active)
    else:
        os.pwrite(fd, bytes(4), 64)
    os.close(fd)
    daemon.restart()
    good.run()
    good.check()
    text = {"damaged": "the checksum is wrong", "version": "version 99, and this evtchnd reads", "empty": "is empty"}
    until(lambda: daemon.text().count(text[how]) >= 2)  # at the start, and when its VMM asks
    assert "RESUME refused: domain 7: cannot be resumed: its state" in daemon.text()
    assert [each["domid"] for each in daemon.ctl("list")] == [8]
    # the guest of that number is started anew
    bad.die()
    with SoftVmm(daemon.vmm_socket, 7, memory=16 * MiB):
        daemon.ctl("block-attach", "7", f"{bad.path},raw,xvda,w")
    good.close()


@pytest.mark.parametrize("who", ["another guest", "another user"])
def test_only_the_same_guest_is_resumed(daemon: KeptDaemon, who: str) -> None:
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    guest = Guest(daemon, 7)
    daemon.kill(signal.SIGSTOP)
    guest.die()
    daemon.restart()
    daemon.vmm_socket.chmod(0o666)
    daemon.folder.chmod(0o755)
    fd = daemon.state_of(7)
    if who == "another user":
        state = State(fd)
        said = state.read()
        said.uid = 4242
        state.write(said)
        state.close()
        daemon.restart()
    os.close(fd)
    uid = 4243 if who == "another user" else 0
    program = f"""
import os
from evtchnd.vmm.client import Client
os.chdir({str(daemon.folder)!r})
os.setuid({uid})
Client("vmm.sock", on_bind=lambda _: [], on_unbind=print).resume(7, uuid=bytes([{1 - bool(uid)}]) * 16)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (
        "cannot be resumed: " + ("its VMM was user 4242's" if uid else "the guest of that number was 0000")
        in done.stderr
    )


def version_of(fd: int, version: int) -> None:
    """Says that both areas of a state were written by that version."""
    for at in (128, 192):
        os.pwrite(fd, version.to_bytes(4, "little"), at)


def test_an_upgrade_is_a_pause_and_a_refusal_is_none(daemon: KeptDaemon) -> None:
    """The program that is asked to take over reads all that is kept, or says why not, and then nothing has happened."""
    guest = Guest(daemon, 7)
    guest.load.start()
    for _ in range(2):
        guest.run()
        served, pid = daemon.served(), daemon.pid
        assert daemon.ctl("upgrade") == {"version": operator.version()}
        daemon.wait(served + 1)
        assert daemon.pid != pid
    guest.run()
    fd, pid = daemon.state_of(7), daemon.pid
    version_of(fd, VERSION + 1)
    with pytest.raises(HostError, match=rf"domain 7: its state has version {VERSION + 1}, .*: this one does"):
        daemon.ctl("upgrade")
    version_of(fd, VERSION)
    guest.run()
    assert daemon.pid == pid
    guest.check()
    os.close(fd)
    guest.close()


def test_a_program_that_can_read_nothing_does_not_start_and_nothing_is_lost(daemon: KeptDaemon) -> None:
    guest = Guest(daemon, 7)
    guest.load.start()
    guest.run()
    fd = daemon.state_of(7)
    daemon.kill(signal.SIGSTOP)
    version_of(fd, VERSION + 1)
    daemon.kill()
    until(lambda: "no domain's state can be read: start the version that wrote it" in daemon.text())
    assert daemon.served() == 1
    version_of(fd, VERSION)  # the right version is installed again
    os.close(fd)
    daemon.wait(2)
    guest.run()
    guest.check()
    guest.close()


def test_nobody_takes_over_where_nothing_is_kept(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as alone, pytest.raises(RuntimeError, match="nobody keeps"):
        alone.call("held")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_s_network_goes_on(daemon: KeptDaemon, number: signal.Signals) -> None:
    """Same TAP, same rings: the guest makes no new handshake, and packets go both ways after each restart."""
    if os.geteuid():
        pytest.skip("needs root")
    with bridged() as (here, far):
        vm = SoftVmm(daemon.vmm_socket, 7, memory=32 * MiB, come_back=True)
        domain = Domain(vm)
        store = XenStore(domain)
        before = daemon.held()
        daemon.ctl("network-attach", "7", "bridge=br0", f"netns={here.name}", "rate=100MB/s")
        card = Netfront(domain, store, queues=2)
        card.connect()
        with answering(card):
            far.ping(GUEST, 5)
            link = here.link("vif7.0").split(":")[0]
            daemon.ctl("network-set", "7", "0", "--rate", "unlimited")
            for count in range(scaled(40, least=2)):
                daemon.restart(number)
                until(lambda count=count: daemon.text().count("vif 0: attached again") > count)  # type: ignore[misc]
                far.ping(GUEST, 10)
            assert here.link("vif7.0").split(":")[0] == link  # its number: the same TAP
            (vif,) = daemon.ctl("network-list", "7")
            assert (vif["state"], vif["link"], vif["tap"], vif["rate_usec"]) == (4, "up", "made here", 0)
            # as ever: deleted by somebody, made again here, and kept as well
            here.ip("link del vif7.0")
            until(lambda: here.link("vif7.0") != "")
            until(lambda: daemon.ctl("network-list", "7")[0]["link"] == "up")
            daemon.restart(number)
            far.ping(GUEST, 10)
        card.disconnect()
        daemon.ctl("network-detach", "7", "0")
        assert here.link("vif7.0") == ""
        until(lambda: daemon.held() == before, "not all was let go")
        store.close()
        domain.close()
        vm.close()


def test_a_tap_that_a_vmm_passes_is_passed_again(daemon: KeptDaemon) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    with namespace() as there, queues(there, "tap0", 2) as fds:
        there.netns.up("tap0", f"{HOST}/24")
        vm = SoftVmm(daemon.vmm_socket, 7, memory=32 * MiB, come_back=True)
        domain = Domain(vm)
        store = XenStore(domain)
        vm.vif(3, BYTES, fds)
        card = Netfront(domain, store, 3, queues=2)
        card.connect()
        with answering(card):
            there.ping(GUEST, 5)
            for count in (1, 2):
                daemon.restart()
                until(lambda count=count: daemon.text().count("vif 3: attached again") == count)  # type: ignore[misc]
                there.ping(GUEST, 5)
            # one that does not come again has ended
            vm._vifs.clear()
            daemon.restart()
            until(lambda: "vif 3: its VMM has not passed it again: removed" in daemon.text())
            until(lambda: daemon.ctl("list") != [])
            assert daemon.ctl("network-list", "7") == []
        store.close()
        domain.close()
        vm._come_back = False
        vm._link.close()


def test_a_vmm_that_goes_between_resume_and_start_may_come_again(daemon: KeptDaemon) -> None:
    before = daemon.held()
    guest = Guest(daemon, 7)
    guest.load.start()
    guest.run()
    for way in ("close", "release"):
        daemon.kill(signal.SIGSTOP)
        guest.die()
        daemon.restart()
        client = Client(daemon.vmm_socket, on_bind=lambda _: [], on_unbind=lambda _: None)
        client.resume(7, name="guest7")
        if way == "release":  # its guest has ended: nothing of it is waited for any more
            client.release()
            client.close()
            until(lambda: daemon.held() == before, "not all was let go")
            break
        client.close()
        until(lambda: "connection ended" in daemon.text() or "its VMM has gone" in daemon.text())
        guest.vm._come_back = True
        guest.vm.resume()
        guest.run()
