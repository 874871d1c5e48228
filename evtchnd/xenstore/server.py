"""XenStore's transports: Unix sockets, guests' ring pages, and the control plane itself, on one asyncio loop."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from evtchnd.xenstore.store import Quotas, XenStore


class RingConnection:
    """A guest's XenStore ring, served on the loop."""

    domid: int
    closed: bool

    def close(self) -> None:
        """Stop serving the ring; watches and open transactions of this connection go. Idempotent."""
        raise NotImplementedError


class LocalTransaction:
    """What `Server.transaction()` gives: the same calls as Server, on the transaction's view."""

    def write(self, path: str, value: str | bytes | int, *, perms: Sequence[str] | None = None) -> None: ...
    def read(self, path: str) -> str: ...
    def get(self, path: str, default: str | None = None) -> str | None: ...
    def ls(self, path: str) -> list[str]: ...
    def mkdir(self, path: str, *, perms: Sequence[str] | None = None) -> None: ...
    def rm(self, path: str) -> None: ...
    def set_perms(self, path: str, perms: Sequence[str]) -> None: ...
    def get_perms(self, path: str) -> list[str]: ...
    def exists(self, path: str) -> bool: ...


class Server:
    """The daemon's XenStore. Everything here runs on the loop's thread; only `listen` must be awaited.

    Values are `str` (UTF-8, other bytes as surrogate escapes), paths absolute; permissions are strings as `xenstore-chmod` takes
    them: `["n0", "r7"]` = owned by domain 0, no access for others, domain 7 reads. Every failing call raises
    `wire.XenStoreError` (an OSError look-alike: `.name` "ENOENT", `.errno`).
    """

    def __init__(self, store: XenStore | None = None, *, quotas: Quotas | None = None) -> None:
        raise NotImplementedError

    # ---- transports
    async def listen(self, path: str, mode: int = 0o660) -> None:
        """Serve a Unix socket at `path` (a stale one is replaced): every client is domain 0, not confined."""

    async def adopt(self, sock: socket.socket) -> None:
        """Serve a listening Unix stream socket that came from elsewhere (systemd). Takes ownership."""

    def attach_socket(self, sock: socket.socket, *, domid: int = 0, confine: int | None = None) -> None:
        """Serve one end of a SOCK_STREAM socketpair. Takes ownership; ends by EOF.

        With `confine=7` (a worker): it may write only /local/domain/0/backend/*/7/**, never a `params` or what lies beside, and may read and watch
        only that and /local/domain/7/**; INTRODUCE, RELEASE and CONTROL are refused.
        """

    def attach_ring(self, domid: int, page: mmap.mmap | memoryview, kick: int, notify: int) -> RingConnection:
        """Serve a guest's XenStore page. `kick` and `notify` are eventfds and are duplicated; the page stays the caller's and must
        live until `close()` of what is returned (after which no view of it is held). Call `introduce` first.

        A guest that corrupts its ring: one line in the log, the connection is closed, nothing else happens.
        """
        raise NotImplementedError

    # ---- domains
    def introduce(self, domid: int) -> None:
        """The domain exists now: fires @introduceDomain. Write its nodes before or after, as xl does: before is fine."""

    def release(self, domid: int) -> None:
        """The domain is gone: its ring connection is closed, its nodes, permissions, watches and quotas go, /local/domain/<domid> is removed,
        @releaseDomain fires. Harmless for an unknown domain."""

    # ---- the control plane's own access: domain 0, not confined, synchronous
    def write(self, path: str, value: str | bytes | int, *, perms: Sequence[str] | None = None) -> None:
        """Write (parents are made); with `perms` the node's permissions are set, too."""

    def read(self, path: str) -> str:
        raise NotImplementedError

    def get(self, path: str, default: str | None = None) -> str | None:
        """`read`, with a default where the node is missing."""
        raise NotImplementedError

    def ls(self, path: str) -> list[str]:
        """Names of the children, in order of creation."""
        raise NotImplementedError

    def mkdir(self, path: str, *, perms: Sequence[str] | None = None) -> None: ...
    def rm(self, path: str) -> None:
        """Remove a tree. No error if it is not there."""

    def set_perms(self, path: str, perms: Sequence[str]) -> None: ...
    def get_perms(self, path: str) -> list[str]:
        raise NotImplementedError

    def exists(self, path: str) -> bool:
        raise NotImplementedError

    @contextmanager
    def transaction(self) -> Iterator[LocalTransaction]:
        """`with server.transaction() as t: t.write(...)`: all or nothing, watches fire once at the end. Do not await inside: then it cannot conflict."""
        raise NotImplementedError
        yield

    async def close(self) -> None:
        """Stop listening, close every connection, remove the socket's file. Idempotent."""
