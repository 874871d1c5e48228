"""A domain's network interfaces as the control plane holds them: their TAPs' queues, and what survives their worker."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec

from evtchnd import answers, transport
from evtchnd.control import descriptors, toolstack
from evtchnd.control.config import Config
from evtchnd.control.disk import is_free, lent
from evtchnd.control.kept import Kept, LeftVif
from evtchnd.control.network import Network, Passed, Port
from evtchnd.control.ports import Ports
from evtchnd.control.state import VifState
from evtchnd.control.supervisor import Supervisor, freed
from evtchnd.errors import HostError, OperatorError, VmmError
from evtchnd.vifspec import VifSpec, parse
from evtchnd.worker import messages as m
from evtchnd.worker.device import Params, vif_key
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import Server

log = logging.getLogger(__name__)

# Of one vif here: its control ring's port, its answers, and some air; of a queue: one of the TAP, four of ports.
DESCRIPTORS, QUEUE_DESCRIPTORS = 5, 5
# A worker that has just been given a vif may not serve it yet.
_SERVED_S, _TRIES = 0.1, 50
_UNLIMITED = (0, 0)


class Vif:
    """One vif. Owns its TAP's descriptors, and the memfd of what its rings have been answered, once it is made.

    host        what the worker is told of the host's end
    connected   what the live rings are (the worker's words), None while there are none
    reason      why it is off; "" while it is served
    leaving     a detach has given up waiting for the guest: it is removed when the guest lets it go
    resumed     a control plane before this one has served it: its nodes are there
    waits       for the worker that had it then
    """

    kind = "vif"

    def __init__(
        self, domid: int, devid: int, spec: VifSpec, config: Config, vifs: Vifs, passed: Passed | None = None
    ) -> None:
        self.domid = domid
        self.devid = devid
        self.key = vif_key(devid)
        self.spec = spec
        queues = min(spec.queues or config.vif.max_queues, config.vif.max_queues)
        queues = len(passed.fds) if passed is not None else queues
        self.port = Port(self.name, spec.name(domid, devid), queues, spec, self, passed)
        self.host = m.Vif(
            spec.mac,
            queues,
            self.port.name,
            rate=spec.rate or _UNLIMITED,
            stall_s=config.vif.stall_s,
            drain_s=config.vif.drain_s,
        )
        self.connected: Params | None = None
        self.reason = ""
        self.leaving = False
        self.closed = False
        self.resumed = self.waits = False
        self.settled = asyncio.Event()  # its backend serves it, or has given up
        self.fds: list[int] = []
        self.answers = -1
        self._lent = -1  # the same, locked as long as a worker has it (control/disk.py)
        self._vifs = vifs

    @property
    def name(self) -> str:
        """As every line about it begins."""
        return f"domain {self.domid}: {self.kind} {self.devid}"

    def attach(self, id: int) -> tuple[m.AttachVif, list[int]]:
        """What its worker gets, and the descriptors that go along."""
        if self._lent < 0:
            self._lent = lent(self.answers)
        return m.AttachVif(id, self.key, self.devid, self.host, self.connected), [self._lent, *self.fds]

    def free(self) -> bool:
        """Whether no worker has it that a control plane before this one has started."""
        return self.answers < 0 or is_free(self.answers)

    def said(self) -> VifState:
        """What the next control plane has to know."""
        port, passed = self.port, self.port.passed
        return VifState(
            devid=self.devid,
            spec=str(self.spec),
            name=port.name,
            queues=self.host.queues,
            rate=self.host.rate,
            carrier=self.host.carrier,
            made=port.made,
            origin=passed.origin if passed is not None else "",
            passed=passed is not None and passed.by_vmm,
            connected=self.connected,
        )

    def kept(self) -> dict[str, int]:
        """The descriptors that it needs, by name."""
        passed = self.port.passed
        taps = [] if passed is not None and passed.by_vmm else self.fds
        named = {f"vif-{self.devid}/tap-{number}": fd for number, fd in enumerate(taps)}
        return {f"vif-{self.devid}/answers": self.answers, **named}

    def taps_changed(self, fds: list[int]) -> None:
        """As network.Changed."""
        old, self.fds = self.fds, fds
        transport.close_all(old)
        if self.closed:
            transport.close_all(fds)
            self.fds = []
        else:
            self._vifs.keep_taps(self)
            self._vifs.tell(self, lambda id: m.Taps(id, self.key), self.fds)

    def mtu_changed(self, mtu: int) -> None:
        """As network.Changed."""
        if mtu != self.host.mtu and not self.closed:
            self.host = msgspec.structs.replace(self.host, mtu=mtu)
            self._vifs.tell(self, lambda id: m.ChangeVif(id, self.key, mtu=mtu), [])

    def close(self) -> None:
        """Closes what it owns. Idempotent."""
        self.closed = True
        fds, self.fds = self.fds, []
        fds += [fd for fd in (self.answers, self._lent) if fd >= 0]
        self.answers = self._lent = -1
        transport.close_all(fds)

    def again(self, said: VifState) -> None:
        """It is one that was there before this process."""
        self.resumed = True
        self.connected = said.connected
        self.port.made = said.made
        self.host = msgspec.structs.replace(self.host, rate=said.rate, carrier=said.carrier)

    def leave(self) -> LeftVif:
        """The opposite of `again`: what is kept of it is the caller's, the rest is closed."""
        said, kept = self.said(), self.kept()
        left = LeftVif(said, *kept.values())
        self.fds = [fd for fd in self.fds if fd not in left.taps]
        self.answers = -1
        self.close()
        return left

    def described(self) -> dict[str, Any]:
        """As operators see it, without its state and its counters."""
        return {
            "devid": self.devid,
            "mac": self.spec.mac,
            "vifname": self.port.name,
            "bridge": self.spec.bridge,
            "netns": self.spec.netns,
            "ip": " ".join(self.spec.ip),
            "mtu": self.host.mtu,
            "queues": self.host.queues,
            "rate_bytes": self.host.rate[0],
            "rate_usec": self.host.rate[1],
            "carrier": self.host.carrier,
            "link": self.port.state,
            "tap": self.port.origin,
            "reason": self.reason,
            "backend": toolstack.backend(self),
            "frontend": toolstack.frontend(self),
        }


class Vifs:
    """All of one domain, by number; `by_key` is the supervisor's view of them."""

    def __init__(
        self,
        domid: int,
        *,
        server: Server,
        store: Client,
        ports: Ports,
        network: Network,
        config: Config,
        kept: Kept,
        note: Callable[[], None],
    ) -> None:
        """note: what is said of the domain has changed."""
        self.by_key: dict[int, Vif] = {}
        self._opening: dict[int, Vif] = {}
        self._domid = domid
        self._label = f"domain {domid}"
        self._server = server
        self._store = store
        self._ports = ports
        self._network = network
        self._config = config
        self._kept = kept
        self._note = note
        self._left: dict[int, LeftVif] = {}
        self._supervisor: Supervisor | None = None
        self._over = False
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, device: str) -> Vif:
        """By its number, its MAC address (as xl does) or the name of its host's end. OperatorError."""
        every = self.by_key.values()
        found = [vif for vif in every if device == str(vif.devid)]
        # a name may be a number, too, but another one's
        for vif in found or [vif for vif in every if device == vif.port.name or device.lower() == vif.spec.mac]:
            return vif
        raise OperatorError(f"{self._label}: no vif {device}", errno.ENOENT)

    # ---- life

    async def attach(self, spec: VifSpec, passed: Passed | None = None) -> Vif:
        """Makes the host's end, then the device, now or at START. OperatorError: there is nothing of it then.

        passed: queues of a TAP that somebody else opened; taken. Without, those of systemd's that `vifname` names.
        """
        passed = passed or self._network.passed(spec.vifname)
        left = self._left.pop(spec.devid, None) if passed is not None and spec.devid is not None else None
        try:
            vif = await self._open(spec, passed, left)
        except BaseException:
            if passed is not None:
                transport.close_all(passed.fds)
            if left is not None:
                os.close(left.answers)
            raise
        if self._over:  # the domain has ended meanwhile
            await self._network.close(vif.port)
            vif.close()
            raise OperatorError(f"{self._label} has ended")
        vif.host = msgspec.structs.replace(vif.host, mtu=vif.port.mtu)
        if self._supervisor is not None:
            await self._keep(vif)
        self.by_key[vif.key] = vif
        if spec.idle:
            log.warning("%s: %s", vif.name, spec.idle)
        if self._supervisor is not None:
            self._note()
            toolstack.add_vif(self._server, vif)
            await self._supervisor.attach_device(vif)
            if vif.reason:
                await self._remove(vif)
                raise OperatorError(f"{vif.name}: {vif.reason}")
        return vif

    async def _keep(self, vif: Vif) -> None:
        """Into the store. OperatorError: it is closed."""
        self._opening[vif.devid] = vif
        try:
            await self._kept.keep(vif.kept(), vif.name)
        except HostError as exc:
            await self._network.close(vif.port)
            vif.close()
            raise OperatorError(str(exc), errno.ENOSPC) from None
        finally:
            del self._opening[vif.devid]

    def keep_taps(self, vif: Vif) -> None:
        """The TAP is another one: so it is in the store."""
        kept, gone = vif.kept(), [name for name in vif.kept() if "/tap-" in name]

        async def again() -> None:
            await self._kept.forget(gone)
            await self._kept.keep({name: kept[name] for name in gone}, vif.name)

        if vif.key in self.by_key and self._supervisor is not None:
            self._spawn(again())

    def expect(self, left: dict[int, LeftVif]) -> None:
        """Those that were left and that the VMM passes again, taken."""
        for devid in [devid for devid, each in left.items() if each.said.passed]:
            self._left[devid] = left.pop(devid)

    async def resume(self, left: dict[int, LeftVif]) -> None:
        """The others that were left, taken; before `start`."""
        for devid, each in sorted(left.items()):
            try:
                vif = await self._reopen(each)
                self.by_key[vif.key] = vif
            except OperatorError as exc:
                log.error("%s: vif %d: not resumed: %s", self._label, devid, exc)
        left.clear()

    async def give_back(self, left: dict[int, LeftVif]) -> None:
        """The opposite of `resume`: the domain waits for its VMM still."""
        left.update(self._left)
        self._left.clear()
        for key, vif in list(self.by_key.items()):
            if vif.resumed:
                del self.by_key[key]
                await self._network.close(vif.port)
                left[vif.devid] = vif.leave()

    async def _reopen(self, left: LeftVif) -> Vif:
        """Its TAP is there, with what came meanwhile; one that was deleted is made again. OperatorError."""
        said = left.said
        spec, passed = parse(said.spec), Passed(left.taps, said.origin)
        try:
            vif = await self._open(dataclasses.replace(spec, devid=said.devid), passed, left)
        except OperatorError as exc:
            if said.origin:
                transport.close_all([left.answers, *left.taps])
                raise
            log.warning("%s: vif %d: %s: its TAP is made again", self._label, said.devid, exc)
            transport.close_all(left.taps)
            try:
                return await self._open(dataclasses.replace(spec, devid=said.devid), None, left)
            except OperatorError:
                os.close(left.answers)
                raise
        if not said.origin:
            vif.port.passed = None
        return vif

    async def _open(self, spec: VifSpec, passed: Passed | None, left: LeftVif | None = None) -> Vif:
        """left: what there was of it before this process; its answers are taken, unless that fails."""
        vif = Vif(self._domid, self._place(spec), spec, self._config, self, passed)
        most = self._config.vif.max_queues
        if passed is not None and len(passed.fds) > most:
            raise OperatorError(f"{vif.name}: {len(passed.fds)} queues of a TAP, {most} are the most (vif.max_queues)")
        try:
            descriptors.require(DESCRIPTORS + QUEUE_DESCRIPTORS * vif.host.queues, vif.name)
            if left is not None:
                vif.again(left.said)
            vif.answers = (
                left.answers
                if left is not None
                else answers.create(vif.host.queues, f"evtchnd-{vif.domid}-vif-{vif.devid}")
            )
        except HostError as exc:
            raise OperatorError(str(exc)) from None
        self._opening[vif.devid] = vif
        try:
            vif.fds = await self._network.open(vif.port)
        except BaseException as exc:
            if left is not None:
                vif.answers = -1
            vif.close()
            if isinstance(exc, OperatorError):
                raise OperatorError(f"{vif.name}: {exc}", exc.errno) from None
            raise
        finally:
            del self._opening[vif.devid]
        vif.host = msgspec.structs.replace(vif.host, name=vif.port.name)
        return vif

    def _place(self, spec: VifSpec) -> int:
        """A free number. OperatorError."""
        if self._over:
            raise OperatorError(f"{self._label} has ended")
        vifs = [*self.by_key.values(), *self._opening.values()]
        if len(vifs) >= self._config.limits.vifs:
            raise OperatorError(f"{self._label}: {len(vifs)} vifs are the limit (limits.vifs)", errno.ENOSPC)
        taken = {vif.devid for vif in vifs}
        if spec.devid is not None and spec.devid in taken:
            raise OperatorError(f"{self._label}: vif {spec.devid} is there already", errno.EEXIST)
        for vif in vifs:
            if vif.spec.mac == spec.mac:
                raise OperatorError(f"{self._label}: vif {vif.devid} has {spec.mac} already", errno.EEXIST)
        return spec.devid if spec.devid is not None else next(n for n in range(len(taken) + 1) if n not in taken)

    async def start(self, supervisor: Supervisor) -> None:
        """At START: nodes, then its worker's; `attach` does both itself from then on."""
        self._supervisor = supervisor
        vifs = list(self.by_key.values())
        for vif in vifs:
            if not vif.resumed:
                toolstack.add_vif(self._server, vif)
        for vif in vifs:
            if vif.resumed:
                supervisor.resume_device(vif, freed(vif))
            else:
                await supervisor.attach_device(vif)

    def settle(self, resumed: bool) -> None:
        """Before `start`: those that were left go on where their nodes are there still; nodes without a vif go."""
        for left in self._left.values():
            log.error("%s: vif %d: its VMM has not passed it again: removed", self._label, left.said.devid)
            os.close(left.answers)
        self._left.clear()
        for vif in self.by_key.values():
            back = toolstack.backend(vif)
            vif.resumed = vif.resumed and resumed and self._server.get(back) is not None
            if vif.resumed:
                vif.leaving = self._server.get(f"{back}/online") == "0"
            else:
                vif.connected = None
        if resumed:
            toolstack.remove_others(self._server, self._domid, "vif", [vif.devid for vif in self.by_key.values()])

    async def detach(self, device: str, *, force: bool) -> tuple[Vif, bool]:
        """Takes a vif from the guest. True: by force. OperatorError: the guest holds on to it."""
        vif, forced = self.find(device), False
        supervisor, limit = self._supervisor, self._config.limits.detach_s
        if supervisor is not None:
            if not await toolstack.ask_to_leave(self._server, self._store, vif, limit):
                if self.by_key.get(vif.key) is vif and vif.connected is not None and not force:
                    vif.leaving = True
                    raise OperatorError(
                        f"{vif.name}: the guest did not let it go in {limit:g} s: it is removed when the guest does",
                        errno.EBUSY,
                    )
                forced = True
            if self.by_key.get(vif.key) is vif:
                await supervisor.detach_device(vif)
        await self._remove(vif)
        return vif, forced

    def ended(self, vif: Vif) -> None:
        """The backend has ended by itself: after a detach that took too long, the rest of it happens now."""

        async def remove() -> None:
            await asyncio.sleep(toolstack.SEEN_S)
            await self._remove(vif)

        if vif.leaving and not vif.reason:
            self._spawn(remove())

    async def _remove(self, vif: Vif) -> None:
        if self.by_key.get(vif.key) is vif:
            del self.by_key[vif.key]
            self._note()
            names = vif.kept()
            self._ports.unbind(vif.key, self._ports.of(vif.key))
            toolstack.remove_device(self._server, vif)
            await self._forget(vif)
            await self._kept.forget(names)
            log.info("%s: removed", vif.name)

    def end(self) -> None:
        """The domain ends: nothing is begun any more."""
        self._over = True

    async def close(self) -> None:
        """Closes all, for good."""
        self._over = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        vifs = list(self.by_key.values())
        self.by_key.clear()
        for vif in vifs:
            await self._forget(vif)
        for left in self._left.values():
            os.close(left.answers)
        self._left.clear()

    async def _forget(self, vif: Vif) -> None:
        """Closes it. A TAP of ours goes now, and not with the last copy that somebody keeps."""
        if self._kept.keeps and not self._kept.stays:
            await self._network.delete(vif.port)
        await self._network.close(vif.port)
        vif.close()

    async def capture(self, device: str, fd: int, greeting: bytes, *, snap: int, frames: int) -> None:
        """Gives a reader's stream socket to who serves the vif. `fd` stays the caller's. OperatorError."""
        vif = self.find(device)
        if vif.reason:
            raise OperatorError(f"{vif.name}: off: {vif.reason}")
        if self._supervisor is None:
            raise OperatorError(f"{self._label} does not run yet")
        try:
            await self._supervisor.client(vif, lambda id: m.Capture(id, vif.key, greeting, snap, frames), fd)
        except (VmmError, HostError) as exc:
            raise OperatorError(str(exc)) from None

    # ---- changes

    async def change(self, device: str, rate: tuple[int, int] | None, carrier: bool | None) -> Vif:
        """Live: what the guest may send ((0, 0): anything), and whether its link is up. None: as it was."""
        vif = self.find(device)
        said = {key: value for key, value in (("rate", rate), ("carrier", carrier)) if value is not None}
        old, vif.host = vif.host, msgspec.structs.replace(vif.host, **said)
        try:
            await self._change(vif, lambda id: m.ChangeVif(id, vif.key, rate=rate, carrier=carrier), [])
        except VmmError as exc:
            vif.host = old
            raise OperatorError(str(exc), exc.errno) from None
        if self._supervisor is not None:
            self._note()
            toolstack.set_rate(self._server, vif)
        return vif

    def tell(self, vif: Vif, message: Any, fds: list[int]) -> None:
        """Tells the worker, beside what is going on here."""

        async def told() -> None:
            try:
                await self._change(vif, message, fds)
            except VmmError as exc:
                log.error("%s: its worker does not take a change: %s", vif.name, exc)

        if not self._over:
            self._spawn(told())

    async def _change(self, vif: Vif, message: Any, fds: list[int]) -> None:
        """A worker that does not serve the vif yet gets it once it does; one that comes later has it from `host`."""
        for _ in range(_TRIES):
            if self._supervisor is None or vif.closed or vif.reason or (fds and fds is not vif.fds):
                return
            try:
                await self._supervisor.change(message, fds)
                return
            except VmmError as exc:
                if exc.errno != errno.ENODEV:
                    raise
            await asyncio.sleep(_SERVED_S)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
