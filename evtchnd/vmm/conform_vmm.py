"""The conformance suite's cases for a VMM: a daemon that asks it good and bad questions.

All cases share the one connection that the VMM makes, in order: each goes on where the last has left off.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

from evtchnd import protocol as p
from evtchnd import transport
from evtchnd.errors import VmmError
from evtchnd.vmm.conform_line import CaseFailed, Ended, Line, Skipped, descriptors_of, is_eventfd, raw, require

FREE_PORT = p.MAX_PORTS - 1  # a port that the guest surely has not allocated
ROUNDS = 50


class Suite:
    def __init__(self, path: str, timeout: float) -> None:
        self.timeout = timeout
        with transport.listen(path) as listener:
            poller = select.poll()
            poller.register(listener, select.POLLIN)
            if not poller.poll(timeout * 1000):
                raise VmmError(f"no VMM has connected in {timeout:g} s")
            sock, _ = listener.accept()
        Path(path).unlink()
        self.pid = transport.peer(sock).pid
        self.line = Line(sock, self.serve, timeout)
        self.state = p.State.NEW
        self.domid = 0
        self.store_port = 0
        self.console: p.Console | None = None
        self.slots: list[p.MemoryEntry] = []
        self.assembly = transport.TableAssembly()
        self.have: set[p.Kind] = set()
        self.start_id = -1

    # ---- the daemon's side, as far as the VMM can see it ----

    def serve(self, message: p.Message, fds: list[int]) -> tuple[p.Body, list[int]]:
        """Answers what the VMM asks, and looks whether it may."""
        try:
            then = p.after(self.state, message.type)
            answer = self._answer(message, fds)
        except VmmError as e:
            transport.close_all(fds)
            raise CaseFailed(f"{message.type.name}: {e}") from None
        self.state = then
        return answer, []

    def _answer(self, message: p.Message, fds: list[int]) -> p.Body:
        if isinstance(message, p.Hello):
            require(message.version == p.VERSION, f"HELLO with version {message.version}, {p.VERSION} is due")
            return p.HelloReply(features=message.features & p.ALL_FEATURES)
        if isinstance(message, p.Register):
            self.domid = message.domid
        elif isinstance(message, p.TableBegin):
            self.assembly.begin(message)
        elif isinstance(message, p.TableChunk):
            self.assembly.chunk(message, fds)
            return p.Ack(message.type)  # the descriptors are the table's
        elif isinstance(message, p.TableCommit):
            entries, fds = self.assembly.commit(message)
            self._look_at(entries, fds)
            if message.kind == p.Kind.MEMORY:
                self.slots = []
            self.slots += [entry for entry in entries if isinstance(entry, p.MemoryEntry)]
            self.have.add(p.Kind(message.kind))
        elif isinstance(message, p.MemoryEntry | p.GrantEntry):
            self._look_at([message], fds)
            self.slots += [message] if isinstance(message, p.MemoryEntry) else []
        elif isinstance(message, p.XenStore):
            self.store_port = message.port
            _check_memory(fds[0], message.offset, 4096, "XenStore page")
        elif isinstance(message, p.Console):
            self.console = message
        transport.close_all(fds)
        return p.Ack(message.type)

    def _look_at(self, entries: list[p.TableEntry], fds: list[int]) -> None:
        for entry in entries:
            if isinstance(entry, p.MemoryEntry):
                _check_memory(fds[entry.fd_index], entry.offset, entry.pages * 4096, f"memory slot {entry.slot}")
            elif isinstance(entry, p.GrantEntry):
                _check_memory(fds[entry.fd_index], entry.offset, 4096, f"grant frame {entry.index}")
            else:
                for fd in (fds[entry.kick_fd_index], fds[entry.notify_fd_index]):
                    require(is_eventfd(fd), f"port {entry.port}: a descriptor is no eventfd")

    def ask(self, message: p.Message, fds: list[int]) -> tuple[p.Body, list[int]]:
        """Asks the VMM; the descriptors that are sent are closed here."""
        try:
            return self.line.ask(message, fds)
        finally:
            transport.close_all(fds)

    def bind(self, *ports: int) -> list[int]:
        """Binds; returns the notify eventfds."""
        kicks = [os.eventfd(0, os.EFD_CLOEXEC) for _ in ports]
        question = p.BindPorts(tuple((port, i) for i, port in enumerate(ports)))
        reply, fds = self.ask(question, kicks)
        if isinstance(reply, p.ErrorReply):
            raise CaseFailed(f"BIND_PORTS {ports}: {os.strerror(reply.errno)}: {reply.reason}")
        if not isinstance(reply, p.BindPortsReply):
            transport.close_all(fds)
            raise CaseFailed("the reply to BIND_PORTS is empty")
        try:
            notify = transport.bound(question, reply, fds)
            for port, fd in notify.items():
                require(is_eventfd(fd), f"the notify descriptor of port {port} is no eventfd")
        except (VmmError, CaseFailed) as e:
            transport.close_all(fds)
            raise CaseFailed(str(e)) from None
        return fds

    # ---- cases ----

    def registers_and_gives_its_tables(self) -> None:
        """Takes questions until START, which is left unanswered: the next case asks first."""
        while self.start_id < 0:
            came = self.line.message()
            if came is None:
                raise Ended("the connection was closed before START")
            header, message, fds = came
            if not isinstance(message, p.Message) or header.is_reply:
                raise CaseFailed("sends a reply that nobody asked for")
            if isinstance(message, p.Start):
                self.state = p.after(self.state, message.type)
                self.start_id = header.id
                break
            answer, _ = self.serve(message, fds)
            self.line.send(p.pack(answer, id=header.id))
        missing = {p.Kind.MEMORY, p.Kind.GRANTS} - self.have
        require(not missing, f"starts without its {' and '.join(kind.name for kind in missing)} table")
        require(self.store_port != 0, "starts without XENSTORE: the suite needs a port to bind")

    def answers_questions_while_it_waits_for_start(self) -> None:
        """The daemon binds the XenStore port before it answers START."""
        transport.close_all(self.bind(self.store_port))
        self.line.send(p.pack(p.Ack(p.Type.START), id=self.start_id))

    def binds_the_console(self) -> None:
        if self.console is None:
            raise Skipped("the VMM has sent no CONSOLE")
        port, gfn = self.console.port, self.console.gfn
        require(port != self.store_port, f"XENSTORE and CONSOLE name the same port {port}")
        known = any(slot.gfn <= gfn < slot.gfn + slot.pages for slot in self.slots)
        require(known, f"CONSOLE names guest frame {gfn:#x}, which is in no memory slot")
        transport.close_all(self.bind(port))

    def answers_pings(self) -> None:
        for _ in range(3):
            reply, _ = self.ask(p.Ping(), [])
            require(isinstance(reply, p.Ack), "PING is refused")

    def repeats_the_id_of_a_question(self) -> None:
        for id in (0, 0xFFFFFFFF, 7, 7):
            self.line.send(p.pack(p.Ping(), id=id))
            self.line.reply_to(id)

    def unbinding_what_is_not_bound_is_no_error(self) -> None:
        for _ in range(2):
            reply, _ = self.ask(p.UnbindPorts((self.store_port, FREE_PORT)), [])
            require(isinstance(reply, p.Ack), f"UNBIND_PORTS is refused: {getattr(reply, 'reason', '')}")

    def binds_again(self) -> None:
        transport.close_all(self.bind(self.store_port))
        transport.close_all(self.bind(self.store_port))  # the same port without unbinding: replaced

    def binds_all_or_none(self) -> None:
        self.ask(p.UnbindPorts((self.store_port,)), [])
        kicks = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
        reply, fds = self.ask(p.BindPorts(((self.store_port, 0), (FREE_PORT, 1))), kicks)
        transport.close_all(fds)
        require(isinstance(reply, p.ErrorReply), f"port {FREE_PORT} was bound, which the guest has not allocated")
        transport.close_all(self.bind(self.store_port))

    def refuses_what_it_does_not_know(self) -> None:
        self.line.refused(raw(999), errnos=[errno.ENOSYS])
        self.line.refused(raw(p.Type.START), errnos=[errno.EPROTO])
        self.line.refused(raw(p.Type.PING, bytes(p.MAX_MESSAGE)), errnos=[errno.EMSGSIZE])
        for wrong in (raw(p.Type.PING, flags=0x8000), raw(p.Type.PING, size=31), raw(p.Type.PING, reserved=b"\1" * 12)):
            self.line.refused(wrong, errnos=[errno.EBADMSG])

    def refuses_wrong_bodies(self) -> None:
        words = b"".join(n.to_bytes(4, "little") for n in (1, 0, self.store_port, 0))
        eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self.line.refused(raw(p.Type.BIND_PORTS, words), errnos=[errno.EINVAL])
            self.line.refused(raw(p.Type.BIND_PORTS, words, nfds=1), errnos=[errno.EINVAL])
            self.line.refused(raw(p.Type.BIND_PORTS, words[:-1], nfds=1), [eventfd], errnos=[errno.EINVAL])
            self.line.refused(raw(p.Type.BIND_PORTS, words, nfds=2), [eventfd] * 2, errnos=[errno.EINVAL])
            self.line.refused(
                raw(p.Type.BIND_PORTS, words[:-4] + b"\1\0\0\0", nfds=1), [eventfd], errnos=[errno.EINVAL]
            )
            self.line.refused(raw(p.Type.UNBIND_PORTS, words[:8]), errnos=[errno.EINVAL])
        finally:
            os.close(eventfd)

    def rebinding_leaks_no_descriptor(self) -> None:
        before = descriptors_of(self.pid)
        if self.pid == os.getpid():
            raise Skipped("the VMM is this process")
        for _ in range(ROUNDS):
            transport.close_all(self.bind(self.store_port))
        self.ask(p.Ping(), [])
        after = descriptors_of(self.pid)
        require(after < before + ROUNDS // 2, f"{before} descriptors, {after} after {ROUNDS} binds of one port")

    def ends_on_what_is_no_message(self) -> None:
        self.line.send(raw(p.Type.PING, magic=0x12345678))
        self.line.ended()


def _check_memory(fd: int, offset: int, length: int, what: str) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise CaseFailed(f"{what}: the descriptor is no memfd") from None
    sealable = not seals & fcntl.F_SEAL_SEAL
    require(bool(seals & fcntl.F_SEAL_SHRINK) or sealable, f"{what}: the memfd is not sealed and cannot be")
    size = os.fstat(fd).st_size
    require(offset + length <= size, f"{what}: ends at {offset + length:#x}, the memfd at {size:#x}")


def cases(path: str, timeout: float) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and body of each case, after a VMM has connected (VmmError: none came)."""
    suite = Suite(path, timeout)
    helpers = ("serve", "ask", "bind")
    try:
        for name, value in vars(Suite).items():
            if not name.startswith("_") and callable(value) and name not in helpers:
                yield name.replace("_", " "), getattr(suite, name)
    finally:
        suite.assembly.drop()
        suite.line.sock.close()
