"""Images beside the loop: what hangs, what comes when nobody waits any more."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evtchnd.control import disk, images
from evtchnd.control.images import Images
from evtchnd.errors import OperatorError, VmmError


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A share that hangs until it is set."""
    answers = threading.Event()

    def slowly(target: Path, **how: Any) -> disk.Image:
        answers.wait(30)
        return disk.open_image(target, **how)

    monkeypatch.setattr(images, "open_image", slowly)
    yield answers
    answers.set()


async def settled(before: int) -> None:
    async with asyncio.timeout(20):
        while descriptors() != before:
            await asyncio.sleep(0.01)


async def test_who_goes_while_an_image_is_opened_leaves_nothing(image: Path, storage: threading.Event) -> None:
    """A VMM that dies in START: its image is free for the next one."""
    before = descriptors()
    beside = Images(30)
    opening = asyncio.create_task(beside.open(image, readonly=False))
    await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    storage.set()
    await asyncio.sleep(0.05)
    await settled(before)
    opened = await beside.open(image, readonly=False)  # its lock is gone, too
    assert opened.size == 4096
    await beside.close([opened.fd])
    assert descriptors() == before


async def test_a_share_that_hangs_costs_only_those_who_want_it(
    image: Path, storage: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_MOST_WAITING", 12)
    before = descriptors()
    beside = Images(0.2)
    tries = [asyncio.create_task(beside.open(image, readonly=True)) for _ in range(12)]
    await asyncio.sleep(0)
    with pytest.raises(OperatorError, match="12 images wait for their storage already"):
        await beside.open(image, readonly=True)
    for each in tries:
        with pytest.raises(OperatorError, match=r"disk\.img: its storage has not answered in 0\.2 s"):
            await each
    # twelve threads hang; the loop's own are free
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 20) == 1
    storage.set()
    await settled(before)


async def test_a_passed_descriptor_is_kept_or_closed(image: Path) -> None:
    before = descriptors()
    beside = Images(30)
    taken = await beside.passed(os.open(image, os.O_RDONLY), readonly=True)
    assert taken.size == 4096
    await beside.close([taken.fd])
    with pytest.raises(VmmError, match="not open for reading and writing"):
        await beside.passed(os.open(image, os.O_RDONLY), readonly=False)
    with pytest.raises(VmmError, match=r"^the descriptor is neither a file nor a block device$") as refused:
        await beside.passed(os.eventfd(0), readonly=False)
    assert refused.value.errno == errno.ENOTBLK
    assert descriptors() == before
