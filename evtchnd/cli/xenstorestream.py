"""`evtchnctl xenstore dump` and `load`: nodes as Xen's migration stream, by requests alone, so of any xenstored.

One transaction each: the dump is of one moment, and a load is there as a whole or not at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from evtchnd.errors import OperatorError
from evtchnd.xenstore import migration, wire
from evtchnd.xenstore.client import Client, Operations

Asked = argparse.Namespace
Walk = Callable[[Operations, str], AsyncIterator[tuple[int, str, bytes, list[str]]]]
# Nodes that are written at once
_BATCH = 256


async def dump(args: Asked, client: Client, walk: Walk) -> None:
    """A node and all below it, to a file or standard output."""
    if args.file == "-" and sys.stdout.isatty():
        raise OperatorError("a dump is bytes, not for a terminal: name a FILE")
    transaction = client.transaction()
    await transaction.begin()
    parts = [migration.header()]
    try:
        async for _, path, value, perms in walk(transaction, args.path):
            texts = wire.parse_perms(text.encode() for text in perms)
            parts.append(migration.pack_node(wire.encode_path(path), value, migration.pack_perms(texts)))
    finally:
        await transaction.abort()
    data = b"".join([*parts, migration.end()])
    if args.file == "-":
        sys.stdout.buffer.write(data)
        return
    file = Path(args.file)
    new = file.with_name(file.name + ".new")
    try:
        new.write_bytes(data)
        new.replace(file)
    except OSError as error:
        raise OperatorError(f"{error.filename}: {error.strerror}") from None
    _say(args, {"file": args.file, "nodes": len(parts) - 1, "bytes": len(data)}, f"{len(parts) - 1} nodes")


async def load(args: Asked, client: Client) -> None:
    """Writes the nodes of a stream, with their permissions; nodes that it does not have stay."""
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        items = list(migration.records(data))
    except OSError as error:
        raise OperatorError(f"{args.file}: {error.strerror}") from None
    except migration.MigrationError as error:
        raise OperatorError(f"{args.file}: {error}") from None
    nodes = [item for item in items if isinstance(item, migration.Node) and not item.conn_id and item.perms]
    nodes = [node for node in nodes if node.path[:1] == b"/"]

    async def one(transaction: Operations, node: migration.Node) -> None:
        path = wire.decode(node.path)
        await transaction.write(path, node.value)
        await transaction.set_perms(path, [text.decode() for text in wire.format_perms(node.perms)])

    async def body(transaction: Operations) -> None:
        for start in range(0, len(nodes), _BATCH):
            await asyncio.gather(*[one(transaction, node) for node in nodes[start : start + _BATCH]])

    if not args.dry_run:
        await client.transact(body)
    would = "would write " if args.dry_run else ""
    _say(args, {"file": args.file, "nodes": len(nodes)}, f"{would}{len(nodes)} nodes")


def _say(args: Asked, reply: dict[str, object], text: str) -> None:
    if args.output == "json":
        json.dump(reply, sys.stdout, indent=2)
        print()
    else:
        print(text)
