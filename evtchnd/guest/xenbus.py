"""The frontend's end of a device's handshake (io/xenbus.h)."""

from __future__ import annotations

from collections.abc import Mapping

from evtchnd.abi import XenbusState
from evtchnd.guest.xenstore import XenStore

# Linux gives a device 10 s at each turn of the handshake before it says anything.
DEFAULT_TIMEOUT = 10.0


class Frontend:
    """A device's nodes as its guest sees them: `device/vbd/51712` and the backend's folder it names."""

    def __init__(self, store: XenStore, kind: str, devid: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.store = store
        self.path = f"device/{kind}/{devid}"
        self.backend_path = store.read(f"{self.path}/backend")
        self.backend_domid = int(store.read(f"{self.path}/backend-id"))
        self._timeout = timeout

    def switch(self, state: XenbusState, nodes: Mapping[str, str] | None = None) -> None:
        """Writes `nodes` and the own state, all at once."""
        self.store.write_all(self.path, {**(nodes or {}), "state": str(int(state))})

    def wait_backend(self, *states: XenbusState) -> XenbusState:
        """Waits until the backend's state is one of `states`; GuestFault when it takes too long."""
        wanted = {str(int(state)) for state in states}
        value = self.store.wait_for(f"{self.backend_path}/state", lambda text: text in wanted, self._timeout)
        return XenbusState(int(value or "0"))

    def state(self) -> int:
        """The own state as the toolstack or we wrote it."""
        return int(self.store.get(f"{self.path}/state") or "0")

    def backend(self, name: str, default: int | None = None) -> int:
        """A number that the backend published; without a default it must be there."""
        text = self.store.get(f"{self.backend_path}/{name}")
        if text is None and default is not None:
            return default
        return int(text if text is not None else self.store.read(f"{self.backend_path}/{name}"))
