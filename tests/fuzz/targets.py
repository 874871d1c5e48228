"""What takes bytes of somebody else's: each a function of any bytes, which raises only where evtchnd has a defect.

What is refused is refused by the errors that the parser's own text names; everything else is a find.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import xenstore_fuzz
from bareguest import Ram
from evtchnd import answers, diskspec, protocol, transport, vifspec
from evtchnd import journal as journals
from evtchnd._core import BlkRing, RxRing, TxRing
from evtchnd.control import config, varlink
from evtchnd.errors import GuestError, HostError, OperatorError, VmmError
from evtchnd.vmm import elf, kernel_image, pvh
from evtchnd.xenstore import log, migration, restore

RING_GREF, TABLE_GREFS = 8, 64


# ---- the VMM's messages


def message(data: bytes) -> None:
    """One message: what was read can be packed again, and is the same then."""
    try:
        header, body = protocol.unpack(data, data[16] % 8 if len(data) > 16 else 0)
    except VmmError:
        pass
    else:
        if not header.is_reply:
            assert isinstance(body, protocol.Message)
            again = protocol.unpack(protocol.pack(body, id=header.id), body.nfds)
            assert again[1] == body
    endpoint = transport.Endpoint()
    endpoint.ask(protocol.Ping())
    try:
        endpoint.feed(data, 0)
    except protocol.WireError as error:
        endpoint.refuse(error)


def table(data: bytes) -> None:
    """A table that comes in chunks, each with its length before it."""
    assembly = transport.TableAssembly()
    at = 0
    while at + 3 <= len(data):
        what, size = data[at], int.from_bytes(data[at + 1 : at + 3], "little")
        body, at = data[at + 3 : at + 3 + size], at + 3 + size
        kind = (protocol.Type.TABLE_BEGIN, protocol.Type.TABLE_CHUNK, protocol.Type.TABLE_COMMIT)[what % 3]
        head = protocol.HEADER.pack(protocol.MAGIC, kind, 0, 1, protocol.HEADER_SIZE + len(body), 0)
        try:
            _, come = protocol.unpack(head + body, 0)
            if isinstance(come, protocol.TableBegin):
                assembly.begin(come)
            elif isinstance(come, protocol.TableChunk):
                assembly.chunk(come, [])
            elif isinstance(come, protocol.TableCommit):
                assembly.commit(come)
        except VmmError:
            pass
    assembly.drop()


# ---- XenStore


def migration_stream(data: bytes) -> None:
    """A stream: refused, or a store whose accounts hold and whose own stream is one."""
    try:
        store = restore.from_stream(data)
    except migration.MigrationError:
        return
    assert store.check() == []
    again = restore.from_stream(b"".join(restore.stream(store)))
    assert dict(again.tree.items()).keys() == dict(store.tree.items()).keys()


def store_log(data: bytes) -> None:
    """The records of a log that an earlier process has left."""
    area = 1 << 16
    fd = os.memfd_create("log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    kept = log.Log.adopt(fd, area)
    try:
        with suppress(log.LogFullError):
            kept.append(data + bytes(-len(data) % 8))
        store = restore.open_store(kept)
        assert store.check() == []
    except (migration.MigrationError, HostError):
        pass
    finally:
        kept.close()
        with suppress(OSError):
            os.close(fd)


# ---- rings


@cache
def _ram() -> Ram:
    return Ram()


def _guest(data: bytes) -> tuple[Ram, bytes]:
    """A guest whose grants are of the data's first bytes: 8 each, from TABLE_GREFS on; -> the rest."""
    ram = _ram()
    entries, rest = data[: 8 * 16], data[8 * 16 :]
    ram.table[:] = bytes(len(ram.table))
    ram.table[8 * TABLE_GREFS : 8 * TABLE_GREFS + len(entries)] = entries
    ram.grant(RING_GREF, 8)
    page = ram.page(8)
    ram.ram[page : page + 4096] = rest[:4096].ljust(4096, b"\0")
    return ram, rest[4096:]


def blk(data: bytes) -> None:
    """A ring of any bytes: each request that is taken is answered once, and nothing stays pinned."""
    _blk(data, b"")


def blk_journal(data: bytes) -> None:
    """The journal that a dead worker left, beside a ring: refused, or all of it answered once."""
    _blk(data[512:], data[:512])


def _blk(data: bytes, left: bytes) -> None:
    ram, rest = _guest(data)
    with ExitStack() as stack:
        page = ram.grants.map(RING_GREF, write=True)
        stack.callback(page.close)
        disk = os.memfd_create("disk")
        stack.callback(os.close, disk)
        os.ftruncate(disk, 1 << 16)
        fd = journals.create(32, name="fuzz")
        stack.callback(os.close, fd)
        journal = journals.Journal(fd)
        stack.callback(journal.close)
        if left:
            with memoryview(journal.mem.view) as words:
                words[16 : 16 + len(left[16:])] = left[16:]
        abi = 32 if rest[:1] == b"\1" else 64
        ring = BlkRing(ram.grants, [page], abi=abi, journal=journal, sectors=128, max_indirect=32)
        stack.callback(ring.close)
        taken = 0
        try:
            todo = ring.attach() if left else []
            for _ in range(4):
                todo += ring.run(disk, 32)
                for req in todo:
                    taken += 1
                    ring.done(req, req.status)
                todo = []
                ring.push()
        except (GuestError, HostError):
            pass
        else:
            assert ring.inflight == 0 and ring.requests == ring.responses, (taken, ring.requests, ring.responses)
    assert ram.grants.pinned == ram.memory.held == 0


def netif_tx(data: bytes) -> None:
    """Packets of any slots and extras."""
    _net(data, send=True)


def netif_rx(data: bytes) -> None:
    """Frames into any slots."""
    _net(data, send=False)


def _net(data: bytes, *, send: bool) -> None:
    ram, rest = _guest(data)
    with ExitStack() as stack:
        page = ram.grants.map(RING_GREF, write=True)
        stack.callback(page.close)
        fd = answers.create(1, "fuzz")
        stack.callback(os.close, fd)
        kept = answers.Answers(fd, 0)
        stack.callback(kept.close)
        with suppress(GuestError):
            if send:
                tap = os.open("/dev/null", os.O_WRONLY)
                stack.callback(os.close, tap)
                tx = TxRing(ram.grants, page, kept.tx, again=rest[:1] == b"\1")
                stack.callback(tx.close)
                for _ in range(4):
                    tx.run(tap, 256)
                    tx.push()
            else:
                tap = os.memfd_create("tap")
                stack.callback(os.close, tap)
                os.write(tap, rest[1:])
                os.lseek(tap, 0, os.SEEK_SET)
                gso = rest[:1] == b"\2"
                rx = RxRing(ram.grants, page, kept.rx, again=rest[:1] == b"\1", most_bytes=65536, gso=gso)
                stack.callback(rx.close)
                for _ in range(4):
                    rx.run(tap, 64)
                    rx.push()
    assert ram.grants.pinned == ram.memory.held == 0


# ---- what operators write


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def disk_string(data: bytes) -> None:
    """xl's disk string."""
    with suppress(OperatorError):
        spec = diskspec.parse(_text(data))
        assert diskspec.devid_of(spec.vdev) >= 0
        assert diskspec.vdev_of(diskspec.devid_of(spec.vdev))


def vif_string(data: bytes) -> None:
    """xl's vif string."""
    with suppress(OperatorError):
        spec = vifspec.parse(_text(data))
        assert spec.name(7, spec.devid or 0)


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="evtchnd-fuzz-")) / "evtchnd.toml"


def configuration(data: bytes) -> None:
    """A configuration file: every fault is told in a line."""
    _file().write_bytes(data)
    try:
        config.load(_file())
    except config.ConfigError as error:
        assert error.faults and all(fault.strip() for fault in error.faults)


@cache
def _service() -> varlink.Service:
    async def echo(call: config.Poll) -> dict[str, int]:
        return {"sum": call.max_us}

    described = "interface org.example.fuzz\nmethod Echo(max_us: int) -> (sum: int)\n"
    methods = {"Echo": varlink.Method(config.Poll, echo)}
    interface = varlink.Interface(described, methods, lambda exc: varlink.VarlinkError("org.example.fuzz.Bad"))
    return varlink.Service([interface], vendor="v", product="p", version="1", url="u")


def varlink_call(data: bytes) -> None:
    """An operator's message."""
    reply = _service().reply(data)
    with suppress(ValueError):
        asyncio.run(reply)


# ---- kernels


def elf_file(data: bytes) -> None:
    """An ELF file, loaded by its PVH entry."""
    with suppress(OperatorError, HostError):
        image = elf.parse(data)
        assert image.start <= image.end

        def write(at: int, part: bytes | memoryview) -> None:
            assert at >= 0 and at + len(part) <= 64 << 20

        pvh.load(write, 64 << 20, 1, image, "quiet", [])


def kernel_file(data: bytes) -> None:
    """A bzImage, or a packed kernel."""
    with suppress(OperatorError, HostError):
        kernel_image._image(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "message": message,
    "table": table,
    "xenstore": xenstore_fuzz.run,
    "migration": migration_stream,
    "storelog": store_log,
    "blk": blk,
    "journal": blk_journal,
    "nettx": netif_tx,
    "netrx": netif_rx,
    "diskspec": disk_string,
    "vifspec": vif_string,
    "config": configuration,
    "varlink": varlink_call,
    "elf": elf_file,
    "kernel": kernel_file,
}
