"""The handshake's table, and both ends of it over a real XenStore."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from evtchnd.abi import XenbusState
from evtchnd.xenbus import TRANSITIONS, Backend, Step, next_step, parse_state
from evtchnd.xenstore.client import Client
from evtchnd.xenstore.server import Server
from scale import scaled

BACK, FRONT = "/local/domain/0/backend/vbd/7/51712", "/local/domain/7/device/vbd/51712"
S = XenbusState
OWN = tuple(TRANSITIONS)


def test_every_pair_has_a_step() -> None:
    assert OWN == (S.INITIALISING, S.INIT_WAIT, S.CONNECTED, S.CLOSING, S.CLOSED, S.RECONFIGURED)
    assert all(len(row) == len(XenbusState) for row in TRANSITIONS.values())


AFTER = {
    Step.ANNOUNCE: S.INIT_WAIT,
    Step.CONNECT: S.CONNECTED,
    Step.CLOSE: S.CLOSING,
    Step.SHUT: S.CLOSED,
}


def after(step: Step, front: XenbusState) -> XenbusState:
    if step is Step.RECONFIGURE:
        return S.CONNECTED if front is S.CONNECTED else S.RECONFIGURED
    return AFTER[step]


@pytest.mark.parametrize("reconfigures", [True, False])
@pytest.mark.parametrize("online", [True, False])
def test_no_frontend_state_makes_it_go_round(online: bool, reconfigures: bool) -> None:
    """Whatever stands in the frontend's node: after a few steps the backend waits for a change."""
    for own in OWN:
        for front in XenbusState:
            state, seen = own, []
            while (step := next_step(state, front, online=online, reconfigures=reconfigures)) is not Step.STAY:
                seen.append(step)
                state = after(step, front)
                assert len(seen) < 4, (own, front, seen)
                if not online and state is S.CLOSED:
                    break


def walk(own: XenbusState, *fronts: int) -> list[int]:
    """The own states that a frontend sees while it writes `fronts`."""
    states = []
    for front in fronts:
        while (step := next_step(own, XenbusState(front), reconfigures=True)) is not Step.STAY:
            own = after(step, XenbusState(front))
        states.append(int(own))
    return states


def test_the_usual_life() -> None:
    assert walk(S.INITIALISING, 1, 3, 4, 5, 6) == [2, 4, 4, 5, 6]


def test_a_frontend_changes_its_mind() -> None:
    assert walk(S.CONNECTED, 7, 4, 7, 4, 5, 6) == [8, 4, 8, 4, 5, 6]
    assert next_step(S.CONNECTED, S.RECONFIGURING) is Step.STAY  # of a disk, there is nothing to change


def test_kexec_wants_5_6_2() -> None:
    assert walk(S.CONNECTED, 5, 6, 1, 3, 4) == [5, 6, 2, 4, 4]
    assert walk(S.CLOSED, 5, 6, 1) == [5, 6, 2]


def test_a_frontend_that_starts_over_gets_a_new_handshake() -> None:
    assert walk(S.CONNECTED, 1, 3) == [2, 4]


def test_detach_begins_nothing_new() -> None:
    for own in (S.INITIALISING, S.INIT_WAIT, S.CLOSED):
        assert next_step(own, S.INITIALISED, online=False) is Step.SHUT
    assert next_step(S.CONNECTED, S.CONNECTED, online=False) is Step.STAY  # the guest closes first
    assert next_step(S.CONNECTED, S.CLOSED, online=False) is Step.SHUT


@pytest.mark.parametrize("text", [None, "", "9", "10", "-1", "x", "1 ", "4\n", "\u0661", "\0", "1" * 4096])
def test_what_is_no_state_is_unknown(text: str | None) -> None:
    assert parse_state(text) is S.UNKNOWN


def test_states_are_read() -> None:
    assert [parse_state(str(number)) for number in range(9)] == list(XenbusState)


@asynccontextmanager
async def world() -> AsyncIterator[tuple[Server, Backend]]:
    server = Server()
    server.introduce(7)
    for path, value in {f"{BACK}/online": "1", f"{BACK}/state": "1", f"{FRONT}/state": "1"}.items():
        server.write(path, value)
    ours, theirs = socket.socketpair()
    server.attach_socket(theirs, confine=7)
    client = await Client.from_socket(ours)
    try:
        async with Backend(client, "domain 7: vbd 51712", BACK, FRONT) as bus:
            yield server, bus
    finally:
        await client.close()
        await server.close()


async def take(bus: Backend) -> Step:
    async with asyncio.timeout(30):
        return await anext(bus)


async def test_a_device_from_begin_to_end() -> None:
    async with world() as (server, bus):
        assert await take(bus) is Step.ANNOUNCE
        await bus.announce({"sectors": "8", "info": "0"})
        assert (server.read(f"{BACK}/state"), server.read(f"{BACK}/sectors")) == ("2", "8")
        server.write(f"{FRONT}/ring-ref", "9")
        server.write(f"{FRONT}/state", "3")
        assert await take(bus) is Step.CONNECT
        assert await bus.frontend_nodes(("ring-ref", "event-channel")) == {"ring-ref": "9"}
        await bus.switch(S.CONNECTED)
        server.write(f"{FRONT}/state", "4")
        server.write(f"{BACK}/online", "0")
        server.write(f"{BACK}/state", "5")
        server.write(f"{FRONT}/state", "5")
        assert await take(bus) is Step.CLOSE
        await bus.switch(S.CLOSING)
        server.write(f"{FRONT}/state", "6")
        assert await take(bus) is Step.SHUT
        await bus.switch(S.CLOSED)
        with pytest.raises(StopAsyncIteration):
            await take(bus)
        assert server.read(f"{BACK}/state") == "6"


async def test_failure_is_one_step() -> None:
    async with world() as (server, bus):
        assert await take(bus) is Step.ANNOUNCE
        await bus.announce({})
        server.write(f"{FRONT}/state", "3")
        assert await take(bus) is Step.CONNECT
        await bus.switch(S.CONNECTED)
        waiting = asyncio.ensure_future(take(bus))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        bus.fail(ValueError("the ring"))
        assert await waiting is Step.FAIL
        assert str(bus.failure) == "the ring"
        await bus.switch(S.CLOSING)
        waiting = asyncio.ensure_future(take(bus))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        waiting.cancel()


async def test_xsa_349_a_million_writes_are_one_look() -> None:
    """XSA-349: what a frontend writes while nobody looks is not kept."""
    async with world() as (server, bus):
        assert await take(bus) is Step.ANNOUNCE
        await bus.announce({})
        for index in range(scaled(1_000_000)):
            server.write(f"{FRONT}/state", str(1 + index % 2))
            if index % 1000 == 0:
                await asyncio.sleep(0)
        server.write(f"{FRONT}/state", "3")
        assert await take(bus) is Step.CONNECT
        await bus.switch(S.CONNECTED)
        server.write(f"{FRONT}/state", "5")
        assert await take(bus) is Step.CLOSE


async def test_xsa_349_a_watch_that_nobody_reads_keeps_one_event() -> None:
    """While its worker is busy elsewhere a frontend's writes cost one event a path."""
    async with world() as (server, bus):
        client = bus._store
        async with client.watch(f"{FRONT}/state") as watch:
            for index in range(1000):
                server.write(f"{FRONT}/state", str(1 + index % 2))
                await asyncio.sleep(0)
            await client.get(f"{FRONT}/state")  # its reply comes after them
            assert await anext(watch) == f"{FRONT}/state"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(watch)


async def test_a_removed_device_stays_removed() -> None:
    async with world() as (server, bus):
        assert await take(bus) is Step.ANNOUNCE
        await bus.announce({})
        server.rm(BACK)
        await bus.switch(S.CLOSED)
        assert not server.exists(BACK)


async def test_an_earlier_worker_had_connected() -> None:
    async with world() as (server, bus):
        server.write(f"{BACK}/state", "2")
        server.write(f"{FRONT}/state", "4")
        await bus.resume()
        assert server.read(f"{BACK}/state") == "4"
        server.write(f"{FRONT}/state", "6")
        assert await take(bus) is Step.SHUT


async def test_a_lost_store_is_an_error() -> None:
    async with world() as (server, bus):
        assert await take(bus) is Step.ANNOUNCE
        await bus.announce({})
        await server.close()
        with pytest.raises(ConnectionError):
            await take(bus)
