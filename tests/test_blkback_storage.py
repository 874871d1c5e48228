"""blkback over a storage that hangs, and what a guest can do to its log."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from evtchnd.abi import PAGE_SIZE, XenbusState
from evtchnd.guest.xenbus import Frontend
from evtchnd_backends import vbd
from vbd import VBD, front, host, image


async def test_a_closed_connection_waits_for_its_storage_and_the_next_one_is_clean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that is kexec'ed meanwhile: its pages are still written to, and the late answer is not the new ring's."""
    monkeypatch.setattr(vbd, "DRAIN_SECONDS", 0.1)
    file, content = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        saved = os.dup(device.disk_fd)
        empty, fill = os.pipe()
        disk = front(world, depth=1)

        def close_it() -> None:
            disk.connect()
            os.dup2(empty, device.disk_fd)  # a read of it waits
            disk.submit_read(0, 8)
            disk.push()
            disk.bus.switch(XenbusState.CLOSED)

        await world.guest(close_it)
        await world.until(lambda: "waiting" in caplog.text, "no line")
        assert caplog.messages == [f"domain 7: vbd {VBD}: 1 requests are still at the disk after 0.1 s: waiting"]
        assert (world.state(VBD), world.grants.pinned) == ("4", 2)  # the ring's page, and the one that is written to
        os.write(fill, b"x" * PAGE_SIZE)
        await world.until(lambda: world.state(VBD) == "6", "Closed")
        assert world.grants.pinned == 0
        os.dup2(saved, device.disk_fd)

        def connect_again() -> None:
            disk.release()
            new = front(world)
            new.connect()
            assert new.read(8, 8) == content[PAGE_SIZE : 2 * PAGE_SIZE]
            new.disconnect()

        await world.guest(connect_again)
        for fd in (saved, empty, fill):
            os.close(fd)


async def test_a_detach_by_force_does_not_wait_for_the_storage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vbd, "DRAIN_SECONDS", 0.1)
    file, _ = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        empty, fill = os.pipe()
        disk = front(world, depth=1)

        def close_it() -> None:
            disk.connect()
            os.dup2(empty, device.disk_fd)
            disk.submit_read(0, 8)
            disk.push()
            disk.bus.switch(XenbusState.CLOSED)

        await world.guest(close_it)
        await world.until(lambda: "waiting" in caplog.text, "no line")
        killed = asyncio.create_task(world.kill(VBD))
        await world.until(lambda: "left to the kernel" in caplog.text, "no line")
        assert world.grants.pinned == 2
        os.write(fill, b"x" * PAGE_SIZE)  # it comes back before the last deadline
        await killed
        assert world.grants.pinned == 0
        disk.release()
        for fd in (empty, fill):
            os.close(fd)


async def test_a_ring_that_cannot_be_attached_again_is_forgotten(tmp_path: Path) -> None:
    """Or the worker after the next one would tell the guest that it is connected."""
    file, _ = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world)
        await world.guest(disk.connect)
        params = world.reported[VBD]
        await world.kill(VBD)
        gone = {**(params or {}), "queues": [{"grefs": [2000], "port": disk.port}]}
        world.run(VBD, device.disk_fd, device.journal_fd, readonly=False, options=device.options, connected=gone)
        await world.until(lambda: world.state(VBD) == "5", "Closing")
        assert world.reported[VBD] is None
        disk.release()


@pytest.mark.parametrize("state", [XenbusState.CLOSED, XenbusState.INITIALISING])
async def test_a_ring_that_its_guest_let_go_while_no_worker_was_there_is_not_touched(
    tmp_path: Path, state: XenbusState
) -> None:
    """Its pages may be anything by now: a response, or the data of a request, would be written into it."""
    file, _ = image(tmp_path)
    async with host() as world:
        device = world.attach(VBD, file)
        disk = front(world, depth=2)
        await world.guest(disk.connect)
        params = world.reported[VBD]
        await world.kill(VBD)

        def let_go() -> None:
            disk.submit_read(0, 8)
            disk.push()
            disk.bus.switch(state)

        await world.guest(let_go)
        world.run(VBD, device.disk_fd, device.journal_fd, readonly=False, options=device.options, connected=params)
        wanted = {XenbusState.CLOSED: "6", XenbusState.INITIALISING: "2"}[state]
        await world.until(lambda: world.state(VBD) == wanted, wanted)
        assert world.reported[VBD] is None
        assert not disk.ring.pending()
        assert world.grants.pinned == 0
        disk.queues[0].release()


async def test_a_guest_does_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, _ = image(tmp_path, 64 * 1024)
    async with host() as world:
        world.attach(VBD, file)

        def guest() -> None:
            bus = Frontend(world.store, "vbd", VBD)
            for _ in range(100):
                bus.wait_backend(XenbusState.INIT_WAIT)
                bus.switch(XenbusState.INITIALISED)  # of nothing
                bus.wait_backend(XenbusState.CLOSING)
                bus.switch(XenbusState.CLOSED)
                bus.wait_backend(XenbusState.CLOSED)
                bus.switch(XenbusState.INITIALISING)

        with caplog.at_level(logging.INFO):
            await world.guest(guest)
        lines = [line for line in caplog.messages if "stopped: ring-ref" in line]
        assert 1 <= len(lines) <= 10
