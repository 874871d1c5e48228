"""Runs inside the private systemd: a soft guest on a disk of the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

IMAGE = Path("/var/lib/evtchnd/a.img")
DOMID, DEVID = 7, 51712


def ctl(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "evtchnd.cli.evtchnctl", *arguments, "-o", "json"], stdout=subprocess.PIPE, check=True
    )
    reply: dict[str, object] = json.loads(done.stdout)
    return reply


def main() -> None:
    content = IMAGE.read_bytes()
    new = os.urandom(4096)
    with SoftVmm("/run/evtchnd/vmm.sock", DOMID) as vm:
        domain = Domain(vm)
        store = XenStore(domain)
        ctl("block-attach", str(DOMID), f"vdev=xvda,target={IMAGE}")
        disk = Blkfront(domain, store, DEVID)
        disk.connect()
        read = disk.read(0, 8) == content[:4096] and disk.read(64, 8) == content[64 * 512 : 72 * 512]
        disk.write(8, new)
        disk.flush()
        written = IMAGE.read_bytes()[4096:8192] == new
        state = "connected" if disk.connected else "not connected"
        disk.disconnect()
        ctl("block-detach", str(DOMID), "xvda")
        store.close()
        domain.close()
    json.dump({"read": read, "written": written, "state": state}, sys.stdout)


if __name__ == "__main__":
    main()
