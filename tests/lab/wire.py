"""A real guest's eth0 on a bridge, and who is at the other end: two network namespaces of the tests' own.

guest: eth0 --- vif1.0 -- br0 (namespace `here`) -- near === veth === far (namespace `far`)
10.88.0.2, fd88::2                                                    10.88.0.1, fd88::1
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from hostnetwork import namespace
from lab.patience import patient
from lab.realguest import RealGuest

MAC = "00:16:3e:88:00:02"
GUEST, FAR = "10.88.0.2", "10.88.0.1"
GUEST6, FAR6 = "fd88::2", "fd88::1"
VIF = "/local/domain/1/device/vif/0"
BACKEND = "/local/domain/0/backend/vif/1/0"
PORT = 5201
# What of a guest's kernel should never be seen.
_COMPLAINTS = "BUG|Oops|WARNING|still in use|vif vif-|blocked for more"


class Wire:
    """Until `close()`."""

    def __init__(self, guest: RealGuest) -> None:
        self.guest = guest
        self._undo = contextlib.ExitStack()
        self.here = self._undo.enter_context(namespace())
        self.far = self._undo.enter_context(namespace())
        try:
            self.bridge()
            self.here.ip(f"link add near type veth peer name far netns {self.far.name}")
            self.join("near")
            self.far.netns.up("far", f"{FAR}/24", f"{FAR6}/64")
            self.attach(f"mac={MAC},bridge=br0,netns={self.here.name}")
            self.address("eth0", GUEST, GUEST6)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """A guest that still lives loses its interface."""
        if self.guest.alive:
            with contextlib.suppress(Exception):
                self.detach("0")
        self._undo.close()

    # ---- the host's end

    def bridge(self) -> None:
        """One that forwards at once: no spanning tree, no wait for its listeners."""
        self.here.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")
        self.here.ip("link set br0 up")

    def join(self, name: str) -> None:
        self.here.ip(f"link set {name} master br0 up")

    def attach(self, vif: str, eth: str = "eth0") -> dict[str, Any]:
        """Returns once the guest has the interface."""
        made: dict[str, Any] = self.guest.call("NetworkAttach", vif=vif)["vif"]
        there = f"[ -e /sys/class/net/{eth} ]"
        self.guest.run(f"for i in $(seq 200); do {there} && break; sleep 0.1; done; {there}", 30)
        return made

    def detach(self, device: str, eth: str = "eth0") -> None:
        self.guest.call("NetworkDetach", device=device, force=False)
        self.guest.run(f"for i in $(seq 100); do [ -e /sys/class/net/{eth} ] || break; sleep 0.1; done", 30)
        self.guest.run(f"[ ! -e /sys/class/net/{eth} ]")

    def set(self, **what: Any) -> None:
        """Live: rate (as `evtchnctl network-set` has it), carrier."""
        self.guest.call("NetworkSet", device="0", **what)

    def vif(self, devid: int = 0) -> dict[str, Any]:
        """What the daemon says of it."""
        found: dict[str, Any] = next(v for v in self.guest.call("NetworkList")["vifs"] if v["devid"] == devid)
        return found

    def counters(self) -> dict[str, int]:
        counted: dict[str, int] = self.vif()["counters"]
        return counted

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """What is counted meanwhile, once it is over."""
        gained: dict[str, int] = {}
        before = self.counters()
        yield gained
        gained |= {name: count - before.get(name, 0) for name, count in self.counters().items()}

    # ---- the guest's end

    def address(self, eth: str, *addresses: str) -> None:
        """The interface is up and has these, usable at once."""
        words = [
            f"ip address add {each}/{64 if ':' in each else 24} dev {eth}{' nodad' if ':' in each else ''}"
            for each in addresses
        ]
        self.guest.run("; ".join([f"ip link set {eth} up", *words]))

    def reaches(self, address: str = FAR, seconds: float = 20) -> None:
        """Waits until it does."""
        self.guest.run(f"for i in $(seq 100); do ping -c1 -W1 -q {address} >/dev/null && break; done", seconds)
        self.guest.run(f"ping -c1 -W2 -q {address}")

    def complaints(self) -> str:
        """What the guest's kernel has against us."""
        return self.guest.run(f"dmesg | grep -E '{_COMPLAINTS}' || true")

    # ---- traffic

    @contextlib.contextmanager
    def started(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A program of the lab's tree, at the far end, until then."""
        full = self.guest.lab.program(*command)
        pipe = subprocess.PIPE
        process = self.far.netns.run(
            lambda: subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def far_run(self, *command: str, seconds: float = 20) -> str:
        """What a program of the tree prints there."""
        full = self.guest.lab.program(*command)
        done = self.far.netns.run(
            lambda: subprocess.run(full, capture_output=True, text=True, timeout=patient(seconds), check=False)
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def iperf_server(self) -> Iterator[None]:
        """For one job."""
        with self.started("usr/bin/iperf3", "-s", "-1", "-p", str(PORT), "--forceflush") as server:
            assert server.stdout is not None
            for line in server.stdout:
                if "listening" in line:
                    break
            yield

    def iperf(self, *options: str, to: str = FAR, seconds: float = 60) -> dict[str, Any]:
        """The guest is the client (-R: it receives); iperf3's `end`."""
        with self.iperf_server():
            said = self.guest.run(f"iperf3 -J -c {to} -p {PORT} {' '.join(options)}", seconds)
        done = json.loads(said[said.index("{") :])
        assert "error" not in done, done["error"]
        end: dict[str, Any] = done["end"]
        return end

    def tcp(self, size: int) -> tuple[Digest, Digest]:
        """Two connections at once of `size` random bytes each, to the guest and from it; what either end hashed."""
        blob = os.urandom(1 << 20) * -(-size // (1 << 20))
        down, up = Digest(blob[:size]), Digest(b"")
        with self._listening() as (sender, to), self._listening() as (receiver, back):
            threads = [
                threading.Thread(target=down.send, args=(sender,)),
                threading.Thread(target=up.receive, args=(receiver,)),
            ]
            for thread in threads:
                thread.start()
            said = self.guest.run(
                f"head -c {size} /dev/urandom >/tmp/up; (cat </dev/tcp/{FAR}/{to} | sha256sum >/tmp/down.sum) & "
                f"cat /tmp/up >/dev/tcp/{FAR}/{back}; wait; sha256sum </tmp/up; cat /tmp/down.sum; rm /tmp/up",
                120,
            ).split()
            for thread in threads:
                thread.join(patient(30))
        up.told, down.told = said[0], said[2]
        return down, up

    @contextlib.contextmanager
    def _listening(self) -> Iterator[tuple[socket.socket, int]]:
        with self.far.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((FAR, 0))
            sock.listen(1)
            sock.settimeout(patient(30))
            yield sock, sock.getsockname()[1]


class Digest:
    """One way of a transfer: the hash of what was sent or received here, and what the guest `told`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.here = hashlib.sha256(data).hexdigest()
        self.count = len(data)
        self.told = ""

    def send(self, listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.settimeout(patient(60))
            connection.sendall(self._data)

    def receive(self, listener: socket.socket) -> None:
        found = hashlib.sha256()
        with listener.accept()[0] as connection:
            connection.settimeout(patient(60))
            while data := connection.recv(1 << 18):
                found.update(data)
                self.count += len(data)
        self.here = found.hexdigest()


class Wires:
    """The wire of whichever guest there is."""

    def __init__(self) -> None:
        self._wire: Wire | None = None

    def get(self, guest: RealGuest) -> Wire:
        if self._wire is None or self._wire.guest is not guest:
            self.close()
            self._wire = Wire(guest)
        return self._wire

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
