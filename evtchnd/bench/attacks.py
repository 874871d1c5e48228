"""What a guest may do to its host, each as a round that can be repeated: rings, grants, XenStore, events, reconnects.

Shared by the tests (tests/hostile: what it may not break) and by `hostile.py` (what it costs a neighbour). Run as a
program (`python -m evtchnd.bench.attacks RUNTIME_DIR DOMID CASE`) it takes "go" and "stop" on standard input, and
answers each with a line: how many rounds it has done. Stopped, it is a guest that only computes: it keeps its CPU busy.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evtchnd import transport
from evtchnd.abi import GTF_PERMIT_ACCESS, XenbusState
from evtchnd.bench import storeattacks as store
from evtchnd.bench.attacker import PATIENCE_S, Attacker, MiB, until
from evtchnd.blkif import X86_64, Op
from evtchnd.errors import HostError, VmmError
from evtchnd.stream import CONSOLE, ByteStream
from evtchnd.vmm.soft import SoftVmm

# blkif's ring page: req_prod, req_event, rsp_prod, rsp_event, then entries of 112 bytes from byte 64 on
_REQ_PROD, _RSP_PROD = 0, 2
_ENTRIES, _ENTRY = 32, 112

# ---- rings and grants


def ring_index(attacker: Attacker) -> None:
    """XSA-39: req_prod where it cannot be. The device is off until the guest begins anew."""
    front = attacker.front()
    with attacker.ring(front) as (_, words):
        jump = attacker.dice.choice((_ENTRIES + 1, 1 << 31, -1))
        words[_REQ_PROD] = (words[_REQ_PROD] + jump) & 0xFFFFFFFF
    attacker.vm.send(front.port)
    front.bus.wait_backend(XenbusState.CLOSING)
    attacker.drop(front)


def _flood(attacker: Attacker, change: Callable[[memoryview, Sequence[int]], None], times: int) -> None:
    """Rings full of requests, each entry made by `change` before it is published and again while it is read."""
    front = attacker.front()
    grefs = front.queues[0]._slots[0].grefs
    with attacker.ring(front) as (page, words):
        for _ in range(times):
            change(page, grefs)
            prod = words[_REQ_PROD] = (words[_REQ_PROD] + _ENTRIES) & 0xFFFFFFFF
            attacker.vm.send(front.port)
            for _ in range(8):
                change(page, grefs)
            until(lambda prod=prod: words[_RSP_PROD] == prod, "requests have no answer")  # type: ignore[misc]
    attacker.drop(front)


def garbage(attacker: Attacker) -> None:
    """XSA-361, 362, 365, 367: requests of nothing but chance, in rings that are full."""

    def change(page: memoryview, _: Sequence[int]) -> None:
        page[64 : 64 + _ENTRIES * _ENTRY] = attacker.dice.randbytes(_ENTRIES * _ENTRY)

    _flood(attacker, change, 20)


def double_fetch(attacker: Attacker) -> None:
    """XSA-155: counts, grants, sectors change while the host reads them."""
    dice = attacker.dice

    def change(page: memoryview, grefs: Sequence[int]) -> None:
        entry = X86_64.request(dice.choice((Op.READ, Op.WRITE)), 7, dice.choice((0, 8)), [(grefs[0], 0, 7)])
        for at in range(64, 64 + _ENTRIES * _ENTRY, _ENTRY):
            page[at : at + len(entry)] = entry
            page[at + 1] = dice.choice((0, 1, 2, 11, 12, 255))
            page[at + 24 : at + 28] = dice.choice((grefs[0], 1 << 20, 0)).to_bytes(4, "little")
            page[at + 28] = dice.choice((0, 7, 8, 255))

    _flood(attacker, change, 20)


def grants_flip(attacker: Attacker) -> None:
    """XSA-295: an entry of the table says another domain, another access, another frame at each look."""
    front = attacker.front()
    gref = attacker.domain.grant(600)
    with attacker.vm.grants.cast("I") as words:
        for _ in range(50):
            for _ in range(4):
                front.submit_raw(lambda ident, _: X86_64.request(Op.READ, ident, 0, [(gref, 0, 7)]), op=Op.READ)
            front.push()
            for _ in range(50):
                words[2 * gref] = GTF_PERMIT_ACCESS | 9 << 16
                words[2 * gref + 1] = 1 << 30
                words[2 * gref] = GTF_PERMIT_ACCESS
                words[2 * gref + 1] = 600
            while front.in_flight:
                front.complete()
        words[2 * gref] = 0
    attacker.domain.end_grant(gref)


def reconnect(attacker: Attacker) -> None:
    """XSA-350: connected and gone again, with requests in the ring."""
    front = attacker.front(queues=2)
    for each in front.queues:
        for _ in range(each.room):
            each.submit_read(0, 8)
        each.push()
    attacker.fronts.pop((front.devid, 2))
    front.bus.switch(XenbusState.CLOSING)
    front.bus.wait_backend(XenbusState.CLOSING, XenbusState.CLOSED)
    front.bus.switch(XenbusState.CLOSED)
    front.bus.wait_backend(XenbusState.CLOSED)
    front.release()


# ---- events


def storm(attacker: Attacker) -> None:
    """XSA-332: all ports of all queues are kicked for nothing, XenStore's and the console's, too."""
    if not attacker.fronts:
        for name in sorted(attacker.store.ls("device/vbd"), key=int):
            path = f"{attacker.store.read(f'device/vbd/{name}/backend')}/multi-queue-max-queues"
            attacker.store.wait_for(path, lambda value: value is not None, PATIENCE_S)
            attacker.front(int(name), queues=int(attacker.store.read(path)))
    ports = [queue.port for front in attacker.fronts.values() for queue in front.queues]
    fds = [attacker.vm.kick_fd(port) for port in (*ports, attacker.vm.store_port, attacker.vm.console_port)]
    for _ in range(50):
        for fd in fds:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(fd, 1)


def ports(attacker: Attacker) -> None:
    """XSA-331, 342: ports are closed, bound anew and reset while they are kicked."""
    front = attacker.front()
    port, fd = front.port, os.dup(attacker.vm.kick_fd(front.port))
    try:
        for _ in range(100):
            os.eventfd_write(fd, 1)
        attacker.vm.close_port(port)
        for _ in range(200):
            os.eventfd_write(fd, 1)
            attacker.vm.close_port(attacker.vm.alloc_unbound(0))
        attacker.vm.reset()
        for _ in range(300):
            os.eventfd_write(fd, 1)
            attacker.vm.alloc_unbound(0)
        attacker.vm.reset()
    finally:
        os.close(fd)
    attacker.reboot()


# ---- the console, the VMM


def console(attacker: Attacker) -> None:
    """Output without end, and indices that cannot be: of the primary console, which goes on when they can be again."""
    with attacker.vm.ram.view(attacker.vm.console_gfn) as page, page.cast("I") as words:
        stream = ByteStream(page, CONSOLE, "front")
        line = bytes(attacker.dice.choices(range(256), k=500))
        for _ in range(100):
            stream.write(line)
            attacker.vm.send(attacker.vm.console_port)
        words[3084 // 4] = (words[3084 // 4] + 5000) & 0xFFFFFFFF
        attacker.vm.send(attacker.vm.console_port)
        time.sleep(0.001)
        words[3084 // 4] = words[3080 // 4]
        stream.close()
        attacker.vm.send(attacker.vm.console_port)


def reboot(attacker: Attacker) -> None:
    """XSA-419: the domain ends, in order or not, and begins again."""
    attacker.reboot()


def vmm_socket(attacker: Attacker) -> None:
    """What no VMM sends: bytes of chance, cut messages, descriptors that belong nowhere, and silence."""
    pipe = os.pipe()
    silent = []
    try:
        for size in (0, 1, 4, 8, 16, 64, 4096, 16384):
            with transport.connect(attacker.vmm_socket) as sock, contextlib.suppress(OSError):
                socket.send_fds(sock, [attacker.dice.randbytes(size) or b"\0"], [pipe[0], pipe[1], 0][: size % 3 + 1])
                sock.settimeout(PATIENCE_S)
                sock.recv(4096)
        with contextlib.suppress(OSError):
            silent += [transport.connect(attacker.vmm_socket) for _ in range(30)]
        with contextlib.suppress(VmmError, HostError):
            SoftVmm(attacker.vmm_socket, attacker.domid, memory=MiB).close()
    finally:
        for sock in silent:
            sock.close()
        transport.close_all(pipe)


# ---- all of them


@dataclass(frozen=True)
class Case:
    """`log`: what the host has to say of it, a regular expression; "": nothing, it is answered or folded."""

    name: str
    attack: Callable[[Attacker], None]
    log: str = ""


CASES = (
    Case("ring_index", ring_index, r"domain {domid}: vbd 51712: .*index"),
    Case("garbage", garbage, r"domain {domid}: vbd 51712: request \d+ refused"),
    Case("double_fetch", double_fetch, r"domain {domid}: vbd 51712: request \d+ refused"),
    Case("grants_flip", grants_flip),
    Case("reconnect", reconnect),
    Case("storm", storm, r"domain {domid}: (vbd|xenstore ring|console).*: kicked \d+ times in a row"),
    Case("ports", ports),
    Case("store_pipelined", store.pipelined),
    Case("store_state", store.state),
    Case("store_transactions", store.transactions),
    Case("store_watches", store.watches),
    Case("store_nodes", store.nodes, r"domain {domid}: .*quota"),
    Case("store_index", store.index, r"domain {domid}: xenstore ring: .*not served any more"),
    Case("console", console, r"domain {domid}: console 0: stopped until its indices are possible"),
    Case("reboot", reboot),
    Case("vmm_socket", vmm_socket, r"registered already|REGISTER|HELLO|message"),
)


def main(argv: Sequence[str]) -> int:
    """As in the module's text."""
    runtime, domid, name = argv
    (case,) = (case for case in CASES if case.name == name)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def hear() -> None:
        for line in sys.stdin:
            told.put(line.strip())
        told.put("end")

    with Attacker(Path(runtime) / "vmm.sock", int(domid)) as attacker:
        case.attack(attacker)
        print(attacker.rounds, flush=True)
        threading.Thread(target=hear, daemon=True).start()
        going = False
        while True:
            try:
                word = told.get_nowait()
            except queue.Empty:
                if going:
                    case.attack(attacker)
                    attacker.rounds += 1
                continue
            if word == "end":
                break
            going = word == "go"
            print(attacker.rounds, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
