"""The control plane towards VMMs and operators: configured and passed disks, refusals, limits, deadlines, RESUME."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd import transport
from evtchnd.abi import PAGE_SIZE, XenbusState
from evtchnd.vmm.client import Client, GrantFrame, MemorySlot, Refused
from evtchnd.vmm.soft import SoftVmm
from test_control_daemon import Guest, image

MiB = 1 << 20


def test_disks_of_the_config(tmp_path: Path) -> None:
    path = image(tmp_path)
    disks = [f"{path},raw,xvda,r", f"{tmp_path}/missing.img,raw,xvdb,w"]
    with DaemonProcess(tmp_path, domains=[{"domid": 7, "disks": disks}]) as daemon, Guest(daemon) as guest:
        assert [each["vdev"] for each in daemon.call("info", 7)["devices"]] == ["xvda"]
        assert "domain 7: xvdb: not attached: " in daemon.text()
        front = guest.connect(51712)
        assert front.readonly
        assert front.read(8, 8) == path.read_bytes()[4096:8192]
        front.disconnect()


def test_a_vmm_passes_a_disk(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        before = daemon.descriptors()
        readonly = os.open(path, os.O_RDONLY)
        with pytest.raises(Refused, match="not open for reading and writing"):
            guest.vm.client.disk(51712, "xvda", readonly)
        read, write = os.pipe()
        with pytest.raises(Refused, match="neither a file nor a block device"):
            guest.vm.client.disk(51712, "xvda", write)
        transport.close_all([read, write])
        assert daemon.descriptors() == before
        guest.vm.client.disk(51712, "xvda", readonly, readonly=True)
        os.close(readonly)
        front = guest.connect(51712)
        assert front.read(0, 8) == path.read_bytes()[:4096]
        front.disconnect()
        guest.vm.client.disk_remove(51712)
        with pytest.raises(Refused, match="no disk 51712"):
            guest.vm.client.disk_remove(51712)
        assert daemon.descriptors() == before


def test_a_guest_that_holds_on_to_its_disk(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path, limits={"detach_s": 0.3}) as daemon, Guest(daemon) as guest:
        before = daemon.descriptors()
        devid = daemon.attach(7, path)
        front = guest.connect(devid)
        with pytest.raises(RuntimeError, match=r"domain 7: vbd 51712: the guest did not let it go in 0\.3 s"):
            daemon.call("detach_block", 7, "xvda")
        assert front.read(0, 8) == path.read_bytes()[:4096]  # and is served on
        front.disconnect()
        until(lambda: not daemon.call("info", 7)["devices"], "the disk is still there")
        front = guest.connect(daemon.attach(7, path))
        assert daemon.call("detach_block", 7, str(devid), force=True)["forced"] is True
        front.release()
        until(lambda: daemon.descriptors() == before, "descriptors are left")


def test_a_worker_that_dies_in_a_handshake(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path, limits={"restart_pause_s": 0.1}) as daemon, Guest(daemon) as guest:
        devid = daemon.attach(7, path)
        for _ in range(3):
            worker = daemon.worker(7)
            os.kill(worker, signal.SIGKILL)
            until(lambda: daemon.worker(7) not in (0, worker), "no other worker")  # noqa: B023
        front = guest.connect(devid)
        assert front.read(0, 8) == path.read_bytes()[:4096]
        front.disconnect()


def test_vmm_a_domid_is_one_vmm_s(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, Guest(daemon):
        before = daemon.descriptors()
        with pytest.raises(Refused, match=f"domain 7: registered already, by pid {os.getpid()}"):
            SoftVmm(daemon.vmm_socket, 7, memory=MiB)
        until(lambda: daemon.descriptors() == before, "descriptors are left")


def test_too_few_descriptors(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (150, 150))
        with pytest.raises(Refused, match=r"domain 7: 30 descriptors more are too many: .* of 150 are in use"):
            SoftVmm(daemon.vmm_socket, 7, memory=MiB)
        assert daemon.call("list") == []


def test_vmm_connections_that_say_nothing(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, limits={"hello_s": 0.5, "pending_connections": 2}) as daemon:
        before = daemon.descriptors()
        silent = [transport.connect(daemon.vmm_socket) for _ in range(2)]
        until(lambda: daemon.descriptors() == before + 2, "not accepted")
        with transport.connect(daemon.vmm_socket) as third:
            third.settimeout(20)
            assert third.recv(1) == b""
        for sock in silent:
            sock.settimeout(20)
            assert sock.recv(1) == b""
            sock.close()
        until(lambda: daemon.descriptors() == before, "descriptors are left")
        until(lambda: daemon.text().count("no REGISTER within 0.5 s") == 2, "no line says why")
        assert "2 connections have not registered yet" in daemon.text()


def test_vmm_that_does_not_answer(tmp_path: Path) -> None:
    stuck = threading.Event()

    def on_bind(ports: list[tuple[int, int]]) -> list[int]:
        stuck.wait(20)
        raise OSError("too late")

    ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(ram, 16 * PAGE_SIZE)
    with DaemonProcess(tmp_path, limits={"request_s": 0.3}) as daemon:
        before = daemon.descriptors()
        client = Client(daemon.vmm_socket, on_bind=on_bind, on_unbind=lambda _: None)
        # a reader of its own: this thread may wait for START while the other one is stuck
        client.register(7, name="stuck")
        client.memory([MemorySlot(0, 0, 16, ram)])
        client.grant_frames([GrantFrame(0, ram, 0)])
        client.xenstore(1, ram, PAGE_SIZE)

        def begin() -> None:
            with pytest.raises(Refused, match="has not answered"):
                client.start()

        start = threading.Thread(target=begin)
        start.start()
        until(lambda: "has not answered BIND_PORTS in 0.3 s" in daemon.text(), "no deadline")
        stuck.set()
        start.join(20)
        assert [each["state"] for each in daemon.call("list")] == ["registered"]
        client.close()
        until(lambda: daemon.call("list") == [], "the domain is still there")
        assert daemon.descriptors() == before
    os.close(ram)


def test_memory_that_changes_while_the_guest_runs(tmp_path: Path) -> None:
    path = image(tmp_path)
    with DaemonProcess(tmp_path) as daemon, Guest(daemon) as guest:
        front = guest.connect(daemon.attach(7, path))
        client = guest.vm.client
        before = daemon.descriptors()
        extra = os.memfd_create("extra", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(extra, 4 * PAGE_SIZE)
        gfn = 0x107FFF
        client.slot_add(MemorySlot(9, gfn, 4, extra))
        with pytest.raises(Refused, match=r"overlap"):
            client.slot_add(MemorySlot(10, gfn + 3, 1, extra))
        assert daemon.call("info", 7)["slots"] == 3
        os.kill(daemon.worker(7), signal.SIGKILL)  # the next one has it, too
        until(lambda: daemon.call("info", 7)["worker"]["restarts"] == 1, "no other worker")
        client.slot_remove(9)
        with pytest.raises(Refused, match="memory slot 9 is not there"):
            client.slot_remove(9)
        os.close(extra)
        assert front.read(0, 8) == path.read_bytes()[:4096]
        assert daemon.descriptors() == before
        front.disconnect()


def test_a_domain_goes_to_a_restarted_daemon(tmp_path: Path) -> None:
    path = image(tmp_path)
    first = DaemonProcess(tmp_path)
    guest = Guest(first)
    first.process.kill()
    first.process.wait()
    for pipe in (first.process.stdin, first.process.stdout):
        assert pipe is not None
        pipe.close()
    with DaemonProcess(tmp_path) as second:
        before = second.descriptors()
        guest.vm.resume()
        assert "domain 7: soft7: resumed by" in second.text()
        assert second.call("info", 7)["state"] == "running"
        assert second.call("info", 7)["ports"] == 2  # store, console
        # its XenStore ring goes on where it was, on the same eventfds
        assert guest.store.read("name") == "soft7"
        front = guest.connect(second.attach(7, path))
        assert front.read(0, 8) == path.read_bytes()[:4096]
        front.disconnect()
        assert guest.store.read(f"{front.bus.backend_path}/state") == str(int(XenbusState.CLOSED))
        guest.undo.close()
        until(lambda: second.call("list") == [], "the domain is still there")
        assert second.descriptors() == before
