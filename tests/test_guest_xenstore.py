"""The guest's XenStore client over its ring page, against the real server."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from evtchnd.guest.domain import GuestFault
from evtchnd.guest.xenbus import Frontend
from evtchnd.guest.xenstore import XenStore
from evtchnd.xenstore.wire import XenStoreError
from scale import scaled
from vbd import host

HOME = "/local/domain/7"


async def test_operations() -> None:
    async with host() as world:
        store = world.store

        def guest() -> None:
            store.write("a/b", "1")
            assert (store.read("a/b"), store.read(f"{HOME}/a/b")) == ("1", "1")
            store.mkdir("a/c")
            assert sorted(store.ls("a")) == ["b", "c"]
            assert store.get_perms("a/b")[0] == "n7"
            assert store.get("a/x") is None
            with pytest.raises(XenStoreError) as caught:
                store.read("a/x")
            assert caught.value.name == "ENOENT"
            with pytest.raises(XenStoreError) as caught:
                store.write("/local/domain/0/x", "1")
            assert caught.value.name == "EACCES"
            store.rm("a")
            assert store.get("a") is None
            text = "x" * 2000  # twice the ring
            store.write("long", text)
            assert store.read("long") == text
            assert store.read("long") == text

        await world.guest(guest)


async def test_transactions_are_done_again() -> None:
    async with host() as world:
        store, tries = world.store, []
        store_ready, changed = threading.Event(), threading.Event()

        def body(tx: int) -> None:
            value = int(store.read("n", tx=tx))
            tries.append(value)
            if len(tries) == 1:
                store_ready.set()
                assert changed.wait(30)
            store.write("n", str(value + 1), tx=tx)

        def guest() -> None:
            store.write("n", "1")
            store.transact(body)
            with pytest.raises(ZeroDivisionError):
                store.transact(lambda tx: (store.write("n", "100", tx=tx), 1 // 0))
            assert store.read("n") == "11"

        work = asyncio.ensure_future(asyncio.to_thread(guest))
        await asyncio.to_thread(store_ready.wait, 30)
        world.server.write(f"{HOME}/n", "10")
        changed.set()
        await work
        assert tries == [1, 10]


async def test_watches() -> None:
    async with host() as world:
        store = world.store

        def guest() -> None:
            with store.watch("w") as changed:
                assert changed(30) == "w"
                store.write("w/a", "1")
                assert changed(30) == "w/a"
                assert changed(0.05) is None
            store.write("w/b", "1")  # unwatched: no event is left over for the next
            with store.watch("v") as changed:
                assert changed(30) == "v"
            with pytest.raises(GuestFault, match="never: is None still"):
                store.wait_for("never", lambda value: value is not None, 0.05)

        await world.guest(guest)


async def test_many_threads_on_one_ring() -> None:
    """Replies and events find their thread, and nobody sleeps on while there is something for him."""
    async with host() as world:
        store: XenStore = world.store
        count = scaled(2000, least=20)

        def worker(number: int) -> None:
            for index in range(count):
                store.write(f"t{number}", str(index))
                assert store.read(f"t{number}") == str(index)

        def waiter() -> None:
            for number in range(4):
                store.wait_for(f"t{number}", lambda value: value == str(count - 1), 60)

        def guest() -> None:
            with ThreadPoolExecutor(6) as pool:
                jobs = [pool.submit(waiter), pool.submit(waiter), *(pool.submit(worker, n) for n in range(4))]
                for job in jobs:
                    job.result(60)

        await world.guest(guest)


async def test_a_frontend_writes_all_at_once() -> None:
    async with host() as world:
        world.write_nodes(51712)
        seen: list[str] = []

        async def look() -> None:
            async with world.client.watch(f"{HOME}/device/vbd/51712/state") as watch:
                async for _ in watch:
                    state = world.server.read(f"{HOME}/device/vbd/51712/state")
                    if state == "3":
                        seen.extend(world.server.ls(f"{HOME}/device/vbd/51712"))
                        return

        looking = asyncio.ensure_future(look())

        def guest() -> None:
            bus = Frontend(world.store, "vbd", 51712, timeout=0.1)
            assert (bus.state(), bus.backend_domid) == (1, 0)
            assert bus.backend("sectors", 5) == 5
            with pytest.raises(XenStoreError):
                bus.backend("sectors")
            with pytest.raises(GuestFault, match="is '1' still"):
                bus.wait_backend(2)  # type: ignore[arg-type]
            bus.switch(3, {"ring-ref": "8", "event-channel": "2"})  # type: ignore[arg-type]

        await world.guest(guest)
        await asyncio.wait_for(looking, 30)
        assert {"ring-ref", "event-channel"} <= set(seen)
