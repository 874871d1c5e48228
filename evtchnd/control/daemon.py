"""The control plane of one host: every domain, its worker, its devices, XenStore and the VMMs' socket.

The operator's server calls the coroutines of `Daemon` and nothing else. Each of them raises OperatorError (one line,
meant for the operator) for what cannot be done, and may be called at any time between `start()` and `stop()`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import socket
import uuid
from builtins import list as List
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from evtchnd import diskspec, transport
from evtchnd import protocol as p
from evtchnd.control import config as configuration
from evtchnd.control import descriptors, toolstack
from evtchnd.control.config import Config, Xenstore
from evtchnd.control.disk import Disk
from evtchnd.control.domain import DESCRIPTORS, Domain
from evtchnd.control.fdstore import DescriptorStore
from evtchnd.control.images import Images
from evtchnd.control.inprocess import InProcess
from evtchnd.control.kept import DESCRIPTORS as KEPT
from evtchnd.control.kept import Left
from evtchnd.control.network import Network, Passed
from evtchnd.control.sdnotify import Notifier
from evtchnd.control.vmm_connection import VmmConnection
from evtchnd.control.zygote import Workers, Zygote
from evtchnd.diskspec import DiskSpec
from evtchnd.errors import HostError, OperatorError, VmmError
from evtchnd.vifspec import VifSpec
from evtchnd.xenstore import restore
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.log import Log
from evtchnd.xenstore.migration import MigrationError
from evtchnd.xenstore.quota import Quotas
from evtchnd.xenstore.server import Server, XenStore

log = logging.getLogger(__name__)

# XenStore's log among what is kept
STORE = "xenstore"
# VMMs that connect in one turn of the loop.
_MOST_ACCEPTS = 16
# After accept() has failed; asyncio's own servers wait as long.
_ACCEPT_PAUSE_S = 1.0

# A worker ends when its control plane has; with a TAP there is nothing that it waits for.
_OLD_WORKER_S, _OLD_WORKER_PAUSE_S = 5.0, 0.1


class Daemon:
    """Everything that `evtchnd` serves but the operator's socket.

    config         checked configuration; `config.runtime_dir` holds vmm.sock and xenstored.sock
    zygote         made by `Zygote.fork()` before any event loop or thread exists; None: single process (workers are
                   tasks of this loop)
    listening      listening sockets by name ("vmm", "xenstored") that stay the caller's; those that are missing are
                   made here
    log_of_store   XenStore's log, which somebody else holds, too: what is in it is the store
    taps           queues of TAPs that systemd passed in, by name; the caller's
    keeper         where domains' descriptors are kept for the next daemon
    left           what the daemon before this one has left there, by domain; taken
    """

    def __init__(
        self,
        config: Config,
        *,
        zygote: Zygote | None,
        listening: Mapping[str, socket.socket] | None = None,
        log_of_store: Log | None = None,
        taps: Mapping[str, Sequence[int]] | None = None,
        keeper: DescriptorStore | None = None,
        left: Mapping[int, Left] | None = None,
    ) -> None:
        self._config = config
        self._workers: Workers = zygote if zygote is not None else InProcess()
        self._listening = dict(listening or {})
        self._images = Images(config.limits.image_s)
        self._network = Network(taps)
        store = _store(log_of_store, Quotas(**msgspec.structs.asdict(config.xenstore)))
        self._server = Server(store, poll_us=config.poll.max_us)
        self._log = log_of_store
        self._keeper = keeper if keeper is not None else DescriptorStore(Notifier())
        self._left = dict(left or {})
        self._dropping: dict[int, asyncio.Task[None]] = {}
        self._domains: dict[int, tuple[Domain, VmmConnection]] = {}
        self._connections: set[VmmConnection] = set()
        self._vmm: socket.socket | None = None
        self._made = False
        self._store: Client | None = None
        self._lost: asyncio.TimerHandle | None = None

    # ---- life

    async def start(self) -> None:
        """Listens on vmm.sock and xenstored.sock. HostError if a socket cannot be made."""
        descriptors.raise_limit()
        self._workers.start()
        ours, theirs = socket.socketpair()
        self._server.attach_socket(theirs, domid=0)
        self._store = await Client.from_socket(ours)
        if (given := self._listening.get("xenstored")) is not None:
            await self._server.adopt(given.dup())
        else:
            await self._server.listen(str(self._config.xenstore_socket))
        if (given := self._listening.get("vmm")) is not None:
            self._vmm = given.dup()
            self._vmm.setblocking(False)
        else:
            self._vmm = transport.listen(self._config.vmm_socket)
            self._made = True
        loop = asyncio.get_running_loop()
        loop.add_reader(self._vmm.fileno(), self._accept)
        if kept := len(self._left.keys() | self._server.store.waiting.keys()):
            log.info(
                "%d domains are kept for their VMMs, for %g s (limits.resume_s)", kept, self._config.limits.resume_s
            )
            self._lost = loop.call_later(self._config.limits.resume_s, self._release_lost)

    def reload(self, config: Config) -> None:
        """Another configuration, while guests run: `xenstore` and `domains` of it; the rest is for the next start.

        Quotas that it has changed hold at once, for domains that are there, too; the rest is for domains to come.
        """
        before, self._config = (
            self._config,
            configuration.replace(self._config, xenstore=config.xenstore, domains=config.domains),
        )
        store = self._server.store
        if changed := _changed(before.xenstore, config.xenstore):
            store.set_quotas(None, dataclasses.replace(store.quotas, **changed))
        for domid in self._domains:
            old, new = before.xenstore_of(domid) or before.xenstore, config.xenstore_of(domid) or config.xenstore
            if changed := _changed(old, new):
                store.set_quotas(domid, dataclasses.replace(store.domain(domid).quotas, **changed))
        if later := [key for key in Config.__struct_fields__ if getattr(config, key) != getattr(self._config, key)]:
            log.warning("reloaded, but %s: from the next start on", ", ".join(later))
        else:
            log.info("reloaded")

    def _release_lost(self) -> None:
        """Domains of before this process whose VMMs have not come back."""
        self._lost = None
        for domid in [each for each in {*self._server.store.waiting, *self._left} if each not in self._domains]:
            log.warning("domain %d: its VMM has not come back: released", domid)
            self._release_kept(domid)

    def _release_kept(self, domid: int) -> None:
        """Everything of a domain that was there before this process, and does not come back."""
        if self._server.kept(domid):
            toolstack.release_kept(self._server, domid)
        left = self._left.pop(domid, None)
        if left is not None:
            task = self._dropping[domid] = asyncio.get_running_loop().create_task(left.drop(self._keeper))
            task.add_done_callback(lambda _: self._dropping.pop(domid))

    async def stop(self) -> None:
        """Ends every worker and connection, closes everything. Idempotent.

        XenStore's log keeps its domains: their VMMs may come back to the next daemon.
        """
        self._server.stop_recording()
        self._keeper.over = True
        if self._lost is not None:
            self._lost.cancel()
        vmm, self._vmm = self._vmm, None
        if vmm is not None:
            asyncio.get_running_loop().remove_reader(vmm.fileno())
            vmm.close()
            if self._made:
                self._config.vmm_socket.unlink(missing_ok=True)
        connections = List(self._connections)
        for connection in connections:
            connection.close("evtchnd stops")
        await asyncio.gather(*(connection.closed() for connection in connections))
        await asyncio.gather(*self._dropping.values())
        for left in self._left.values():
            left.close()
        self._left.clear()
        store, self._store = self._store, None
        if store is not None:
            await store.close()
        await self._server.close()
        await self._workers.close()
        if self._log is not None:
            self._log.close()

    # ---- what operators ask

    async def attach_block(self, domid: int, spec: DiskSpec) -> dict[str, Any]:
        """Opens the image, gives it to the domain's worker, writes the device's nodes. Does not wait for the guest.

        Returns {"domid", "devid", "vdev", "target", "readonly", "sectors", "backend", "frontend"}.
        """
        domain = self._domain(domid)
        try:
            domain.check_room(spec.devid, spec.vdev)
            opened = await self._open(domain, spec)
            await domain.attach(opened)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        log.info("%s: %s: attached %s%s", opened.name, opened.vdev, opened.target, " (ro)" if opened.readonly else "")
        return {
            "domid": domid,
            "devid": opened.devid,
            "vdev": opened.vdev,
            "target": opened.target,
            "readonly": opened.readonly,
            "sectors": opened.sectors,
            "backend": toolstack.backend(opened),
            "frontend": toolstack.frontend(opened),
        }

    async def detach_block(self, domid: int, device: str | int, *, force: bool = False) -> dict[str, Any]:
        """Asks the guest to let the device ("xvda" or a device number) go, waits (limits.detach_s), removes it.

        Returns {"domid", "devid", "vdev", "forced"}. A guest that does not answer in time: OperatorError, and the
        device goes once the guest lets it go; with `force` it is taken away.
        """
        domain = self._domain(domid)
        found = self._disk(domain, device)
        try:
            forced = await domain.detach(found, force=force)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        log.info("%s: %s: detached%s", found.name, found.vdev, " by force" if forced else "")
        return {"domid": domid, "devid": found.devid, "vdev": found.vdev, "forced": forced}

    async def console(self, domid: int, devid: int) -> dict[str, Any]:
        """Returns {"devid", "tty"}."""
        found = self._domain(domid).consoles[devid]
        return {"devid": found.devid, "tty": found.tty}

    async def console_client(self, domid: int, devid: int, fd: int, greeting: bytes) -> None:
        """Gives a stream socket to a console: `greeting`, its recent output, then bytes both ways. Copies `fd`."""
        await self._domain(domid).consoles.client(devid, fd, greeting)

    async def attach_console(self, domid: int, devid: int | None = None) -> dict[str, Any]:
        """A further console; does not wait for the guest. Returns {"devid", "tty", "backend", "frontend"}."""
        made = await self._domain(domid).consoles.attach(devid)
        log.info("%s: attached, %s", made.name, made.tty or "without a pty")
        return {
            "devid": made.devid,
            "tty": made.tty,
            "backend": toolstack.backend(made),
            "frontend": toolstack.frontend(made),
        }

    async def detach_console(self, domid: int, devid: int, *, force: bool = False) -> dict[str, Any]:
        """Takes a further console away, as detach_block. Returns {"devid", "forced"}."""
        try:
            forced = await self._domain(domid).consoles.detach(devid, force=force)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        return {"devid": devid, "forced": forced}

    async def resize_block(self, domid: int, device: str | int, size: int | None = None) -> dict[str, Any]:
        """The device gets the size that its image has now, or, of a file, `size` bytes; a guest sees it at once.

        Returns {"domid", "devid", "vdev", "sectors", "sector_size"}.
        """
        domain = self._domain(domid)
        found = self._disk(domain, device)
        try:
            await domain.resize(found, size)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        log.info("%s: %s: %d sectors of 512 bytes", found.name, found.vdev, found.sectors)
        return {
            "domid": domid,
            "devid": found.devid,
            "vdev": found.vdev,
            "sectors": found.sectors,
            "sector_size": found.sector_size,
        }

    async def attach_vif(self, domid: int, spec: VifSpec) -> dict[str, Any]:
        """Makes and wires the host's end, gives it to the domain's worker, writes the device's nodes. Does not wait for
        the guest. Returns what `vifs` has of it, without "state" and "counters".
        """
        domain = self._domain(domid)
        try:
            made = await domain.vifs.attach(spec)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        log.info("%s: attached, %s %s", made.name, made.port.name, made.spec.bridge)
        return made.described()

    async def detach_vif(self, domid: int, device: str, *, force: bool = False) -> dict[str, Any]:
        """As detach_block; `device`: number, MAC address or the name of the host's end. Returns {"devid", "forced"}."""
        try:
            gone, forced = await self._domain(domid).vifs.detach(device, force=force)
        except (HostError, VmmError) as exc:
            raise OperatorError(str(exc)) from None
        return {"devid": gone.devid, "forced": forced}

    async def change_vif(
        self, domid: int, device: str, *, rate: tuple[int, int] | None = None, carrier: bool | None = None
    ) -> dict[str, Any]:
        """What the guest may send (bytes, microseconds; (0, 0): anything), whether its link is up; None: as it was."""
        changed = await self._domain(domid).vifs.change(device, rate, carrier)
        log.info(
            "%s: rate %d,%d, carrier %s", changed.name, *changed.host.rate, "up" if changed.host.carrier else "down"
        )
        return changed.described()

    def vif_named(self, device: str) -> tuple[int, int, str]:
        """By the name of its host's end, or as vifDOMID.DEVID: (domid, devid, that name). OperatorError."""
        every = [vif for domain, _ in self._domains.values() for vif in domain.vifs.by_key.values()]
        found = [vif for vif in every if vif.port.name == device]
        found = found or [vif for vif in every if f"vif{vif.domid}.{vif.devid}" == device]
        if not found:
            raise OperatorError(f"no domain has a vif {device} (evtchnctl network-list DOM)", errno.ENOENT)
        if len(found) > 1:
            names = ", ".join(f"vif{vif.domid}.{vif.devid}" for vif in found)
            raise OperatorError(f"{device}: {names} are named so, each in a network namespace of its own: say which")
        return found[0].domid, found[0].devid, found[0].port.name

    async def capture_vif(self, device: str, fd: int, greeting: bytes, *, snap: int, frames: int) -> None:
        """Copies of a vif's frames to a stream socket: `greeting`, then pcapng. `snap`: bytes of a frame at most,
        `frames`: it ends after so many; 0: no limit. Copies `fd`.
        """
        domid, devid, _ = self.vif_named(device)
        await self._domain(domid).vifs.capture(str(devid), fd, greeting, snap=snap, frames=frames)

    async def vifs(self, domid: int) -> List[dict[str, Any]]:
        """One object a vif: control/vif.py's Vif.described(), "state" (xenbus) and "counters" {name: int}."""
        domain = self._domain(domid)
        return self._vifs(domain, await domain.supervisor.counters())

    def _vifs(self, domain: Domain, counters: Mapping[int, Mapping[str, int]]) -> List[dict[str, Any]]:
        return [
            {
                **each.described(),
                "state": toolstack.state(self._server, toolstack.backend(each)),
                "counters": counters.get(each.key, {}),
            }
            for each in domain.vifs.by_key.values()
        ]

    def held(self) -> dict[str, int]:
        """All that the next daemon is given, by name; still this one's. OperatorError: nobody keeps anything."""
        if not self._keeper or self._log is None:
            raise OperatorError("nobody keeps what guests need over a restart: systemd does, and evtchnd --keep")
        found = {STORE: self._log.fd}
        for domain, _ in self._domains.values():
            found |= domain.held()
        for left in self._left.values():
            found |= left.held()
        return found

    async def list(self) -> List[dict[str, Any]]:
        """One object a domain: {"domid", "name", "uuid", "state", "memory" (bytes), "vcpus", "devices" (count)}."""
        return [_summary(domain) for _, (domain, _) in sorted(self._domains.items())]

    async def info(self, domid: int) -> dict[str, Any]:
        """As in list(), and "slots", "grant_frames", "ports", "vmm_pid", "worker" {"pid", "restarts", "failing"} and
        "devices": [{"kind", "devid", "vdev", "target", "readonly", "state" (xenbus), "counters" {name: int}, and of a
        disk "sectors" (of 512 bytes), "sector_size" (bytes), "cache" ("writeback", "none")}]
        and "consoles": [{"devid", "tty", "log", "state", "counters"}], and "vifs" as in vifs().
        """
        domain = self._domain(domid)
        counters = await domain.supervisor.counters()
        return {
            **_summary(domain),
            "slots": len(domain.slots),
            "grant_frames": len(domain.frames),
            "ports": len(domain.ports),
            "vmm_pid": self._domains[domid][1].peer.pid if domid in self._domains else 0,
            "worker": {
                "pid": domain.supervisor.pid or 0,
                "restarts": domain.supervisor.restarts,
                "failing": domain.supervisor.failing,
            },
            "vifs": self._vifs(domain, counters),
            "devices": [
                {
                    "kind": each.kind,
                    "devid": each.devid,
                    "vdev": each.vdev,
                    "target": each.target,
                    "readonly": each.readonly,
                    "sectors": each.sectors,
                    "sector_size": each.sector_size,
                    "cache": "none" if each.direct else "writeback",
                    "state": toolstack.state(self._server, toolstack.backend(each)),
                    "counters": counters.get(each.devid, {}),
                }
                for each in domain.disks.values()
            ],
            "consoles": [
                {
                    "devid": each.devid,
                    "tty": each.tty,
                    "log": each.log_path,
                    "state": each.reason or "on",
                    "counters": counters.get(each.key, {}),
                }
                for each in domain.consoles.by_key.values()
            ],
        }

    def _domain(self, domid: int) -> Domain:
        if domid not in self._domains:
            raise OperatorError(f"domain {domid} is not there", errno.ENOENT)
        return self._domains[domid][0]

    def _disk(self, domain: Domain, device: str | int) -> Disk:
        for each in domain.disks.values():
            if device in (each.vdev, each.devid, str(each.devid)):
                return each
        with suppress(OperatorError):  # another name of the same number
            if isinstance(device, str) and (devid := diskspec.devid_of(device)) in domain.disks:
                return domain.disks[devid]
        raise OperatorError(f"{domain.label}: no disk {device}", errno.ENOENT)

    async def _open(self, domain: Domain, spec: DiskSpec) -> Disk:
        readonly = spec.readonly or spec.cdrom
        image = await self._images.open(
            spec.target, readonly=readonly, sector_size=spec.sector_size, direct=spec.direct
        )
        try:
            # the domain may have changed meanwhile
            if self._domains.get(domain.domid, (None,))[0] is not domain:
                raise OperatorError(f"{domain.label} has ended")
            domain.check_room(spec.devid, spec.vdev)
        except BaseException:
            await self._images.close([image.fd])
            raise
        return Disk(
            domain.domid,
            spec.devid,
            spec.vdev,
            image,
            target=str(spec.target),
            readonly=readonly,
            cdrom=spec.cdrom,
            discard=spec.discard,
            vbd=self._config.vbd,
        )

    # ---- what VMMs ask (vmm_connection.Host)

    def _accept(self) -> None:
        vmm = self._vmm
        for _ in range(_MOST_ACCEPTS):
            if vmm is None:
                return
            try:
                sock, _ = vmm.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                # it waits on: without a pause the loop would turn for nothing else (no descriptor is free, for one)
                log.error("a VMM cannot connect: %s: next try in %g s", exc.strerror, _ACCEPT_PAUSE_S)
                self._accept_later()
                return
            pending = sum(connection.domain is None for connection in self._connections)
            if pending >= self._config.limits.pending_connections:
                log.warning("vmm %s: refused: %d connections have not registered yet", transport.peer(sock), pending)
                sock.close()
                continue
            self._connections.add(VmmConnection(sock, self, self._config.limits))

    def _accept_later(self) -> None:
        loop = asyncio.get_running_loop()
        if self._vmm is not None:
            loop.remove_reader(self._vmm.fileno())

        def again() -> None:
            if self._vmm is not None:
                loop.add_reader(self._vmm.fileno(), self._accept)

        loop.call_later(_ACCEPT_PAUSE_S, again)

    def register(self, register: p.Register, connection: VmmConnection) -> Domain:
        """A new domain. VmmError: its number is taken or another user's, there are too many; HostError: no descriptors
        left.
        """
        domid, uid = register.domid, connection.peer.uid
        if domid in self._domains:
            other = self._domains[domid][1]
            raise VmmError(f"domain {domid}: registered already, by {other.peer}", errno.EEXIST)
        if len(self._domains) >= self._config.limits.domains:
            raise VmmError(f"domain {domid}: {len(self._domains)} are the limit (limits.domains)", errno.ENOSPC)
        if self._store is None:
            raise HostError(f"domain {domid}: evtchnd stops")
        entries = [entry for entry in self._config.domains if entry.domid == domid]
        left = self._left.get(domid)
        if left is not None and isinstance(register, p.Resume):
            _check_resumed(register, left, uid)
        # a domain of before this process waits for its VMM: nobody else gets its number, its nodes or its guest
        kept = [toolstack.owner(self._server, domid)] if self._server.kept(domid) else []
        kept += [left.said.uid] if left is not None and left.said is not None else []
        owners = [(entry.uid, "domains[].uid") for entry in entries] + [
            (each, "it is kept for its VMM") for each in kept
        ]
        for owner, why in owners:
            if owner not in (None, uid) and uid != 0:
                raise VmmError(f"domain {domid}: is uid {owner}'s ({why}), not {connection.peer}'s", errno.EPERM)
        if left is not None and not isinstance(register, p.Resume):  # a new domain of that number inherits nothing
            self._release_kept(domid)
            left = None
        if left is None:
            self._keeper.require(KEPT, f"domain {domid}")
        disks = [spec for entry in entries for spec in entry.disk_specs]
        vifs = [spec for entry in entries for spec in entry.vif_specs]
        descriptors.require(DESCRIPTORS, f"domain {domid}")
        domain = Domain(
            register,
            connection,
            server=self._server,
            store=self._store,
            workers=self._workers,
            images=self._images,
            network=self._network,
            config=self._config,
            attach=lambda: self._attach_configured(domain, disks, vifs),
            keeper=self._keeper,
            left=left,
            owner=uid,
        )
        self._left.pop(domid, None)
        self._domains[domid] = (domain, connection)
        return domain

    async def _attach_configured(self, domain: Domain, disks: List[DiskSpec], vifs: List[VifSpec]) -> None:
        """The config's devices, before the domain is served. One that cannot be had is missing, with a line."""
        if (dropping := self._dropping.get(domain.domid)) is not None:
            await asyncio.wait([dropping])
        for vif in vifs:
            if any(vif.devid == each.devid for each in domain.vifs.by_key.values()):  # a second START
                continue
            try:
                await self._attach_vif(domain, vif)
            except (HostError, OperatorError) as exc:
                log.error("%s: vif %s: not attached: %s", domain.label, vif.devid, exc)
        for spec in disks:
            if spec.devid in domain.disks:  # a second START, or the VMM passed it
                continue
            try:
                domain.check_room(spec.devid, spec.vdev)
                await domain.attach(await self._open(domain, spec))
            except (HostError, OperatorError) as exc:
                log.error("%s: %s: not attached: %s", domain.label, spec.vdev, exc)

    async def _attach_vif(self, domain: Domain, spec: VifSpec) -> None:
        """Of a domain that is resumed: the worker of the daemon before this one may have its TAP still."""
        deadline = asyncio.get_running_loop().time() + (_OLD_WORKER_S if domain.resumed else 0)
        while True:
            try:
                await domain.vifs.attach(spec)
                return
            except OperatorError as exc:
                if exc.errno != errno.EBUSY or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_OLD_WORKER_PAUSE_S)

    async def release(self, domain: Domain, reason: str) -> None:
        """Ends a domain and everything of it."""
        await domain.end()
        if self._domains.get(domain.domid, (None,))[0] is domain:
            del self._domains[domain.domid]
            log.info("%s: %s", domain.label, reason)
            if domain.left is not None:
                self._left[domain.domid] = domain.left
            if self._lost is None and domain.resumed and not self._keeper.over:
                # it has not begun to be served, and is not waited for any more
                self._release_kept(domain.domid)

    async def attach_passed(self, domain: Domain, message: p.Disk, fd: int) -> None:
        """A disk that a VMM passes as a descriptor. Takes `fd`."""
        readonly = bool(message.flags & (p.DiskFlag.READONLY | p.DiskFlag.CDROM))
        image = await self._images.passed(fd, readonly=readonly)
        if (again := domain.unpassed(message.devid, readonly=readonly)) is not None:
            again.fd = image.fd
            await domain.attach(again)
            return
        try:
            domain.check_room(message.devid, message.vdev)
        except BaseException:
            await self._images.close([fd])
            raise
        await domain.attach(
            Disk(
                domain.domid,
                message.devid,
                message.vdev,
                image,
                target=f"descriptor of {self._domains[domain.domid][1].peer}",
                readonly=readonly,
                cdrom=bool(message.flags & p.DiskFlag.CDROM),
                vbd=self._config.vbd,
                passed=True,
            )
        )

    async def detach_passed(self, domain: Domain, devid: int) -> None:
        """DISK_REMOVE: as an operator's detach."""
        if devid not in domain.disks:
            raise VmmError(f"{domain.label}: no disk {devid}", errno.ENOENT)
        await domain.detach(domain.disks[devid], force=False)

    async def attach_passed_vif(self, domain: Domain, message: p.Vif, fds: List[int]) -> None:
        """A TAP's queues that a VMM passes. Takes `fds`. It is wired by whoever made it."""
        spec = VifSpec(mac=message.mac.hex(":"), wiring="none", mtu=message.mtu, devid=message.devid)
        made = await domain.vifs.attach(
            spec, Passed(fds, f"descriptor of {self._domains[domain.domid][1].peer}", by_vmm=True)
        )
        log.info("%s: attached, %s, passed by its VMM", made.name, made.port.name)

    async def detach_passed_vif(self, domain: Domain, devid: int) -> None:
        """VIF_REMOVE: as an operator's detach."""
        await domain.vifs.detach(str(devid), force=False)

    def gone(self, connection: VmmConnection) -> None:
        """A connection has ended, and its domain."""
        self._connections.discard(connection)


def _check_resumed(register: p.Resume, left: Left, uid: int) -> None:
    """VmmError: what was left of that guest is another's, or cannot be read."""
    domid = register.domid
    if left.said is None:
        raise VmmError(f"domain {domid}: cannot be resumed: {left.reason}", errno.ESTALE)
    if left.said.uuid != str(uuid.UUID(bytes=register.uuid)):
        raise VmmError(f"domain {domid}: cannot be resumed: the guest of that number was {left.said.uuid}", errno.EPERM)
    if uid not in (0, left.said.uid):
        raise VmmError(f"domain {domid}: cannot be resumed: its VMM was user {left.said.uid}'s", errno.EPERM)


def _store(log_of_store: Log | None, quotas: Quotas) -> XenStore:
    if log_of_store is None:
        return XenStore(quotas)
    try:
        return restore.open_store(log_of_store, quotas)
    except MigrationError as exc:
        log.error("xenstore: the log is damaged, the store begins empty: %s", exc)
        log_of_store.clear()
        return restore.open_store(log_of_store, quotas)


def _summary(domain: Domain) -> dict[str, Any]:
    return {
        "domid": domain.domid,
        "name": domain.name,
        "uuid": domain.uuid,
        "state": domain.state,
        "memory": domain.memory_bytes,
        "vcpus": domain.vcpus,
        "devices": len(domain.disks) + len(domain.vifs.by_key),
    }


def _changed(old: Xenstore, new: Xenstore) -> dict[str, Any]:
    """The quotas of `new` that are others."""
    return {name: value for name, value in msgspec.structs.asdict(new).items() if value != getattr(old, name)}
