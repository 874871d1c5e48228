"""The control plane between two steps: who goes in the middle of what, and what is left of it."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.abi import PAGE_SIZE
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import GuestFault
from evtchnd.vmm.client import Client, GrantFrame, MemorySlot, Refused
from test_control_daemon import Guest, image


def no_ports(_: Sequence[tuple[int, int]]) -> list[int]:
    raise OSError("no ports here")


def registered(daemon: DaemonProcess, ram: int, on_bind: Callable[[list[tuple[int, int]]], Sequence[int]]) -> Client:
    """A domain of 16 pages, ready for START but for its XenStore page."""
    client = Client(daemon.vmm_socket, on_bind=on_bind, on_unbind=lambda _: None)
    client.register(7)
    client.memory([MemorySlot(0, 0, 16, ram)])
    client.grant_frames([GrantFrame(0, ram, 0)])
    return client


@pytest.fixture
def ram() -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE_SIZE)
    return fd


@pytest.mark.parametrize("served", [False, True], ids=["registered", "served"])
def test_a_vmm_that_does_not_wait_for_its_release(tmp_path: Path, ram: int, served: bool) -> None:
    with DaemonProcess(tmp_path) as daemon:
        before = daemon.descriptors()
        for _ in range(3):
            client = registered(daemon, ram, no_ports)
            if served:
                client.start()
            # both lie in the socket when the daemon looks
            os.kill(daemon.process.pid, signal.SIGSTOP)
            client._sock.setblocking(True)
            transport.send(client._sock, p.pack(p.Release(0), id=1 << 20))
            client.close()
            os.kill(daemon.process.pid, signal.SIGCONT)
            until(lambda: daemon.call("list") == [], "the domain is still there")
            assert daemon.descriptors() == before
        assert daemon.text().count("domain 7: released by its VMM (reason 0)") == 3
    os.close(ram)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_notify_descriptor_that_is_no_eventfd(tmp_path: Path, ram: int, kind: str) -> None:
    """The control plane writes to the XenStore port's itself: a file on a share that hangs would stop every domain."""
    with DaemonProcess(tmp_path) as daemon:
        before = daemon.descriptors()
        read, write = os.pipe()
        wrong = write if kind == "pipe" else os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        client = registered(daemon, ram, lambda ports: [os.dup(wrong) for _ in ports])
        client.xenstore(1, ram, PAGE_SIZE)
        with pytest.raises(Refused, match=r"xenstore: port 1: notify: descriptor \d+ is no eventfd"):
            client.start()
        client.close()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        assert daemon.descriptors() == before
        transport.close_all({read, write, wrong})
    os.close(ram)


def test_vmms_that_cannot_be_accepted_do_not_turn_the_loop(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        pid = daemon.process.pid
        whole = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (daemon.descriptors(), whole[1]))
        with transport.connect(daemon.vmm_socket) as sock:
            until(lambda: "a VMM cannot connect: Too many open files" in daemon.text(), "no line")
            for _ in range(50):  # each call is a turn of the loop at least
                assert daemon.call("list") == []
            assert daemon.text().count("a VMM cannot connect") <= 5
            resource.prlimit(pid, resource.RLIMIT_NOFILE, whole)
            sock.settimeout(20)
            transport.send(sock, p.pack(p.Hello(), id=1))
            assert transport.recv(sock) is not None


class SlowPorts:
    """The guest's VMM thinks about each BIND_PORTS until told."""

    def __init__(self, guest: Guest) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()
        client = guest.vm.client
        bind = client._on_bind

        def slowly(ports: list[tuple[int, int]]) -> Sequence[int]:
            self.asked.set()
            self.go.wait(20)
            return bind(ports)  # type: ignore[no-any-return]

        client._on_bind = slowly


def test_a_worker_that_dies_while_its_port_is_bound(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        devid = daemon.attach(7, path)
        slow = SlowPorts(guest)
        read: list[bytes] = []

        def connect() -> None:
            front = guest.connect(devid)
            read.append(front.read(0, 8))
            front.disconnect()

        user = threading.Thread(target=connect)
        user.start()
        assert slow.asked.wait(20)
        worker = daemon.worker(7)
        os.kill(worker, signal.SIGKILL)
        until(lambda: daemon.worker(7) not in (0, worker), "no other worker")
        time.sleep(0.5)  # nothing shows when the next one has come as far as its own question
        slow.go.set()
        user.join(40)
        assert read == [path.read_bytes()[:4096]]
        assert "stopped" not in daemon.text()


def test_a_disk_that_goes_while_its_port_is_bound(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        before = daemon.descriptors(), daemon.call("info", 7)["ports"]
        devid = daemon.attach(7, path)
        slow = SlowPorts(guest)
        front = Blkfront(guest.domain, guest.store, devid, timeout=2.0)

        def connect() -> None:
            with pytest.raises((GuestFault, OSError)):
                front.connect()

        user = threading.Thread(target=connect)
        user.start()
        assert slow.asked.wait(20)
        daemon.call("detach_block", 7, "xvda", force=True)
        slow.go.set()
        user.join(40)
        front.release()
        until(lambda: (daemon.descriptors(), daemon.call("info", 7)["ports"]) == before, "something is left")


def test_many_disks_begin_at_once(tmp_path: Path) -> None:
    """A worker announces all of them side by side, at its start and after its death."""
    disks = [f"{image(tmp_path, f'{n}.img', 1 << 20)},raw,xvd{chr(97 + n)},w" for n in range(24)]
    with DaemonProcess(tmp_path, domains=[{"domid": 7, "disks": disks}], xenstore={"watches": 8}) as daemon:
        with Guest(daemon) as guest:

            def all_announced() -> bool:
                return all(each["state"] == 2 for each in daemon.call("info", 7)["devices"])

            until(all_announced, "a disk is not announced")
            os.kill(daemon.worker(7), signal.SIGKILL)
            until(lambda: daemon.call("info", 7)["worker"]["restarts"] == 1, "no other worker")
            for each in daemon.call("info", 7)["devices"]:
                guest.connect(each["devid"]).disconnect()
        assert "quota" not in daemon.text()
        assert "off:" not in daemon.text()
