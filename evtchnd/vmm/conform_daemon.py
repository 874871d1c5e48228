"""The conformance suite's cases for a daemon: what VMMs send it, good and bad."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.abi import PAGE_SIZE
from evtchnd.vmm.conform_line import CaseFailed, Ended, Line, Skipped, body_of, descriptors_of, is_eventfd, raw, require

PAGES = 256  # of the guest's RAM; grant frame and XenStore page lie behind it in the same memfd
GRANT_OFFSET = PAGES * PAGE_SIZE
STORE_OFFSET = GRANT_OFFSET + PAGE_SIZE
FILE_PAGES = PAGES + 2
STORE_PORT = 1
CONSOLE_PORT = 2
CONSOLE_GFN = PAGES - 1
U32 = struct.Struct("<I")


def memfd(pages: int = FILE_PAGES, *, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    fd = os.memfd_create("evtchnd-conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, pages * PAGE_SIZE)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Guest:
    """A VMM's connection with a guest's memory; what the daemon binds is answered with eventfds of ours."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.domid = next(suite.domids)
        self.ram = memfd()
        self.kicks: dict[int, int] = {}
        self.notifies: dict[int, int] = {}
        self.refuse_bind = False
        self.line = Line(transport.connect(suite.path), self.serve, suite.timeout)

    def serve(self, message: p.Message, fds: list[int]) -> tuple[p.Body, list[int]]:
        if isinstance(message, p.BindPorts) and not self.refuse_bind:
            for port, index in message.ports:
                if not is_eventfd(fds[index]):
                    raise CaseFailed(f"BIND_PORTS: the kick descriptor of port {port} is no eventfd")
                self._forget(port)
                self.kicks[port] = fds[index]
                self.notifies[port] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            reply = p.BindPortsReply(tuple((port, i) for i, (port, _) in enumerate(message.ports)))
            return reply, [self.notifies[port] for port, _ in message.ports]
        transport.close_all(fds)
        if isinstance(message, p.BindPorts):
            return p.ErrorReply(message.type, errno.ENOENT, "no such port (conformance suite)"), []
        if isinstance(message, p.UnbindPorts):
            for port in message.ports:
                self._forget(port)
        return p.Ack(message.type), []

    def _forget(self, port: int) -> None:
        transport.close_all(table.pop(port) for table in (self.kicks, self.notifies) if port in table)

    # the way of a domain, step by step

    def hello(self, features: int = p.ALL_FEATURES) -> p.HelloReply:
        reply = self.line.well(p.Hello(p.VERSION, features))
        if not isinstance(reply, p.HelloReply):
            raise CaseFailed("the reply to HELLO is empty")
        return reply

    def register(self) -> Guest:
        self.hello()
        self.line.well(p.Register(self.domid, p.RegisterFlag.LONG_MODE, 1, name=f"conformance-{self.domid}"))
        return self

    def table(self, *entries: p.TableEntry, fds: list[int], kind: p.Kind) -> None:
        self.line.well(p.TableBegin(kind, len(entries)))
        self.line.well(p.TableChunk(kind, entries), fds)
        self.line.well(p.TableCommit(kind))

    def memory(self) -> Guest:
        self.table(p.MemoryEntry(0, 0, 0, PAGES, 0), fds=[self.ram], kind=p.Kind.MEMORY)
        self.table(p.GrantEntry(0, 0, GRANT_OFFSET), fds=[self.ram], kind=p.Kind.GRANTS)
        return self

    def xenstore(self) -> Guest:
        self.line.well(p.XenStore(STORE_PORT, STORE_OFFSET), [self.ram])
        return self

    def start(self) -> Guest:
        self.line.well(p.Start())
        return self

    def served(self) -> Guest:
        return self.register().memory().xenstore().start()

    def release(self) -> None:
        self.line.well(p.Release())
        self.line.ended()

    def close(self) -> None:
        self.line.sock.close()
        transport.close_all([self.ram, *self.kicks.values(), *self.notifies.values()])

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Suite:
    def __init__(self, path: str, domid: int, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        self.domids = itertools.count(domid)
        with transport.connect(path) as probe:
            self.pid = transport.peer(probe).pid

    def guest(self) -> Guest:
        return Guest(self)

    def still_there(self) -> None:
        """What one connection did touches nobody else: a new one is greeted."""
        try:
            with self.guest() as guest:
                guest.hello()
        except (CaseFailed, OSError) as e:
            raise CaseFailed(f"afterwards the daemon does not greet a new connection: {e}") from None

    # ---- what has to work ----

    def hello_states_limits(self) -> None:
        with self.guest() as guest:
            reply = guest.hello()
            require(reply.version == p.VERSION, f"version {reply.version}, {p.VERSION} was asked")
            require(
                reply.max_fds == p.MAX_FDS and reply.max_message == p.MAX_MESSAGE, "max_fds or max_message is wrong"
            )
            least = reply.max_slots and reply.max_grant_frames and reply.max_ports
            require(bool(least), "a limit is 0")

    def unknown_features_are_not_accepted(self) -> None:
        with self.guest() as guest:
            reply = guest.hello(1 << 63 | 1 << 40)
            require(reply.features == 0, f"features {reply.features:#x} were accepted, which version 1 does not know")

    def whole_life_without_devices(self) -> None:
        with self.guest() as guest:
            guest.register().memory().start().line.well(p.Ping())
            guest.release()

    def xenstore_port_is_bound_and_ring_served(self) -> None:
        with self.guest() as guest:
            guest.served()
            require(STORE_PORT in guest.kicks, f"port {STORE_PORT} (XenStore) is not bound when START is answered")
            # XS_DIRECTORY (1) of "/": any answer with this request id will do
            request = struct.pack("<IIII", 1, 77, 0, 2) + b"/\0"
            os.pwrite(guest.ram, request, STORE_OFFSET)
            os.pwrite(guest.ram, U32.pack(len(request)), STORE_OFFSET + 2052)
            os.eventfd_write(guest.kicks[STORE_PORT], 1)
            until = time.monotonic() + self.timeout
            while U32.unpack(os.pread(guest.ram, 4, STORE_OFFSET + 2060))[0] < 16:
                require(time.monotonic() < until, "a request in the XenStore ring is not answered")
                time.sleep(0.01)
            _, id, _, _ = struct.unpack("<IIII", os.pread(guest.ram, 16, STORE_OFFSET + 1024))
            require(id == 77, f"the XenStore ring answers request {id}, 77 was asked")
            while True:
                try:
                    os.eventfd_read(guest.notifies[STORE_PORT])
                    break
                except BlockingIOError:
                    require(time.monotonic() < until, "the XenStore ring is answered without a notification")
                    time.sleep(0.01)
            guest.release()

    def slots_and_frames_change_while_it_runs(self) -> None:
        with self.guest() as guest:
            guest.served()
            extra = memfd(4)
            try:
                for _ in range(3):
                    guest.line.well(p.MemoryEntry(7, 0, 0x100000, 4, 0), [extra])
                    guest.line.refused(p.MemoryEntry(7, 0, 0x200000, 4, 0), [extra])
                    guest.line.well(p.GrantEntry(1, 0, PAGE_SIZE), [extra])
                    guest.line.well(p.GrantFrameRemove(1))
                    guest.line.well(p.SlotRemove(7))
                guest.line.refused(p.SlotRemove(7))
                guest.line.refused(p.MemoryEntry(8, 0, PAGES - 1, 4, 0), [extra])
            finally:
                os.close(extra)
            guest.line.well(p.Ping())
            guest.release()

    def tables_of_many_chunks(self) -> None:
        with self.guest() as guest:
            guest.register()
            fds = [memfd(1) for _ in range(p.MAX_FDS)]
            try:
                count = 2 * p.MAX_FDS
                guest.line.well(p.TableBegin(p.Kind.MEMORY, count))
                for base in (0, p.MAX_FDS):
                    entries = tuple(p.MemoryEntry(base + i, i, base + i, 1, 0) for i in range(p.MAX_FDS))
                    guest.line.well(p.TableChunk(p.Kind.MEMORY, entries), fds)
                guest.line.well(p.TableCommit(p.Kind.MEMORY))
            finally:
                transport.close_all(fds)
            guest.start().release()

    def a_refused_table_changes_nothing(self) -> None:
        with self.guest() as guest:
            guest.register().memory()
            low, high = p.MemoryEntry(0, 0, 0, 8, 0), p.MemoryEntry(1, 0, 7, 8, 0)
            guest.line.well(p.TableBegin(p.Kind.MEMORY, 2))
            guest.line.well(p.TableChunk(p.Kind.MEMORY, (low, high)), [guest.ram])
            guest.line.refused(p.TableCommit(p.Kind.MEMORY))
            guest.xenstore().start().line.refused(p.MemoryEntry(9, 0, PAGES - 1, 1, 0), [guest.ram])
            guest.release()

    def tables_that_do_not_add_up(self) -> None:
        one = p.MemoryEntry(0, 0, 0, 8, 0)
        with self.guest() as guest:
            line = guest.register().line
            line.refused(p.TableChunk(p.Kind.MEMORY, (one,)), [guest.ram], errnos=[errno.EPROTO])
            line.refused(p.TableCommit(p.Kind.MEMORY), errnos=[errno.EPROTO])
            line.well(p.TableBegin(p.Kind.MEMORY, 2))
            line.well(p.TableChunk(p.Kind.MEMORY, (one,)), [guest.ram])
            line.refused(p.TableCommit(p.Kind.MEMORY), errnos=[errno.EPROTO])
            line.well(p.TableBegin(p.Kind.MEMORY, 1))
            line.well(p.TableChunk(p.Kind.MEMORY, (one,)), [guest.ram])
            line.refused(p.TableChunk(p.Kind.MEMORY, (one,)), [guest.ram], errnos=[errno.E2BIG])
            line.refused(p.TableCommit(p.Kind.MEMORY), errnos=[errno.EPROTO])
            line.well(p.TableBegin(p.Kind.GRANTS, 1))
            line.refused(p.TableChunk(p.Kind.MEMORY, (one,)), [guest.ram], errnos=[errno.EPROTO])
            guest.memory().start().release()

    def ids_are_repeated_and_answers_in_order(self) -> None:
        with self.guest() as guest:
            guest.hello()
            ids = [0, 0xFFFFFFFF, 5, 5, 1 << 31]
            for id in ids:
                guest.line.send(p.pack(p.Ping(), id=id))
            for id in ids:
                reply, _ = guest.line.reply_to(id)
                require(isinstance(reply, p.Ack), "PING is refused")

    def a_closed_connection_releases_the_domain(self) -> None:
        with self.guest() as first:
            first.served()
            domid = first.domid
        until = time.monotonic() + self.timeout
        while True:
            with self.guest() as second:
                second.domid = domid
                try:
                    second.served().release()
                    return
                except CaseFailed as e:
                    if time.monotonic() > until:
                        raise CaseFailed(f"the domain cannot be registered again: {e}") from None
            time.sleep(0.1)

    def a_domain_has_one_owner(self) -> None:
        with self.guest() as first, self.guest() as second:
            first.served()
            second.hello()
            again = p.Register(first.domid, p.RegisterFlag.LONG_MODE, 1)
            second.line.refused(again, errnos=[errno.EEXIST, errno.EPERM])
            first.line.well(p.Ping())
            first.release()

    def a_vmm_that_refuses_to_bind(self) -> None:
        with self.guest() as guest:
            guest.register().memory().refuse_bind = True
            guest.line.ask(p.XenStore(STORE_PORT, STORE_OFFSET), [guest.ram])
            guest.line.refused(p.Start())
        self.still_there()

    def disks_by_descriptor(self) -> None:
        with self.guest() as guest, tempfile.TemporaryFile() as image:
            if not guest.hello().features & p.Feature.DISK:
                raise Skipped("the daemon has no feature DISK")
            image.truncate(1 << 20)
            guest.line.well(p.Register(guest.domid, p.RegisterFlag.LONG_MODE, 1))
            guest.memory().xenstore().start()
            guest.line.well(p.Disk(51712, p.DiskFlag.READONLY, "xvda"), [image.fileno()])
            guest.line.refused(p.Disk(51712, p.DiskFlag.READONLY, "xvda"), [image.fileno()])
            guest.line.refused(p.Disk(51728, 0, "xvdb"), [guest.notifies[STORE_PORT]])
            guest.line.refused(p.DiskRemove(51728))
            guest.line.well(p.DiskRemove(51712))
            guest.release()

    def vifs_by_descriptor(self) -> None:
        with self.guest() as guest, tempfile.TemporaryFile() as file:
            if not guest.hello().features & p.Feature.VIF:
                raise Skipped("the daemon has no feature VIF")
            guest.line.well(p.Register(guest.domid, p.RegisterFlag.LONG_MODE, 1))
            guest.memory().xenstore().start()
            mac = bytes.fromhex("00163e000007")
            guest.line.refused(p.Vif(0, 1, mac), [file.fileno()])
            guest.line.refused(p.Vif(0, 1, mac), [guest.notifies[STORE_PORT]])
            guest.line.refused(p.VifRemove(0))
            guest.release()

    def console_port_is_bound_and_ring_emptied(self) -> None:
        with self.guest() as guest:
            if not guest.hello().features & p.Feature.CONSOLE:
                raise Skipped("the daemon has no feature CONSOLE")
            guest.line.well(p.Register(guest.domid, p.RegisterFlag.LONG_MODE, 1))
            guest.memory().xenstore()
            guest.line.refused(raw(p.Type.CONSOLE, struct.pack("<IIQ", 0, 0, CONSOLE_GFN)))
            guest.line.refused(raw(p.Type.CONSOLE, struct.pack("<IIQ", CONSOLE_PORT, 1, CONSOLE_GFN)))
            guest.line.refused(raw(p.Type.CONSOLE, struct.pack("<IIQ", CONSOLE_PORT, 0, 1 << 40)))
            guest.line.well(p.Console(CONSOLE_PORT, PAGES))
            guest.line.refused(p.Start())  # no slot has that frame
            guest.line.well(p.Console(CONSOLE_PORT, CONSOLE_GFN))
            guest.start()
            require(CONSOLE_PORT in guest.kicks, f"port {CONSOLE_PORT} (console) is not bound when START is answered")
            guest.line.refused(p.Console(CONSOLE_PORT, CONSOLE_GFN), errnos=[errno.EPROTO])
            # out_prod (3084) of struct xencons_interface moves by a boot's first line; out_cons (3080) has to follow
            page = CONSOLE_GFN * PAGE_SIZE
            os.pwrite(guest.ram, b"Linux version", page + 1024)
            os.pwrite(guest.ram, U32.pack(13), page + 3084)
            os.eventfd_write(guest.kicks[CONSOLE_PORT], 1)
            until = time.monotonic() + self.timeout
            while U32.unpack(os.pread(guest.ram, 4, page + 3080))[0] != 13:
                require(time.monotonic() < until, "what the guest writes to its console is not taken")
                time.sleep(0.01)
            guest.release()

    def resume_after_a_restart(self) -> None:
        with self.guest() as guest:
            if not guest.hello().features & p.Feature.RESUME:
                raise Skipped("the daemon has no feature RESUME")
            guest.line.well(p.Resume(guest.domid, p.RegisterFlag.LONG_MODE, 1))
            guest.memory().xenstore()
            eventfds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
            try:
                guest.table(p.PortEntry(STORE_PORT, 0, 1), fds=eventfds, kind=p.Kind.PORTS)
            finally:
                transport.close_all(eventfds)
            guest.start().release()

    # ---- what has to be refused ----

    def order_of_messages(self) -> None:
        with self.guest() as guest:
            guest.line.refused(p.Register(guest.domid, 0, 1), errnos=[errno.EPROTO])
            guest.hello()
            guest.line.refused(p.Hello(), errnos=[errno.EPROTO])
            guest.line.refused(p.Start(), errnos=[errno.EPROTO])
            guest.line.refused(p.MemoryEntry(0, 0, 0, 1, 0), [guest.ram], errnos=[errno.EPROTO])
            guest.line.well(p.Register(guest.domid, p.RegisterFlag.LONG_MODE, 1))
            guest.line.refused(p.Register(guest.domid, 0, 1), errnos=[errno.EPROTO])
            guest.memory().start()
            guest.line.refused(p.Start(), errnos=[errno.EPROTO])
            guest.line.refused(p.TableBegin(p.Kind.MEMORY, 1), errnos=[errno.EPROTO])
            guest.line.refused(p.UnbindPorts((1,)), errnos=[errno.EPROTO])
            guest.release()

    def another_version(self) -> None:
        with self.guest() as guest:
            guest.line.refused(p.Hello(p.VERSION + 1), errnos=[errno.EPROTONOSUPPORT])
            guest.hello()

    def what_is_no_message(self) -> None:
        good = p.pack(p.Ping(), id=0)
        for data in (b"\0", good[:31], b"", raw(p.Type.PING, magic=0x12345678)):
            with self.guest() as guest:
                guest.hello()
                try:
                    guest.line.send(data)
                    guest.line.ended()
                except CaseFailed as e:
                    raise CaseFailed(f"{len(data)} bytes: {e}") from None
            self.still_there()

    def headers_that_lie(self) -> None:
        wrong = [
            ("size too small", raw(p.Type.PING, size=31)),
            ("size too large", raw(p.Type.PING, size=33)),
            ("size 2^32-1", raw(p.Type.PING, size=0xFFFFFFFF)),
            ("unknown flags", raw(p.Type.PING, flags=0x8000)),
            ("ERROR without REPLY", raw(p.Type.PING, flags=2)),
            ("reserved words", raw(p.Type.PING, reserved=b"\0" * 11 + b"\1")),
        ]
        with self.guest() as guest:
            guest.hello()
            for what, data in wrong:
                try:
                    guest.line.refused(data, errnos=[errno.EBADMSG])
                except CaseFailed as e:
                    raise type(e)(f"{what}: {e}") from None
            guest.line.refused(raw(999), errnos=[errno.ENOSYS])
            guest.line.well(p.Ping())

    def a_message_that_is_too_long(self) -> None:
        with self.guest() as guest:
            guest.hello()
            # the daemon may answer or end the connection
            with contextlib.suppress(Ended):
                guest.line.refused(raw(p.Type.PING, bytes(p.MAX_MESSAGE)), errnos=[errno.EMSGSIZE])
                guest.line.well(p.Ping())
        self.still_there()

    def answers_to_nothing(self) -> None:
        for answer in (p.Ack(p.Type.PING), p.ErrorReply(p.Type.PING, errno.EIO, "no"), p.BindPortsReply(((1, 0),))):
            with self.guest() as guest:
                guest.hello()
                guest.line.send(p.pack(answer, id=12345), [guest.ram] * answer.nfds)
                guest.line.ended()
        self.still_there()

    def bodies_that_lie(self) -> None:
        with self.guest() as guest:
            guest.hello()
            register = body_of(p.Register(guest.domid, 1, 1, name="x"))
            wrong: dict[str, bytes] = {
                "body too short": raw(p.Type.REGISTER, register[:-1]),
                "body too long": raw(p.Type.REGISTER, register + b"\0"),
                "no body": raw(p.Type.REGISTER),
                "padding is not 0": raw(p.Type.REGISTER, register[:2] + b"\1" + register[3:]),
                "domid 0": raw(p.Type.REGISTER, b"\0\0" + register[2:]),
                "domid 0x7ff0": raw(p.Type.REGISTER, b"\xf0\x7f" + register[2:]),
                "unknown flag": raw(p.Type.REGISTER, register[:4] + b"\x80\0\0\0" + register[8:]),
                "no vCPU": raw(p.Type.REGISTER, register[:8] + bytes(4) + register[12:]),
                "grant table version 2": raw(p.Type.REGISTER, register[:12] + U32.pack(2) + register[16:]),
                "name with a newline": raw(p.Type.REGISTER, register[:32] + b"a\nb".ljust(64, b"\0")),
                "name is not UTF-8": raw(p.Type.REGISTER, register[:32] + b"\xff".ljust(64, b"\0")),
            }
            _each_refused(guest.line, wrong)
            guest.line.well(p.Register(guest.domid, 1, 1, name="x"))
            entry = struct.Struct("<IIQQQ")
            bad: dict[str, bytes] = {
                "no pages": entry.pack(0, 0, 0, 0, 0),
                "slot 512": entry.pack(512, 0, 0, 1, 0),
                "unaligned": entry.pack(0, 0, 0, 1, 2048),
                "gfn wraps": entry.pack(0, 0, (1 << 64) - 1, 2, 0),
                "pages wrap 2^64 bytes": entry.pack(0, 0, 0, 1 << 52, 0),
                "offset wraps": entry.pack(0, 0, 0, 2, (1 << 64) - PAGE_SIZE),
                "past the end of the memfd": entry.pack(0, 0, 0, FILE_PAGES + 1, 0),
                "descriptor index 1 of 1": entry.pack(0, 1, 0, 1, 0),
            }
            _each_refused(guest.line, {k: raw(p.Type.SLOT_ADD, v, nfds=1) for k, v in bad.items()}, [guest.ram])
            counts = {"n too large": U32.pack(1) + U32.pack(0xFFFFFFFF), "kind 9": U32.pack(9) + U32.pack(1)}
            _each_refused(guest.line, {k: raw(p.Type.TABLE_CHUNK, v) for k, v in counts.items()})
            guest.memory().start().release()

    def wrong_number_of_descriptors(self) -> None:
        with self.guest() as guest:
            line = guest.register().line
            entry = body_of(p.MemoryEntry(0, 0, 0, 8, 0))
            line.refused(raw(p.Type.SLOT_ADD, entry), errnos=[errno.EINVAL])
            line.refused(raw(p.Type.SLOT_ADD, entry, nfds=1), errnos=[errno.EINVAL])
            line.refused(raw(p.Type.SLOT_ADD, entry, nfds=2), [guest.ram] * 2, errnos=[errno.EINVAL])
            line.refused(raw(p.Type.SLOT_ADD, entry, nfds=1), [guest.ram] * p.MAX_FDS, errnos=[errno.EINVAL])
            line.refused(raw(p.Type.PING), [guest.ram], errnos=[errno.EINVAL])
            guest.memory().start().release()

    def descriptors_that_are_no_memory(self) -> None:
        with self.guest() as guest, tempfile.TemporaryFile() as file, _socket() as sock:
            line = guest.register().line
            file.truncate(FILE_PAGES * PAGE_SIZE)
            frozen = os.memfd_create("evtchnd-conformance", os.MFD_CLOEXEC)  # cannot be sealed against shrinking
            os.truncate(frozen, FILE_PAGES * PAGE_SIZE)
            ends = os.pipe2(os.O_CLOEXEC)
            path = Path("/").resolve()
            wrong = {
                "a pipe": ends[0],
                "an eventfd": os.eventfd(0, os.EFD_CLOEXEC),
                "a directory": os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
                "an O_PATH descriptor": os.open(path, os.O_PATH | os.O_CLOEXEC),
                "a regular file": os.dup(file.fileno()),
                "a socket": os.dup(sock.fileno()),
                "a memfd that cannot be sealed": frozen,
                "/dev/zero": os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
            }
            try:
                for what, fd in wrong.items():
                    try:
                        line.refused(p.MemoryEntry(0, 0, 0, 8, 0), [fd])
                        line.refused(p.GrantEntry(0, 0, 0), [fd])
                        line.refused(p.XenStore(STORE_PORT, 0), [fd])
                    except CaseFailed as e:
                        raise type(e)(f"{what}: {e}") from None
            finally:
                transport.close_all([*wrong.values(), ends[1]])
            guest.memory().xenstore().start().release()

    def memory_that_cannot_be_written(self) -> None:
        whole = memfd()
        wrong = {
            "read-only": os.open(f"/proc/self/fd/{whole}", os.O_RDONLY | os.O_CLOEXEC),
            "sealed against writing": memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE),
        }
        try:
            for what, fd in wrong.items():
                with self.guest() as guest, self.guest() as late:
                    try:
                        guest.served()
                        guest.line.refused(p.MemoryEntry(3, 0, 0x1000, 8, 0), [fd])
                        guest.line.refused(p.GrantEntry(3, 0, 0), [fd])
                        guest.release()
                        late.register().memory().line.refused(p.XenStore(STORE_PORT, STORE_OFFSET), [fd])
                        late.line.ask(p.MemoryEntry(3, 0, 0x1000, 8, 0), [fd])
                        late.line.refused(p.Start())
                    except CaseFailed as e:
                        raise type(e)(f"{what}: {e}") from None
        finally:
            transport.close_all([whole, *wrong.values()])
        self.still_there()

    def ends_in_the_middle(self) -> None:
        steps: list[Callable[[Guest], object]] = [
            lambda guest: None,
            lambda guest: guest.hello(),
            lambda guest: guest.register(),
            lambda guest: guest.register().memory(),
            lambda guest: guest.register().line.send(p.pack(p.TableBegin(p.Kind.MEMORY, 5), id=1)),
            lambda guest: guest.register().memory().xenstore(),
            lambda guest: guest.register().memory().xenstore().line.send(p.pack(p.Start(), id=1)),
            lambda guest: guest.served(),
        ]
        for step in steps:
            with self.guest() as guest:
                step(guest)
        self.still_there()

    def nothing_is_left(self) -> None:
        """Descriptors of the daemon's process, after everything above has ended, and again after ten more lives."""
        counts = []
        for _ in range(2):
            for _ in range(10):
                with self.guest() as guest:
                    guest.served().line.refused(raw(p.Type.SLOT_ADD, nfds=1), [guest.ram])
                    guest.release()
            counts.append(self._settled())
        require(counts[1] <= counts[0], f"{counts[0]} descriptors, {counts[1]} after ten more domains")

    def _settled(self) -> int:
        """The least number of descriptors seen until it has not moved for a second."""
        least, still = descriptors_of(self.pid), 0
        while still < 10:
            time.sleep(0.1)
            now = descriptors_of(self.pid)
            still = 0 if now < least else still + 1
            least = min(now, least)
        return least

    def silence_ends_the_connection(self) -> None:
        """HELLO and REGISTER have a deadline (10 s unless the operator has set another)."""
        with self.guest() as guest, self.guest() as greeted:
            guest.line.timeout = greeted.line.timeout = 60.0
            greeted.hello()
            guest.line.ended()
            greeted.line.ended()


def _each_refused(line: Line, wrong: dict[str, bytes], fds: list[int] | None = None) -> None:
    for what, data in wrong.items():
        try:
            line.refused(data, fds or [])
        except CaseFailed as e:
            raise type(e)(f"{what}: {e}") from None


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def cases(path: str, domid: int, timeout: float, *, slow: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and body of each case; a body raises what is wrong. OSError: nobody listens at `path`."""
    suite = Suite(path, domid, timeout)
    names = [
        name
        for name, value in vars(Suite).items()
        if not name.startswith("_") and callable(value) and name not in ("guest", "still_there")
    ]
    for name in names:
        if name == "silence_ends_the_connection" and not slow:
            continue
        yield name.replace("_", " "), functools.partial(getattr(suite, name))
