"""A domain as the control plane holds it: memory, grant frames, ports, disks, its XenStore ring, its worker.

The tables here are the truth; the worker has a copy of them and gets them again when it is replaced. Of the guest's
memory only one page is mapped here, the XenStore ring, from a memfd that was checked for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
import os
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from evtchnd import memory, transport
from evtchnd import protocol as p
from evtchnd.abi import PAGE_SIZE
from evtchnd.control import descriptors, toolstack
from evtchnd.control.config import Config
from evtchnd.control.console import Console, Consoles
from evtchnd.control.descriptors import Held
from evtchnd.control.disk import Disk, Image
from evtchnd.control.fdstore import DescriptorStore
from evtchnd.control.images import Images
from evtchnd.control.kept import Kept, Left
from evtchnd.control.network import Network
from evtchnd.control.ports import STORE, Ports, Vmm
from evtchnd.control.state import DomainState
from evtchnd.control.supervisor import Attachable, Supervisor
from evtchnd.control.vif import Vif, Vifs
from evtchnd.control.zygote import Workers
from evtchnd.errors import EvtchndError, HostError, OperatorError, VmmError
from evtchnd.worker import messages as m
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.quota import Quotas
from evtchnd.xenstore.server import RingConnection, Server

log = logging.getLogger(__name__)

# A domain before its memory and its disks: sockets, pidfd, store page and port, a console, and some air.
DESCRIPTORS = 30
# Of one disk here: image, journal, io_uring, and some air; two more a queue.
DISK_DESCRIPTORS = 6
# Descriptors in one message to the worker; the kernel's limit is 253.
_FDS = 200


class Domain:
    """Made by REGISTER, served from START to `end()`."""

    def __init__(
        self,
        register: p.Register,
        vmm: Vmm,
        *,
        server: Server,
        store: Client,
        workers: Workers,
        images: Images,
        network: Network,
        config: Config,
        attach: Callable[[], Awaitable[None]],
        keeper: DescriptorStore,
        owner: int,
        left: Left | None = None,
    ) -> None:
        """`attach`: attaches what the config names, before the guest runs. left: what a process before this one has
        left of it; owner: the VMM's uid.
        """
        self.domid = register.domid
        self.name = register.name or f"domain-{register.domid}"
        self.uuid = str(uuid.UUID(bytes=register.uuid))
        self.vcpus = register.vcpus
        self.owner = owner
        self.running = False
        self.resumed = isinstance(register, p.Resume)
        self.slots: dict[int, tuple[p.MemoryEntry, Held]] = {}
        self.frames: dict[int, tuple[p.GrantEntry, Held]] = {}
        self.ports = Ports(self.label, vmm, config.limits.ports)
        self.left = left
        self.disks: dict[int, Disk] = {}
        self._unpassed: dict[int, Disk] = {}  # of those that are left: their VMM has to pass them
        for disk in left.disks.values() if left is not None else ():
            (self._unpassed if disk.passed else self.disks)[disk.devid] = disk
        self._coming: set[int] = set()
        self._kept = Kept(register.domid, keeper, left)
        self.store_port = 0
        self.consoles = Consoles(self.domid, server=server, store=store, ports=self.ports, images=images, config=config)
        self.vifs = Vifs(
            self.domid,
            server=server,
            store=store,
            ports=self.ports,
            network=network,
            config=config,
            kept=self._kept,
            note=self.note,
        )
        if left is not None:
            self.vifs.expect(left.vifs)
        self.supervisor = Supervisor(self, workers, config)
        self._config = config
        self._images = images
        self._server = server
        self._store = store
        self._attach_first = attach
        self._page: mmap.mmap | None = None
        self._ring: RingConnection | None = None
        self._ended = False
        self._removing: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    @property
    def label(self) -> str:
        """As every line about it begins."""
        return f"domain {self.domid}"

    @property
    def memory_bytes(self) -> int:
        return sum(entry.pages for entry, _ in self.slots.values()) * PAGE_SIZE

    @property
    def state(self) -> str:
        if self._ended or not self.running:
            return "ended" if self._ended else "registered"
        return "failing" if self.supervisor.failing else "running"

    # ---- memory and grant frames

    def set_slots(self, entries: Iterable[p.MemoryEntry], fds: Sequence[int]) -> None:
        """The whole table, before START. Takes the descriptors. VmmError: nothing has changed."""
        held = self._check_all(entries := list(entries), fds)
        old, self.slots = self.slots, {entry.slot: (entry, held[entry.fd_index].take()) for entry in entries}
        _drop([*held, *(each for _, each in old.values())])

    def set_frames(self, entries: Iterable[p.GrantEntry], fds: Sequence[int]) -> None:
        """As set_slots."""
        held = self._check_all(entries := list(entries), fds)
        old, self.frames = self.frames, {entry.index: (entry, held[entry.fd_index].take()) for entry in entries}
        _drop([*held, *(each for _, each in old.values())])

    def set_ports(self, entries: Iterable[p.PortEntry], fds: Sequence[int]) -> None:
        """Ports that are bound already (RESUME). Takes the descriptors."""
        self.ports.resume({entry.port: (fds[entry.kick_fd_index], fds[entry.notify_fd_index]) for entry in entries})

    def _check_all(self, entries: Sequence[p.MemoryEntry | p.GrantEntry], fds: Sequence[int]) -> list[Held]:
        try:
            descriptors.require(0, self.label)
            for entry in entries:
                self._check(entry, fds[entry.fd_index])
        except EvtchndError:
            transport.close_all(fds)
            raise
        return [Held(fd) for fd in fds]

    def _check(self, entry: p.MemoryEntry | p.GrantEntry, fd: int) -> None:
        if isinstance(entry, p.MemoryEntry):
            what, pages, most = f"memory slot {entry.slot}", entry.pages, self._config.limits.memory_slots
            number = entry.slot
        else:
            what, pages, most = f"grant frame {entry.index}", 1, self._config.limits.grant_frames
            number = entry.index
        if number >= most:
            raise VmmError(f"{self.label}: {what}: the limit is {most}", errno.ERANGE)
        # only the worker maps these: huge pages are fine as guest memory
        huge = isinstance(entry, p.MemoryEntry)
        memory.check_memfd(fd, entry.offset, pages * PAGE_SIZE, f"{self.label}: {what}", hugetlb=huge)

    async def add_slot(self, entry: p.MemoryEntry, fd: int) -> None:
        """Takes `fd`. VmmError: the slot is there, or overlaps another."""
        held = self._check_all([entry], [fd])[0]
        async with self._changing:
            try:
                p.check_table([*(each for each, _ in self.slots.values()), entry])
            except VmmError:
                held.drop()
                raise
            self.slots[entry.slot] = (entry, held)
            slot = m.Slot(entry.slot, 0, entry.gfn, entry.pages, entry.offset)
            try:
                await self.supervisor.change(lambda id: m.Memory(id, [], [slot], [], []), [held.fd])
            except VmmError:
                del self.slots[entry.slot]
                held.drop()
                raise

    async def remove_slot(self, slot: int) -> None:
        async with self._changing:
            if slot not in self.slots:
                raise VmmError(f"{self.label}: memory slot {slot} is not there", errno.ENOENT)
            _, held = self.slots.pop(slot)
            held.drop()
            await self.supervisor.change(lambda id: m.Memory(id, [slot], [], [], []))

    async def add_frame(self, entry: p.GrantEntry, fd: int) -> None:
        """Takes `fd`. VmmError: the frame is there."""
        held = self._check_all([entry], [fd])[0]
        async with self._changing:
            if entry.index in self.frames:
                held.drop()
                raise VmmError(f"{self.label}: grant frame {entry.index} is there already", errno.EEXIST)
            self.frames[entry.index] = (entry, held)
            frame = m.Frame(entry.index, 0, entry.offset)
            try:
                await self.supervisor.change(lambda id: m.Memory(id, [], [], [], [frame]), [held.fd])
            except VmmError:
                del self.frames[entry.index]
                held.drop()
                raise

    async def remove_frame(self, index: int) -> None:
        async with self._changing:
            if index not in self.frames:
                raise VmmError(f"{self.label}: grant frame {index} is not there", errno.ENOENT)
            _, held = self.frames.pop(index)
            held.drop()
            await self.supervisor.change(lambda id: m.Memory(id, [], [], [index], []))

    def memory_messages(self, id: Callable[[], int]) -> Iterable[tuple[m.Memory, list[int]]]:
        """All slots and grant frames, in messages of at most so many descriptors."""
        slots: list[m.Slot] = []
        frames: list[m.Frame] = []
        fds: dict[int, int] = {}  # descriptor -> index in the message
        for entry, held in [*self.slots.values(), *self.frames.values()]:
            if held.fd not in fds and len(fds) == _FDS:
                yield m.Memory(id(), [], slots, [], frames), list(fds)
                slots, frames, fds = [], [], {}
            index = fds.setdefault(held.fd, len(fds))
            if isinstance(entry, p.MemoryEntry):
                slots.append(m.Slot(entry.slot, index, entry.gfn, entry.pages, entry.offset))
            elif isinstance(entry, p.GrantEntry):
                frames.append(m.Frame(entry.index, index, entry.offset))
        yield m.Memory(id(), [], slots, [], frames), list(fds)

    # ---- XenStore

    def set_store_page(self, port: int, fd: int, offset: int) -> None:
        """Maps the guest's XenStore page. Takes `fd`. VmmError: it is no page of a sealed memfd."""
        try:
            memory.check_memfd(fd, offset, PAGE_SIZE, f"{self.label}: xenstore page")
            page = memory.map_page(fd, offset)
        finally:
            os.close(fd)
        if self._page is not None:
            self._page.close()
        self._page, self.store_port = page, port

    def store_socket(self) -> socket.socket:
        """A worker's XenStore connection: domain 0, confined to this guest's nodes."""
        ours, theirs = socket.socketpair()
        self._server.attach_socket(ours, domid=0, confine=self.domid)
        return theirs

    # ---- life

    async def start(self) -> None:
        """Serves the domain. VmmError, HostError: it is not served, and may be started again."""
        if not self.slots:
            raise VmmError(f"{self.label}: START without memory")
        self.consoles.check_page(entry for entry, _ in self.slots.values())
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        log.info(
            "%s: %s: served: %d MiB, %d vCPUs, worker %s",
            self.label,
            self.name,
            self.memory_bytes >> 20,
            self.vcpus,
            self.supervisor.pid,
        )

    async def _start(self) -> None:
        if self.left is not None:
            await self.vifs.resume(self.left.vifs)
        await self._attach_first()
        await self.supervisor.start()
        kept = self._server.kept(self.domid)
        self._settle(kept and self.resumed)
        await self._keep_all()
        if kept and not self.resumed:
            # another one of that number, which inherits nothing
            toolstack.release_kept(self._server, self.domid)
        if not (kept and self.resumed):
            toolstack.add_domain(self._server, self)
            quotas = self._config.xenstore_of(self.domid)
            if quotas is not None:
                self._server.store.set_quotas(self.domid, Quotas(**msgspec.structs.asdict(quotas)))
            self._server.introduce(self.domid)
        if self._page is not None:
            kick, notify = await self.ports.bind(STORE, [self.store_port])
            self._ring = self._server.attach_ring(self.domid, self._page, kick, notify)
        self._server.resumed(self.domid)
        self.left = None
        await self.consoles.start(self.supervisor, resumed=kept and self.resumed)
        for disk in self.disks.values():
            if not disk.resumed:
                toolstack.add_disk(self._server, disk)
        self.running = True
        for disk in list(self.disks.values()):
            if disk.resumed:
                self.supervisor.resume(disk)
        await self.consoles.serve()
        for disk in list(self.disks.values()):
            if not disk.resumed:
                await self.supervisor.attach(disk)
        await self.vifs.start(self.supervisor)

    def _settle(self, resumed: bool) -> None:
        """Disks that were left go on where their nodes are there still; nodes without a disk go."""
        for disk in self._unpassed.values():
            log.error("%s: its VMM has not passed it again: removed", disk.name)
            transport.close_all(disk.close())
            if self.left is not None:
                del self.left.disks[disk.devid]
        self._unpassed.clear()
        for disk in self.disks.values():
            disk.resumed = disk.resumed and resumed and self._server.get(toolstack.backend(disk)) is not None
            if disk.resumed:
                disk.leaving = self._server.get(f"{toolstack.backend(disk)}/online") == "0"
            else:
                disk.connected = None
        if resumed:
            toolstack.remove_others(self._server, self.domid, "vbd", self.disks)
        self.vifs.settle(resumed)

    async def _keep_all(self) -> None:
        """All that the next process has to have. HostError: a domain that was not there before cannot be kept."""
        try:
            await self._kept.begin(self._said(), self._fds())
        except HostError as exc:
            if not self.resumed:
                raise
            log.error("%s: would not survive another restart: %s", self.label, exc)

    def _said(self) -> DomainState:
        disks = [disk.said() for disk in self.disks.values()]
        vifs = [vif.said() for vif in self.vifs.by_key.values()]
        return DomainState(domid=self.domid, uuid=self.uuid, uid=self.owner, disks=disks, vifs=vifs)

    def _fds(self) -> dict[str, int]:
        devices: list[Disk | Vif] = [*self.disks.values(), *self.vifs.by_key.values()]
        return {name: fd for each in devices for name, fd in each.kept().items()}

    def held(self) -> dict[str, int]:
        """What the next process is given of it, by name."""
        return self._kept.held(self._fds())

    def note(self) -> None:
        """As supervisor.Owner."""
        self._kept.note(self._said())

    async def _stop(self) -> None:
        """Ends worker, ring and nodes. To the end, also when who asked for it is cancelled meanwhile (its VMM goes)."""
        work = asyncio.get_running_loop().create_task(self._stopped())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    async def _stopped(self) -> None:
        self.running = False
        await self.supervisor.end()
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()
        if self._waits():
            return
        self._server.release(self.domid)
        toolstack.remove_domain(self._server, self.domid, self.uuid)

    def _waits(self) -> bool:
        """Whether it was resumed and has not begun to be served: it goes on waiting for its VMM."""
        return self.resumed and (self.left is not None or self._server.kept(self.domid))

    def give_up(self) -> None:
        """Its guest has ended: it waits for no RESUME any more."""
        left, self.left = self.left, None
        self.resumed = False
        if left is not None:
            left.close_vifs()

    async def end(self) -> None:
        """Ends worker, ring and nodes, and closes every descriptor; but what waits for a RESUME stays, in `left`, too.
        Idempotent.
        """
        if self._ended:
            return
        self._ended = True
        self.consoles.end()
        self.vifs.end()
        try:
            await self._stop()
        finally:
            await self._close()

    async def _close(self) -> None:
        if self._page is not None:
            self._page.close()
        self.ports.close()
        await self.consoles.close()
        if self.left is not None:
            await self.vifs.give_back(self.left.vifs)
        await self.vifs.close()
        disks, left = {**self.disks, **self._unpassed}, self.left.disks if self.left is not None else {}
        images = []
        for disk in disks.values():
            if left.get(disk.devid) is disk:
                images += disk.unpass()
            else:
                if not self._kept.stays:
                    disk.unlock()
                images += disk.close()
        if self.left is None:
            await self._kept.end()
        self._unpassed = {}
        _drop([*(held for _, held in self.slots.values()), *(held for _, held in self.frames.values())])
        self.disks, self.slots, self.frames = {}, {}, {}
        await self._close_images(images)

    async def _close_images(self, fds: Sequence[int]) -> None:
        if fds:
            try:
                await self._images.close(fds)
            except OperatorError as exc:
                log.warning("%s: %s", self.label, exc)

    # ---- ports

    async def bind(self, devid: int, ports: Sequence[int]) -> list[int]:
        """As Ports.bind, for a device that is there."""
        fds = await self.ports.bind(devid, ports) if self._has(devid) else []
        if not self._has(devid):  # it may have been taken away while the VMM thought about it
            self.ports.unbind(devid, ports)
            raise VmmError(f"{self.label}: device {devid} is not there", errno.ENODEV)
        return fds

    def _has(self, key: int) -> bool:
        return key in self.disks or key in self.consoles.by_key or key in self.vifs.by_key

    def unbind(self, devid: int, ports: Sequence[int]) -> None:
        """As Ports.unbind, for a device (STORE is no worker's)."""
        if devid != STORE:
            self.ports.unbind(devid, ports)

    def kick(self, devid: int) -> None:
        """As Ports.kick."""
        self.ports.kick(devid)

    def port_closed(self, port: int) -> None:
        """As Ports.closed."""
        self.ports.closed(port)

    # ---- disks

    def check_room(self, devid: int, vdev: str) -> None:
        """OperatorError if there is no place for that disk."""
        if self._ended:
            raise OperatorError(f"{self.label} has ended")
        if devid in self.disks:
            raise OperatorError(f"{self.label}: {vdev} is there already: {self.disks[devid].target}", errno.EEXIST)
        if devid in self._coming:
            raise OperatorError(f"{self.label}: {vdev} is being attached already", errno.EEXIST)
        if len(self.disks) >= self._config.limits.disks:
            raise OperatorError(f"{self.label}: {len(self.disks)} disks are the limit (limits.disks)", errno.ENOSPC)
        descriptors.require(DISK_DESCRIPTORS + 2 * self._config.vbd.max_queues, f"{self.label}: {vdev}")

    async def attach(self, disk: Disk) -> None:
        """Takes the disk; its device appears now, or at START. OperatorError where the worker cannot serve it, or it
        cannot be kept over a restart.
        """
        if self.running:
            await self._keep(disk)
        self.disks[disk.devid] = disk
        if self.running:
            self.note()
            toolstack.add_disk(self._server, disk)
            await self.supervisor.attach(disk)
            if disk.reason:
                await self.remove(disk)
                raise OperatorError(f"{disk.name}: {disk.reason}")

    async def _keep(self, disk: Disk) -> None:
        """Into the store. The disk is closed where that fails."""
        self._coming.add(disk.devid)
        try:
            await self._kept.keep(disk.kept(), disk.name)
            if self._ended:
                raise OperatorError(f"{self.label} has ended")
        except BaseException as exc:
            await self._kept.forget(disk.kept())
            disk.unlock()
            await self._close_images(disk.close())
            if isinstance(exc, HostError):
                raise OperatorError(str(exc), errno.ENOSPC) from None
            raise
        finally:
            self._coming.discard(disk.devid)

    def unpassed(self, devid: int, *, readonly: bool) -> Disk | None:
        """The disk that was left, and that its VMM passes again now."""
        disk = self._unpassed.get(devid)
        return self._unpassed.pop(devid) if disk is not None and disk.readonly == readonly else None

    async def detach(self, disk: Disk, *, force: bool) -> bool:
        """Takes the disk from the guest and closes it. True: by force. OperatorError: the guest holds on to it."""
        forced = False
        if self.running:
            limit = self._config.limits.detach_s
            if not await toolstack.ask_to_leave(self._server, self._store, disk, limit):
                # its ring is gone if the guest let it go after all, while that was found out
                if self.disks.get(disk.devid) is disk and disk.connected is not None and not force:
                    disk.leaving = True
                    raise OperatorError(
                        f"{disk.name}: the guest did not let it go in {limit:g} s: it is removed when the guest does",
                        errno.EBUSY,
                    )
                forced = True
        await self._take_away(disk)
        return forced

    async def resize(self, disk: Disk, size: int | None) -> None:
        """The disk's size after its owner has changed it, or `size` in bytes; a connected guest is told.

        OperatorError: it cannot be, and why; VmmError: the worker refuses it.
        """
        if size is not None and disk.readonly:
            raise OperatorError(f"{disk.name}: is attached read-only: its image is not made longer")
        if size is not None and size % disk.sector_size:
            raise OperatorError(f"{disk.name}: {size} bytes are no whole sectors of {disk.sector_size}")
        try:
            now = await self._images.resize(disk.vdev, disk.fd, size)
        except OperatorError as exc:
            raise OperatorError(f"{disk.name}: {exc}") from None
        async with self._changing:
            if self.disks.get(disk.devid) is not disk:
                raise OperatorError(f"{disk.name}: was taken away")
            sectors = Image(disk.fd, now, disk.sector_size).sectors
            old = disk.sectors
            if sectors < old and disk.connected is not None:
                raise OperatorError(
                    f"{disk.name}: the image has {sectors} sectors of 512 bytes, the guest uses {old}: "
                    "it is not made smaller while it is connected (detach it)"
                )
            if not sectors:
                raise OperatorError(f"{disk.name}: no sector fits into {now} bytes")
            disk.sectors = sectors
            try:
                await self.supervisor.change(lambda id: m.Resize(id, disk.devid, sectors))
            except VmmError:
                disk.sectors = old
                raise
            self.note()

    def rings_gone(self, device: Disk | Attachable) -> None:
        """The worker has let a device's rings go."""
        if isinstance(device, Disk | Vif):
            toolstack.forget_rings(self._server, device)

    def device_ended(self, device: Attachable) -> None:
        """The backend of a console or a vif has ended by itself."""
        if isinstance(device, Console):
            self.consoles.ended(device)
        elif isinstance(device, Vif):
            self.vifs.ended(device)

    def disk_ended(self, disk: Disk) -> None:
        """The backend has ended by itself: after a detach that took too long, the rest of it happens now."""

        async def remove() -> None:
            await asyncio.sleep(toolstack.SEEN_S)
            if self.disks.get(disk.devid) is disk:
                await self.remove(disk)
                log.info("%s: removed", disk.name)

        if disk.leaving and not disk.reason:
            task = asyncio.get_running_loop().create_task(remove())
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def _take_away(self, disk: Disk) -> None:
        if self.disks.get(disk.devid) is disk:
            await self.supervisor.detach(disk)
        if self.disks.get(disk.devid) is disk:
            await self.remove(disk)

    async def remove(self, disk: Disk) -> None:
        """Nodes, ports, descriptors."""
        del self.disks[disk.devid]
        self.note()
        names = disk.kept()
        self.ports.unbind(disk.devid, self.ports.of(disk.devid))
        toolstack.remove_disk(self._server, disk)
        disk.unlock()
        images = disk.close()
        await self._kept.forget(names)
        await self._close_images(images)


def _drop(held: Iterable[Held]) -> None:
    for each in held:
        each.drop()
