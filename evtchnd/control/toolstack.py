"""What a toolstack writes to XenStore: a domain's nodes and its devices', as xl does (libxl_create.c, libxl_device.c).

Permissions: the guest reads its own directory and owns only what it has to write; a device's frontend directory is
the guest's, readable for domain 0; its backend directory is domain 0's, readable for the guest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Container
from typing import Protocol

from evtchnd.abi import GNTTAB_RESERVED_XENSTORE, XenbusState
from evtchnd.control.disk import Disk
from evtchnd.vifspec import VifSpec
from evtchnd.worker.device import Params
from evtchnd.worker.messages import Vif
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.local import LocalTransaction
from evtchnd.xenstore.server import Server


class Placed(Protocol):
    """A device, as its nodes' paths and its detach need it."""

    @property
    def kind(self) -> str: ...

    domid: int
    devid: int
    connected: Params | None


class Interface(Placed, Protocol):
    """A vif."""

    spec: VifSpec
    host: Vif


class Terminal(Placed, Protocol):
    """A console."""

    page: tuple[int, int] | None
    tty: str


class Introduced(Protocol):
    """What is told of a domain."""

    domid: int
    name: str
    uuid: str
    vcpus: int
    store_port: int
    owner: int

    @property
    def memory_bytes(self) -> int: ...


# A frontend that waits for its backend's last state has seen it then, before the nodes go.
SEEN_S = 0.25
_OF_RINGS = re.compile(
    r"((tx-|rx-|ctrl-)?ring-ref|event-channel(-tx|-rx|-ctrl)?)\d*"
    r"|ring-page-order|num-ring-pages|multi-queue-num-queues|queue-\d+"
)
# libxl's LIBXL_DEVICE_NIC_MTU_DEFAULT: a vif of that size has no `mtu` at its backend
_DEFAULT_MTU = 1500
# A frontend in one of these has a ring, or is about to: a detach waits for it.
_WITH_RING = (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)


def home(domid: int) -> str:
    """/local/domain/7"""
    return f"/local/domain/{domid}"


def _owner(domid: int) -> str:
    """Who may come back for it: with the other nodes it outlives the daemon. No guest reads it."""
    return f"/tool/evtchnd/owner/{domid}"


def owner(server: Server, domid: int) -> int | None:
    """The uid of the VMM that registered a domain; None: it is not known."""
    text = server.get(_owner(domid), "") or ""
    return int(text) if text.isdecimal() else None


def backend(device: Placed) -> str:
    """/local/domain/0/backend/vbd/7/51712"""
    return f"/local/domain/0/backend/{device.kind}/{device.domid}/{device.devid}"


def frontend(device: Placed) -> str:
    """/local/domain/7/device/vbd/51712; a primary console's is /local/domain/7/console"""
    if device.kind == "console" and device.devid == 0:
        return f"{home(device.domid)}/console"
    return f"{home(device.domid)}/device/{device.kind}/{device.devid}"


def add_domain(server: Server, domain: Introduced) -> None:
    """The domain's directory, before its guest runs."""
    domid, path = domain.domid, home(domain.domid)
    readable = ["n0", f"r{domid}"]
    writable = [f"n{domid}"]
    kib = domain.memory_bytes // 1024
    with server.transaction() as t:
        t.rm(path)  # whatever an earlier domain of that number left
        # two guests may say the same uuid, or none (all 0): the second one's node has its number, too
        vm = f"/vm/{domain.uuid}"
        if vm in _vms(t):
            vm = f"{vm}-{domid}"
        t.rm(vm)
        t.write(_owner(domid), domain.owner, perms=["n0"])
        t.mkdir(vm, perms=readable)
        t.write(f"{vm}/uuid", domain.uuid, perms=readable)
        t.write(f"{vm}/name", domain.name, perms=readable)
        t.mkdir(path, perms=readable)
        nodes: dict[str, str | int] = {
            "vm": vm,
            "name": domain.name,
            "domid": domid,
            "memory/static-max": kib,
            "memory/target": kib,
            "store/port": domain.store_port,
            "store/ring-ref": GNTTAB_RESERVED_XENSTORE,
            # Linux asks for XS_RESET_WATCHES at boot only if this says that it is served
            "control/platform-feature-xs_reset_watches": 1,
            **{f"cpu/{vcpu}/availability": "online" for vcpu in range(domain.vcpus)},
        }
        for directory in (
            "memory",
            "store",
            "control",
            "cpu",
            "device",
            *(f"device/{kind}" for kind in ("vbd", "vif", "console")),
        ):
            t.mkdir(f"{path}/{directory}", perms=readable)
        for vcpu in range(domain.vcpus):
            t.mkdir(f"{path}/cpu/{vcpu}", perms=readable)
        for name, value in nodes.items():
            t.write(f"{path}/{name}", value, perms=readable)
        # Linux says in control/feature-* what it can be told by control/shutdown
        told = [
            f"control/{name}" for name in ("shutdown", "sysrq", "feature-poweroff", "feature-reboot", "feature-suspend")
        ]
        for name in (*told, "data", "drivers", "feature", "attr", "error"):
            t.write(f"{path}/{name}", "", perms=writable)


def remove_domain(server: Server, domid: int, uuid: str) -> None:
    """Everything of the domain's that `Server.release` does not know of: its backends and /vm."""
    with server.transaction() as t:
        for kind in t.ls("/local/domain/0/backend") if t.exists("/local/domain/0/backend") else []:
            t.rm(f"/local/domain/0/backend/{kind}/{domid}")
        t.rm(_owner(domid))
        t.rm(f"{home(domid)}/vm")
        for vm in {f"/vm/{uuid}", f"/vm/{uuid}-{domid}"} - _vms(t):
            t.rm(vm)


def release_kept(server: Server, domid: int) -> None:
    """Everything of a domain that was there before this process, and does not come back."""
    vm = server.get(f"{home(domid)}/vm", "") or ""
    server.release(domid)
    remove_domain(server, domid, vm.removeprefix("/vm/"))


def _vms(t: LocalTransaction) -> set[str]:
    """The nodes below /vm that domains have."""
    domains = t.ls("/local/domain") if t.exists("/local/domain") else []
    return {t.get(f"/local/domain/{name}/vm", "") or "" for name in domains}


def add_disk(server: Server, disk: Disk) -> None:
    """Both directories of a vbd, at once: the backend's watch and the guest's fire when all of it is there."""
    front, back = frontend(disk), backend(disk)
    of_guest = [f"n{disk.domid}", "r0"]
    of_host = ["n0", f"r{disk.domid}"]
    device_type = "cdrom" if disk.cdrom else "disk"
    with server.transaction() as t:
        t.rm(back)
        t.rm(front)
        t.mkdir(back.rpartition("/")[0], perms=of_host)
        t.mkdir(back, perms=of_host)
        t.mkdir(front, perms=of_guest)
        of_backend: dict[str, str | int] = {
            "frontend": front,
            "frontend-id": disk.domid,
            "online": 1,
            "removable": int(disk.cdrom),
            "bootable": 1,
            "state": int(XenbusState.INITIALISING),
            "dev": disk.vdev,
            "type": "phy",
            "mode": "r" if disk.readonly else "w",
            "device-type": device_type,
            "params": disk.target,
            "discard-enable": int(disk.discard),
        }
        for name, value in of_backend.items():
            t.write(f"{back}/{name}", value, perms=of_host)
        of_frontend: dict[str, str | int] = {
            "backend": back,
            "backend-id": 0,
            "state": int(XenbusState.INITIALISING),
            "virtual-device": disk.devid,
            "device-type": device_type,
        }
        for name, value in of_frontend.items():
            t.write(f"{front}/{name}", value, perms=of_guest)


def add_console(server: Server, console: Terminal, limit: int) -> None:
    """Both directories of a console. The primary one has no handshake; its `tty` is what xenconsole looks for."""
    front, back = frontend(console), backend(console)
    of_guest = [f"n{console.domid}", "r0"]
    of_host = ["n0", f"r{console.domid}"]
    of_backend: dict[str, str | int] = {
        "frontend": front,
        "frontend-id": console.domid,
        "online": 1,
        "state": int(XenbusState.INITIALISING),
        "protocol": "vt100",
    }
    # what the guest only reads, as libxl has it
    fixed: dict[str, str | int] = {"limit": limit, "type": "xenconsoled", "output": "pty", "tty": console.tty}
    own: dict[str, str | int] = {"backend": back, "backend-id": 0}
    if console.page is not None:
        fixed |= {"port": console.page[0], "ring-ref": console.page[1]}
    else:
        own |= {"protocol": "vt100", "state": int(XenbusState.INITIALISING)}
    with server.transaction() as t:
        t.rm(back)
        t.rm(front)
        t.mkdir(back.rpartition("/")[0], perms=of_host)
        t.mkdir(back, perms=of_host)
        t.mkdir(front, perms=of_guest)
        for name, value in of_backend.items():
            t.write(f"{back}/{name}", value, perms=of_host)
        for name, value in fixed.items():
            t.write(f"{front}/{name}", value, perms=of_host)
        for name, value in own.items():
            t.write(f"{front}/{name}", value, perms=of_guest)


def console_again(server: Server, console: Terminal) -> bool:
    """The primary console's nodes as they were, with its new terminal. False: they are not there, or not the same."""
    if console.page is None:
        return False
    path, (port, gfn) = frontend(console), console.page
    if (server.get(f"{path}/port"), server.get(f"{path}/ring-ref")) != (str(port), str(gfn)):
        return False
    with server.transaction() as t:
        t.write(f"{path}/tty", console.tty)
    return True


def add_vif(server: Server, vif: Interface) -> None:
    """Both directories of a vif, at once, as libxl_nic.c has them. The host's end is wired already: no script comes."""
    front, back, spec, host = frontend(vif), backend(vif), vif.spec, vif.host
    of_guest = [f"n{vif.domid}", "r0"]
    of_host = ["n0", f"r{vif.domid}"]
    of_backend: dict[str, str | int] = {
        "frontend": front,
        "frontend-id": vif.domid,
        "online": 1,
        "state": int(XenbusState.INITIALISING),
        "script": spec.wiring,
        "vifname": host.name,
        "mac": spec.mac,
        **({"ip": " ".join(spec.ip)} if spec.ip else {}),
        **({"rate": _rate(host)} if host.rate[1] else {}),
        **({"mtu": host.mtu} if host.mtu != _DEFAULT_MTU else {}),
        **({"bridge": spec.bridge} if spec.bridge else {}),
        "handle": vif.devid,
        "type": "vif",
        "hotplug-status": "connected",
    }
    of_frontend: dict[str, str | int] = {
        "backend": back,
        "backend-id": 0,
        "state": int(XenbusState.INITIALISING),
        "handle": vif.devid,
        "mac": spec.mac,
        "trusted": int(spec.trusted),
    }
    with server.transaction() as t:
        t.rm(back)
        t.rm(front)
        t.mkdir(back.rpartition("/")[0], perms=of_host)
        t.mkdir(back, perms=of_host)
        t.mkdir(front, perms=of_guest)
        for name, value in of_backend.items():
            t.write(f"{back}/{name}", value, perms=of_host)
        for name, value in of_frontend.items():
            t.write(f"{front}/{name}", value, perms=of_guest)
        t.write(f"{front}/mtu", host.mtu, perms=of_host)


def set_rate(server: Server, vif: Interface) -> None:
    """The backend's `rate`, after a change of it."""
    node = f"{backend(vif)}/rate"
    with server.transaction() as t:
        if vif.host.rate[1]:
            t.write(node, _rate(vif.host), perms=["n0", f"r{vif.domid}"])
        else:
            t.rm(node)


def _rate(host: Vif) -> str:
    return f"{host.rate[0]},{host.rate[1]}"


def forget_rings(server: Server, disk: Placed) -> None:
    """Removes what a frontend that has closed, or begins anew, had published of its rings.

    A kernel after kexec may have another number of queues or of ring pages, and Linux' blkfront writes only the nodes
    that it needs then: `multi-queue-num-queues` of the one before would lead to rings that are not there any more.
    """
    front = frontend(disk)
    if state(server, front) in _WITH_RING:
        return
    with server.transaction() as t:
        for name in t.ls(front) if t.exists(front) else []:
            if _OF_RINGS.fullmatch(name):
                t.rm(f"{front}/{name}")


def remove_disk(server: Server, disk: Disk) -> None:
    """As remove_device."""
    remove_device(server, disk)


def remove_device(server: Server, device: Placed) -> None:
    """Both directories. Their parents stay until the domain's end: below them, a guest that looks for its backend
    gets ENOENT, elsewhere it would be EACCES."""
    with server.transaction() as t:
        t.rm(backend(device))
        t.rm(frontend(device))


def remove_others(server: Server, domid: int, kind: str, devids: Container[int]) -> None:
    """The nodes of every device of a kind that is not one of `devids`: it was being attached, or removed, when the
    process that did so died."""
    with server.transaction() as t:
        path = f"/local/domain/0/backend/{kind}/{domid}"
        for name in t.ls(path) if t.exists(path) else []:
            if not (name.isdecimal() and int(name) in devids):
                t.rm(f"{path}/{name}")
                t.rm(f"{home(domid)}/device/{kind}/{name}")


def state(server: Server, path: str) -> int:
    """A `state` node as a number, 0 where there is none (a guest writes what it likes)."""
    text = server.get(f"{path}/state") or ""
    return int(text) if len(text) == 1 and text in "012345678" else 0


async def ask_to_leave(server: Server, store: Client, device: Placed, limit_s: float) -> bool:
    """Asks the guest to let the device go: online 0, state 5, then the backend's state 6. False: not in time.

    A guest that has no ring on it is not waited for.
    """
    back = backend(device)
    if state(server, frontend(device)) not in _WITH_RING or device.connected is None:
        return True
    try:
        async with asyncio.timeout(limit_s), store.watch(f"{back}/state") as watch:
            with server.transaction() as t:
                t.write(f"{back}/online", 0)
                t.write(f"{back}/state", int(XenbusState.CLOSING))
            async for _ in watch:
                if state(server, back) in (0, XenbusState.CLOSED):
                    break
        await asyncio.sleep(SEEN_S)
        return True
    except TimeoutError:
        pass
    return False
