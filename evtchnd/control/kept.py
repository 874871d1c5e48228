"""What of a domain outlives this process: its descriptors in the store, and the memfd that says what they are.

    domain-7                       the state (state.py)
    domain-7/vbd-51712/image       of a disk that its VMM does not pass
    domain-7/vbd-51712/journal
    domain-7/vif-0/answers
    domain-7/vif-0/tap-0           a queue of its TAP, unless its VMM passes that

A descriptor is held before the state names it, and the state names it no longer before it is let go: whatever the state
names is there, and what it does not name is let go by the next process. The VMM's own things (memory, grant frames,
ports, disks and TAPs that it passes) come back with its RESUME.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from evtchnd import transport
from evtchnd.control.disk import Disk
from evtchnd.control.fdstore import DescriptorStore
from evtchnd.control.state import DomainState, State, VersionError, VifState
from evtchnd.control.supervisor import freed
from evtchnd.errors import HostError

log = logging.getLogger(__name__)

_NAME = re.compile(r"domain-(\d{1,5})(?:/(.+))?")
# A domain before its devices.
DESCRIPTORS = 1
# An old worker's requests, of a disk that nobody goes on with; its lock may go later, with its last copy.
_FREED_S = 5.0


class Left:
    """What a process before this one has left of a domain.

    said        its state; None where that cannot be read
    reason      why the domain cannot be resumed, "" if it can
    old         the reason is that another version of this program wrote it
    disks       those that can be served again, by number; those that the VMM passes have no image yet
    vifs        the same; the descriptors are taken by whoever takes them out
    names       of all descriptors that the store holds of it
    """

    def __init__(self, domid: int, fds: Mapping[str, Sequence[int]]) -> None:
        """Takes the descriptors; "" names the state's."""
        self.domid = domid
        self.state: State | None = None
        self.said: DomainState | None = None
        self.reason = ""
        self.old = False
        self.disks: dict[int, Disk] = {}
        self.vifs: dict[int, LeftVif] = {}
        self.names = {_full(domid, name) for name in fds}
        self._fds = {name: each[0] for name, each in fds.items()}
        transport.close_all(fd for each in fds.values() for fd in each[1:])
        try:
            self.state = State(self._need("", "its state"))
            del self._fds[""]
            self.said = self.state.read()
            if self.said.domid != domid:
                raise HostError(f"its state is that of domain {self.said.domid}")
        except HostError as exc:
            self.reason, self.old = str(exc), isinstance(exc, VersionError)
            log.error("domain %d: cannot be resumed: %s", domid, exc)
            return
        for each in self.said.disks:
            try:
                image = -1 if each.passed else self._need(f"vbd-{each.devid}/image", "its image")
                disk = Disk.again(domid, each, image, self._need(f"vbd-{each.devid}/journal", "its journal"))
            except HostError as exc:
                log.error("domain %d: vbd %d: cannot be resumed: %s", domid, each.devid, exc)
                continue
            self.disks[each.devid] = disk
            for name in disk.kept():
                del self._fds[name]
        for vif in self.said.vifs:
            try:
                taps = [] if vif.passed else [f"vif-{vif.devid}/tap-{number}" for number in range(vif.queues)]
                names = [f"vif-{vif.devid}/answers", *taps]
                for name in names:
                    self._need(name, name)
            except HostError as exc:
                log.error("domain %d: vif %d: cannot be resumed: %s", domid, vif.devid, exc)
                continue
            self.vifs[vif.devid] = LeftVif(vif, *(self._fds.pop(name) for name in names))
        transport.close_all(self._fds.values())
        self._fds = {}

    def _need(self, name: str, what: str) -> int:
        if name not in self._fds:
            raise HostError(f"{what} is not among what was kept")
        return self._fds[name]

    def held(self) -> dict[str, int]:
        """Descriptors by their full names."""
        state = {} if self.state is None else {"": self.state.fd}
        disks = {name: fd for disk in self.disks.values() for name, fd in disk.kept().items()}
        vifs = {name: fd for vif in self.vifs.values() for name, fd in vif.kept().items()}
        return {_full(self.domid, name): fd for name, fd in {**self._fds, **disks, **vifs, **state}.items()}

    async def drop(self, store: DescriptorStore) -> None:
        """Nobody goes on with it: everything is closed and let go, and its images can be another's."""
        disks, self.disks = list(self.disks.values()), {}
        for disk in disks:
            try:
                async with asyncio.timeout(_FREED_S):
                    await freed(disk)
            except TimeoutError:
                log.warning("%s: its image stays locked: requests of a worker that died are in flight", disk.name)
            disk.unlock()
            transport.close_all(disk.close())
        self.close()
        await store.forget(self.names)

    def close(self) -> None:
        """Closes what is here; the store holds it. Idempotent."""
        disks, self.disks = list(self.disks.values()), {}
        for disk in disks:
            transport.close_all(disk.close())
        self.close_vifs()
        state, self.state = self.state, None
        if state is not None:
            state.close()
            os.close(state.fd)
        transport.close_all(self._fds.values())
        self._fds = {}

    def close_vifs(self) -> None:
        """Those that nobody has taken out."""
        vifs, self.vifs = list(self.vifs.values()), {}
        for vif in vifs:
            transport.close_all([vif.answers, *vif.taps])


class LeftVif:
    """A vif that was left: what is said of it, its answers, its TAP's queues (none where its VMM passes them)."""

    def __init__(self, said: VifState, answers: int, *taps: int) -> None:
        self.said = said
        self.answers = answers
        self.taps = list(taps)

    def kept(self) -> dict[str, int]:
        """The descriptors by name."""
        taps = {f"vif-{self.said.devid}/tap-{number}": fd for number, fd in enumerate(self.taps)}
        return {f"vif-{self.said.devid}/answers": self.answers, **taps}


def left_of(passed: Mapping[str, Sequence[int]]) -> dict[int, Left]:
    """By domain, all that `passed` has of domains. Takes those descriptors."""
    found: dict[int, dict[str, Sequence[int]]] = {}
    for name, fds in passed.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2] or ""] = fds
    return {domid: Left(domid, fds) for domid, fds in sorted(found.items())}


def is_kept(name: str) -> bool:
    """Whether a passed descriptor of that name is a domain's."""
    return _NAME.fullmatch(name) is not None


class Kept:
    """One domain's part of the store. `left`: what it had before this process; taken."""

    def __init__(self, domid: int, store: DescriptorStore, left: Left | None) -> None:
        self._domid = domid
        self._label = f"domain {domid}"
        self._store = store
        self._state = left.state if left is not None else None
        self._names: set[str] = left.names if left is not None else set()

    def held(self, fds: Mapping[str, int]) -> dict[str, int]:
        """The domain's descriptors `fds`, and its state, by their full names; {} where nothing is kept."""
        if self._state is None:
            return {}
        return {_full(self._domid, name): fd for name, fd in {**fds, "": self._state.fd}.items()}

    async def begin(self, said: DomainState, fds: Mapping[str, int]) -> None:
        """The domain is served from now on: `fds` are all that it has to keep. HostError: they cannot be kept.

        What is held and is not among them is let go.
        """
        if not self._store:
            return
        if self._state is None:
            self._state = State.create(f"evtchnd-{self._domid}")
        full = {_full(self._domid, name): fd for name, fd in {**fds, "": self._state.fd}.items()}
        new = {name: fd for name, fd in full.items() if name not in self._names}
        await self._store.keep(new, self._label)
        gone = self._names - full.keys()
        self._names |= full.keys()
        self._names -= gone
        self.note(said)
        await self._store.forget(gone)

    @property
    def keeps(self) -> bool:
        """Whether somebody keeps it."""
        return bool(self._store)

    @property
    def stays(self) -> bool:
        """This process ends, and what is kept is the next one's."""
        return self._store.over

    def note(self, said: DomainState) -> None:
        """What is said of it from now on."""
        if self._state is not None:
            try:
                self._state.write(said)
            except HostError as exc:
                log.error("%s: a restart would not know of its last change: %s", self._label, exc)

    async def keep(self, fds: Mapping[str, int], what: str) -> None:
        """Further descriptors, before anything is said of them. HostError."""
        full = {_full(self._domid, name): fd for name, fd in fds.items()}
        await self._store.keep(full, what)
        self._names |= full.keys()

    async def forget(self, names: Iterable[str]) -> None:
        """Descriptors of which nothing is said any more."""
        gone = {_full(self._domid, name) for name in names} & self._names
        self._names -= gone
        await self._store.forget(gone)

    async def end(self) -> None:
        """The domain has ended. Idempotent."""
        state, self._state = self._state, None
        if state is not None:
            state.close()
            os.close(state.fd)
        gone = set(self._names)
        self._names.clear()
        await self._store.forget(gone)


def _full(domid: int, name: str) -> str:
    return f"domain-{domid}/{name}" if name else f"domain-{domid}"
