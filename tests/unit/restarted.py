"""Runs inside the private systemd: soft guests use their disks while the service is restarted or killed.

restarted.py WAY ROUNDS: "restart" (systemctl restart), "upgrade" (evtchnctl), "kill" (SIGKILL, and wait for the next
one), "loop" (SIGKILL as soon as there is something to kill).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from evtchnd.cli.process import evtchnctl
from evtchnd.guest.blkfront import Blkfront
from evtchnd.guest.checkedload import BLOCK, CheckedLoad
from evtchnd.guest.domain import Domain
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import MiB, SoftVmm

SERVICE = "evtchnd.service"
RUNTIME = Path("/run/evtchnd")
DEVID, BLOCKS, GUESTS = 51712, 256, 3


def show(name: str) -> str:
    command = ["systemctl", "show", SERVICE, f"--property={name}", "--value"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def until(true: object, what: str) -> None:
    assert callable(true)
    end = time.monotonic() + 60
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.01)


def main(way: str, rounds: int) -> None:
    rng = random.Random(way)
    empty = show("NFileDescriptorStore")
    guests = []
    for domid in range(1, GUESTS + 1):
        path = Path(f"/var/lib/evtchnd/{domid}.img")
        path.write_bytes(bytes(BLOCKS * BLOCK))
        shutil.chown(path, "evtchnd")
        vm = SoftVmm(RUNTIME / "vmm.sock", domid, memory=16 * MiB, come_back=True)
        domain = Domain(vm)
        store = XenStore(domain)
        evtchnctl(RUNTIME, "block-attach", str(domid), f"{path},raw,xvda,w")
        front = Blkfront(domain, store, DEVID)
        front.connect()
        load = CheckedLoad(front, BLOCKS, seed=domid)
        load.start()
        guests.append((path, vm, domain, store, front, load))
    full = show("NFileDescriptorStore")
    pauses = []
    for _ in range(rounds):
        for *_, load in guests:
            load.mark()
        if way == "restart":
            subprocess.run(["systemctl", "restart", SERVICE], check=True)
        elif way == "upgrade":
            before = show("MainPID")
            evtchnctl(RUNTIME, "upgrade")
            until(lambda before=before: show("MainPID") not in ("0", before), "the next one")
        else:
            pid = int(show("MainPID"))
            if pid:
                os.kill(pid, 9)
            if way == "kill":
                until(lambda pid=pid: show("MainPID") not in ("0", str(pid)), "the next one")
            else:
                time.sleep(rng.random() * 0.3)
        if way != "loop":
            for *_, load in guests:
                before = load.answered
                until(lambda load=load, before=before: load.failed or load.answered > before + 20, "an answer")
                load.mark()
                pauses.append(load.pauses[-1])
    images = []
    for path, vm, domain, store, front, load in guests:
        load.stop()
        front.flush()
        images.append(path.read_bytes() == load.image())
        front.disconnect()
        store.close()
        domain.close()
        vm.close()
    until(lambda: evtchnctl(RUNTIME, "list") == [], "the end of all domains")
    until(lambda: show("NFileDescriptorStore") == empty, "an empty store")
    said = {"images": images, "kept": int(full) - int(empty), "restarts": int(show("NRestarts"))}
    json.dump({**said, "pauses": [round(pause, 3) for pause in pauses]}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
