"""What an operator may ask the daemon, over Varlink: the interface io.evtchnd (io.evtchnd.varlink beside this file).

The structs here are the contract of the replies; a test holds them against the interface's text.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from evtchnd import diskspec, vifspec
from evtchnd.control import varlink
from evtchnd.errors import EvtchndError, OperatorError
from evtchnd.netif import MOST_SNAP

if TYPE_CHECKING:
    from evtchnd.control.config import Limits
    from evtchnd.control.daemon import Daemon

log = logging.getLogger(__name__)

NAME = "io.evtchnd"
DESCRIPTION = files(__package__).joinpath(f"{NAME}.varlink").read_text("utf-8")

# a domain's number on the wire has 16 bits; which of them are domains the daemon knows
Domid = Annotated[int, Meta(ge=0, le=0xFFFF)]
T = TypeVar("T", bound=Struct)


class Domain(Struct, frozen=True):
    domid: int
    name: str
    uuid: str
    state: str
    memory: int
    vcpus: int
    devices: int


class Device(Struct, frozen=True):
    kind: str
    devid: int
    vdev: str
    target: str
    readonly: bool
    state: int
    counters: dict[str, int]
    sectors: int | None = None
    sector_size: int | None = None
    cache: str | None = None


class Worker(Struct, frozen=True):
    pid: int
    restarts: int
    failing: str


class Disk(Struct, frozen=True):
    domid: int
    devid: int
    vdev: str
    target: str
    readonly: bool
    sectors: int
    backend: str
    frontend: str


class Console(Struct, frozen=True):
    devid: int
    tty: str
    log: str
    state: str
    counters: dict[str, int]


class Vif(Struct, frozen=True):
    devid: int
    mac: str
    vifname: str
    bridge: str
    netns: str
    ip: str
    mtu: int
    queues: int
    rate_bytes: int
    rate_usec: int
    carrier: bool
    link: str
    tap: str
    reason: str
    backend: str
    frontend: str
    state: int | None = None
    counters: dict[str, int] | None = None


class ListReply(Struct, frozen=True):
    domains: list[Domain]


class InfoCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid


class InfoReply(Struct, frozen=True):
    domain: Domain
    slots: int
    grant_frames: int
    ports: int
    vmm_pid: int
    worker: Worker
    devices: list[Device]
    consoles: list[Console]
    vifs: list[Vif]


class BlockAttachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    disk: str


class BlockAttachReply(Struct, frozen=True):
    disk: Disk


class BlockDetachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    device: str
    force: bool | None = None


class BlockDetachReply(Struct, frozen=True):
    devid: int
    vdev: str
    forced: bool


class ConsoleCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    devid: int


class ConsoleReply(Struct, frozen=True):
    devid: int
    tty: str


class ConsoleAttachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    devid: int | None = None


class ConsoleAttachReply(Struct, frozen=True):
    devid: int
    tty: str
    backend: str
    frontend: str


class ConsoleDetachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    devid: int
    force: bool | None = None


class ConsoleDetachReply(Struct, frozen=True):
    devid: int
    forced: bool


class BlockResizeCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    device: str
    size: Annotated[int, Meta(gt=0, le=(1 << 63) - 1)] | None = None


class BlockResizeReply(Struct, frozen=True):
    devid: int
    vdev: str
    sectors: int
    sector_size: int


class NetworkAttachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    vif: str


class NetworkAttachReply(Struct, frozen=True):
    vif: Vif


class NetworkDetachCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    device: str
    force: bool | None = None


class NetworkDetachReply(Struct, frozen=True):
    devid: int
    forced: bool


class NetworkSetCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid
    device: str
    rate: str | None = None
    carrier: bool | None = None


class NetworkSetReply(Struct, frozen=True):
    vif: Vif


class NetworkCaptureCall(Struct, frozen=True, forbid_unknown_fields=True):
    device: str
    snap: Annotated[int, Meta(ge=0, le=MOST_SNAP)] | None = None
    frames: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None


class NetworkCaptureReply(Struct, frozen=True):
    domid: int
    devid: int
    vifname: str


class NetworkListCall(Struct, frozen=True, forbid_unknown_fields=True):
    domid: Domid


class NetworkListReply(Struct, frozen=True):
    vifs: list[Vif]


class UpgradeReply(Struct, frozen=True):
    version: str


class Operator:
    """The operator's socket of a running Daemon."""

    def __init__(
        self, daemon: Daemon, limits: Limits, sock: socket.socket, upgrade: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """`sock`: a listening Unix stream socket; it stays the caller's. `upgrade`: OperatorError, or this process ends
        and another one goes on.
        """
        self._daemon = daemon
        self._upgrade_to = upgrade
        methods = {
            "List": varlink.Method(varlink.NoParameters, self._list),
            "Info": varlink.Method(InfoCall, self._info),
            "BlockAttach": varlink.Method(BlockAttachCall, self._block_attach),
            "BlockDetach": varlink.Method(BlockDetachCall, self._block_detach),
            "Console": varlink.Method(ConsoleCall, self._console, self._console_client),
            "ConsoleAttach": varlink.Method(ConsoleAttachCall, self._console_attach),
            "ConsoleDetach": varlink.Method(ConsoleDetachCall, self._console_detach),
            "BlockResize": varlink.Method(BlockResizeCall, self._block_resize),
            "NetworkAttach": varlink.Method(NetworkAttachCall, self._network_attach),
            "NetworkDetach": varlink.Method(NetworkDetachCall, self._network_detach),
            "NetworkSet": varlink.Method(NetworkSetCall, self._network_set),
            "NetworkCapture": varlink.Method(NetworkCaptureCall, self._network_capture, self._network_captured),
            "NetworkList": varlink.Method(NetworkListCall, self._network_list),
            "Upgrade": varlink.Method(varlink.NoParameters, self._upgrade),
        }
        service = varlink.Service(
            [varlink.Interface(DESCRIPTION, methods, _failed)],
            vendor="evtchnd",
            product="evtchnd",
            version=version(),
            url="",
        )
        self._server = varlink.Server(
            service,
            sock,
            connections=limits.operator_connections,
            message_bytes=limits.operator_message_bytes,
            idle_s=limits.operator_idle_s,
        )

    def start(self) -> None:
        """Answers from now on."""
        self._server.start()

    async def close(self) -> None:
        """Ends every connection. Idempotent."""
        await self._server.close()

    async def _list(self, _: varlink.NoParameters) -> ListReply:
        return _reply(ListReply, {"domains": await self._daemon.list()})

    async def _info(self, call: InfoCall) -> InfoReply:
        info = await self._daemon.info(call.domid)
        # `devices` is a list here and a count in the domain
        count = len(info["devices"]) + len(info["vifs"])
        return _reply(InfoReply, {**info, "domain": {**info, "devices": count}})

    async def _block_attach(self, call: BlockAttachCall) -> BlockAttachReply:
        spec = diskspec.parse(call.disk)
        if not spec.target.is_absolute():
            raise OperatorError(f"target '{spec.target}' must be an absolute path: the daemon has its own folder")
        disk = await self._daemon.attach_block(call.domid, spec)
        return _reply(BlockAttachReply, {"disk": disk})

    async def _block_detach(self, call: BlockDetachCall) -> BlockDetachReply:
        gone = await self._daemon.detach_block(call.domid, call.device, force=bool(call.force))
        return _reply(BlockDetachReply, gone)

    async def _console(self, call: ConsoleCall) -> ConsoleReply:
        return _reply(ConsoleReply, await self._daemon.console(call.domid, call.devid))

    async def _console_client(self, call: ConsoleCall, fd: int, greeting: bytes) -> None:
        await self._daemon.console_client(call.domid, call.devid, fd, greeting)

    async def _console_attach(self, call: ConsoleAttachCall) -> ConsoleAttachReply:
        return _reply(ConsoleAttachReply, await self._daemon.attach_console(call.domid, call.devid))

    async def _console_detach(self, call: ConsoleDetachCall) -> ConsoleDetachReply:
        gone = await self._daemon.detach_console(call.domid, call.devid, force=bool(call.force))
        return _reply(ConsoleDetachReply, gone)

    async def _block_resize(self, call: BlockResizeCall) -> BlockResizeReply:
        return _reply(BlockResizeReply, await self._daemon.resize_block(call.domid, call.device, call.size))

    async def _network_attach(self, call: NetworkAttachCall) -> NetworkAttachReply:
        made = await self._daemon.attach_vif(call.domid, vifspec.parse(call.vif))
        return _reply(NetworkAttachReply, {"vif": made})

    async def _network_detach(self, call: NetworkDetachCall) -> NetworkDetachReply:
        gone = await self._daemon.detach_vif(call.domid, call.device, force=bool(call.force))
        return _reply(NetworkDetachReply, gone)

    async def _network_set(self, call: NetworkSetCall) -> NetworkSetReply:
        rate = None if call.rate is None else vifspec.limit(call.rate)
        changed = await self._daemon.change_vif(call.domid, call.device, rate=rate, carrier=call.carrier)
        return _reply(NetworkSetReply, {"vif": changed})

    async def _network_capture(self, call: NetworkCaptureCall) -> NetworkCaptureReply:
        return NetworkCaptureReply(*self._daemon.vif_named(call.device))

    async def _network_captured(self, call: NetworkCaptureCall, fd: int, greeting: bytes) -> None:
        await self._daemon.capture_vif(call.device, fd, greeting, snap=call.snap or 0, frames=call.frames or 0)

    async def _network_list(self, call: NetworkListCall) -> NetworkListReply:
        return _reply(NetworkListReply, {"vifs": await self._daemon.vifs(call.domid)})

    async def _upgrade(self, _: varlink.NoParameters) -> UpgradeReply:
        if self._upgrade_to is None:
            raise OperatorError("nobody would start the next daemon")
        await self._upgrade_to()
        return UpgradeReply(version())


def version() -> str:
    """Of the installed distribution."""
    try:
        return _installed("evtchnd")
    except PackageNotFoundError:
        return "not installed"


def _reply(kind: type[T], data: dict[str, Any]) -> T:
    return msgspec.convert(data, kind)


def _failed(exc: Exception) -> varlink.VarlinkError:
    if isinstance(exc, EvtchndError):
        return varlink.VarlinkError(f"{NAME}.Refused", reason=str(exc))
    log.error("operator's socket: a call failed", exc_info=exc)
    return varlink.VarlinkError(f"{NAME}.Failed", reason=f"{type(exc).__name__}: {exc}")
