"""The control plane of one host: every domain, its worker, its devices, XenStore and the VMMs' socket.

The operator's server calls the coroutines of `Daemon` and nothing else. Each of them raises OperatorError (one line,
meant for the operator) for what cannot be done, and may be called at any time between `start()` and `stop()`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evtchnd.control.config import Config
    from evtchnd.control.diskspec import DiskSpec
    from evtchnd.control.zygote import Zygote


class Daemon:
    """Everything that `evtchnd` serves but the operator's socket.

    config         checked configuration; `config.runtime_dir` holds vmm.sock and xenstored.sock
    zygote         made by `Zygote.fork()` before any event loop or thread exists; None: single process (workers are
                   tasks of this loop)
    listening      sockets by name that systemd made ("vmm", "xenstored"); those that are missing are made here
    """

    def __init__(
        self,
        config: Config,
        *,
        zygote: Zygote | None,
        listening: Mapping[str, socket.socket] | None = None,
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Listens on vmm.sock and xenstored.sock. HostError if a socket cannot be made."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Ends every worker and connection, closes everything. Idempotent."""
        raise NotImplementedError

    async def attach_block(self, domid: int, spec: DiskSpec) -> dict[str, Any]:
        """Opens the image, gives it to the domain's worker, writes the device's nodes. Does not wait for the guest.

        Returns {"domid", "devid", "vdev", "target", "readonly", "sectors", "backend", "frontend"}.
        """
        raise NotImplementedError

    async def detach_block(self, domid: int, device: str | int) -> dict[str, Any]:
        """Asks the guest to let the device ("xvda" or a device number) go, waits for it (10 s), removes it.

        Returns {"domid", "devid", "vdev", "forced"}; forced: the guest did not answer in time.
        """
        raise NotImplementedError

    async def list(self) -> list[dict[str, Any]]:
        """One object a domain: {"domid", "name", "uuid", "state", "memory" (bytes), "vcpus", "devices" (count)}."""
        raise NotImplementedError

    async def info(self, domid: int) -> dict[str, Any]:
        """As in list(), and "slots", "grant_frames", "ports", "vmm_pid", "worker" {"pid", "restarts", ...} and
        "devices": [{"kind", "devid", "vdev", "target", "state" (xenbus), "counters" {name: int}}].
        """
        raise NotImplementedError
