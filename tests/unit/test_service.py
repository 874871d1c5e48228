"""The service under a real systemd, in namespaces of its own: ready, watchdog, stop, restart, descriptor store."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scale import scaled
from unit.private import PrivateSystemd, why_not
from unit.render import SOURCE

pytestmark = [pytest.mark.unit, pytest.mark.timeout(300)]

SERVICE = "evtchnd.service"
SOCKETS = ["evtchnd-vmm.socket", "evtchnd-xenstored.socket", "evtchnd-control.socket"]
FILES = ["/run/evtchnd/control.sock", "/run/evtchnd/vmm.sock", "/run/evtchnd/xenstored.sock"]
CTL = [sys.executable, "-m", "evtchnd.cli.evtchnctl"]
REASON = why_not()
# what tests may have changed
RESTORE = """
rm -rf /etc/evtchnd /run/evtchnd/* /run/units/evtchnd.service.d/test.conf
cd /run/units
[ ! -d off ] || { mv off/* . && rmdir off && mv evtchnd.service.on evtchnd.service; }
"""


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSystemd]:
    if REASON:
        pytest.skip(REASON)
    with PrivateSystemd(tmp_path_factory.mktemp("evtchnd-unit")) as booted:
        booted.run("systemctl", "start", "systemd-journald.socket")
        yield booted


@pytest.fixture(autouse=True)
def fresh(systemd: PrivateSystemd) -> Iterator[None]:
    """Every test starts with the sockets listening and the service stopped."""
    systemd.run("systemctl", "start", *SOCKETS)
    yield
    systemd.run("systemctl", "stop", *SOCKETS, SERVICE, check=False)
    systemd.run("bash", "-c", RESTORE)
    systemd.run("systemctl", "daemon-reload")
    systemd.run("systemctl", "reset-failed")


def dropin(systemd: PrivateSystemd, text: str) -> None:
    script = f"open('/run/units/evtchnd.service.d/test.conf', 'w').write({text!r})"
    systemd.python(script)
    systemd.run("systemctl", "daemon-reload")


def main_pid(systemd: PrivateSystemd) -> int:
    return int(systemd.show(SERVICE, "MainPID"))


def listing(systemd: PrivateSystemd) -> object:
    """`evtchnctl list`: the service answers."""
    return json.loads(systemd.run(*CTL, "list", "-o", "json"))


def test_start_returns_when_the_daemon_serves(systemd: PrivateSystemd) -> None:
    systemd.run("systemctl", "start", SERVICE)
    assert systemd.show(SERVICE, "ActiveState") == "active"
    assert systemd.show(SERVICE, "StatusText") == "serving in /run/evtchnd"
    assert listing(systemd) == []
    store = ["env", "XENSTORED_PATH=/run/evtchnd/xenstored.sock"]
    systemd.run(*store, "xenstore-write", "/tool/unit", "here")
    assert systemd.run(*store, "xenstore-read", "/tool/unit") == "here\n"


def test_the_first_connection_starts_it(systemd: PrivateSystemd) -> None:
    assert systemd.show(SERVICE, "ActiveState") == "inactive"
    assert listing(systemd) == []
    assert systemd.show(SERVICE, "ActiveState") == "active"


def test_it_runs_without_privileges(systemd: PrivateSystemd) -> None:
    systemd.run("systemctl", "start", SERVICE)
    pids = systemd.run("cat", f"/sys/fs/cgroup/system.slice/{SERVICE}/cgroup.procs").split()
    assert len(pids) >= 2, "control plane and zygote"
    for pid in pids:
        status = dict(
            line.split(":\t", 1) for line in systemd.run("cat", f"/proc/{pid}/status").splitlines() if ":\t" in line
        )
        assert status["Uid"].split()[0] == systemd.run("id", "-u", "evtchnd").strip()
        for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[which], 16) == 0, which
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        limits = systemd.run("cat", f"/proc/{pid}/limits")
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def test_who_may_connect_where(systemd: PrivateSystemd) -> None:
    said = systemd.run("stat", "-c", "%n %a %U %G", *FILES)
    assert said.split("\n")[:-1] == [
        "/run/evtchnd/control.sock 660 root evtchnd-operator",
        "/run/evtchnd/vmm.sock 660 root evtchnd-vmm",
        "/run/evtchnd/xenstored.sock 660 root evtchnd-operator",
    ]


def test_stop_ends_all_of_it_in_order(systemd: PrivateSystemd) -> None:
    systemd.run("systemctl", "start", SERVICE)
    systemd.run("systemctl", "stop", SERVICE)
    assert systemd.show(SERVICE, "Result") == "success"
    assert systemd.show(SERVICE, "ExecMainStatus") == "0"
    assert systemd.show(SERVICE, "ActiveState") == "inactive"
    assert not systemd.run("bash", "-c", f"cat /sys/fs/cgroup/system.slice/{SERVICE}/cgroup.procs || true").split()
    # the sockets are systemd's: who connects now starts it again
    assert listing(systemd) == []


def test_the_watchdog_is_fed_and_bites(systemd: PrivateSystemd) -> None:
    dropin(systemd, "[Service]\nWatchdogSec=2\nTimeoutAbortSec=5\n")
    systemd.run("systemctl", "start", SERVICE)
    first = main_pid(systemd)
    seen = {systemd.show(SERVICE, "WatchdogTimestampMonotonic")}

    def fed() -> bool:
        seen.add(systemd.show(SERVICE, "WatchdogTimestampMonotonic"))
        return len(seen) >= 5  # twice the time after which it would have bitten

    systemd.wait_for(fed)
    assert (main_pid(systemd), systemd.show(SERVICE, "NRestarts")) == (first, "0")
    # a loop that stands still
    systemd.run("kill", "-STOP", str(first))
    systemd.wait_for(lambda: systemd.show(SERVICE, "NRestarts") == "1")
    systemd.wait_for(lambda: systemd.show(SERVICE, "ActiveState") == "active")
    assert main_pid(systemd) != first
    assert listing(systemd) == []
    said = systemd.run(
        "journalctl", "--no-pager", "-o", "cat", f"_SYSTEMD_UNIT={SERVICE}", f"UNIT={SERVICE}", check=False
    )
    assert "Traceback" not in said


def test_kill_9_is_followed_by_a_start_on_the_same_sockets(systemd: PrivateSystemd) -> None:
    systemd.run("systemctl", "start", SERVICE)
    before = main_pid(systemd)
    inodes = listening(systemd, before)
    assert len(inodes) == 3
    systemd.run("kill", "-KILL", str(before))
    assert listing(systemd) == []  # waits in the backlog, if it must
    systemd.wait_for(lambda: main_pid(systemd) not in (0, before))
    assert inodes <= held(systemd, main_pid(systemd))


def held(systemd: PrivateSystemd, pid: int) -> set[str]:
    """Inodes of all sockets of a process."""
    links = systemd.run("bash", "-c", f"readlink /proc/{pid}/fd/* || true")
    return set(re.findall(r"^socket:\[(\d+)\]$", links, re.MULTILINE))


def listening(systemd: PrivateSystemd, pid: int) -> set[str]:
    """Those that listen in /run/evtchnd. Each network namespace lists the sockets that were made in it."""
    lines = systemd.run("cat", "/proc/net/unix", f"/proc/{pid}/net/unix").splitlines()
    ours = {line.split()[6] for line in lines if "/run/evtchnd/" in line and line.split()[3] == "00010000"}
    return ours & held(systemd, pid)


@pytest.mark.parametrize("way", ["kill -9", "restart"])
def test_the_descriptor_store_keeps_sockets_that_no_unit_has(systemd: PrivateSystemd, way: str) -> None:
    """Without socket units the daemon makes its sockets, and gives them into systemd's keeping."""
    systemd.run("systemctl", "stop", *SOCKETS)
    # a drop-in cannot take Sockets= back
    systemd.run(
        "bash", "-c", "cd /run/units && mkdir off && mv evtchnd-*.socket off && sed -i.on /^Sockets=/d evtchnd.service"
    )
    dropin(systemd, "[Service]\nRestartSec=2s\n")
    systemd.run("systemctl", "start", SERVICE)
    assert systemd.show(SERVICE, "NFileDescriptorStore") == "4"
    before = main_pid(systemd)
    inodes = listening(systemd, before)
    assert len(inodes) == 3
    if way == "restart":
        systemd.run("systemctl", "restart", SERVICE)
    else:
        systemd.run("kill", "-KILL", str(before))
        systemd.wait_for(lambda: main_pid(systemd) == 0)
        # nobody is there for two seconds: who connects waits, and is answered
        assert listing(systemd) == []
    after = main_pid(systemd)
    assert after not in (0, before)
    assert inodes <= held(systemd, after)
    assert listing(systemd) == []
    # handed back and not stored twice
    assert systemd.show(SERVICE, "NFileDescriptorStore") == "4"
    systemd.run("systemctl", "stop", SERVICE)
    assert systemd.show(SERVICE, "NFileDescriptorStore") == "0"


@pytest.mark.parametrize("way", ["restart", "upgrade", "kill", "loop"])
def test_guests_disks_go_on(systemd: PrivateSystemd, way: str) -> None:
    """Three guests under load: nothing is lost, and nothing of them stays in the store at their end."""
    systemd.run("systemctl", "start", SERVICE)
    script = str(Path(__file__).parent / "restarted.py")
    rounds = scaled(60, least=4)
    said = json.loads(systemd.run(sys.executable, script, way, str(rounds)))
    print(said)
    assert said["images"] == [True] * 3
    assert said["kept"] == 3 * 3  # state, image and journal
    if way == "kill":
        assert said["restarts"] == rounds
    systemd.run("journalctl", "--sync")
    said = systemd.run("journalctl", "--no-pager", "-o", "cat")
    assert "Traceback" not in said
    assert "defect" not in said


def test_what_does_not_fit_into_the_store_is_refused(systemd: PrivateSystemd) -> None:
    dropin(systemd, "[Service]\nFileDescriptorStoreMax=7\n")
    systemd.python(
        "import os; os.makedirs('/etc/evtchnd');"
        "open('/etc/evtchnd/evtchnd.toml', 'w').write('[limits]\\nstored_descriptors = 7\\n')"
    )
    systemd.run("systemctl", "start", SERVICE)
    systemd.run("bash", "-c", "head -c 1M /dev/zero > /var/lib/evtchnd/a.img; chown evtchnd: /var/lib/evtchnd/a.img")
    # what units pass in is counted, too: three sockets, XenStore, a domain, and two of a disk
    said = systemd.python(
        "from evtchnd.cli.process import evtchnctl\n"
        "from evtchnd.errors import HostError, VmmError\n"
        "from evtchnd.vmm.soft import SoftVmm\n"
        "with SoftVmm('/run/evtchnd/vmm.sock', 7):\n"
        "    for vdev in 'xvda', 'xvdb':\n"
        "        try: evtchnctl('/run/evtchnd', 'block-attach', '7', f'/var/lib/evtchnd/a.img,raw,{vdev},r')\n"
        "        except HostError as error: print(error)\n"
        "    try: SoftVmm('/run/evtchnd/vmm.sock', 8)\n"
        "    except VmmError as error: print(error)\n"
    )
    more = "do not fit into the service manager's store: it holds 7 of 7 (FileDescriptorStoreMax=, "
    disk, domain = said.splitlines()
    assert f"domain 7: vbd 51728: 2 descriptors more {more}" in disk
    assert f"domain 8: 1 descriptors more {more}" in domain
    assert systemd.show(SERVICE, "NFileDescriptorStore") == "1"  # XenStore's: the domain and its disk are gone


def test_a_wrong_configuration_is_told_once(systemd: PrivateSystemd) -> None:
    systemd.python("import os; os.makedirs('/etc/evtchnd'); open('/etc/evtchnd/evtchnd.toml', 'w').write('foo = 1')")
    systemd.run("systemctl", "start", SERVICE, check=False)
    systemd.wait_for(lambda: systemd.show(SERVICE, "ActiveState") == "failed")
    assert systemd.show(SERVICE, "ExecMainStatus") == str(os.EX_CONFIG)
    assert systemd.show(SERVICE, "NRestarts") == "0"
    systemd.run("journalctl", "--sync")
    assert "/etc/evtchnd/evtchnd.toml:foo: no such key" in systemd.run("journalctl", "--no-pager", "-o", "cat")


def test_the_journal_has_the_lines_with_their_fields(systemd: PrivateSystemd) -> None:
    systemd.run("systemctl", "start", SERVICE)
    systemd.run("journalctl", "--sync")
    lines = systemd.run("journalctl", "--no-pager", "-o", "json", "SYSLOG_IDENTIFIER=evtchnd", "LOGGER=evtchnd")
    entries = [json.loads(line) for line in lines.splitlines()]
    said = [entry for entry in entries if str(entry["MESSAGE"]).endswith("serves in /run/evtchnd")]
    assert said
    assert said[-1]["PRIORITY"] == "6"
    assert said[-1]["_SYSTEMD_UNIT"] == SERVICE
    assert said[-1]["CODE_FILE"].endswith("__main__.py")


def test_a_guest_is_served_within_the_sandbox(systemd: PrivateSystemd) -> None:
    """A soft guest reads and writes its disk through the hardened service: nothing that it needs is forbidden."""
    systemd.run("systemctl", "start", SERVICE)
    systemd.run("bash", "-c", "head -c 1M /dev/urandom > /var/lib/evtchnd/a.img; chown evtchnd: /var/lib/evtchnd/a.img")
    said = systemd.python((Path(__file__).parent / "guest.py").read_text())
    assert json.loads(said) == {"read": True, "written": True, "state": "connected"}
    systemd.run("journalctl", "--sync")
    # io_uring, and the control plane's copy of it (pidfd_getfd), pass the filter
    assert "served by threads" not in systemd.run("journalctl", "--no-pager", "-o", "cat")
    # a worker cannot make the journal's socket any more
    connected = systemd.run("journalctl", "--no-pager", "-o", "json", "DOMID=7", "DEVICE=vbd 51712")
    (line,) = [entry for entry in map(json.loads, connected.splitlines()) if ": connected" in str(entry["MESSAGE"])]
    assert (line["_TRANSPORT"], line["_COMM"]) == ("journal", "evtchnd-worker")


def test_a_service_that_opens_nothing(systemd: PrivateSystemd) -> None:
    """evtchnd-fd.service: a VMM passes an image and a TAP that are root's alone; its worker has less than its unit."""
    fd_service = "evtchnd-fd.service"
    systemd.run("systemctl", "stop", *SOCKETS)
    for name in SOCKETS:
        systemd.run("mkdir", "-p", f"/run/units/{name}.d")
        systemd.run("cp", "/run/units/evtchnd-fd.socket.conf", f"/run/units/{name}.d/")
    systemd.run("bash", "-c", "rm -f /run/tun; mknod -m 600 /run/tun c 10 200")
    systemd.run("systemctl", "daemon-reload")
    try:
        systemd.run("systemctl", "start", *SOCKETS)
        said = json.loads(systemd.python((Path(__file__).parent / "passed.py").read_text()))
        assert (said["read"], said["written"]) == (True, True)
        assert systemd.show(fd_service, "ActiveState") == "active"
        assert systemd.show(SERVICE, "ActiveState") == "inactive"
        status = dict(line.split(":\t", 1) for line in said["status"].splitlines() if ":\t" in line)
        pid = systemd.show(fd_service, "MainPID")
        unit = systemd.run("grep", "Seccomp_filters", f"/proc/{pid}/status").split()[1]
        assert int(status["Seccomp_filters"]) == int(unit) + 1
        assert {int(status[which], 16) for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["Uid"].split()[0] == systemd.run("id", "-u", "evtchnd").strip()
        assert said["refused"] == "evtchnctl: /var/lib/passed.img: Permission denied (attach it read-only?)\n"
    finally:
        systemd.run("systemctl", "stop", *SOCKETS, fd_service, check=False)
        systemd.run("bash", "-c", "rm -rf /run/units/evtchnd-*.socket.d /var/lib/passed.img /run/tun")
        systemd.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("capability", [True, False], ids=["made by the service", "made for its user"])
def test_a_vif_within_the_sandbox(systemd: PrivateSystemd, capability: bool) -> None:
    """With the drop-in a TAP is made and wired; without its capability one of the service's user is taken as it is."""
    text = (SOURCE / "evtchnd.service.d/tap.conf").read_text()
    name = f"evtunit{os.getpid() % 10**6}"
    if not capability:
        text = "\n".join(line for line in text.splitlines() if "CAP_NET_ADMIN" not in line)
    # as udev makes it, whatever this machine has
    systemd.run("bash", "-c", "rm -f /run/tun; mknod -m 666 /run/tun c 10 200")
    dropin(systemd, f"{text}\nBindPaths=/run/tun:/dev/net/tun\n")
    systemd.run("systemctl", "start", SERVICE)
    attach = ["network-attach", "7", f"script=none,vifname={name}", "-o", "json"]
    guest = (Path(__file__).parent / "network.py").read_text().replace('["--help"]', repr(attach))
    try:
        if not capability:
            refused = systemd.python(guest)
            assert f"{name}: Operation not permitted (a TAP is made with CAP_NET_ADMIN, which" in refused
            command = re.search(r"without it: (ip tuntap add .*)\)", refused)
            assert command is not None
            systemd.run(*command[1].split())
            systemd.run("ip", "link", "set", name, "up")
        assert systemd.python(guest) == "connected"
    finally:
        systemd.run("ip", "link", "del", name, check=False)
