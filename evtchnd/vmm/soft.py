"""A domain without KVM, in its own process: RAM, grant table, shared_info and event ports, on the VMM's socket.

The guest's side is called from any thread and blocks; `evtchnd.guest` builds drivers on it, and a C program can use
the same memory and eventfds. With it the daemon is complete on any machine.

    gfn 0 .. ram_pages-1          RAM, memory slot 0
    gfn 0xfeff8 + 0, 1, 2         shared_info, XenStore page, console page: slot 1, a memfd of their own, since the
                                  control plane gets that descriptor and has no business with RAM
    grant frames                  a third memfd
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Self

from evtchnd.abi import (
    DOMID_SELF,
    GNTTAB_RESERVED_CONSOLE,
    GNTTAB_RESERVED_XENSTORE,
    GTF_PERMIT_ACCESS,
    PAGE_SIZE,
)
from evtchnd.errors import EvtchndError, HostError
from evtchnd.memory import GuestMemory
from evtchnd.protocol import Feature
from evtchnd.vmm.channels import Channels, EventKernel
from evtchnd.vmm.client import Client, GrantFrame, MemorySlot
from evtchnd.vmm.daemon_link import DaemonLink
from evtchnd.vmm.physmap import memfd
from evtchnd.vmm.shared_info import SharedInfo
from evtchnd.vmm.soft_kernel import SoftKernel

log = logging.getLogger(__name__)

MiB = 1 << 20
SPECIAL_GFN = 0xFEFF8  # where Xen's toolstack puts an HVM guest's special pages: below the local APIC's page
SHARED_INFO_GFN = SPECIAL_GFN
STORE_GFN = SPECIAL_GFN + 1
CONSOLE_GFN = SPECIAL_GFN + 2
SPECIAL_PAGES = 3
RAM_SLOT, SPECIAL_SLOT = 0, 1
STORE_PORT = 1  # xl's order: the store's port is the first that a domain gets, the console's the second
CONSOLE_PORT = 2
# A daemon that is started again and again may take a while.
_RETURN_S = 60.0
MAX_MEMORY = SPECIAL_GFN * PAGE_SIZE  # RAM here ends below the special pages


class SoftVmm:
    """One running domain at the daemon that listens on `socket_path`. A context manager.

    `memory`: bytes of RAM, a multiple of 4096; `grant_frames`: pages of the grant table, 512 references each.
    HostError (Disconnected) where the daemon is not there, VmmError (Refused) where it refuses the domain.
    `ram` has `view(gfn)`, `read(gpa, n)` and `write(gpa, data)`; release views before `close`.
    """

    long_mode = True

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        domid: int,
        *,
        memory: int = 64 * MiB,
        vcpus: int = 1,
        name: str = "",
        grant_frames: int = 4,
        timeout: float = 10.0,
        come_back: bool = False,
    ) -> None:
        """come_back: resumes by itself whenever the daemon has gone; `resumed` counts."""
        if not 0 < memory <= MAX_MEMORY or memory % PAGE_SIZE:
            raise ValueError(f"domain {domid}: {memory} bytes of memory: not pages below {MAX_MEMORY:#x}")
        self.domid, self.vcpus, self.name = domid, vcpus, name or f"soft{domid}"
        self.ram_pages = memory // PAGE_SIZE
        self.store_gfn, self.store_port = STORE_GFN, STORE_PORT
        self.console_gfn, self.console_port = CONSOLE_GFN, CONSOLE_PORT
        self._grant_frames = grant_frames
        self._come_back = come_back
        self.resumed = 0
        self._disks: list[tuple[int, str, int]] = []
        self._vifs: list[tuple[int, bytes, Sequence[int]]] = []
        self.channels = self._new_channels()
        self._ports, self._guest, self._lock = self.channels.ports, self.channels.turn, self.channels.lock
        self._link = DaemonLink(socket_path, self.channels, self._introduce, timeout=timeout, lost=self._lost)
        with contextlib.ExitStack() as undo:
            self.ram_fd = memfd(f"{self.name} ram", memory, undo)
            self._special_fd = memfd(f"{self.name} special", SPECIAL_PAGES * PAGE_SIZE, undo)
            self._grants_fd = memfd(f"{self.name} grants", grant_frames * PAGE_SIZE, undo)
            self.ram = GuestMemory()
            undo.callback(self.ram.close)
            self.ram.add(RAM_SLOT, 0, self.ram_pages, self.ram_fd, 0)
            self.ram.add(SPECIAL_SLOT, SPECIAL_GFN, SPECIAL_PAGES, self._special_fd, 0)
            self._grants_map = mmap.mmap(self._grants_fd, grant_frames * PAGE_SIZE)
            self.grants = memoryview(self._grants_map)
            undo.callback(self._grants_map.close)
            undo.callback(self.grants.release)
            self._info = SharedInfo(self.ram.view(SHARED_INFO_GFN), vcpus=vcpus, long_mode=self.long_mode)
            undo.callback(self._info.close)
            self._kernel = self.channels.kernel = self._start_kernel(undo)
            self._boot()
            undo.callback(self.channels.close)
            undo.callback(self._link.close)
            self._link.connect()
            self._undo = undo.pop_all()

    # ---- the guest's side --------------------------------------------------------------------------------------

    def hypercall_evtchn(self, op: int, arg: bytes | bytearray) -> tuple[int, bytes]:
        """HYPERVISOR_event_channel_op: (0 or a negated error number, the struct as it comes back)."""
        return self.channels.hypercall(op, arg)

    def alloc_unbound(self, remote: int) -> int:
        """A port to which domain `remote` may bind. XenError."""
        return self.channels.change(lambda: self._ports.alloc_unbound(DOMID_SELF, remote))

    def bind_interdomain(self, remote: int, port: int) -> int:
        """A port connected with an unbound one of `remote` (own domain: loopback). XenError."""
        return self.channels.change(lambda: self._ports.bind_interdomain(remote, port))

    def close_port(self, port: int) -> None:
        """EVTCHNOP_close; returns when the daemon knows. XenError."""
        self.channels.change(lambda: self._ports.close(port))

    def send(self, port: int) -> None:
        """EVTCHNOP_send: writes the eventfd, as KVM would. XenError."""
        with self._lock:
            if not self._kernel.send(port):
                self._ports.send(port)
                self.channels.happen()

    def wait(self, port: int, timeout: float) -> bool:
        """Blocks until the port is pending and clears it, as a guest's handler does; False after `timeout` s."""
        return self._soft.wait(port, timeout)

    def pending(self, port: int) -> bool:
        """Whether the port is pending; it stays so."""
        with self._lock:
            return self._info.pending(port)

    # ---- for C programs and benchmarks -------------------------------------------------------------------------

    def kick_fd(self, port: int, timeout: float = 10.0) -> int:
        """The eventfd that a send on `port` writes. Waits until the daemon has bound the port; HostError."""
        return self._bound_fd(port, self.channels.applier.kick_fd, timeout)

    def irq_fd(self, port: int, timeout: float = 10.0) -> int:
        """The eventfd by which the daemon raises `port`, the caller's to read from now on. As `kick_fd`.

        Both stay this object's, until the port is closed.
        """
        fd = self._bound_fd(port, self.channels.applier.notify_fd, timeout)
        with self._lock:
            self._kernel.claim(port)
        return fd

    def _bound_fd(self, port: int, fd_of: Callable[[int], int], timeout: float) -> int:
        with self._lock:
            if not self._lock.wait_for(lambda: fd_of(port) >= 0, timeout):
                raise HostError(f"domain {self.domid}: port {port}: the daemon has not bound it in {timeout} s")
            return fd_of(port)

    # ---- the domain's life -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """EVTCHNOP_reset: every port is closed, the store's and the console's too. They can be bound again
        (`bind_interdomain` with the number that EVTCHNOP_status gave before) and get their numbers back."""
        self.channels.change(lambda: self._ports.reset(DOMID_SELF))

    def reboot(self) -> None:
        """The domain ends for the daemon and begins anew on the same memory: RAM stays, all else is as at first."""
        with self._guest:
            self._link.release()
            with self._lock:
                self.channels.reset()
                self._boot()
            self._link.connect()

    def resume(self, timeout: float = 30.0) -> None:
        """Goes to a restarted daemon and sends everything again; the guest notices nothing. Tries until `timeout`."""
        with self._guest:
            self._link.close()
        self._link.resume(timeout)

    def disk(self, devid: int, vdev: str, fd: int) -> None:
        """Passes a disk, now and with each RESUME; `fd` stays the caller's, and open."""
        self.client.disk(devid, vdev, fd)
        self._disks.append((devid, vdev, fd))

    def vif(self, devid: int, mac: bytes, fds: Sequence[int]) -> None:
        """The same of a TAP's queues."""
        self.client.vif(devid, mac, fds)
        self._vifs.append((devid, mac, fds))

    @property
    def client(self) -> Client:
        """The connection, for messages that have no method here (disks, slots). HostError when there is none."""
        return self._link.client

    def close(self, *, release: bool = True) -> None:
        """Ends the domain; `release=False`: as a VMM that dies. Views of memory must be gone. Can be called twice."""
        with self._guest:
            if release:
                self._link.release()
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _start_kernel(self, undo: contextlib.ExitStack) -> EventKernel:
        self._soft = SoftKernel(self._lock, self._info, self.name)
        undo.callback(self._soft.close)
        return self._soft

    def _new_channels(self) -> Channels:
        return Channels(self.domid, vcpus=self.vcpus)

    def _boot(self) -> None:
        """What a toolstack prepares: the two ports, their pages, the two grants for domain 0."""
        self._ports.reserve(STORE_PORT)
        self._ports.reserve(CONSOLE_PORT)
        self._info.wipe()
        for gfn in (STORE_GFN, CONSOLE_GFN):
            self.ram.write(gfn * PAGE_SIZE, bytes(PAGE_SIZE))
        self._grants_map[:] = bytes(len(self._grants_map))
        with self.grants.cast("I") as words:
            for gref, gfn in ((GNTTAB_RESERVED_CONSOLE, CONSOLE_GFN), (GNTTAB_RESERVED_XENSTORE, STORE_GFN)):
                words[2 * gref + 1] = gfn
                words[2 * gref] = GTF_PERMIT_ACCESS  # domid 0 in the upper half

    def _introduce(self, client: Client, *, resumed: bool) -> None:
        """Everything that the daemon has to know, in the protocol's order."""
        enter = client.resume if resumed else client.register
        enter(self.domid, vcpus=self.vcpus, name=self.name, long_mode=self.long_mode)
        client.memory(
            [
                MemorySlot(RAM_SLOT, 0, self.ram_pages, self.ram_fd),
                MemorySlot(SPECIAL_SLOT, SPECIAL_GFN, SPECIAL_PAGES, self._special_fd),
            ]
        )
        client.grant_frames(
            [GrantFrame(i, self._grants_fd, i * PAGE_SIZE) for i in range(self._grant_frames)],
        )
        if resumed:
            client.ports(self.channels.bound())
        client.xenstore(STORE_PORT, self._special_fd, (STORE_GFN - SPECIAL_GFN) * PAGE_SIZE)
        if Feature.CONSOLE in client.features:
            client.console(CONSOLE_PORT, CONSOLE_GFN)
        for devid, vdev, fd in self._disks:
            client.disk(devid, vdev, fd)
        for devid, mac, fds in self._vifs:
            client.vif(devid, mac, fds)
        client.start()

    def _lost(self) -> None:
        if not self._come_back:
            log.warning("domain %d: the daemon has gone; resume() goes to a new one", self.domid)
            return
        threading.Thread(target=self._return, name=f"{self.name} resume", daemon=True).start()

    def _return(self) -> None:
        try:
            if self._link.resume(_RETURN_S):
                self.resumed += 1
        except EvtchndError as error:
            log.error("domain %d: not resumed: %s", self.domid, error)
