"""Unmodified Linux kernels that find no Xen but KVM and evtchnd: console, XenStore, channels, timers, and their end."""

from __future__ import annotations

import pytest

from lab.realguest import VCPUS, RealGuest, until

pytestmark = pytest.mark.timeout(120)


def test_two_cpus(guest: RealGuest) -> None:
    assert guest.run("nproc") == str(VCPUS)
    # both run, at once
    guest.run(
        "taskset -c 0 sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done' & p=$!; taskset -c 1 true && wait $p", 30
    )


def test_console_both_ways(guest: RealGuest) -> None:
    """A line of 4000 characters, and 64 KiB back."""
    line = "0123456789abcdef" * 248
    assert guest.run(f"echo {line} | tr -d '\\n' | wc -c") == str(len(line))
    said = guest.run("seq 1 12000", 30).split()
    assert said == [str(number) for number in range(1, 12001)]


def test_xenstore_from_inside(guest: RealGuest) -> None:
    """Both ends by Xen's own tools: the guest's own nodes are its own, the others are not."""
    assert guest.run("xenstore-read name") == guest.xenstore("read", "/local/domain/1/name")
    guest.run("xenstore-write data/said-by-the-guest 'a word'")
    assert guest.xenstore("read", "/local/domain/1/data/said-by-the-guest") == "a word"
    guest.fails("xenstore-write /local/domain/0/name mine")
    guest.run("(xenstore-watch -n 2 data/watched >/tmp/watched; echo done >>/tmp/watched) & sleep 0.5")
    guest.xenstore("write", "/local/domain/1/data/watched", "now")
    guest.run("for i in $(seq 100); do grep -q done /tmp/watched && break; sleep 0.1; done; grep done /tmp/watched")


def test_io_leaves_the_guest_by_eventfd_alone(guest: RealGuest) -> None:
    """Sends, timers and IPIs stay in the kernel: the VMM sees none while disk, console and store are busy."""
    calls, before = guest.hypercalls(), guest.interrupts()
    fio = "cd /tmp && fio --name=r --filename=/dev/xvdb --ioengine=libaio --direct=1 --rw=randrw --bs=4k --minimal"
    guest.run(f"{fio} --iodepth=8 --runtime=1 --time_based --randrepeat=0; xenstore-read name", 30)
    after, calls_after = guest.interrupts(), guest.hypercalls()
    left = {name: count - calls.get(name, 0) for name, count in calls_after.items()}
    assert left.get("event_channel_op.send", 0) == 0
    assert left.get("vcpu_op.set_singleshot_timer", 0) == 0
    assert left.get("sched_op.poll", 0) == 0
    gained = {what: count - before.get(what, 0) for what, count in after.items()}

    def more(*words: str) -> int:
        return sum(count for what, count in gained.items() if all(word in what.split() for word in words))

    assert any(what.startswith("xen-dyn") and what.endswith("blkif") and count > 0 for what, count in gained.items())
    assert any(what.startswith("xen-dyn") and what.endswith("xenbus") and count > 0 for what, count in gained.items())
    assert more("xen-percpu", "timer0") > 0
    assert any("resched" in what or "callfunc" in what for what in after)
    device = guest.device("xvdb")["counters"]
    assert device["errors"] == 0


def test_what_the_guest_can_be_told(guest: RealGuest) -> None:
    """Linux says so at boot, in nodes that are its own."""
    for name in ("poweroff", "reboot"):
        assert guest.xenstore("read", f"/local/domain/1/control/feature-{name}") == "1"


def test_reboot_by_xenstore(guest: RealGuest) -> None:
    """control/shutdown, as `xl reboot` writes it: the guest takes leave of its file system and comes up again."""
    guest.run("echo kept >/root/kept")
    guest.xenstore("write", "/local/domain/1/control/shutdown", "reboot")
    guest.comes_back()
    assert guest.run("cat /root/kept; rm /root/kept") == "kept"
    assert guest.run("dmesg | grep -c 'EXT4-fs (xvda): recovery complete' || true") == "0"


def test_poweroff_by_xenstore(guest: RealGuest) -> None:
    """The root file system is clean afterwards, and nothing of the domain is left."""
    guest.xenstore("write", "/local/domain/1/control/shutdown", "poweroff")
    assert guest.ended() == 0
    done = guest.check_root()
    assert done.returncode == 0, done.stdout
    until(lambda: not guest.domains())
    assert "1" not in guest.xenstore("list", "/local/domain").split()
