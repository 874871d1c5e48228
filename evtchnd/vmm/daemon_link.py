"""A domain's connection to the daemon over its whole life: made, lost, made anew with everything sent again."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from evtchnd.errors import EvtchndError, HostError
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.client import Client, Disconnected, Refused

_AGAIN_S = 0.05


class Introduce(Protocol):
    """REGISTER (`resumed`: RESUME, the tables of ports too), everything else that the daemon has to know, START."""

    def __call__(self, client: Client, *, resumed: bool) -> None: ...


class DaemonLink:
    """`channels.client` is the connection while there is one. `channels.turn` is taken for an exchange with the daemon,
    not while it is waited for: a guest's calls go on.

    `lost()` runs, in any thread, when the daemon of a domain that was introduced has gone; not after `release` or
    `close`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        channels: Channels,
        introduce: Introduce,
        *,
        timeout: float,
        lost: Callable[[], None],
    ) -> None:
        self._path, self._channels, self._introduce, self._timeout = path, channels, introduce, timeout
        self._lost = lost
        self._leaving = False  # released: the daemon hangs up, as it should
        self._state = threading.Lock()
        self._introduced = False

    def connect(self, timeout: float = 0.0, stopped: Callable[[], bool] = lambda: False) -> None:
        """A new domain. HostError (Disconnected) where there is no daemon, VmmError (Refused) where it says no.

        Tries until `timeout` s have gone or it is `stopped` where the daemon is being restarted, or has not yet
        cleared the last domain of this number away.
        """
        self._leaving = False
        if not self._enter(timeout, stopped, resumed=False):
            raise HostError(f"domain {self._channels.domid}: ended while the daemon was waited for")

    def resume(self, timeout: float) -> bool:
        """The same domain at a restarted daemon. Tries until `timeout` s have gone: as `connect`.

        False: there is nothing to resume, since the domain was released, or introduced anew by somebody else.
        """
        return self._enter(timeout, lambda: self._leaving or self._introduced, resumed=True)

    def _enter(self, timeout: float, stopped: Callable[[], bool], *, resumed: bool) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self._channels.turn:
                    if stopped():
                        return False
                    self._exchange(resumed=resumed)
                    return True
            except (Disconnected, Refused) as error:
                # EEXIST: the old daemon is there and has not yet cleared the domain away
                final = isinstance(error, Refused) and error.errno != errno.EEXIST
                if final or time.monotonic() >= deadline:
                    raise
            time.sleep(_AGAIN_S)

    def _exchange(self, *, resumed: bool) -> None:
        self.close()
        try:
            client = self._open()
            self._introduce(client, resumed=resumed)
        except BaseException:
            self.close()
            raise
        self._introduced = True
        if client.lost:  # before that was known
            self._on_lost()

    @property
    def client(self) -> Client:
        """HostError when there is none."""
        if self._channels.client is None:
            raise HostError(f"domain {self._channels.domid}: not connected to the daemon")
        return self._channels.client

    def release(self, reason: int = 0) -> None:
        """The domain ends for the daemon, if that is there. `reason`: SHUTDOWN_* of sched.h."""
        self._leaving = True
        with self._channels.turn:
            client = self._channels.client
            if client is not None and not client.lost:
                with contextlib.suppress(EvtchndError):
                    client.release(reason)
            self.close()

    def close(self) -> None:
        """Hangs up: to the daemon, a VMM that has died if the domain was not released. Can be called twice.

        With `channels.turn`.
        """
        self._introduced = False
        client, self._channels.client = self._channels.client, None
        if client is not None:
            client.close()

    def _open(self) -> Client:
        self._channels.client = client = Client(
            self._path,
            on_bind=self._channels.bind,
            on_unbind=self._channels.unbind,
            on_lost=self._on_lost,
            timeout=self._timeout,
        )
        return client

    def _on_lost(self) -> None:
        with self._state:
            introduced, self._introduced = self._introduced, False
        if introduced and not self._leaving:
            self._lost()
