"""An asyncio client of XenStore, over a Unix stream socket."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Self, TypeVar

T = TypeVar("T")


class Operations:
    """What a client and a transaction both can do. Paths and values are `str` (UTF-8, other bytes as surrogate escapes).

    A relative path belongs to /local/domain/<domid of the connection>. Every error the store answers is a `wire.XenStoreError`
    (`.name` "ENOENT", `.errno`); a lost connection is ConnectionError.
    """

    async def read(self, path: str) -> str:
        raise NotImplementedError

    async def read_bytes(self, path: str) -> bytes:
        raise NotImplementedError

    async def get(self, path: str, default: str | None = None) -> str | None:
        """`read`, with a default where the node is missing (ENOENT only)."""
        raise NotImplementedError

    async def write(self, path: str, value: str | bytes | int) -> None: ...
    async def ls(self, path: str) -> list[str]:
        """Names of the children, in order of creation; lists of any length (DIRECTORY_PART where needed)."""
        raise NotImplementedError

    async def mkdir(self, path: str) -> None: ...
    async def rm(self, path: str) -> None:
        """Remove a tree. No error if the node is missing and its parent is there."""

    async def exists(self, path: str) -> bool:
        raise NotImplementedError

    async def get_perms(self, path: str) -> list[str]:
        """As `["n0", "r7"]`: the owner with everyone's default first."""
        raise NotImplementedError

    async def set_perms(self, path: str, perms: Sequence[str]) -> None: ...


class Transaction(Operations):
    """An open transaction; see `Client.transaction`."""


class Watch:
    """`async with client.watch(path) as watch: async for changed in watch: ...`

    The first event comes at once (the path itself). Events that are identical and unread are one.
    Ends with StopAsyncIteration when it is closed, ConnectionError when the connection is lost.
    """

    path: str

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, *exc: object) -> None: ...
    def __aiter__(self) -> AsyncIterator[str]:
        raise NotImplementedError

    async def __anext__(self) -> str:
        """The path that changed."""
        raise NotImplementedError

    async def start(self) -> Self:
        """What `async with` does on entry."""
        raise NotImplementedError

    async def close(self) -> None:
        """What `async with` does on exit: UNWATCH. Idempotent."""


class Client(Operations):
    """One connection. Safe for many tasks at once; requests are pipelined."""

    @classmethod
    async def connect(cls, path: str) -> Client:
        """Connect to a server's Unix socket."""
        raise NotImplementedError

    @classmethod
    async def from_socket(cls, sock: socket.socket) -> Client:
        """Over one end of a SOCK_STREAM socketpair; takes ownership."""
        raise NotImplementedError

    def watch(self, path: str, *, depth: int | None = None) -> Watch:
        raise NotImplementedError

    def transaction(self) -> Transaction:
        """`async with client.transaction() as t: await t.write(...)`: committed at the end, dropped if the body raises.

        A commit that meets a conflict is done again with the same operations, as long as everything the body read still reads the same;
        else `XenStoreError` EAGAIN: the body has to run again; `transact` does that.
        """
        raise NotImplementedError

    async def transact(self, body: Callable[[Transaction], Awaitable[T]], *, tries: int = 32) -> T:
        """Run `body(t)` in a transaction, again from its start after each conflict; EAGAIN after `tries`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connection; whoever waits gets ConnectionError. Idempotent."""
