"""In the lab: a real guest, its console on the second serial line, for `python tests/lab guest`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from evtchnd.bench.served import Daemon  # noqa: E402
from evtchnd.cli.varlink import Client  # noqa: E402
from lab import guestimage, prepare, terminal  # noqa: E402

DOMID = 1
REBOOT_S = 60.0
HOST, GUEST = "10.0.0.1", "10.0.0.2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=guestimage.SUITES)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--columns", type=int, default=80)
    arguments = parser.parse_args()
    guest = guestimage.find(prepare.find(), arguments.suite)
    line = os.open(terminal.DEVICE, os.O_RDWR | os.O_NOCTTY)
    with tempfile.TemporaryDirectory() as folder:
        root, data = Path(folder) / "root", Path(folder) / "data"
        subprocess.run(["cp", "--sparse=always", guest.root, root], check=True)
        with data.open("wb") as file:
            file.truncate(1 << 30)
        daemon = Daemon(Path(folder))
        append = f"console=hvc0 quiet root=/dev/xvda GUEST_ROWS={arguments.rows} GUEST_COLUMNS={arguments.columns}"
        append += f" GUEST_ADDRESS={GUEST}/24"
        for command in ("link add br0 type bridge", f"address add {HOST}/24 dev br0", "link set br0 up"):
            subprocess.run(["ip", *command.split()], check=True)
        command = [sys.executable, "-m", "evtchnd.vmm.micro", "--socket", str(daemon.runtime / "vmm.sock")]
        command += ["--kernel", str(guest.kernel), "--initrd", str(guest.initramfs), "--append", append]
        command += ["--domid", str(DOMID), "--name", arguments.suite, "--vcpus", "2"]
        command += ["--disk", f"vdev=xvda,target={root}", "--disk", f"vdev=xvdb,target={data}"]
        command += ["--vif", "mac=00:16:3e:00:00:02,bridge=br0"]
        say(line, f"evtchnd serves. evtchnd-micro starts Debian {arguments.suite}, Linux {guest.release}.")
        say(line, f"Its eth0 is {GUEST}, on a bridge of this machine, which is {HOST} there.")
        micro = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=line, stderr=line)
        try:
            while comes(daemon, micro):
                console = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(daemon.runtime)]
                console += ["console", str(DOMID)]
                subprocess.run(console, stdin=line, stdout=line, stderr=line, check=False)
                if served(daemon):  # ^]
                    break
            else:
                return micro.wait()
            return 0
        finally:
            if micro.poll() is None:
                micro.terminate()
                micro.wait()
            daemon.stop()


def comes(daemon: Daemon, micro: subprocess.Popen[bytes]) -> bool:
    """Waits until the guest is there: at its start, or again after its reboot; False: it has ended for good."""
    end = time.monotonic() + REBOOT_S
    while micro.poll() is None and time.monotonic() < end:
        if served(daemon):
            return True
        time.sleep(0.1)
    return False


def served(daemon: Daemon) -> bool:
    with Client(daemon.runtime / "control.sock") as client:
        return any(row["state"] == "running" for row in client.call("io.evtchnd.List")["domains"])


def say(line: int, text: str) -> None:
    os.write(line, f"{text}\r\n".encode())


if __name__ == "__main__":
    sys.exit(main())
