"""CONTROL: `xenstore-control check | log | memreport | print | quota | quota-soft | help`, answered as in C.

No command opens a file: `logfile` is not known, and reports go into the reply.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from operator import itemgetter

from . import wire
from .administration import changed, value_of
from .quota import NAMES, QUOTA_MAX, Connection, Domain
from .request import OK, Request
from .store import XenStore
from .wire import Op, XenStoreError

log = logging.getLogger(__name__)

_SOFT = "soft-"
# Of a payload in a line of the log
_SHOWN = 200
# Lines of a report: a reply has 4,096 bytes
_LINES = 40


def control(request: Request) -> bytes | None:
    """command, parameters -> what it says, or OK"""
    command, *words = wire.strings(request.payload) or [b""]
    name = wire.decode(command)
    if name == "check" and not words:
        return _check(request)
    if name not in _COMMANDS:
        raise XenStoreError("EINVAL", "no such command")
    return _COMMANDS[name][0](request.store, [wire.decode(word) for word in words])


def _check(request: Request) -> bytes | None:
    """Walks the whole store, and answers at the end of it."""
    store, conn = request.store, request.conn

    def walk() -> Generator[None, None, None]:
        faults = yield from store.check_steps()
        for fault in faults:
            log.error("xenstore: check: %s", fault)
        if conn in store.connections:
            body = b"%d faults, see the log\0" % len(faults) if faults else OK
            conn.reply(request.op, request.req_id, request.tx_id, body)

    if store.later is None or conn.flush is None:  # nobody would send it
        for _ in walk():
            pass
    else:
        store.later(walk())
    return None


def _log(store: XenStore, words: list[str]) -> bytes:
    match words:
        case []:
            return b"Log switch settings:\n%-8s: %s\n\0" % (b"io", b"on" if store.trace else b"off")
        case ["on" | "+io"]:
            store.trace = True
        case ["off" | "-io"]:
            store.trace = False
        case _:
            raise XenStoreError("EINVAL")
    return OK


def trace(conn: Connection, op: int, tx_id: int, payload: bytes) -> None:
    """One request and the last thing that was queued for it."""
    reply = conn.out[-1] if conn.out else b""
    name = Op(op).name if op in Op.__members__.values() else str(op)
    log.info(
        "domain %d: xenstore: %s tx %d %r -> %r",
        *(conn.domid, name, tx_id, payload[:_SHOWN], reply[wire.HEADER_SIZE :][:_SHOWN]),
    )


def _memreport(store: XenStore, words: list[str]) -> bytes:
    """Who holds how much. Numbers that are kept anyway: nothing is walked."""
    if words:
        raise XenStoreError("EINVAL", "no file is written")
    rows = [
        f"{len(store.tree):>9} nodes",
        f"{len(store.watches):>9} watches",
        f"{store.contention.open:>9} transactions",
        f"{len(store.connections):>9} connections",
    ]
    held = {domid: domain.node_bytes for domid, domain in store.domains.items()}
    for conn in store.connections:
        held[conn.domid] += conn.memory - conn.domain.node_bytes
    most = sorted(held.items(), key=itemgetter(1), reverse=True)[:_LINES]
    rows += [f"{size:>9} bytes counted for domain {domid}" for domid, size in most]
    return ("\n".join(rows) + "\n").encode() + b"\0"


def _print(_: XenStore, words: list[str]) -> bytes:
    if len(words) != 1:
        raise XenStoreError("EINVAL")
    log.info("xenstore: control: %r", words[0])
    return OK


# ---- quotas


def usage(store: XenStore, domain: Domain) -> dict[str, int]:
    """What a domain holds of each quota now; 0 where it is looked at only when something is asked."""
    conns = [conn for conn in store.connections if conn.domain is domain and conn.confine is None]
    return {
        **dict.fromkeys(NAMES, 0),
        "nodes": domain.owned,
        "watches": sum(len(conn.watches) for conn in conns),
        "outstanding": sum(conn.replies + conn.caused for conn in conns),
        "memory": domain.node_bytes + sum(conn.memory - domain.node_bytes for conn in conns),
        "transactions": sum(len(conn.transactions) for conn in conns),
    }


def _show(store: XenStore, soft: bool) -> bytes:
    rows = [
        f"{name.removeprefix(_SOFT):<17}: {value_of(store.quotas, name):8} {text}\n"
        for name, (_, text) in NAMES.items()
        if name.startswith(_SOFT) is soft
    ]
    return "".join(["Quota settings:\n", *rows]).encode() + b"\0"


def _set(store: XenStore, words: list[str], soft: bool) -> bytes:
    if len(words) != 2:
        raise XenStoreError("EINVAL")
    name = f"{_SOFT}{words[0]}" if soft else words[0]
    value = wire.number(wire.encode(words[1]), QUOTA_MAX)
    if name not in NAMES or name.startswith(_SOFT) is not soft or value < 1:
        raise XenStoreError("EINVAL")
    store.set_quotas(None, changed(store.quotas, name, value))
    return OK


def _quota(store: XenStore, words: list[str]) -> bytes:
    match words:
        case []:
            return _show(store, soft=False)
        case ["set", *rest]:
            return _set(store, rest, soft=False)
        case ["max", *rest]:
            return _max(store, rest)
        case [text]:
            domid = wire.number(wire.encode(text), 0xFFFF)
            domain = store.domains.get(domid)
            if domain is None:
                raise XenStoreError("ENOENT")
            now, counts = usage(store, domain), store.refusals.counts
            rows = [f"Domain {domid}:\n"]
            for name in NAMES:
                if not name.startswith(_SOFT):
                    refused = counts.get((domid, name), 0)
                    most = max(now[name], domain.peaks.get(name, 0))
                    said = f" {refused} refused" if refused else ""
                    rows.append(f"{name:<17}: {now[name]:8} (max {most:8}){said}\n")
            return "".join(rows).encode() + b"\0"
    raise XenStoreError("EINVAL")


def _max(store: XenStore, words: list[str]) -> bytes:
    """The highest value of each quota that any guest of now has had."""
    if words not in ([], ["-r"]):
        raise XenStoreError("EINVAL")
    guests = [domain for domid, domain in store.domains.items() if domid]
    if words:
        for domain in guests:
            domain.peaks = usage(store, domain)
    rows = [
        f"{name:<17}: {max((domain.peaks.get(name, 0) for domain in guests), default=0):8}\n"
        for name in NAMES
        if not name.startswith(_SOFT)
    ]
    return "".join(["Max. seen accounting values:\n", *rows]).encode() + b"\0"


def _quota_soft(store: XenStore, words: list[str]) -> bytes:
    match words:
        case []:
            return _show(store, soft=True)
        case ["set", *rest]:
            return _set(store, rest, soft=True)
    raise XenStoreError("EINVAL")


def _help(_: XenStore, words: list[str]) -> bytes:
    if words:
        raise XenStoreError("EINVAL")
    texts = {"check": "", **{name: text for name, (_, text) in _COMMANDS.items()}}
    return "".join(f"{name:<15} {text}\n" for name, text in texts.items()).encode() + b"\0"


_COMMANDS: dict[str, tuple[Callable[[XenStore, list[str]], bytes], str]] = {
    "log": (_log, "[on|off|+io|-io]"),
    "memreport": (_memreport, ""),
    "print": (_print, "<string>"),
    "quota": (_quota, "[set <name> <val>|<domid>|max [-r]]"),
    "quota-soft": (_quota_soft, "[set <name> <val>]"),
    "help": (_help, ""),
}
