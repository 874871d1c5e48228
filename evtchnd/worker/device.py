"""What a backend sees of its device: the interface of every `async def run(device)`.

A backend is one coroutine a device. It runs in the domain's worker, from the moment the toolstack's nodes are in
XenStore to the end of the device; cancelling it is the teardown (deadline: 10 s). It ends in one of these ways:

| how                    | what the worker does                                                            |
|------------------------|---------------------------------------------------------------------------------|
| returns                | the device is closed (`state` 6 and `online` 0): descriptors are closed         |
| GuestError, HostError  | one line in the log, the control plane is told; the device is off, its nodes stay |
| cancelled              | detach, end of the domain or of the worker                                      |
| anything else          | our defect: a traceback in the log, and as GuestError                           |

Whatever was bound by `bind()` and not unbound is unbound by the worker.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evtchnd.channel import Channel
from evtchnd.errors import EvtchndError, GuestError
from evtchnd.transport import close_all

if TYPE_CHECKING:
    import asyncio

    from evtchnd._core.uring import Uring
    from evtchnd.channel import Poller
    from evtchnd.control.config import Vbd
    from evtchnd.grants import GrantTable
    from evtchnd.memory import GuestMemory
    from evtchnd.xenstore.client import Client

# What a live ring needs to be found again by the next worker: plain values only (they cross a socket).
Params = dict[str, Any]


class Device:
    """One device of one domain, as its backend sees it.

    kind            "vbd"
    name            "domain 7: vbd 51712": begins every log line and error text of the device
    store           XenStore client, domain 0 confined to the guest's nodes (never `params`)
    backend_path    "/local/domain/0/backend/vbd/7/51712"; frontend_path "/local/domain/7/device/vbd/51712"
    uring           this device's own io_uring, or None where io_uring is refused or engine = "threads";
                    its completions raise `completions` (an eventfd that the backend reads: add_reader)
    completions     eventfd of this device for the disk side's completions (io_uring's, or the threads')
    disk_fd         the image or block device, opened by the control plane; belongs to the worker, not closed by run()
    readonly, cdrom, direct   how the disk was attached (direct: opened with O_DIRECT)
    sectors, sector_size   the disk's size in 512-byte units, its sectors in bytes; 0: as the disk says
    journal_fd      the in-flight journals' memfd, made by the control plane for the most and largest rings allowed
    options         the `vbd` table of the configuration (control/config.py: Vbd)
    connected       params of the live ring if an earlier worker was connected: attach to it, replay, no handshake
    stats           set by the backend: plain integers by name, read by `info`
    resize          set by the backend: the disk has so many sectors of 512 bytes now; HostError: it has not
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
        uring: Uring | None,
        completions: int,
        disk_fd: int,
        readonly: bool,
        cdrom: bool,
        direct: bool,
        journal_fd: int,
        options: Vbd,
        connected: Params | None,
        sectors: int = 0,
        sector_size: int = 0,
        bind: Callable[[Sequence[int]], Awaitable[list[tuple[int, int]]]],
        unbind: Callable[[Sequence[int]], None],
        report: Callable[[Params | None], None],
    ) -> None:
        self.domid = domid
        self.devid = devid
        self.kind = kind
        self.name = f"domain {domid}: {kind} {devid}"
        self.backend_path = f"/local/domain/0/backend/{kind}/{domid}/{devid}"
        self.frontend_path = f"/local/domain/{domid}/device/{kind}/{devid}"
        self.store = store
        self.memory = memory
        self.grants = grants
        self.poller = poller
        self.loop = loop
        self.uring = uring
        self.completions = completions
        self.disk_fd = disk_fd
        self.readonly = readonly
        self.cdrom = cdrom
        self.direct = direct
        self.journal_fd = journal_fd
        self.options = options
        self.connected = connected
        self.sectors = sectors
        self.sector_size = sector_size
        self.stats: Callable[[], Mapping[str, int]] = dict
        self.resize: Callable[[int], Awaitable[None]] = self._resize
        self._bind = bind
        self._unbind = unbind
        self._report = report
        self._channels: dict[Channel, int] = {}

    async def _resize(self, sectors: int) -> None:
        """Before the backend has begun: it begins with that."""
        self.sectors = sectors

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

    def connected_as(self, params: Params | None) -> None:
        """Remembers `params` in the control plane, to be `connected` in a worker that replaces this one.

        Call it before the first request is taken; None when the ring is gone (closed, or a new handshake begins).
        """
        self.connected = params
        self._report(params)

    def release(self, channel: Channel) -> None:
        """What `unbind` does to one channel."""
        port = self._channels.pop(channel, None)
        if port is not None:
            channel.close()
            self._unbind([port])

    def left_over(self) -> list[Channel]:
        """Channels that are bound still: what the worker unbinds when `run()` has ended."""
        return list(self._channels)
