"""Runs inside the private systemd: a soft guest's vif of the service. The test says what evtchnctl is told."""

from __future__ import annotations

import subprocess
import sys

from evtchnd.guest.domain import Domain
from evtchnd.guest.netfront import Netfront
from evtchnd.guest.xenstore import XenStore
from evtchnd.vmm.soft import SoftVmm

ATTACH = ["--help"]


def main() -> None:
    with SoftVmm("/run/evtchnd/vmm.sock", 7) as vm:
        domain = Domain(vm)
        store = XenStore(domain)
        attach = [sys.executable, "-m", "evtchnd.cli.evtchnctl", *ATTACH]
        done = subprocess.run(attach, capture_output=True, text=True)
        if done.returncode:
            sys.stdout.write(done.stderr)
        else:
            card = Netfront(domain, store)
            card.connect()
            sys.stdout.write("connected")
            card.disconnect()
        store.close()
        domain.close()


main()
