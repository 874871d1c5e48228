"""A domain on KVM at a daemon that is the wire alone, for the tests of what KVM does with its ports."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evtchnd.abi import Evtchnop
from evtchnd.vmm.kvm_agent import FLAG_COUNT, FLAG_TELL, Command
from evtchnd.vmm.kvm_vm import KvmVmm, Xen
from kvmguest import Other, agent
from lab.patience import patient
from test_soft import MEMORY, Daemon

# exits of one command that the kernel carries out all by itself: the agent says that it is done
NONE = {"io": 1}


class Domain(KvmVmm):
    """With the other end of its ports: `daemon` binds them, `other` is the process that has their eventfds."""

    def __init__(self, daemon: Daemon, other: Other, *, long_mode: bool = True, **more: Any) -> None:
        self.daemon, self.other = daemon, other
        super().__init__(
            daemon.path, 7, memory=MEMORY, code=agent(long_mode), long_mode=long_mode, timeout=patient(10), **more
        )

    def quiet(self) -> None:
        """Upcalls are not told to the VMM: the guest takes its events and counts them."""
        for runner in self.runners:
            runner.mailbox.set_flags(FLAG_COUNT)

    def loud(self) -> None:
        """As at first: the guest tells of upcalls and leaves the events to `wait`."""
        for runner in self.runners:
            runner.mailbox.set_flags(FLAG_TELL)

    def bound(self) -> int:
        """A port that domain 0 has bound; its kicks so far are read."""
        port = self.alloc_unbound(0)
        self.daemon.bind(port)
        os.eventfd_read(self.daemon.kick(port))
        return port

    def notify_fd(self, port: int) -> int:
        """What the worker writes."""
        return self.daemon.ports[port][1]

    def kick_of(self, port: int) -> int:
        return self.daemon.kick(port)

    def sends(self, port: int, count: int, *, vcpu: int = 0, counter: int = 0) -> tuple[int, dict[str, int]]:
        """How many of so many sends failed, and why that vCPU left the guest for it."""
        exits = self.runners[vcpu].vcpu.exits
        before = Counter(exits)
        failed = self.command(Command.SENDS, port, count, counter, vcpu=vcpu)
        return failed, dict(exits - before)

    def call(self, number: Xen, *args: int, vcpu: int = 0, data: bytes = b"") -> tuple[int, dict[str, int]]:
        """A hypercall; its result, and the exits. `data` is at `scratch`."""
        exits = self.runners[vcpu].vcpu.exits
        before = Counter(exits)
        result = self.command(Command.CALL, number, *args, vcpu=vcpu, data=data)
        return result, dict(exits - before)

    def scratch(self, vcpu: int = 0) -> int:
        return self.runners[vcpu].mailbox.scratch_gpa

    def taken(self, port: int) -> int:
        return self.agent.taken(port)

    def upcalls(self, vcpu: int = 0) -> int:
        return self.runners[vcpu].mailbox.upcalls

    def mask(self, port: int) -> None:
        self.command(Command.MASK, port)

    def unmask(self, port: int) -> None:
        """As a guest does it where the port may be pending."""
        assert self.hypercall_evtchn(Evtchnop.UNMASK, struct.pack("<I", port)) == (0, b"")

    def now(self, vcpu: int = 0) -> int:
        """The guest's clock (at least: when the vCPU last changed its state)."""
        return self.runners[vcpu].vcpu.xen.runstate_times().entry

    def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Waits for what another process or the kernel does."""
        deadline = time.monotonic() + patient(20)
        while not condition():
            assert time.monotonic() < deadline, what or "it did not happen"
            time.sleep(0.005)


def eventfd_number(fd: int) -> int:
    """The kernel's number of an eventfd, the lowest free one: it is free again when nobody holds the eventfd."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("eventfd-id:"):
            return int(line.split()[1])
    raise AssertionError(f"{fd} is no eventfd")
