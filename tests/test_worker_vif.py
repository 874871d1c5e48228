"""A vif in a worker, by the control plane's messages: attach with TAP queues, changes, another TAP, detach."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence

from evtchnd import transport
from evtchnd.control.config import Poll, Vbd
from evtchnd.worker import messages as m
from evtchnd.worker.device import VifDevice, vif_key
from evtchnd.worker.domain import Worker
from evtchnd.xenstore.server import Server
from test_worker_domain import Control

KEY = vif_key(2)


class Spy:
    """A backend that notes what it is told."""

    def __init__(self) -> None:
        self.changes: list[m.Vif] = []
        self.taps: list[list[int]] = []

    async def run(self, device: VifDevice) -> None:
        async def change(vif: m.Vif) -> None:
            device.vif = vif
            self.changes.append(vif)

        def retap(taps: Sequence[int]) -> None:
            self.taps.append([os.fstat(fd).st_ino for fd in taps])

        device.change, device.retap = change, retap
        self.name, self.connected = device.name, device.connected
        self.taps.append([os.fstat(fd).st_ino for fd in device.taps])
        await asyncio.Event().wait()


async def test_a_vif_by_messages() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server, spy = Server(), Spy()
    task = asyncio.create_task(Worker(theirs, {"vif": spy.run}).run())
    control = Control(ours)
    a, b = socket.socketpair()
    server.attach_socket(a, domid=0, confine=7)
    files = [os.memfd_create(str(number)) for number in range(5)]
    inodes = [os.fstat(fd).st_ino for fd in files]
    try:
        assert (await control.ask(m.Setup(control.id(), 7, Poll(), Vbd(), 10.0), [b.fileno()])) == m.Done(1)
        b.close()
        vif = m.Vif("00:16:3e:00:00:01", 2, "vif7.2", rate=(1000, 50000))
        few = await control.ask(m.AttachVif(control.id(), KEY, 2, vif, None), files[:2])
        assert isinstance(few, m.Done) and few.errno == errno.EINVAL and "1 TAP queues" in few.reason
        message = m.AttachVif(control.id(), KEY, 2, vif, {"queues": []})
        assert await control.ask(message, files[:3]) == m.Done(message.id)
        await asyncio.sleep(0.01)
        assert spy.name == "domain 7: vif 2" and spy.connected == {"queues": []}
        change = m.ChangeVif(control.id(), KEY, rate=(0, 0))
        assert await control.ask(change) == m.Done(change.id)
        change = m.ChangeVif(control.id(), KEY, mtu=9000, carrier=False)
        assert await control.ask(change) == m.Done(change.id)
        assert [(new.rate, new.mtu, new.carrier) for new in spy.changes] == [
            ((0, 0), 1500, True),
            ((0, 0), 9000, False),
        ]
        taps = m.Taps(control.id(), KEY)
        assert await control.ask(taps, files[3:]) == m.Done(taps.id)
        assert spy.taps == [inodes[1:3], inodes[3:]]
        wrong = await control.ask(m.Taps(control.id(), KEY), files[3:4])
        assert isinstance(wrong, m.Done) and wrong.errno
        unknown = await control.ask(m.ChangeVif(control.id(), vif_key(9), mtu=1))
        assert isinstance(unknown, m.Done) and unknown.errno == errno.ENODEV
        detach = m.Detach(control.id(), KEY)
        assert await control.ask(detach) == m.Done(detach.id)
    finally:
        control.close()
        await task
        await server.close()
        transport.close_all(files)
