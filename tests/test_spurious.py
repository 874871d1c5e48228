"""Kicks that bring no work (XSA-332): heard late, and what else is served is not."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any

import pytest

import test_channel
from evtchnd import spurious
from evtchnd.channel import Channel, Poller
from test_channel import Served, eventfd, until

channels = test_channel.channels
polling = test_channel.polling
HOUR = 3600.0


@pytest.fixture
async def poller(polling: Callable[..., Poller]) -> AsyncIterator[Poller]:
    yield polling(max_us=0)


async def kick(channel: Channel, times: int) -> None:
    """One by one: each of them is heard before the next one, if it is heard."""
    for _ in range(times):
        os.eventfd_write(channel.kick_fd, 1)
        for _ in range(3):
            await asyncio.sleep(0)


def test_the_delay_doubles_up_to_its_most() -> None:
    free = spurious.FREE
    assert [spurious.delay_s(count) for count in range(free + 1)] == [0.0] * (free + 1)
    assert [spurious.delay_s(free + count) for count in range(1, 8)] == [0.001 * 2**n for n in range(7)]
    assert {spurious.delay_s(free + count) for count in (8, 9, 100, 1 << 40)} == {spurious.LONGEST_S}


def test_a_domain_has_one_budget_however_many_channels_it_has() -> None:
    for late in (1, 9, 99, 999):
        delays = [spurious.delay_s(spurious.FREE + count, late) for count in range(1, 12)]
        assert delays[0] == min(0.001 * (late + 1), 1.0)
        assert delays == sorted(delays) and delays[-1] <= spurious.LONGEST_OF_MANY_S


async def test_xsa_332_a_storm_is_heard_late(
    channels: Callable[..., Channel], poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spurious, "FIRST_S", HOUR)
    monkeypatch.setattr(spurious, "LONGEST_S", HOUR)
    monkeypatch.setattr(spurious, "LONGEST_OF_MANY_S", HOUR)
    storm, calm = Served(channels(poller)), Served(channels(poller))
    await kick(storm.channel, 1000)
    assert storm.channel.wakeups == storm.channel.spurious == spurious.FREE + 1
    for number in range(1, 100):  # the other channel of that domain is heard as ever
        calm.ring.put()
        await until(lambda number=number: calm.taken == number)  # type: ignore[misc]
    assert calm.channel.spurious == 0
    # and so is all that steps the one that storms
    storm.ring.prod += 1
    storm.channel.step()
    assert storm.taken == 1


async def test_it_is_heard_again_and_then_later_each_time(
    channels: Callable[..., Channel], poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def delay(in_a_row: int, late: int = 0, **_: Any) -> float:
        asked.append((in_a_row, late))
        return 0.0

    monkeypatch.setattr(spurious, "delay_s", delay)
    storm = Served(channels(poller))
    async with asyncio.timeout(30):
        while len(asked) < 20:
            os.eventfd_write(storm.channel.kick_fd, 1)
            await asyncio.sleep(0)
    assert asked == [(spurious.FREE + count, 0) for count in range(1, 21)]
    # a kick with work, and they are free again
    storm.ring.put()
    await until(lambda: storm.taken == 1)
    await kick(storm.channel, spurious.FREE)
    assert len(asked) == 20
    await kick(storm.channel, 1)
    assert asked[20:] == [(spurious.FREE + 1, 0)]


async def test_work_that_comes_while_it_is_not_heard_is_served(
    channels: Callable[..., Channel], poller: Poller
) -> None:
    storm = Served(channels(poller))
    for number in range(1, 20):
        await kick(storm.channel, spurious.FREE + 5)
        storm.ring.put()
        await until(lambda number=number: storm.taken == number)  # type: ignore[misc]


async def test_a_guest_that_falls_silent_is_believed_again(
    channels: Callable[..., Channel], poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spurious, "delay_s", lambda *_: 0.0)
    storm = Served(channels(poller))
    await kick(storm.channel, spurious.FREE + 1)
    await until(lambda: storm.channel.idle == spurious.FREE)


async def test_late_channels_share_a_budget(
    channels: Callable[..., Channel], poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[int] = []

    def delay(_: int, late: int = 0) -> float:
        shares.append(late)
        return HOUR

    monkeypatch.setattr(spurious, "delay_s", delay)
    storms = [Served(channels(poller)) for _ in range(10)]
    for storm in storms:
        await kick(storm.channel, spurious.FREE + 1)
    assert shares == list(range(10))
    storms[0].channel.close()  # its share is free, and its timer is gone
    extra = Served(channels(poller))
    await kick(extra.channel, spurious.FREE + 1)
    assert shares[-1] == 9


async def test_xsa_331_441_closed_while_it_is_not_heard(
    channels: Callable[..., Channel], poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor's number is another channel's at once: that one is heard, and nobody else's timer goes off."""
    wrong: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    monkeypatch.setattr(spurious, "delay_s", lambda *_: 0.01)
    for _ in range(20):
        storm = Served(channels(poller))
        await kick(storm.channel, spurious.FREE + 1)
        storm.channel.close()
        other = Served(channels(poller))
        other.ring.put()
        await until(lambda: other.taken == 1)  # noqa: B023
        other.channel.close()
    await asyncio.sleep(0.05)
    assert wrong == []


async def test_no_polling_while_a_ring_is_kicked_for_nothing(
    channels: Callable[..., Channel], polling: Callable[..., Poller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spurious, "delay_s", lambda *_: HOUR)
    poller = polling(max_us=50)
    storm = Served(channels(poller))
    for _ in range(300):
        os.eventfd_write(storm.channel.kick_fd, 1)
        await asyncio.sleep(0.0005)
    slices, wakeups = poller.slices, storm.channel.wakeups
    await kick(storm.channel, 1000)
    assert (poller.slices, storm.channel.wakeups) == (slices, wakeups)


async def test_one_line_says_so_and_a_storm_of_storms_does_not_fill_the_log(
    channels: Callable[..., Channel], poller: Poller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spurious, "delay_s", lambda *_: HOUR)
    with caplog.at_level(logging.WARNING):
        for number in range(40):
            storm = Served(channels(poller, name=f"domain 7: vbd {number}: port 9"))
            await kick(storm.channel, spurious.FREE + 1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("domain 7: vbd 0: port 9: kicked 9 times in a row without work: heard late")
    assert len(lines) == 8  # seldom.BURST, of the whole domain


async def test_a_channel_without_a_ring_is_never_late(channels: Callable[..., Channel], poller: Poller) -> None:
    """Nobody knows whether its kicks bring work."""
    channel = channels(poller)
    steps = 0

    async def pump() -> None:
        nonlocal steps
        while True:
            await channel.kicked()
            steps += 1

    channel.drive(pump())
    await kick(channel, 100)
    assert steps == 100 and channel.spurious == 0


async def test_xsa_331_441_no_kick_goes_to_who_has_the_number_next(
    channels: Callable[..., Channel], poller: Poller
) -> None:
    """Somebody has a copy of a closed channel's eventfd, and another channel its number."""
    first = channels(poller)
    Served(first)
    number, copy = first.kick_fd, os.dup(first.kick_fd)
    first.close()
    kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    if kick != number:
        os.dup2(kick, number, inheritable=False)
        os.close(kick)
    with closing(Channel(number, eventfd(), name="domain 7: vbd 51728", poller=poller)) as second:
        served = Served(second)
        for _ in range(20):
            os.eventfd_write(copy, 1)
            await asyncio.sleep(0)
        assert second.wakeups == 0
        served.ring.put()
        await until(lambda: served.taken == 1)
    os.close(copy)
