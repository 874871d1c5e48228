"""What a backend sees of its device: the interface of every `async def run(device)`.

A backend is one coroutine a device. It runs in the domain's worker, from the moment the toolstack's nodes are in
XenStore to the end of the device; cancelling it is the teardown (deadline: 10 s). It ends in one of these ways:

| how                    | what the worker does                                                            |
|------------------------|---------------------------------------------------------------------------------|
| returns                | the device is closed (`state` 6 and `online` 0): descriptors are closed         |
| GuestError, HostError  | one line in the log, the control plane is told; the device is off, its nodes stay |
| cancelled              | detach, end of the domain or of the worker                                      |
| anything else          | our defect: a traceback in the log, and the worker ends: the next one goes on   |

What a pump raises (evtchnd/channel.py) and is no EvtchndError ends the worker at once, before any teardown.
Whatever was bound by `bind()` and not unbound is unbound by the worker.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evtchnd.channel import Channel
from evtchnd.errors import EvtchndError, GuestError, HostError, VmmError
from evtchnd.transport import close_all

if TYPE_CHECKING:
    import asyncio

    from evtchnd._core.uring import Uring
    from evtchnd.channel import Poller
    from evtchnd.control.config import Console, Vbd
    from evtchnd.grants import GrantTable
    from evtchnd.memory import GuestMemory
    from evtchnd.worker.messages import Vif
    from evtchnd.xenstore.client import Client

# What a live ring needs to be found again by the next worker: plain values only (they cross a socket).
Params = dict[str, Any]


class AnyDevice:
    """What every backend sees of its device, whatever its kind.

    kind            "vbd", "console", "vif"
    key             its number among all of the domain's devices: a vbd's is its devid (see console_key, vif_key)
    name            "domain 7: vbd 51712": begins every log line and error text of the device
    store           XenStore client, domain 0 confined to the guest's nodes (never `params`)
    backend_path    "/local/domain/0/backend/vbd/7/51712"; frontend_path "/local/domain/7/device/vbd/51712"
    connected       params of the live ring if an earlier worker was connected: attach to it, replay, no handshake
    stats           set by the backend: plain integers by name, read by `info`
    """

    def __init__(
        self,
        *,
        domid: int,
        devid: int,
        kind: str,
        store: Client,
        memory: GuestMemory,
        grants: GrantTable,
        poller: Poller,
        loop: asyncio.AbstractEventLoop,
        connected: Params | None,
        bind: Callable[[Sequence[int]], Awaitable[list[tuple[int, int]]]],
        unbind: Callable[[Sequence[int]], None],
        report: Callable[[Params | None], Awaitable[object]],
    ) -> None:
        self.domid = domid
        self.devid = devid
        self.key = devid
        self.kind = kind
        self.name = f"domain {domid}: {kind} {devid}"
        self.backend_path = f"/local/domain/0/backend/{kind}/{domid}/{devid}"
        self.frontend_path = f"/local/domain/{domid}/device/{kind}/{devid}"
        self.store = store
        self.memory = memory
        self.grants = grants
        self.poller = poller
        self.loop = loop
        self.connected = connected
        self.stats: Callable[[], Mapping[str, int]] = dict
        self._bind = bind
        self._unbind = unbind
        self._report = report
        self._channels: dict[Channel, int] = {}

    async def bind(self, ports: Sequence[int]) -> list[Channel]:
        """Channels for the guest's `ports`, all or none, through the control plane and the VMM.

        A port that an earlier worker of this device had bound gives the same eventfds again, kicks kept.
        GuestError if the VMM refuses (no such port, not open to domain 0) or does not answer in time.
        """
        pairs = await self._bind(ports)
        channels: list[Channel] = []
        try:
            for port, (kick, notify) in zip(ports, pairs, strict=True):
                channels.append(Channel(kick, notify, name=f"{self.name}: port {port}", poller=self.poller))
        except EvtchndError as exc:
            for channel in channels:
                channel.close()
            close_all(fd for pair in pairs[len(channels) :] for fd in pair)
            self._unbind(ports)
            raise GuestError(str(exc)) from None
        self._channels.update(zip(channels, ports, strict=True))
        return channels

    async def unbind(self, channels: Sequence[Channel]) -> None:
        """Closes `channels` and gives their ports back to the guest as unbound. Does not wait; twice is nothing."""
        for channel in channels:
            self.release(channel)

    def connected_as(self, params: Params | None) -> Awaitable[object]:
        """Remembers `params` in the control plane, to be `connected` in a worker that replaces this one.

        Call it before the first request is taken; None when the ring is gone (closed, or a new handshake begins). Once
        what it returns was awaited, the next control plane knows it, too.
        """
        self.connected = params
        return self._report(params)

    def release(self, channel: Channel) -> None:
        """What `unbind` does to one channel."""
        port = self._channels.pop(channel, None)
        if port is not None:
            channel.close()
            self._unbind([port])

    def left_over(self) -> list[Channel]:
        """Channels that are bound still: what the worker unbinds when `run()` has ended."""
        return list(self._channels)


class Device(AnyDevice):
    """A disk.

    uring           this device's own io_uring, or None where io_uring is refused or engine = "threads";
                    its completions raise `completions` (an eventfd that the backend reads: add_reader)
    completions     eventfd of this device for the disk side's completions (io_uring's, or the threads')
    disk_fd         the image or block device, opened by the control plane; belongs to the worker, not closed by run()
    readonly, cdrom, direct   how the disk was attached (direct: opened with O_DIRECT)
    sectors, sector_size   the disk's size in 512-byte units, its sectors in bytes; 0: as the disk says
    holes           of a block device: what it discards at once and from where on, in bytes; None: it does not
    failed          why an earlier worker's flush failed; "": none has. A kernel tells a lost write once
    flush_failed    called with that: the next worker has to know
    journal_fd      the in-flight journals' memfd, made by the control plane for the most and largest rings allowed
    options         the `vbd` table of the configuration (control/config.py: Vbd)
    hung            set by the backend at its end: requests are still at the disk, and the journal stays locked
    resize          set by the backend: the disk has so many sectors of 512 bytes now; HostError: it has not
    """

    def __init__(
        self,
        *,
        uring: Uring | None,
        completions: int,
        disk_fd: int,
        readonly: bool,
        cdrom: bool,
        direct: bool,
        journal_fd: int,
        options: Vbd,
        sectors: int = 0,
        sector_size: int = 0,
        holes: tuple[int, int] | None = None,
        failed: str = "",
        flush_failed: Callable[[str], None] | None = None,
        **shared: Any,
    ) -> None:
        """`shared`: what AnyDevice takes."""
        super().__init__(**shared)
        self.uring = uring
        self.completions = completions
        self.disk_fd = disk_fd
        self.readonly = readonly
        self.cdrom = cdrom
        self.direct = direct
        self.journal_fd = journal_fd
        self.options = options
        self.sectors = sectors
        self.sector_size = sector_size
        self.hung = False
        self.holes = holes
        self.failed = failed
        self.flush_failed = flush_failed
        self.resize: Callable[[int], Awaitable[None]] = self._resize

    async def _resize(self, sectors: int) -> None:
        """Before the backend has begun: it begins with that."""
        self.sectors = sectors


def console_key(devid: int) -> int:
    """A console's number among the domain's devices: -16, -17, ... Its devid may be another kind's, too."""
    return -16 - devid


class ConsoleDevice(AnyDevice):
    """A console. Its descriptors belong to the worker and are not closed by run(); -1: there is none.

    page            (port, guest frame) of the primary console, which has no handshake; None: found by xenbus
    pty             the master of its terminal, whose slave the control plane holds open
    log, old_log    its log file, and the one that a full log is copied to
    options         the `console` table of the configuration
    accept          set by the backend: gets a client's stream socket (a descriptor, the backend's from then on) and
                    what to greet it with; HostError: it has no place for it, and has closed it
    """

    def __init__(
        self, *, page: tuple[int, int] | None, pty: int, log: int, old_log: int, options: Console, **shared: Any
    ) -> None:
        """`shared`: what AnyDevice takes."""
        super().__init__(**shared)
        self.key = console_key(self.devid)
        self.page = page
        self.pty = pty
        self.log = log
        self.old_log = old_log
        self.options = options
        self.accept: Callable[[int, bytes], None] = self.refuse

    def refuse(self, fd: int, _: bytes) -> None:
        """`accept` while nobody serves."""
        os.close(fd)
        raise HostError(f"{self.name}: not served now")


def vif_key(devid: int) -> int:
    """A vif's number among the domain's devices: behind every console's."""
    return -(1 << 20) - devid


class VifDevice(AnyDevice):
    """A network interface. Its descriptors belong to the worker and are not closed by run().

    vif             what the control plane says of it (messages.py); `change` keeps it up to date
    taps            the TAP's descriptors, one a queue
    answers_fd      the memfd with what its rings have been answered (evtchnd/answers.py), made by the control plane
    change          set by the backend: `vif` is another one now (mtu, rate, carrier); HostError: it cannot be
    retap           set by the backend: the TAP was made anew, these are its descriptors (the worker's, too)
    capture         set by the backend: gets a reader's stream socket (a descriptor, the backend's from then on), what
                    to greet it with, bytes of a frame and frames at most (0: any); HostError: there are too many
    """

    def __init__(self, *, vif: Vif, taps: Sequence[int], answers_fd: int, **shared: Any) -> None:
        """`shared`: what AnyDevice takes."""
        super().__init__(**shared)
        self.key = vif_key(self.devid)
        self.vif = vif
        self.taps = list(taps)
        self.answers_fd = answers_fd
        self.change: Callable[[Vif], Awaitable[None]] = self._change
        self.retap: Callable[[Sequence[int]], None] = self._retap
        self.capture: Callable[[int, bytes, int, int], None] = self.refuse

    async def _change(self, vif: Vif) -> None:
        """Before the backend has begun: it begins with that."""
        self.vif = vif

    def _retap(self, taps: Sequence[int]) -> None:
        self.taps = list(taps)

    def refuse(self, fd: int, *_: object) -> None:
        """`capture` while nobody serves."""
        os.close(fd)
        raise VmmError(f"{self.name}: not served now", errno.ENODEV)
