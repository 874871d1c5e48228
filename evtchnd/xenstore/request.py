"""One request, and the quotas that it meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

from .quota import NAMES, Connection
from .store import XenStore
from .tree import Transaction
from .wire import Op, XenStoreError

OK = b"OK\0"


class Request(NamedTuple):
    """One request, with the view of the store that it sees: a transaction's or `store.now`."""

    store: XenStore
    conn: Connection
    view: Transaction
    payload: bytes
    op: int
    req_id: int
    tx_id: int


# The reply's payload; None: the reply is queued already
Handler = Callable[[Request], bytes | None]


def refuse(request: Request, quota: str, value: int, limit: int, error: str = "ENOSPC") -> NoReturn:
    """Said in the log and counted."""
    request.store.refusals.note(request.conn.domid, Op(request.op).name, quota, value, limit)
    raise XenStoreError(error, f"quota {quota}")


def check(request: Request, quota: str, value: int) -> None:
    """ENOSPC if `value` is above the client's quota of that name."""
    conn = request.conn
    if not conn.allows(quota, value):
        refuse(request, quota, value, getattr(conn.quotas, NAMES[quota][0]))


def check_memory(request: Request, more: int) -> None:
    """ENOMEM if the client's domain may not have `more` bytes."""
    conn = request.conn
    if conn.quotas is not None and not conn.allows_memory(more):
        refuse(request, "memory", conn.memory + more, conn.quotas.memory_bytes, "ENOMEM")
