"""VMMs of different users (SO_PEERCRED) on one daemon: none of them gets another's domain, its number or its disks."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemonprocess import DaemonProcess, until
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.client import Client, Refused
from evtchnd.vmm.soft import SoftVmm
from keptdaemon import KeptDaemon
from test_control_daemon import image
from test_xenstore_restart import Daemon as Restarted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes are root's to make")

ALICE, BOB = 61001, 61002
MIB = 1 << 20


def enter(uid: int, folder: Path) -> None:
    """This process is that user's, for good, and stands in `folder`: those above it may be root's alone."""
    os.chdir(folder)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def open_to_all(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "vmm.sock").chmod(0o666)


def connect_as(uid: int, folder: Path) -> socket.socket:
    """A connection to vmm.sock, made by a process of that user and handed over: its credentials stay that user's."""
    open_to_all(folder)
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            enter(uid, folder)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect("vmm.sock")
            socket.send_fds(theirs, [b"x"], [sock.fileno()])
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    assert os.waitpid(pid, 0)[1] == 0
    return socket.socket(fileno=fds[0])


def register(uid: int, folder: Path, domid: int = 7, *, resume: bool = False) -> Client:
    """A VMM of that user that has the domain."""
    client = Client(connect_as(uid, folder), on_bind=lambda *_: {}, on_unbind=lambda *_: None)
    try:
        (client.resume if resume else client.register)(domid, name=f"of {uid}")
    except BaseException:
        client.close()
        raise
    return client


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as it:
        yield it


def test_a_number_that_is_taken(daemon: DaemonProcess, tmp_path: Path) -> None:
    with register(ALICE, tmp_path):
        for resume in (False, True):
            with pytest.raises(Refused, match=rf"domain 7: registered already, by pid \d+ \(uid {ALICE}\)"):
                register(BOB, tmp_path, resume=resume)
        with register(BOB, tmp_path, 8):
            assert [each["domid"] for each in daemon.call("list")] == [7, 8]
        until(lambda: len(daemon.call("list")) == 1, "bob's is still there")
        assert daemon.call("list")[0]["name"] == f"of {ALICE}"


def test_a_vmm_speaks_of_its_own_domain_alone(daemon: DaemonProcess, tmp_path: Path) -> None:
    """No message but REGISTER and RESUME has a domid: what a VMM asks for is its own domain's."""
    with register(ALICE, tmp_path), register(BOB, tmp_path, 8) as bob:
        path = image(tmp_path)
        fd = os.open(path, os.O_RDWR)
        bob.disk(51712, "xvda", fd)
        os.close(fd)
        assert [len(daemon.call("info", domid)["devices"]) for domid in (7, 8)] == [0, 1]
        bob.release()
        assert [each["domid"] for each in daemon.call("list")] == [7]


def test_a_number_of_the_config_is_its_user_s(tmp_path: Path) -> None:
    path = image(tmp_path)
    domains = [{"domid": 7, "uid": ALICE, "disks": [f"{path},raw,xvda,w"]}]
    with DaemonProcess(tmp_path, domains=domains) as daemon:
        with pytest.raises(Refused, match=rf"is uid {ALICE}'s \(domains\[\]\.uid\), not pid \d+ \(uid {BOB}\)'s") as no:
            register(BOB, tmp_path)
        assert no.value.errno == errno.EPERM
        assert daemon.call("list") == []
        with register(ALICE, tmp_path):
            assert [each["domid"] for each in daemon.call("list")] == [7]
        until(lambda: daemon.call("list") == [], "alice's is still there")
        with register(0, tmp_path):  # root may anyway
            pass


@contextmanager
def a_guest_of(owner: int, folder: Path) -> Iterator[Callable[[], bytes]]:
    """Domain 7, whose VMM is a process of that user. Called after the daemon has ended it resumes; -> its node."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            enter(owner, folder)
            with SoftVmm("vmm.sock", 7, memory=32 * MIB) as vm:
                domain = Domain(vm)
                store = XenStore(domain)
                store.write("data/mine", "secret")
                theirs.send(b"written")
                theirs.recv(1)
                vm.resume()
                theirs.send(store.read("data/mine").encode())
                theirs.recv(1)
                store.close()
                domain.close()
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    ours.settimeout(30)

    def resumed() -> bytes:
        ours.send(b"x")
        return ours.recv(100)

    try:
        assert ours.recv(100) == b"written"
        yield resumed
        ours.send(b"x")
        assert os.waitpid(pid, 0)[1] == 0
        pid = 0
    finally:
        ours.close()
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("owner", [ALICE, 0])
def test_a_domain_is_resumed_by_its_own_user(tmp_path: Path, owner: int) -> None:
    """After a daemon was killed, what waits for its VMM waits for that user's: its nodes, its number, its guest."""
    daemon = Restarted(tmp_path)
    daemon.start()
    open_to_all(tmp_path)
    try:
        with a_guest_of(owner, tmp_path) as resumed:
            daemon.end(signal.SIGKILL)
            daemon.start()
            for resume in (False, True):
                with pytest.raises(Refused, match=rf"domain 7: is uid {owner}'s \(it is kept for its VMM\)") as no:
                    register(BOB, tmp_path, resume=resume)
                assert no.value.errno == errno.EPERM
            open_to_all(tmp_path)
            assert resumed() == b"secret"
        # it has ended: its number is anybody's
        register(BOB, tmp_path).close()
    finally:
        daemon.end(signal.SIGTERM)
        os.close(daemon.state)
    assert "Traceback" not in daemon.text()


@pytest.mark.parametrize("owner", [ALICE, 0])
def test_what_is_kept_of_a_domain_waits_for_its_own_user(tmp_path: Path, owner: int) -> None:
    """The same where descriptors are kept, too: another user's new domain of that number does not end it."""
    with KeptDaemon(tmp_path) as daemon:
        open_to_all(tmp_path)
        with a_guest_of(owner, tmp_path) as resumed:
            daemon.restart()
            for resume in (False, True):
                with pytest.raises(Refused) as no:
                    register(BOB, tmp_path, resume=resume)
                assert no.value.errno == errno.EPERM
            open_to_all(tmp_path)
            assert resumed() == b"secret"
        register(BOB, tmp_path).close()
