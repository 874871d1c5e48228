"""A guest whose network stack is this kernel's, in a second namespace: a TAP there is the soft guest's netfront's.

So both ends of netback are real stacks, with their checksum and segmentation offloads; only the frontend is ours.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading

from evtchnd.guest.netfront import Frame, Netfront
from evtchnd.guest.netqueue import Queue
from evtchnd_backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUNSETOFFLOAD
from netns import Netns
from oneprocess import LocalVm
from vif import GUEST4, GUEST6, HOST4, HOST6, MAC

VNET = struct.Struct("<BBHHHHH")


class Relay:
    """`start` after `connect`; `stop` joins the thread, and raises what it met."""

    def __init__(self, netns: Netns, vm: LocalVm, front: Netfront, *, mtu: int = 1500) -> None:
        self.netns = netns
        self.vm = vm
        self.front = front
        self.sent_gso = self.got_gso = self.got_blank = self.longest = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()
        (self.tap,) = netns.tap("eth0")
        fcntl.ioctl(self.tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
        netns.ip("link", "set", "eth0", "address", MAC, "mtu", str(mtu))
        netns.up("eth0", f"{GUEST4}/24", f"{GUEST6}/64")

    def neighbours(self, mac: bytes) -> None:
        """The host's addresses, so that no test waits for a resolution."""
        for address in (HOST4, HOST6):
            self.netns.ip("neigh", "replace", address, "lladdr", mac.hex(":"), "dev", "eth0")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self.tap)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
            for queue in self.front.queues:
                queue.flush()
        except BaseException as error:
            self._error = error

    def _turn(self) -> None:
        waits = [self.tap]
        more = False
        for queue in self.front.queues:
            more = queue.rx.arm() or more
            waits.append(self.vm.ports[queue.ports[-1]][1])
        ready = select.select(waits, [], [], 0 if more else 0.1)[0]
        for queue in self.front.queues:
            notify = self.vm.ports[queue.ports[-1]][1]
            if notify in ready:
                os.eventfd_read(notify)
            for frame in queue.receive():
                self._in(frame)
        if self.tap in ready:
            self._out()

    def _out(self) -> None:
        """From the stack: a queue by the port it goes to, as a guest's stack spreads its flows."""
        for _ in range(64):
            try:
                data = os.read(self.tap, 70000)
            except BlockingIOError:
                break
            flags, gso, _, size, *_ = VNET.unpack_from(data)
            kind = {0: 0, 1: 1, 4: 2}[gso & 0x7F]
            self.sent_gso += bool(kind)
            frame = data[VNET.size :]
            queue = self._queue(frame)
            queue.send(Frame(frame, csum_blank=bool(flags & 1), gso_size=size if kind else 0, gso_type=kind))
        for queue in self.front.queues:
            queue.push()

    def _queue(self, frame: bytes) -> Queue:
        queues = self.front.queues
        port = 56 if frame[12:14] == b"\x86\xdd" else 36
        return queues[int.from_bytes(frame[port : port + 2], "big") % len(queues)]

    def _in(self, frame: Frame) -> None:
        """To the stack. What netif does not carry, where the checksum belongs, a frontend finds in the headers."""
        data = frame.data
        self.longest = max(self.longest, len(data))
        flags = gso = header = start = offset = 0
        if frame.csum_blank:
            self.got_blank += 1
            ipv6 = data[12:14] == b"\x86\xdd"
            start = 54 if ipv6 else 14 + (data[14] & 15) * 4
            tcp = (data[20] if ipv6 else data[23]) == 6
            flags, offset = 1, 16 if tcp else 6
            if frame.gso_size:
                gso = 1 if frame.gso_type == 1 else 4
                header = start + (data[start + 12] >> 4) * 4
        elif frame.validated:
            flags = 2
        self.got_gso += bool(frame.gso_size)
        os.write(self.tap, VNET.pack(flags, gso, header, frame.gso_size, start, offset, 0) + data)
