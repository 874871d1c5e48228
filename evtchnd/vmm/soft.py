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
import errno
import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Protocol, Self, TypeVar

from evtchnd.abi import (
    DOMID_SELF,
    GNTTAB_RESERVED_CONSOLE,
    GNTTAB_RESERVED_XENSTORE,
    GTF_PERMIT_ACCESS,
    PAGE_SIZE,
    Evtchnop,
)
from evtchnd.errors import EvtchndError, HostError
from evtchnd.memory import GuestMemory
from evtchnd.ports import Delivery, Effect, PortTable, Setting
from evtchnd.protocol import ALL_PORTS, Feature
from evtchnd.vmm.client import BoundPort, Client, Disconnected, GrantFrame, MemorySlot
from evtchnd.vmm.hypercall import event_channel_op
from evtchnd.vmm.settings import Applier, Kernel
from evtchnd.vmm.shared_info import SharedInfo
from evtchnd.vmm.soft_kernel import SoftKernel, signal

log = logging.getLogger(__name__)
T = TypeVar("T")

MiB = 1 << 20
SPECIAL_GFN = 0xFEFF8  # where Xen's toolstack puts an HVM guest's special pages: below the local APIC's page
SHARED_INFO_GFN = SPECIAL_GFN
STORE_GFN = SPECIAL_GFN + 1
CONSOLE_GFN = SPECIAL_GFN + 2
SPECIAL_PAGES = 3
RAM_SLOT, SPECIAL_SLOT = 0, 1
STORE_PORT = 1  # xl's order: the store's port is the first that a domain gets, the console's the second
CONSOLE_PORT = 2
MAX_MEMORY = SPECIAL_GFN * PAGE_SIZE  # RAM here ends below the special pages


class EventKernel(Kernel, Protocol):
    """What keeps the event bits of one guest; to be called with the VMM's lock."""

    def send(self, port: int) -> bool:
        """The guest's EVTCHNOP_send; False: not known here, the VMM has to look."""

    def raise_event(self, port: int, vcpu: int) -> None:
        """Sets `port` pending on `vcpu`."""

    def clear(self, port: int) -> None:
        """The port was freed: nothing is pending on it."""

    def unmask(self, port: int, vcpu: int) -> None:
        """EVTCHNOP_unmask; `vcpu` is told where the port is pending."""

    def claim(self, port: int) -> bool:
        """Leaves the port's notify eventfd to the caller; False: it has none."""


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
    ) -> None:
        if not 0 < memory <= MAX_MEMORY or memory % PAGE_SIZE:
            raise ValueError(f"domain {domid}: {memory} bytes of memory: not pages below {MAX_MEMORY:#x}")
        self.domid, self.vcpus, self.name = domid, vcpus, name or f"soft{domid}"
        self.ram_pages = memory // PAGE_SIZE
        self.store_gfn, self.store_port = STORE_GFN, STORE_PORT
        self.console_gfn, self.console_port = CONSOLE_GFN, CONSOLE_PORT
        self._path, self._timeout, self._grant_frames = socket_path, timeout, grant_frames
        # Who tells the daemon of closed ports goes first through _guest: a number is not given out again before the
        # daemon knows. The daemon's questions take only _lock, so a guest that waits for an answer blocks nobody.
        self._guest = threading.RLock()
        self._lock = threading.Condition()
        self._backend: dict[int, tuple[int, int]] = {}  # port as the daemon bound it: its kick, our notify eventfd
        self._effects: list[Delivery] = []  # of the call that runs; carried out once the kernel has the table
        self._applier = Applier()
        self._applied: tuple[Setting, ...] = ()
        self._client: Client | None = None
        self._leaving = False  # released: the daemon hangs up, as it should
        with contextlib.ExitStack() as undo:
            self.ram_fd = _memfd(f"{self.name} ram", memory, undo)
            self._special_fd = _memfd(f"{self.name} special", SPECIAL_PAGES * PAGE_SIZE, undo)
            self._grants_fd = _memfd(f"{self.name} grants", grant_frames * PAGE_SIZE, undo)
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
            self._kernel: EventKernel = self._start_kernel(undo)
            self._ports = self._new_ports()
            self._boot()
            undo.callback(self._drop_backend)
            undo.callback(self._applier.close)
            undo.callback(self._disconnect)
            self._client = self._connect()
            self._serve(self._client, self._client.register)
            self._undo = undo.pop_all()

    # ---- the guest's side --------------------------------------------------------------------------------------

    def hypercall_evtchn(self, op: int, arg: bytes | bytearray) -> tuple[int, bytes]:
        """HYPERVISOR_event_channel_op: (0 or a negated error number, the struct as it comes back)."""
        if op == Evtchnop.SEND and len(arg) >= 4:
            with self._lock:
                if self._kernel.send(int.from_bytes(arg[:4], "little")):
                    return 0, b""
        try:
            return self._change(lambda: event_channel_op(self._ports, op, arg))
        except HostError as error:
            log.warning("domain %d: event channel operation %d: %s", self.domid, op, error)
            return -errno.ENOMEM, b""

    def alloc_unbound(self, remote: int) -> int:
        """A port to which domain `remote` may bind. XenError."""
        return self._change(lambda: self._ports.alloc_unbound(DOMID_SELF, remote))

    def bind_interdomain(self, remote: int, port: int) -> int:
        """A port connected with an unbound one of `remote` (own domain: loopback). XenError."""
        return self._change(lambda: self._ports.bind_interdomain(remote, port))

    def close_port(self, port: int) -> None:
        """EVTCHNOP_close; returns when the daemon knows. XenError."""
        self._change(lambda: self._ports.close(port))

    def send(self, port: int) -> None:
        """EVTCHNOP_send: writes the eventfd, as KVM would. XenError."""
        with self._lock:
            if not self._kernel.send(port):
                self._ports.send(port)
                self._happen()

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
        return self._bound_fd(port, self._applier.kick_fd, timeout)

    def irq_fd(self, port: int, timeout: float = 10.0) -> int:
        """The eventfd by which the daemon raises `port`, the caller's to read from now on. As `kick_fd`.

        Both stay this object's, until the port is closed.
        """
        fd = self._bound_fd(port, self._applier.notify_fd, timeout)
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
        self._change(lambda: self._ports.reset(DOMID_SELF))

    def reboot(self) -> None:
        """The domain ends for the daemon and begins anew on the same memory: RAM stays, all else is as at first."""
        with self._guest:
            self._release()
            self._disconnect()
            with self._lock:
                for port in self._ports.bound():
                    self._ports.disconnect(port)
                self._ports.reset(DOMID_SELF)
                self._apply()
                self._effects.clear()
                self._drop_backend()
                self._boot()
            self._client = self._connect()
            self._serve(self._client, self._client.register)

    def resume(self, timeout: float = 30.0) -> None:
        """Goes to a restarted daemon and sends everything again; the guest notices nothing. Tries until `timeout`."""
        with self._guest:
            self._disconnect()
            deadline = time.monotonic() + timeout
            while True:
                try:
                    self._client = self._connect()
                    break
                except Disconnected:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.05)
            self._serve(self._client, self._client.resume, resumed=True)

    @property
    def client(self) -> Client:
        """The connection, for messages that have no method here (disks, slots). HostError when there is none."""
        if self._client is None:
            raise HostError(f"domain {self.domid}: not connected to the daemon")
        return self._client

    def close(self, *, release: bool = True) -> None:
        """Ends the domain; `release=False`: as a VMM that dies. Views of memory must be gone. Can be called twice."""
        with self._guest:
            if release:
                self._release()
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

    def _new_ports(self) -> PortTable:
        return PortTable(self.domid, vcpus=self.vcpus, deliver=lambda delivery: self._effects.append(delivery))

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

    def _release(self) -> None:
        self._leaving = True
        if self._client is not None and not self._client.lost:
            with contextlib.suppress(EvtchndError):
                self._client.release()

    def _connect(self) -> Client:
        self._leaving = False
        return Client(
            self._path,
            on_bind=self._on_bind,
            on_unbind=self._on_unbind,
            on_lost=self._on_lost,
            timeout=self._timeout,
        )

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _serve(self, client: Client, enter: Callable[..., None], *, resumed: bool = False) -> None:
        """Everything that the daemon has to know, in the protocol's order."""
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
            with self._lock:
                # the new daemon has never heard of an end whose guest port was closed meanwhile
                for port in [port for port, connected in self._ports.bound().items() if not connected]:
                    self._ports.disconnect(port)
                self._drop_backend(keep=self._ports.bound())
                bound = [BoundPort(port, *pair) for port, pair in sorted(self._backend.items())]
            client.ports(bound)
        client.xenstore(STORE_PORT, self._special_fd, (STORE_GFN - SPECIAL_GFN) * PAGE_SIZE)
        if Feature.CONSOLE in client.features:
            client.console(CONSOLE_PORT, CONSOLE_GFN)
        client.start()

    def _change(self, call: Callable[[], T]) -> T:
        """A guest's call that may change the table: the kernel gets it, then its effects happen."""
        with self._guest:
            with self._lock:
                saved = self._ports.save()
                try:
                    result = call()
                    self._apply()
                except BaseException:
                    self._ports.restore(saved)
                    self._effects.clear()
                    raise
                closed = self._happen()
            self._tell(closed)
        return result

    def _apply(self) -> None:
        table = self._ports.table()
        if table is not self._applied:
            self._applier.apply(table, self._kernel)
            self._applied = table

    def _happen(self) -> list[int]:
        """Carries out what the last calls caused; the ports that domain 0 had bound and the guest has closed."""
        effects, self._effects = self._effects, []
        closed: list[int] = []
        for each in effects:
            match each.effect:
                case Effect.RAISE:
                    self._kernel.raise_event(each.port, each.vcpu)
                case Effect.SIGNAL:
                    signal(self._applier.kick_fd(each.port))
                case Effect.CLEAR:
                    self._kernel.clear(each.port)
                case Effect.UNMASK:
                    self._kernel.unmask(each.port, each.vcpu)
                case Effect.CLOSED:
                    closed.append(each.port)
                case Effect.DROP:
                    pass
        return closed

    def _tell(self, closed: Sequence[int]) -> None:
        if not closed or self._client is None:
            return
        try:
            for port in closed if any(self._ports.bound().values()) else [closed[0] if len(closed) == 1 else ALL_PORTS]:
                self._client.port_closed(port)
        except EvtchndError as error:  # the guest's call has succeeded all the same
            log.warning("domain %d: the daemon was not told of a closed port: %s", self.domid, error)

    def _on_bind(self, wanted: list[tuple[int, int]]) -> Sequence[int]:
        """The daemon binds ports to its kick eventfds; our notify eventfds. All of them or none."""
        made: list[int] = []
        with self._lock:
            saved = self._ports.save()
            try:
                for port, kick in wanted:
                    made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                    self._ports.connect(port, kick, made[-1])
                self._apply()
            except BaseException:
                self._ports.restore(saved)
                for fd in made:
                    os.close(fd)
                raise
            # Kept until the daemon unbinds: the guest may close its end and bind to ours again. An older pair is
            # closed here, in the thread that has sent it off by now.
            for (port, kick), notify in zip(wanted, made, strict=True):
                _close_pair(self._backend.pop(port, None))
                self._backend[port] = (kick, notify)
                signal(kick)  # the guest may have sent before
            self._drop_backend(keep=self._ports.bound())
            self._lock.notify_all()
        return made

    def _on_unbind(self, ports: list[int]) -> None:
        with self._lock:
            saved = self._ports.save()
            try:
                for port in ports:
                    if port in self._ports.bound():  # or bound anew by the guest under another number
                        self._ports.disconnect(port)
                self._apply()
            except BaseException:
                self._ports.restore(saved)
                raise
            self._drop_backend(keep=self._ports.bound())

    def _on_lost(self) -> None:
        if not self._leaving:
            log.warning("domain %d: the daemon has gone; resume() goes to a new one", self.domid)

    def _drop_backend(self, keep: Container[int] = ()) -> None:
        for port in [port for port in self._backend if port not in keep]:
            _close_pair(self._backend.pop(port))


def _close_pair(pair: tuple[int, int] | None) -> None:
    for fd in pair or ():
        os.close(fd)


def _memfd(name: str, size: int, undo: contextlib.ExitStack) -> int:
    """Sealed: nobody can take pages away from under a mapping."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    undo.callback(os.close, fd)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
