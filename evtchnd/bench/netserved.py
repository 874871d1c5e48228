"""evtchnd's side of `evtchnd-bench net`: daemon, worker, and a soft guest's vif whose rings are lent to a C program."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Self

from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.netns import Namespace
from evtchnd.bench.served import DOMID, in_a_row, soft_guest
from evtchnd.guest.netfront import Netfront

MAC = "00:16:3e:77:00:07"


class Served:
    """A connected vif of one queue on a TAP in `netns`: `words` for the load, `pid` of the worker that serves it."""

    def __init__(self, folder: Path, netns: Namespace, *, poll_us: int) -> None:
        with contextlib.ExitStack() as stack:
            config = f"[poll]\nmax_us = {poll_us}\n[vif]\nmax_queues = 1\n"
            self.daemon, vm, domain, store = stack.enter_context(soft_guest(folder, config))
            made = self.daemon.ctl("network-attach", str(DOMID), f"mac={MAC}", "script=none", f"netns={netns.path}")
            card = Netfront(domain, store, post=0)
            card.connect()
            stack.callback(card.disconnect)
            (queue,) = card.queues
            for grefs in (queue.tx_grefs, queue.rx_grefs):
                in_a_row(grefs)
            tx, rx = queue.ports
            fds = {
                "ram": vm.ram_fd,
                "tx_kick": vm.kick_fd(tx),
                "tx_notify": vm.irq_fd(tx),
                "rx_kick": vm.kick_fd(rx),
                "rx_notify": vm.irq_fd(rx),
            }
            self.fds = tuple(fds.values())
            self.words = {
                **fds,
                "tx_ring": queue.ring_gfns[0] * PAGE_SIZE,
                "rx_ring": queue.ring_gfns[1] * PAGE_SIZE,
                "tx_pages": queue.tx_gfn * PAGE_SIZE,
                "tx_gref": queue.tx_grefs[0],
                "rx_gref": queue.rx_grefs[0],
            }
            self.link = netns.link(made["vifname"], 1, MAC)
            self.pid: int = self.daemon.ctl("info", str(DOMID))["worker"]["pid"]
            self._stack = stack.pop_all()

    def pin(self, cpu: int) -> None:
        """The worker's CPU; the control plane shares it, it has nothing to do."""
        os.sched_setaffinity(self.pid, {cpu})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
