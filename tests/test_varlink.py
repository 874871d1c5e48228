"""The Varlink server: the protocol with a small service and an independent client, then the daemon's own interface."""

# no `from __future__ import annotations`: asyncvarlink reads annotations as they are

import asyncio
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import asyncvarlink
import msgspec
import pytest
from asyncvarlink.serviceerrors import InterfaceNotFound
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from evtchnd.control import operator, varlink
from evtchnd.control.config import Config
from evtchnd.control.daemon import Daemon
from evtchnd.control.operator import Operator
from evtchnd.errors import OperatorError
from scale import scaled

DESCRIPTION = """\
# Adds, waits, fails.
interface org.example.sum
method Add(a: int, b: int) -> (sum: int)
method Wait() -> ()
method Fail(reason: string) -> ()
error Bad (reason: string)
"""


class AddCall(msgspec.Struct, forbid_unknown_fields=True):
    a: int
    b: int


class FailCall(msgspec.Struct):
    reason: str


class Sums:
    """A service of three methods."""

    def __init__(self) -> None:
        self.added = 0
        self.go = asyncio.Event()
        self.service = varlink.Service(
            [
                varlink.Interface(
                    DESCRIPTION,
                    {
                        "Add": varlink.Method(AddCall, self.add),
                        "Wait": varlink.Method(varlink.NoParameters, self.wait),
                        "Fail": varlink.Method(FailCall, self.fail),
                    },
                    lambda exc: varlink.VarlinkError("org.example.sum.Bad", reason=str(exc)),
                )
            ],
            vendor="v",
            product="p",
            version="1",
            url="http://example.org",
        )

    async def add(self, call: AddCall) -> Mapping[str, int]:
        self.added += 1
        return {"sum": call.a + call.b}

    async def wait(self, _: varlink.NoParameters) -> Mapping[str, int]:
        await self.go.wait()
        return {}

    async def fail(self, call: FailCall) -> Mapping[str, int]:
        raise RuntimeError(call.reason)


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen()
    return sock


@asynccontextmanager
async def served(
    sums: Sums, path: Path, *, connections: int = 4, message_bytes: int = 65536, idle_s: float = 30.0
) -> AsyncIterator[varlink.Server]:
    with listening(path) as sock:
        server = varlink.Server(sums.service, sock, connections=connections, message_bytes=message_bytes, idle_s=idle_s)
        server.start()
        try:
            yield server
        finally:
            await server.close()


class Raw:
    """A connection that writes what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def to(cls, path: Path) -> AsyncIterator["Raw"]:
        reader, writer = await asyncio.open_unix_connection(os.fspath(path), limit=1 << 24)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    async def answer(self) -> Any:
        async with asyncio.timeout(20):
            return json.loads((await self.reader.readuntil(b"\0"))[:-1])

    async def call(self, method: str, **rest: Any) -> Any:
        self.writer.write(json.dumps({"method": method, **rest}).encode() + b"\0")
        return await self.answer()

    async def is_closed(self) -> bool:
        async with asyncio.timeout(20):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


class SumInterface(asyncvarlink.VarlinkInterface, name="org.example.sum"):
    """What asyncvarlink holds calls and replies against."""

    @asyncvarlink.varlinkmethod(return_parameter="sum")
    def Add(self, *, a: int, b: int) -> int:
        raise NotImplementedError


@asynccontextmanager
async def oracle(path: Path) -> AsyncIterator[asyncvarlink.VarlinkClientProtocol]:
    """Another implementation's client."""
    transport, protocol = await asyncvarlink.connect_unix_varlink(asyncvarlink.VarlinkClientProtocol, path)
    try:
        yield protocol
    finally:
        transport.close()
        await asyncio.sleep(0)


async def test_another_implementation_calls_and_introspects(tmp_path: Path) -> None:
    async with served(Sums(), tmp_path / "s"), oracle(tmp_path / "s") as client:
        sums = client.make_proxy(SumInterface)
        assert (await sums.Add(a=2, b=3))["sum"] == 5
        service = client.make_proxy(VarlinkServiceInterface)
        about = await service.GetInfo()
        assert about["interfaces"] == ["org.example.sum", "org.varlink.service"]
        assert (about["vendor"], about["product"], about["version"]) == ("v", "p", "1")
        described = await service.GetInterfaceDescription(interface="org.example.sum")
        assert described["description"] == DESCRIPTION
        with pytest.raises(InterfaceNotFound):
            await service.GetInterfaceDescription(interface="org.example.none")


S = "org.varlink.service"


@pytest.mark.parametrize(
    ("method", "parameters", "error", "which"),
    [
        ("org.example.sum.Add", {"a": 1, "b": "2"}, f"{S}.InvalidParameter", {"parameter": "b"}),
        ("org.example.sum.Add", {"a": 1}, f"{S}.InvalidParameter", {"parameter": "b"}),
        ("org.example.sum.Add", {"a": 1, "b": 2, "c": 3}, f"{S}.InvalidParameter", {"parameter": "c"}),
        ("org.example.sum.Add", None, f"{S}.InvalidParameter", {"parameter": "a"}),
        ("org.example.sum.Sub", {}, f"{S}.MethodNotFound", {"method": "org.example.sum.Sub"}),
        ("org.example.none.Add", {}, f"{S}.InterfaceNotFound", {"interface": "org.example.none"}),
        ("Add", {}, f"{S}.InterfaceNotFound", {"interface": ""}),
        ("org.example.sum.Fail", {"reason": "why"}, "org.example.sum.Bad", {"reason": "why"}),
    ],
)
async def test_error_replies_say_what_is_wrong(
    tmp_path: Path, method: str, parameters: Any, error: str, which: Any
) -> None:
    async with served(Sums(), tmp_path / "s"), Raw.to(tmp_path / "s") as client:
        assert await client.call(method, parameters=parameters) == {"error": error, "parameters": which}
        # and the connection goes on
        assert await client.call("org.example.sum.Add", parameters={"a": 1, "b": 1}) == {"parameters": {"sum": 2}}


async def test_flags_of_a_call(tmp_path: Path) -> None:
    sums = Sums()
    async with served(sums, tmp_path / "s"), Raw.to(tmp_path / "s") as client:
        add = {"method": "org.example.sum.Add", "parameters": {"a": 1, "b": 2}}
        client.writer.write(json.dumps({**add, "oneway": True}).encode() + b"\0")
        # one reply is an answer to `more`; keys of a newer client are passed over
        assert await client.call(**add, more=True, newer=1) == {"parameters": {"sum": 3}}
        assert sums.added == 2
        assert (await client.call(**add, upgrade=True))["error"] == f"{S}.InvalidParameter"


async def test_calls_that_arrive_together_or_in_pieces_are_answered_in_order(tmp_path: Path) -> None:
    async with served(Sums(), tmp_path / "s"), Raw.to(tmp_path / "s") as client:
        count = scaled(1000)
        calls = b"".join(
            json.dumps({"method": "org.example.sum.Add", "parameters": {"a": n, "b": 0}}).encode() + b"\0"
            for n in range(count)
        )
        client.writer.write(calls)
        assert [(await client.answer())["parameters"]["sum"] for _ in range(count)] == list(range(count))
        for byte in calls[: calls.index(b"\0") + 1]:
            client.writer.write(bytes([byte]))
            await client.writer.drain()
        assert await client.answer() == {"parameters": {"sum": 0}}


@pytest.mark.parametrize(
    "message", [b"\0", b"{\0", b"[]\0", b"{}\0", b'{"method":1}\0', b'{"method":"a.B","parameters":[]}\0']
)
async def test_what_is_no_call_ends_its_connection_only(
    tmp_path: Path, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(Sums(), tmp_path / "s"), Raw.to(tmp_path / "s") as good:
        async with Raw.to(tmp_path / "s") as bad:
            bad.writer.write(message)
            assert await bad.is_closed()
        assert await good.call("org.example.sum.Add", parameters={"a": 1, "b": 2}) == {"parameters": {"sum": 3}}
    assert "no Varlink call" in caplog.text


async def test_a_message_without_end_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served(Sums(), tmp_path / "s", message_bytes=4096), Raw.to(tmp_path / "s") as client:
        client.writer.write(b"x" * 100_000)
        assert await client.is_closed()
    assert "a message above 4096 bytes" in caplog.text


async def test_a_connection_that_ends_within_a_message_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(Sums(), tmp_path / "s"), Raw.to(tmp_path / "s") as client:
        client.writer.write(b'{"meth')
        client.writer.write_eof()
        assert await client.is_closed()
    assert "ended within a message of 6 bytes" in caplog.text


async def test_more_connections_than_the_limit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add: dict[str, Any] = {"a": 1, "b": 2}
    async with served(Sums(), tmp_path / "s", connections=2):
        async with Raw.to(tmp_path / "s") as one, Raw.to(tmp_path / "s") as two:
            assert await one.call("org.example.sum.Add", parameters=add)
            assert await two.call("org.example.sum.Add", parameters=add)
            async with Raw.to(tmp_path / "s") as three:
                assert await three.is_closed()
            assert await one.call("org.example.sum.Add", parameters=add)
        for _ in range(1000):
            async with Raw.to(tmp_path / "s") as again:
                again.writer.write(b'{"method":"org.example.sum.Add","parameters":{"a":1,"b":2}}\0')
                try:
                    if await again.answer():
                        break
                except (asyncio.IncompleteReadError, ConnectionError):
                    await asyncio.sleep(0.01)
        else:
            pytest.fail("room that has become free is not given")
    assert "2 connections are open (limits.operator_connections)" in caplog.text


async def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    async with served(Sums(), tmp_path / "s", idle_s=0.1), Raw.to(tmp_path / "s") as client:
        assert await client.is_closed()


async def test_a_client_that_does_not_read_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are dropped with it: they may not lie here for as long as it likes."""
    monkeypatch.setattr(varlink, "_WRITE_S", 0.1)
    async with served(Sums(), tmp_path / "s"), Raw.to(tmp_path / "s") as client:
        assert await client.call("org.example.sum.Add", parameters={"a": 1, "b": 2})
        connected = len(os.listdir("/proc/self/fd"))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        about = {"method": f"{S}.GetInterfaceDescription", "parameters": {"interface": S}}
        ask = json.dumps(about).encode() + b"\0"
        client.writer.write(ask * 20_000)
        async with asyncio.timeout(60):
            while len(os.listdir("/proc/self/fd")) >= connected:
                await asyncio.sleep(0.05)
        async with Raw.to(tmp_path / "s") as other:
            assert await other.call("org.example.sum.Add", parameters={"a": 1, "b": 2})


async def test_a_client_that_leaves_does_not_stop_what_it_asked_for(tmp_path: Path) -> None:
    sums = Sums()
    async with served(sums, tmp_path / "s"):
        async with Raw.to(tmp_path / "s") as client:
            client.writer.write(b'{"method":"org.example.sum.Wait"}\0' * 3)
            await client.writer.drain()
        async with Raw.to(tmp_path / "s") as other:
            assert await other.call("org.example.sum.Add", parameters={"a": 1, "b": 2})
            sums.go.set()
            assert await other.call("org.example.sum.Wait") == {"parameters": {}}


async def test_closing_ends_calls_that_wait_and_leaves_no_descriptor(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def once() -> None:
        async with served(Sums(), tmp_path / "s") as server, Raw.to(tmp_path / "s") as client:
            client.writer.write(b'{"method":"org.example.sum.Wait"}\0')
            async with Raw.to(tmp_path / "s") as other:
                assert await other.call("org.example.sum.Add", parameters={"a": 1, "b": 2})
            await server.close()
            assert await client.is_closed()
            await server.close()
        (tmp_path / "s").unlink()

    await once()  # uvloop opens some of its own at first use
    before = descriptors()
    for _ in range(scaled(100)):
        await once()
    for _ in range(100):
        if descriptors() <= before:
            break
        await asyncio.sleep(0.05)
    assert descriptors() <= before


# ---- io.evtchnd ----------------------------------------------------------------------------------------------------


def test_every_struct_is_what_the_interface_says() -> None:
    """The text of io.evtchnd.varlink against the structs that replies and calls are converted to."""
    text = re.sub(r"#.*", "", operator.DESCRIPTION)
    fields = r"\(([^()]*)\)"

    def said(body: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+): ([^,\s]+)", body))

    def made(struct: type[msgspec.Struct]) -> dict[str, str]:
        names: dict[Any, str] = {int: "int", str: "string", bool: "bool", dict[str, int]: "[string]int"}

        def name(kind: Any) -> str:
            kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
            if kind in names:
                return names[kind]
            arguments: tuple[Any, ...] = getattr(kind, "__args__", ())
            if type(None) in arguments:
                return "?" + name(arguments[0])
            return f"[]{name(arguments[0])}" if arguments else kind.__name__

        return {field.name: name(field.type) for field in msgspec.structs.fields(struct)}

    types = dict(re.findall(r"type (\w+) " + fields, text))
    assert sorted(types) == ["Console", "Device", "Disk", "Domain", "Vif", "Worker"]
    for name, body in types.items():
        assert said(body) == made(getattr(operator, name)), name
    methods = re.findall(r"method (\w+)" + fields + r" -> " + fields, text)
    assert [name for name, _, _ in methods] == [
        *("List", "Info", "BlockAttach", "BlockDetach"),
        *("Console", "ConsoleAttach", "ConsoleDetach", "BlockResize"),
        *("NetworkAttach", "NetworkDetach", "NetworkSet", "NetworkCapture", "NetworkList"),
        "Upgrade",
    ]
    for name, call, reply in methods:
        wanted = getattr(operator, f"{name}Call", varlink.NoParameters)
        assert said(call) == made(wanted), name
        assert said(reply) == made(getattr(operator, f"{name}Reply")), name


class Domains(asyncvarlink.VarlinkInterface, name="io.evtchnd"):
    """The part of the interface that needs no domain, as asyncvarlink types it."""

    class Domain(TypedDict):
        domid: int
        name: str
        uuid: str
        state: str
        memory: int
        vcpus: int
        devices: int

    @asyncvarlink.varlinkmethod(return_parameter="domains")
    def List(self) -> list[Domain]:
        raise NotImplementedError


@asynccontextmanager
async def operated(folder: Path) -> AsyncIterator[Path]:
    """The real daemon, without workers, and its operator's socket."""
    config = Config(runtime_dir=str(folder), single_process=True)
    daemon = Daemon(config, zygote=None)
    await daemon.start()
    with listening(config.control_socket) as sock:
        server = Operator(daemon, config.limits, sock)
        server.start()
        try:
            yield config.control_socket
        finally:
            await server.close()
            await daemon.stop()


async def test_the_daemon_introspects_and_lists(tmp_path: Path) -> None:
    async with operated(tmp_path) as path, oracle(path) as client:
        about = await client.make_proxy(VarlinkServiceInterface).GetInfo()
        assert about["interfaces"] == ["io.evtchnd", "org.varlink.service"]
        described = await client.make_proxy(VarlinkServiceInterface).GetInterfaceDescription(interface="io.evtchnd")
        assert described["description"] == operator.DESCRIPTION
        assert await client.make_proxy(Domains).List() == {"domains": []}


@pytest.mark.parametrize(
    ("method", "parameters", "reason"),
    [
        ("Info", {"domid": 7}, "domain 7 is not there"),
        ("BlockAttach", {"domid": 7, "disk": "/a,raw,xvda"}, "domain 7 is not there"),
        ("BlockAttach", {"domid": 7, "disk": "a,raw,xvda"}, "target 'a' must be an absolute path"),
        ("BlockAttach", {"domid": 7, "disk": "/a,qcow2,xvda"}, "format qcow2 is not served"),
        ("BlockDetach", {"domid": 7, "device": "xvda"}, "domain 7 is not there"),
        ("NetworkAttach", {"domid": 7, "vif": "bridge=br0"}, "domain 7 is not there"),
        ("NetworkAttach", {"domid": 7, "vif": "brigde=br0"}, "'brigde' is no key of a vif"),
        ("NetworkDetach", {"domid": 7, "device": "0"}, "domain 7 is not there"),
        ("NetworkSet", {"domid": 7, "device": "0", "rate": "fast"}, "'fast' is no rate"),
        ("NetworkList", {"domid": 7}, "domain 7 is not there"),
    ],
)
async def test_what_the_daemon_refuses_it_refuses_with_a_reason(
    tmp_path: Path, method: str, parameters: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with operated(tmp_path) as path, Raw.to(path) as client:
        answer = await client.call(f"io.evtchnd.{method}", parameters=parameters)
    assert answer["error"] == "io.evtchnd.Refused"
    assert reason in answer["parameters"]["reason"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_domid_has_16_bits(tmp_path: Path) -> None:
    async with operated(tmp_path) as path, Raw.to(path) as client:
        for domid in (-1, 65536, "7", 7.5, True, None):
            answer = await client.call("io.evtchnd.Info", parameters={"domid": domid})
            assert answer == {"error": f"{S}.InvalidParameter", "parameters": {"parameter": "domid"}}


async def test_a_defect_is_logged_and_named_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    error = operator._failed(KeyError("x"))
    assert (error.name, error.parameters) == ("io.evtchnd.Failed", {"reason": "KeyError: 'x'"})
    assert "a call failed" in caplog.text
    assert operator._failed(OperatorError("no")).name == "io.evtchnd.Refused"
