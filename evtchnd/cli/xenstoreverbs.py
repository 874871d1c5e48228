"""What `evtchnctl xenstore` does, over xenstored.sock. Its command line is in xenstore.py: this imports a loop."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from evtchnd.cli import xenstorestream
from evtchnd.errors import OperatorError
from evtchnd.xenstore import wire
from evtchnd.xenstore.client import Client, Operations
from evtchnd.xenstore.wire import Op, XenStoreError

Asked = argparse.Namespace
# Reads of one directory that are under way at once
_BATCH = 256
_USED = re.compile(r"(\S+) *: +(\d+) \(max +(\d+)\)(?: (\d+) refused)?")
_BLUE, _GREEN, _DIM = "34", "32", "2"


def run(name: str, args: Asked, control_socket: Path) -> None:
    """Does what the verb `name` stands for. OperatorError with one line for whatever goes wrong."""
    path = control_socket.with_name("xenstored.sock")

    async def serve() -> None:
        try:
            async with asyncio.timeout(args.timeout):
                client = await Client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise OperatorError(f"{path}: no evtchnd serves there (--runtime-dir names its folder)") from None
        try:
            async with asyncio.timeout(None if name in _LONG else args.timeout):
                await _VERBS[name](args, client)
        finally:
            await client.close()

    try:
        asyncio.run(serve())
    except XenStoreError as error:
        raise OperatorError(f"{error} ({os.strerror(error.errno or 0)})") from None
    except TimeoutError:
        raise OperatorError(f"{path}: no answer in {args.timeout:g} s") from None
    except BrokenPipeError:
        # of what is printed, not of the socket
        raise
    except OSError as error:
        raise OperatorError(f"{path}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        # the way to end a watch
        return


# ---- nodes


async def _tree(client: Operations, path: str) -> AsyncIterator[tuple[int, str, bytes, list[str]]]:
    """(depth, path, value, permissions) of a node and all below it, parents first; without what goes meanwhile."""
    pending: list[tuple[int, str, bytes, list[str]]] = []
    first = await _node(client, path)
    if first is None:
        raise XenStoreError("ENOENT", path)
    pending.append((0, path, *first))
    while pending:
        depth, path, value, perms = pending.pop()
        yield depth, path, value, perms
        below: list[tuple[int, str, bytes, list[str]]] = []
        for batch in await _children(client, path):
            found = await asyncio.gather(*[_node(client, child) for child in batch])
            below += [(depth + 1, child, *node) for child, node in zip(batch, found, strict=True) if node is not None]
        pending += reversed(below)


async def _children(client: Operations, path: str) -> list[list[str]]:
    """Their paths, so many at once."""
    try:
        paths = [f"{path.rstrip('/')}/{name}" for name in await client.ls(path)]
    except XenStoreError as error:
        if error.name != "ENOENT":
            raise
        return []
    return [paths[start : start + _BATCH] for start in range(0, len(paths), _BATCH)]


async def _node(client: Operations, path: str) -> tuple[bytes, list[str]] | None:
    try:
        return await client.read_bytes(path), await client.get_perms(path)
    except XenStoreError as error:
        if error.name == "ENOENT":
            return None
        raise


async def _ls(args: Asked, client: Client) -> None:
    if args.output == "json":
        rows = [
            {"path": path, "value": wire.decode(value), "perms": perms}
            async for _, path, value, perms in _tree(client, args.path)
        ]
        return _json(rows)
    async for depth, path, value, perms in _tree(client, args.path):
        name = path if depth == 0 else path.rpartition("/")[2]
        shown = f"{' ' * depth}{_paint(name, _BLUE)} = {_paint(f'{chr(34)}{_printable(value)}{chr(34)}', _GREEN)}"
        print(f"{shown}  {_paint('(' + ','.join(perms) + ')', _DIM)}" if args.perms else shown)
    return None


async def _read(args: Asked, client: Client) -> None:
    values = {path: await client.read_bytes(path) for path in args.paths}
    if args.output == "json":
        return _json({path: wire.decode(value) for path, value in values.items()})
    for value in values.values():
        if sys.stdout.isatty():
            print(_paint(_printable(value), _GREEN))
        else:
            sys.stdout.buffer.write(value + b"\n")
    return None


async def _write(args: Asked, client: Client) -> None:
    if len(args.pairs) % 2:
        raise OperatorError(f"{args.pairs[-1]}: no value (write PATH VALUE ...)")
    pairs = list(zip(args.pairs[::2], args.pairs[1::2], strict=True))

    async def body(transaction: Operations) -> None:
        for path, value in pairs:
            await transaction.write(path, value)

    await _change(args, client, body, dict(pairs), "write")


async def _rm(args: Asked, client: Client) -> None:
    async def body(transaction: Operations) -> None:
        for path in args.paths:
            await transaction.rm(path)

    await _change(args, client, body, args.paths, "remove")


async def _change(
    args: Asked, client: Client, body: Callable[[Operations], Awaitable[None]], reply: Any, what: str
) -> None:
    """All of it or nothing; with --dry-run it is tried in a transaction that is dropped."""
    if args.dry_run:
        transaction = client.transaction()
        await transaction.begin()
        try:
            await body(transaction)
        finally:
            await transaction.abort()
    else:
        await client.transact(body)
    if args.output == "json":
        _json(reply)
    elif args.dry_run:
        print(f"would {what} {', '.join(reply)}")


async def _watch(args: Asked, client: Client) -> None:
    async with AsyncExitStack() as stack:
        watches = [
            await stack.enter_async_context(client.watch(path, depth=args.depth)) for path in dict.fromkeys(args.paths)
        ]
        waiting = {asyncio.ensure_future(anext(watch)): watch for watch in watches}
        stack.callback(lambda: [event.cancel() for event in waiting])
        left = math.inf if args.count is None else args.count
        while left > 0:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for event in done:
                watch = waiting.pop(event)
                path = event.result()
                print(json.dumps({"path": path}) if args.output == "json" else _paint(path, _BLUE), flush=True)
                waiting[asyncio.ensure_future(anext(watch))] = watch
                left -= 1
                if left <= 0:
                    break


# ---- quotas


async def _quota(args: Asked, client: Client) -> None:
    head = "" if args.domain == "default" else f"{args.domid_of(args, args.domain)}\0"

    async def limit_of(name: str) -> int:
        return int((await client.request(Op.GET_QUOTA, f"{head}{name}\0".encode(), what=f"quota {name}"))[:-1])

    names = (await client.request(Op.GET_QUOTA, b""))[:-1].decode().split()
    if args.name is not None and args.name not in names:
        raise OperatorError(f"no quota named '{args.name}': {', '.join(names)}")
    if args.value is not None:
        if not args.value.isdecimal():
            raise OperatorError(f"'{args.value}' is no number of 0 (not checked) or more")
        if not args.dry_run:
            payload = f"{head}{args.name}\0{args.value}\0".encode()
            await client.request(Op.SET_QUOTA, payload, what=f"quota {args.name} {args.value}")
    used = await _used(client, head) if head else {}
    rows = {name: {"limit": await limit_of(name), **used.get(name, {})} for name in names if args.name in (None, name)}
    if args.output == "json":
        return _json(rows)
    columns = ("used", "most", "limit", "refused") if head else ("limit",)
    width = max(map(len, rows))
    print(" " * width, *[f"{column:>12}" for column in columns])
    for name, row in rows.items():
        print(_paint(f"{name:{width}}", _BLUE), *[f"{row.get(column, ''):>12}" for column in columns])
    return None


async def _used(client: Client, head: str) -> dict[str, dict[str, int]]:
    """What CONTROL says of a domain: by quota what is used, the most that was, how often it was refused."""
    try:
        said = (await client.request(Op.CONTROL, f"quota\0{head}".encode())).decode()
    except XenStoreError as error:
        if error.name != "ENOENT":
            raise
        return {}
    found = [match.groups("0") for line in said.splitlines() if (match := _USED.fullmatch(line)) is not None]
    return {
        name: {"used": int(used), "most": int(most), "refused": int(refused)} for name, used, most, refused in found
    }


_VERBS: dict[str, Callable[[Asked, Client], Awaitable[None]]] = {
    "ls": _ls,
    "read": _read,
    "write": _write,
    "rm": _rm,
    "watch": _watch,
    "quota": _quota,
    "dump": lambda args, client: xenstorestream.dump(args, client, _tree),
    "load": xenstorestream.load,
}
# As long as there is something to say, or so many nodes take
_LONG = ("watch", "dump", "load")

# ---- output


def _json(reply: Any) -> None:
    json.dump(reply, sys.stdout, indent=2)
    print()


def _printable(value: bytes) -> str:
    """A guest writes what it likes: nothing of it reaches a terminal as it is, but printable text."""
    text = value.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _paint(text: str, colour: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"
