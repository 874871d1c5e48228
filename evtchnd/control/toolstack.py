"""What a toolstack writes to XenStore: a domain's nodes and its devices', as xl does (libxl_create.c, libxl_device.c).

Permissions: the guest reads its own directory and owns only what it has to write; a device's frontend directory is
the guest's, readable for domain 0; its backend directory is domain 0's, readable for the guest.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from evtchnd.abi import GNTTAB_RESERVED_XENSTORE, XenbusState
from evtchnd.control.disk import Disk
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.local import LocalTransaction
from evtchnd.xenstore.server import Server


class Introduced(Protocol):
    """What is told of a domain."""

    domid: int
    name: str
    uuid: str
    vcpus: int
    store_port: int

    @property
    def memory_bytes(self) -> int: ...


# A frontend that waits for its backend's last state has seen it then, before the nodes go.
SEEN_S = 0.25
# A frontend in one of these has a ring, or is about to: a detach waits for it.
_WITH_RING = (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)


def home(domid: int) -> str:
    """/local/domain/7"""
    return f"/local/domain/{domid}"


def backend(disk: Disk) -> str:
    """/local/domain/0/backend/vbd/7/51712"""
    return f"/local/domain/0/backend/{disk.kind}/{disk.domid}/{disk.devid}"


def frontend(disk: Disk) -> str:
    """/local/domain/7/device/vbd/51712"""
    return f"{home(disk.domid)}/device/{disk.kind}/{disk.devid}"


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
        for directory in ("memory", "store", "control", "cpu", "device", "device/vbd"):
            t.mkdir(f"{path}/{directory}", perms=readable)
        for vcpu in range(domain.vcpus):
            t.mkdir(f"{path}/cpu/{vcpu}", perms=readable)
        for name, value in nodes.items():
            t.write(f"{path}/{name}", value, perms=readable)
        for name in ("control/shutdown", "data", "drivers", "feature", "attr", "error"):
            t.write(f"{path}/{name}", "", perms=writable)


def remove_domain(server: Server, domid: int, uuid: str) -> None:
    """Everything of the domain's that `Server.release` does not know of: its backends and /vm."""
    with server.transaction() as t:
        for kind in t.ls("/local/domain/0/backend") if t.exists("/local/domain/0/backend") else []:
            t.rm(f"/local/domain/0/backend/{kind}/{domid}")
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


def remove_disk(server: Server, disk: Disk) -> None:
    """Both directories. Their parents stay until the domain's end: below them, a guest that looks for its backend
    gets ENOENT, elsewhere it would be EACCES."""
    with server.transaction() as t:
        t.rm(backend(disk))
        t.rm(frontend(disk))


def state(server: Server, path: str) -> int:
    """A `state` node as a number, 0 where there is none (a guest writes what it likes)."""
    text = server.get(f"{path}/state") or ""
    return int(text) if len(text) == 1 and text in "012345678" else 0


async def ask_to_leave(server: Server, store: Client, disk: Disk, limit_s: float) -> bool:
    """Asks the guest to let the disk go: online 0, state 5, then the backend's state 6. False: not in time.

    A guest that has no ring on the disk is not waited for.
    """
    back = backend(disk)
    if state(server, frontend(disk)) not in _WITH_RING or disk.connected is None:
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
