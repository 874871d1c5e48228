"""What each request means: one small function an operation; the table at the end is the dispatch and the list.

    conn = store.connect(7)
    handle(store, conn, op, req_id, tx_id, payload)

The reply and all events are queued in connections when it returns; `store.ready` tells in which. Errors and corner
cases are those of the C server (tools/xenstored of Xen 4.17 and later).
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import NoReturn

from . import administration, control, wire
from .quota import PERM_SIZE, Connection, node_size
from .request import OK, Handler, Request, check, check_memory, refuse
from .store import XenStore
from .tree import CHILDREN, PERMS, VALUE, Node
from .watches import Watch
from .wire import Op, XenStoreError

log = logging.getLogger(__name__)

# /local/domain/0/backend/<kind>/<domid>/<device>
_DEVICE_DEPTH = 7


# What Request(...) calls in the end
_tuple = tuple.__new__


def handle(store: XenStore, conn: Connection, op: int, req_id: int, tx_id: int, payload: bytes) -> None:
    """Serve one request. Never raises for what a client sends."""
    now = store.now
    store.cause = None if conn.privileged else conn
    try:
        handler, flags = _OPERATIONS.get(op, _UNKNOWN)
        if flags & _TOOLS and (conn.domid != 0 or conn.confine is not None):
            raise XenStoreError("EACCES", "for domain 0's tools")
        view = now if tx_id == 0 or flags & _NO_TX else conn.transactions.get(tx_id)
        if view is None:
            raise XenStoreError("ENOENT", f"no transaction {tx_id}")
        request = _tuple(Request, (store, conn, view, payload, op, req_id, tx_id))
        touched = view.touched
        quotas = conn.quotas
        if touched is not None and quotas is not None and not conn.allows("transaction-nodes", len(touched)):
            # One operation late: so those that fail count, too
            view.failed = True
            if op != Op.TRANSACTION_END:
                refuse(request, "transaction-nodes", len(touched), quotas.transaction_nodes)
        body = handler(request)
        if now.changes or now.events:
            store.publish(now)
    except XenStoreError as error:
        store.forget()
        conn.reply(Op.ERROR, req_id, tx_id, error.name.encode() + b"\0")
    except Exception:
        # A defect of ours that one client's request has found: it must not end what serves all the others
        log.exception("domain %d: xenstore: operation %d failed", conn.domid, op)
        store.forget()
        conn.reply(Op.ERROR, req_id, tx_id, b"EIO\0")
    else:
        if body is not None:
            conn.reply(op, req_id, tx_id, body)
    finally:
        store.cause = None
    if store.recorder is not None:
        store.recorder.commit(store.ready)
    if store.trace:
        control.trace(conn, op, tx_id, payload)


# ---- finding nodes


def _path(request: Request, text: bytes, *, special: bool = False, write: bool = False) -> bytes:
    conn = request.conn
    quota = wire.ABS_PATH_MAX if conn.quotas is None else conn.quotas.path_bytes or wire.ABS_PATH_MAX
    try:
        path = wire.canonical(text, conn.home, special=special, quota=quota)
    except wire.PathTooLongError as error:
        refuse(request, "path-max", error.size, quota, error.name)
    if conn.confine is not None and not (conn.may_write(path) if write else conn.may_read(path)):
        raise XenStoreError("EACCES", "not what this worker serves")
    return path


def _find(
    request: Request, text: bytes, want: int, what: int, *, special: bool = False, write: bool = False
) -> tuple[bytes, Node | None]:
    """The path that `text` means, and its node; None if it is missing and the client may know. EACCES where it may not
    know either way."""
    conn, view = request.conn, request.view
    path = text
    # A path that is in the tree is a good one
    node = view.tree.get(text) if conn.quotas is None and text[:1] == b"/" else None
    if node is None:
        path = _path(request, text, special=special, write=write)
        node = view.tree.get(path)
    if view.touched is not None:
        view.touch(path, what | PERMS)
    elif node is None and conn.privileged:
        return path, None
    if node is not None:
        if conn.rights(node.perms) & want != want:
            raise XenStoreError("EACCES")
        return path, node
    above = path
    parent = None
    while parent is None:
        above = wire.parent_of(above)
        parent = view.get(above, PERMS)
    if not conn.rights(parent.perms) & want:
        raise XenStoreError("EACCES")
    return path, None


def _readable(request: Request, text: bytes, what: int, *, special: bool = False) -> Node:
    _, node = _find(request, text, wire.PERM_READ, what, special=special)
    if node is None:
        raise XenStoreError("ENOENT")
    return node


def _check_size(request: Request, path: bytes, value: bytes, perms: wire.Perms, old: Node | None) -> None:
    """Quotas of a node that is to be written."""
    if request.conn.quotas is not None:
        check(request, "node-size", len(path) + len(value) + PERM_SIZE * len(perms))
        check_memory(request, node_size(path, value, perms) - (0 if old is None else len(old.value)))


def _create(request: Request, path: bytes, value: bytes) -> None:
    """A node that is not there, and what is missing above it.

    Permissions are those of the nearest node above; a guest owns what it makes.
    """
    store, conn, view = request.store, request.conn, request.view
    missing = [path]
    above = wire.parent_of(path)
    while (parent := view.get(above, PERMS)) is None:
        missing.append(above)
        above = wire.parent_of(above)
    if conn.confine is not None and above.count(b"/") < _DEVICE_DEPTH:
        # A worker that is late: its toolstack has removed the device, it shall not come back as a stump
        raise XenStoreError("ENOENT", "the device was removed")
    if conn.confine is not None and conn.quotas is not None:
        device = b"/".join(path.split(b"/")[: _DEVICE_DEPTH + 1])
        count = sum(1 for _ in islice(view.tree.walk(device), conn.quotas.nodes)) + len(missing)
        if count > conn.quotas.nodes:
            refuse(request, "nodes", count, conn.quotas.nodes)
    perms = parent.perms if conn.privileged else ((conn.domid, parent.perms[0][1]), *parent.perms[1:])
    _check_size(request, path, value, perms, None)
    if not conn.privileged:
        check(request, "nodes", conn.domain.owned + view.growth.get(conn.domid, 0) + len(missing))
    for above in reversed(missing[1:]):
        view.create(above, b"", perms, store.tick())
    view.create(path, value, perms, store.tick())


# ---- nodes


def _read(request: Request) -> bytes:
    return _readable(request, wire.one_string(request.payload), VALUE).value


def _directory(request: Request) -> bytes:
    return _readable(request, wire.one_string(request.payload), CHILDREN).listing()


def _directory_part(request: Request) -> bytes:
    """path, offset -> the node's generation, then names from that byte offset; an empty name ends the list."""
    texts = wire.strings(request.payload)
    if len(texts) != 2:
        raise XenStoreError("EINVAL")
    node = _readable(request, texts[0], CHILDREN)
    offset = wire.number(texts[1], 0xFFFFFFFF)
    names = node.listing()
    head = b"%d\0" % node.generation
    room = wire.PAYLOAD_MAX - len(head) - 1
    if len(names) - offset <= room:
        return head + names[offset:] + b"\0"
    return head + names[offset : names.rfind(b"\0", offset, offset + room) + 1]


def _get_perms(request: Request) -> bytes:
    node = _readable(request, wire.one_string(request.payload), PERMS, special=True)
    return b"".join([text + b"\0" for text in wire.format_perms(node.perms)])


def _write(request: Request) -> bytes:
    payload, view = request.payload, request.view
    end = payload.find(b"\0")
    if end < 0:
        raise XenStoreError("EINVAL")
    path, node = _find(request, payload[:end], wire.PERM_WRITE, VALUE, write=True)
    value = payload[end + 1 :]
    if node is None:
        _create(request, path, value)
    else:
        if request.conn.quotas is not None:
            _check_size(request, path, value, node.perms, node)
        if not view.holders:
            request.store.rewrite(path, node, value)
            return OK
        view.update(path, node, value, node.perms, request.store.tick())
    # The same value again fires, too: that is how a backend tells that a disk was resized
    view.fire(path)
    return OK


def _mkdir(request: Request) -> bytes:
    path, node = _find(request, wire.one_string(request.payload), wire.PERM_WRITE, PERMS, write=True)
    if node is None:
        _create(request, path, b"")
        request.view.fire(path)
    return OK


def _rm(request: Request) -> bytes:
    path, node = _find(request, wire.one_string(request.payload), wire.PERM_WRITE, PERMS, write=True)
    if node is None:
        if request.view.get(wire.parent_of(path), PERMS) is None:
            raise XenStoreError("ENOENT")
    elif path == b"/":
        raise XenStoreError("EINVAL")
    else:
        request.view.remove(path, request.store.tick())
    return OK


def _set_perms(request: Request) -> bytes:
    store, conn = request.store, request.conn
    texts = wire.strings(request.payload)
    if len(texts) < 2:
        raise XenStoreError("EINVAL")
    check(request, "node-permissions", len(texts) - 1)
    perms = wire.parse_perms(texts[1:])
    if conn.confine is not None:
        _path(request, texts[0], special=True, write=True)
        raise XenStoreError("EACCES", "permissions are the toolstack's")
    # A commit writes the node as a whole: its value is relied on, too
    path, node = _find(request, texts[0], wire.PERM_WRITE | wire.PERM_OWNER, VALUE, special=True, write=True)
    if node is None:
        raise XenStoreError("ENOENT")
    if not conn.privileged:
        if perms[0][0] != node.owner:
            raise XenStoreError("EPERM", "only domain 0 gives nodes away")
        # What a guest grants to a domain that is not there is nobody's: not its next owner's either (XSA-322)
        perms = (perms[0], *[entry if store.exists(entry[0]) else (entry[0], 0) for entry in perms[1:]])
    _check_size(request, path, node.value, perms, node)
    request.view.update(path, node, node.value, perms, store.tick())
    request.view.fire(path)
    return OK


# ---- watches and transactions


def _watch(request: Request) -> None:
    store, conn = request.store, request.conn
    texts = wire.strings(request.payload)
    if len(texts) not in (2, 3):
        raise XenStoreError("EINVAL")
    if len(texts) == 3 and not conn.domain.features & wire.FEATURE_WATCHDEPTH:
        raise XenStoreError("EINVAL", "watches with a depth are switched off")
    depth = wire.number(texts[2], 0x7FFFFFFF) if len(texts) == 3 else None
    path, token = _path(request, texts[0], special=True), texts[1]
    if (path, token) in conn.watches:
        raise XenStoreError("EEXIST")
    check(request, "watches", len(conn.watches) + 1)
    check_memory(request, len(path) + len(token))
    relative = texts[0][:1] not in (b"/", b"@")
    watch = Watch(conn, path, token, len(conn.home) + 1 if relative else 0, depth)
    store.add_watch(watch)
    # The reply first, then one event: clients take their first look at the node for it
    conn.reply(request.op, request.req_id, request.tx_id, OK)
    conn.event(path[watch.strip :], token)


def _unwatch(request: Request) -> bytes:
    texts = wire.strings(request.payload)
    if len(texts) != 2:
        raise XenStoreError("EINVAL")
    request.store.remove_watch(request.conn, _path(request, texts[0], special=True), texts[1])
    return OK


def _reset_watches(request: Request) -> bytes:
    request.store.reset_watches(request.conn)
    return OK


def _transaction_start(request: Request) -> bytes:
    store, conn = request.store, request.conn
    if request.view is not store.now:
        raise XenStoreError("EBUSY", "transactions do not nest")
    check(request, "transactions", len(conn.transactions) + 1)
    tx_id = conn.new_tx_id()
    store.begin(conn, tx_id)
    if store.recorder is not None:
        store.recorder.started(conn, tx_id)
    return b"%d\0" % tx_id


def _transaction_end(request: Request) -> bytes:
    store, conn, view = request.store, request.conn, request.view
    verdict = wire.one_string(request.payload)
    if verdict not in (b"T", b"F"):
        raise XenStoreError("EINVAL")
    if view is store.now:
        raise XenStoreError("ENOENT", "no transaction")
    del conn.transactions[request.tx_id]
    store.now.holders -= 1
    if store.recorder is not None:
        store.recorder.ended(conn, request.tx_id)
    path = view.conflict(store.tree) if verdict == b"T" and not view.failed else None
    store.contention.ended(conn, path)
    if verdict == b"F":
        return OK
    if view.failed:
        raise XenStoreError("ENOMEM", "an operation of the transaction was refused")
    if path is not None:
        raise XenStoreError("EAGAIN")
    conn.conflicts = 0
    growth = view.growth.get(conn.domid, 0)
    if not conn.privileged and growth > 0:
        check(request, "nodes", conn.domain.owned + growth)
    store.publish(view)
    return OK


def _unknown(request: Request) -> NoReturn:
    raise XenStoreError("ENOSYS", f"operation {request.op}")


_NO_TX = 1  # the request's transaction id is not looked at
_TOOLS = 2  # domain 0 only, and not a worker
_UNKNOWN: tuple[Handler, int] = (_unknown, _NO_TX)
_OPERATIONS: dict[int, tuple[Handler, int]] = {
    Op.CONTROL: (control.control, _TOOLS),
    Op.DIRECTORY: (_directory, 0),
    Op.READ: (_read, 0),
    Op.GET_PERMS: (_get_perms, 0),
    Op.WATCH: (_watch, _NO_TX),
    Op.UNWATCH: (_unwatch, _NO_TX),
    Op.TRANSACTION_START: (_transaction_start, 0),
    Op.TRANSACTION_END: (_transaction_end, 0),
    Op.INTRODUCE: (administration.introduce, _TOOLS),
    Op.RELEASE: (administration.release, _TOOLS),
    Op.GET_DOMAIN_PATH: (administration.get_domain_path, 0),
    Op.WRITE: (_write, 0),
    Op.MKDIR: (_mkdir, 0),
    Op.RM: (_rm, 0),
    Op.SET_PERMS: (_set_perms, 0),
    Op.IS_DOMAIN_INTRODUCED: (administration.is_domain_introduced, _TOOLS),
    Op.RESUME: (administration.resume, _TOOLS),
    Op.SET_TARGET: (administration.set_target, _TOOLS),
    Op.RESET_WATCHES: (_reset_watches, 0),
    Op.DIRECTORY_PART: (_directory_part, 0),
    Op.GET_FEATURE: (administration.get_feature, 0),
    Op.SET_FEATURE: (administration.set_feature, _TOOLS),
    Op.GET_QUOTA: (administration.get_quota, _TOOLS),
    Op.SET_QUOTA: (administration.set_quota, _TOOLS),
}
