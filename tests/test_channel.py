"""Channels and their poller, over real eventfds; the ring is the smallest model of one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from evtchnd.channel import MOST_IN_VAIN, MOST_KICKED, MOST_SKIPPED, Channel, Poller
from evtchnd.errors import GuestError, VmmError
from scale import scaled


class Ring:
    """Producer and consumer index, and the event index that says when the producer has to kick."""

    def __init__(self, kick: int) -> None:
        self.kick = kick
        self.prod = self.cons = 0
        self.event = 1
        self.arms = 0

    def put(self, count: int = 1) -> None:
        """The guest's side."""
        old, self.prod = self.prod, self.prod + count
        if old < self.event <= self.prod:
            os.eventfd_write(self.kick, 1)

    def pending(self) -> bool:
        return self.prod != self.cons

    def arm(self) -> bool:
        self.arms += 1
        self.event = self.cons + 1
        return self.prod != self.cons

    def take(self) -> int:
        count, self.cons = self.prod - self.cons, self.prod
        return count


class Clock:
    """Nanoseconds that pass only when told, and `step` at every look at it."""

    def __init__(self, step: int = 0) -> None:
        self.now = 0
        self.step = step

    def __call__(self) -> int:
        self.now += self.step
        return self.now


def eventfd(count: int = 0) -> int:
    return os.eventfd(count, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


@pytest.fixture
async def channels() -> AsyncIterator[Callable[..., Channel]]:
    made: list[Channel] = []

    def make(poller: Poller | None = None, *, name: str = "domain 7: vbd 51712") -> Channel:
        made.append(Channel(eventfd(), eventfd(), name=name, poller=poller))
        return made[-1]

    yield make
    for channel in made:
        channel.close()


@pytest.fixture
async def polling() -> AsyncIterator[Callable[..., Poller]]:
    made: list[Poller] = []

    def make(**options: Any) -> Poller:
        made.append(Poller(asyncio.get_running_loop(), **options))
        return made[-1]

    yield make
    for poller in made:
        poller.close()


async def until(done: Callable[[], bool]) -> None:
    """Lets the loop turn until `done()`."""
    async with asyncio.timeout(30):
        while not done():
            await asyncio.sleep(0)


async def quiet(poller: Poller) -> None:
    """Until the poller sleeps and stays asleep."""
    async with asyncio.timeout(30):
        while True:
            before = poller.slices
            for _ in range(20):
                await asyncio.sleep(0.0005)
            if poller.slices == before:
                return


class Served:
    """A channel with a ring and a pump that takes everything."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.ring = Ring(channel.kick_fd)
        self.taken = 0
        self.pumps = 0
        channel.watch(self.ring.pending, self.ring.arm)
        self.done = channel.drive(self.pump())

    async def pump(self) -> None:
        while True:
            await self.channel.kicked()
            self.pumps += 1
            self.taken += self.ring.take()


async def test_a_kick_steps_the_pump(channels: Callable[..., Channel]) -> None:
    served = Served(channels())
    await asyncio.sleep(0.01)
    assert served.pumps == 0  # the first kicked() waits, too
    served.ring.put()
    await until(lambda: served.taken == 1)
    served.ring.put(5)
    await until(lambda: served.taken == 6)
    assert (served.channel.kicks, served.channel.wakeups) == (2, 2)


async def test_kicks_fold(channels: Callable[..., Channel]) -> None:
    channel = channels()
    served = Served(channel)
    for _ in range(1000):
        os.eventfd_write(channel.kick_fd, 1)
    await until(lambda: served.pumps == 1)
    assert (channel.kicks, channel.wakeups) == (1000, 1)


async def test_kicks_from_before_are_served(channels: Callable[..., Channel]) -> None:
    channel = channels()
    os.eventfd_write(channel.kick_fd, 3)
    served = Served(channel)
    await until(lambda: served.pumps == 1)


async def test_a_pump_may_work_before_it_waits(channels: Callable[..., Channel]) -> None:
    """After a restart: what is in the ring is taken at once, and then the ring is armed without a kick."""
    channel = channels()
    ring = Ring(channel.kick_fd)
    ring.prod = 4

    async def pump() -> None:
        while True:
            ring.take()
            await channel.kicked()

    channel.watch(ring.pending, ring.arm)
    channel.drive(pump())
    assert (ring.cons, ring.event) == (4, 5)


@pytest.mark.parametrize("max_us", [0, 50])
async def test_nothing_is_lost(channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int) -> None:
    """A thread produces as a guest does: kicks only where the event index says so."""
    served = Served(channels(polling(max_us=max_us)))
    count = scaled(200_000)
    asked = threading.Semaphore(64)

    def produce() -> None:
        for _ in range(count):
            asked.acquire()
            served.ring.put()

    async def release() -> None:
        released = 0
        while released < count:
            await asyncio.sleep(0)
            while released < served.taken:
                asked.release()
                released += 1

    thread = threading.Thread(target=produce)
    thread.start()
    async with asyncio.timeout(100):
        await release()
    thread.join()
    assert served.taken == count


async def test_while_it_polls_the_guest_does_not_kick(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    clock = Clock(step=1000)
    poller = polling(max_us=50, clock=clock)
    served = Served(channels(poller))
    served.ring.put()
    await until(lambda: served.taken == 1)
    for number in range(2, 100):
        served.ring.put()
        await until(lambda number=number: served.taken == number)
    assert served.channel.kicks == 1
    assert served.ring.arms == 0
    assert poller.hits >= 98


async def test_the_window_ends_and_idle_costs_nothing(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    poller = polling(max_us=50, clock=Clock(step=1000))
    served = Served(channels(poller))
    await quiet(poller)
    slices, sleeps = poller.slices, poller.sleeps
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert (poller.slices, poller.sleeps) == (slices, sleeps)
    assert served.ring.event == 1
    served.ring.put()
    await until(lambda: served.taken == 1)
    await quiet(poller)
    assert served.ring.event == 2
    assert served.channel.kicks == 1


async def test_a_try_ends_with_the_windows_that_found_nothing(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    clock = Clock(step=1000)
    poller = polling(max_us=50, clock=clock)
    served = Served(channels(poller))
    windows = []
    for number in range(1, 8):
        clock.now += 10_000_000  # the guest comes back after 10 ms
        served.ring.put()
        await until(lambda number=number: served.taken == number)
        await quiet(poller)
        windows.append(poller.window_ns)
    assert windows == [50_000] * (MOST_IN_VAIN - 1) + [0] * (8 - MOST_IN_VAIN)
    slices = poller.slices
    clock.now += 10_000_000
    served.ring.put()
    await until(lambda: served.taken == 8)
    await quiet(poller)
    assert poller.slices == slices  # straight to sleep
    assert served.ring.event == 9


async def test_the_window_comes_back_after_a_short_sleep_and_stays_while_it_pays(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    clock = Clock(step=1000)
    poller = polling(max_us=50, clock=clock)
    served = Served(channels(poller))
    await quiet(poller)
    poller.window_ns = 0
    served.ring.put()  # soon after it fell asleep
    await until(lambda: served.taken == 1)
    assert poller.window_ns == 50_000
    await quiet(poller)
    # the guest comes back within every other window, and in the end not at all
    for number in range(2, 20):
        clock.now += 10_000_000 * (number % 2)
        served.ring.put()
        await until(lambda number=number: served.taken == number)
        if number % 2 == 0:
            await quiet(poller)
        assert poller.window_ns == 50_000
    for number in range(20, 20 + MOST_IN_VAIN):
        clock.now += 10_000_000
        served.ring.put()
        await until(lambda number=number: served.taken == number)
        await quiet(poller)
    assert poller.window_ns == 0


async def test_a_slow_turn_of_the_loop_makes_the_slices_longer(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    """What is not looked at is a part of the window, and bounded; a slice is, too."""

    async def slices(turn: int, loop: asyncio.AbstractEventLoop) -> int:
        """Of one window of 1 ms, if each turn between them takes `turn` ns."""
        clock = Clock(step=1000)
        poller = polling(max_us=1000, clock=clock)
        served = Served(channels(poller))
        await quiet(poller)
        served.ring.put()
        await until(lambda: served.taken == 1)
        before = poller.slices
        while poller.slices == before or poller.live:
            clock.now += turn
            await asyncio.sleep(0)
        return poller.slices - before

    loop = asyncio.get_running_loop()
    quick, slow, slower = [await slices(turn, loop) for turn in (1_000, 20_000, 10_000_000)]
    assert quick > 30
    assert 7 <= slow <= 13
    assert slower <= 2


async def test_tries_that_never_pay_become_rare(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    """A guest that comes back just too late: the part of sleeps that are followed by a try goes down."""
    clock = Clock(step=2000)
    poller = polling(max_us=10, clock=clock)
    served = Served(channels(poller))
    tries = []
    for number in range(1, 200):
        served.ring.put()
        await until(lambda number=number: served.taken == number)
        tries.append(poller.window_ns != 0)
        await until(lambda: not poller.live and served.ring.event == served.ring.prod + 1)
    assert tries[:20].count(True) >= 3
    assert tries[100:].count(True) <= MOST_IN_VAIN
    assert MOST_SKIPPED >= 128


async def test_it_looks_at_live_channels_only(channels: Callable[..., Channel], polling: Callable[..., Poller]) -> None:
    """One is busy among many: the others are neither looked at nor armed again."""
    poller = polling(max_us=50, clock=Clock(step=1000))
    many = [Served(channels(poller)) for _ in range(100)]
    await quiet(poller)
    looks = arms = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    def arm() -> bool:
        nonlocal arms
        arms += 1
        return False

    for served in many[1:]:
        served.channel.watch(look, arm)
    busy = many[0]
    for number in range(1, 50):
        busy.ring.put()
        await until(lambda number=number: busy.taken == number)
        if number % 10 == 0:
            await quiet(poller)
    await quiet(poller)
    assert (looks, arms) == (0, 0)
    assert busy.ring.arms >= 5
    assert not poller.live


async def test_one_that_falls_quiet_is_armed_while_others_go_on(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    clock = Clock(step=1000)
    poller = polling(max_us=50, clock=clock)
    busy, quiet_one = Served(channels(poller)), Served(channels(poller))
    await quiet(poller)
    arms = quiet_one.ring.arms
    busy.ring.put()
    quiet_one.ring.put()
    await until(lambda: busy.taken == quiet_one.taken == 1)
    sleeps = poller.sleeps
    for number in range(2, 200):
        busy.ring.put()
        await until(lambda number=number: busy.taken == number)
    assert poller.sleeps == sleeps
    assert busy.ring.arms == 1  # when it was made
    assert quiet_one.ring.arms == arms + 1
    assert quiet_one.ring.event == 2
    quiet_one.ring.put()
    await until(lambda: quiet_one.taken == 2)
    assert quiet_one.channel.kicks == 2


@pytest.mark.parametrize("max_us", [0, 50])
async def test_a_kick_that_is_read_after_the_answer_is_not_lost(
    channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int
) -> None:
    """The guest sees the answer and kicks again before the eventfd is read: both kicks are read at once."""
    channel = channels(polling(max_us=max_us))
    ring = Ring(channel.kick_fd)
    taken = 0

    async def pump() -> None:
        nonlocal taken
        while True:
            await channel.kicked()
            taken += ring.take()
            if 0 < taken < 20:
                ring.prod += 1
                os.eventfd_write(channel.kick_fd, 1)

    channel.watch(ring.pending, ring.arm)
    channel.drive(pump())
    ring.put()
    await until(lambda: taken == 20)


async def test_without_a_window_each_pump_is_followed_by_an_arm(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    poller = polling(max_us=0)
    served = Served(channels(poller))
    for number in range(1, 20):
        served.ring.put()
        await until(lambda number=number: served.taken == number)
        assert served.ring.event == number + 1
    assert served.channel.kicks == 19
    assert (poller.slices, poller.hits) == (0, 0)


@pytest.mark.parametrize("max_us", [0, 50])
async def test_what_comes_while_arming_is_taken(
    channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int
) -> None:
    channel = channels(polling(max_us=max_us, clock=Clock(step=1000)))
    served = Served(channel)
    late = 3

    def arm() -> bool:
        nonlocal late
        if served.taken and late:
            late -= 1
            served.ring.prod += 1  # after the last look, before the event index: nobody kicks
        return served.ring.arm()

    channel.watch(served.ring.pending, arm)
    served.ring.put()
    await until(lambda: served.taken == 4)
    assert channel.kicks == 1


@pytest.mark.parametrize("max_us", [0, 50])
async def test_a_ring_that_is_never_empty_lets_the_loop_turn(
    channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int
) -> None:
    poller = polling(max_us=max_us)
    storm, calm = Served(channels(poller)), Served(channels(poller))
    storm.channel.watch(lambda: True, lambda: True)
    storm.ring.put()
    for number in range(1, 50):
        calm.ring.put()
        await until(lambda number=number: calm.taken == number)
    assert storm.pumps > 10


@pytest.mark.parametrize("max_us", [0, 50])
async def test_kicks_without_work_do_not_keep_it_awake(
    channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int
) -> None:
    clock = Clock(step=1000)
    poller = polling(max_us=max_us, clock=clock)
    served = Served(channels(poller))
    for _ in range(300):
        os.eventfd_write(served.channel.kick_fd, 1)
        await asyncio.sleep(0)
    sleeps = poller.sleeps
    assert sleeps > 5
    assert served.taken == 0


async def test_step_wakes_at_once(channels: Callable[..., Channel]) -> None:
    served = Served(channels())
    served.ring.prod = 1  # no kick
    served.channel.step()
    assert served.taken == 1
    assert served.ring.event == 2


async def test_step_from_within_the_pump(channels: Callable[..., Channel]) -> None:
    channel = channels()
    turns = 0

    async def pump() -> None:
        nonlocal turns
        while True:
            await channel.kicked()
            turns += 1
            if turns < 5:
                channel.step()

    channel.drive(pump())
    channel.step()
    assert turns == 5


async def test_the_end_and_the_error_of_a_pump(channels: Callable[..., Channel]) -> None:
    async def ends(channel: Channel) -> None:
        await channel.kicked()

    async def fails(channel: Channel) -> None:
        await channel.kicked()
        raise GuestError("req_prod jumped")

    first, second = channels(), channels()
    done, failed = first.drive(ends(first)), second.drive(fails(second))
    for channel in (first, second):
        os.eventfd_write(channel.kick_fd, 1)
    async with asyncio.timeout(30):
        await done
        with pytest.raises(GuestError, match="jumped"):
            await failed
    # Nobody reads these any more: the loop is idle although they are readable.
    wakeups = first.wakeups, second.wakeups
    for channel in (first, second):
        os.eventfd_write(channel.kick_fd, 1)
        channel.step()
    await asyncio.sleep(0.01)
    assert (first.wakeups, second.wakeups) == wakeups


@pytest.mark.parametrize("part", ["pending", "arm"])
@pytest.mark.parametrize("max_us", [0, 50])
async def test_what_a_look_raises_ends_that_channel_only(
    channels: Callable[..., Channel], polling: Callable[..., Poller], part: str, max_us: int
) -> None:
    poller = polling(max_us=max_us, clock=Clock(step=1000))
    bad, good = Served(channels(poller)), Served(channels(poller))

    def broken() -> bool:
        raise GuestError(part)

    pending, arm = (broken, bad.ring.arm) if part == "pending" else (bad.ring.pending, broken)
    bad.channel.watch(pending, arm)
    bad.ring.put()
    async with asyncio.timeout(30):
        with pytest.raises(GuestError, match=part):
            await bad.done
    for number in range(1, 5):
        good.ring.put()
        await until(lambda number=number: good.taken == number)
    assert not good.done.done()


async def test_cancelling_closes_the_pump(channels: Callable[..., Channel]) -> None:
    channel = channels()
    ended = []

    async def pump() -> None:
        try:
            while True:
                await channel.kicked()
        finally:
            ended.append(True)

    done = channel.drive(pump())
    done.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended == [True]
    os.eventfd_write(channel.kick_fd, 1)
    await asyncio.sleep(0.01)
    assert channel.wakeups == 0


async def test_close(channels: Callable[..., Channel], polling: Callable[..., Poller]) -> None:
    poller = polling(max_us=50)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(scaled(1000)):
        served = Served(Channel(eventfd(), eventfd(), name="x", poller=poller))
        served.ring.put()
        await asyncio.sleep(0)
        served.channel.close()
        served.channel.close()
        assert served.done.cancelled()
        served.channel.step()
    assert len(os.listdir("/proc/self/fd")) == before
    await quiet(poller)


async def test_a_pump_that_closes_its_own_channel(channels: Callable[..., Channel]) -> None:
    channel = channels()
    ended = []

    async def pump() -> None:
        try:
            await channel.kicked()
            channel.close()
            await channel.kicked()
        finally:
            ended.append(True)

    done = channel.drive(pump())
    channel.step()
    assert ended == [True]
    assert done.cancelled()


async def test_a_pump_awaits_nothing_else(channels: Callable[..., Channel]) -> None:
    channel = channels()

    async def pump() -> None:
        await channel.kicked()
        await asyncio.sleep(1)

    done = channel.drive(pump())
    channel.step()
    with pytest.raises(RuntimeError, match=r"awaits kicked\(\) and nothing else"):
        await done


async def test_one_coroutine_a_channel(channels: Callable[..., Channel]) -> None:
    served = Served(channels())
    with pytest.raises(RuntimeError, match="one coroutine"):
        served.channel.drive(served.pump())


async def test_another_file_in_the_place_of_the_kick_descriptor(channels: Callable[..., Channel]) -> None:
    """The loop is not called for ever, and the channel ends as any other."""
    channel = channels()
    served = Served(channel)
    listener = os.open("/", os.O_RDONLY)
    os.dup2(listener, channel.kick_fd)  # epoll does not take it
    os.close(listener)
    await asyncio.sleep(0.01)
    assert channel.wakeups == 0
    channel.close()
    assert served.done.cancelled()


async def test_xsa_331_441_a_copy_of_the_kick_descriptor_does_not_keep_it_in_the_epoll(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    """The control plane has one of each: what is kicked after the end of a channel wakes nobody."""
    poller = polling(max_us=0)
    first = channels(poller)
    Served(first)
    copy, number = os.dup(first.kick_fd), first.kick_fd
    first.close()
    second = Served(channels(poller))
    assert second.channel.kick_fd == number
    os.eventfd_write(copy, 1)
    os.close(copy)
    await asyncio.sleep(0.01)
    assert (second.pumps, second.channel.wakeups) == (0, 0)


async def test_more_kicked_than_one_look_takes(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    poller = polling(max_us=0)
    many = [Served(channels(poller)) for _ in range(3 * MOST_KICKED)]
    for served in many:
        served.ring.put()
    await until(lambda: all(served.taken == 1 for served in many))
    assert {served.channel.wakeups for served in many} == {1}


async def test_a_kick_that_nobody_reads_is_followed_by_others(channels: Callable[..., Channel]) -> None:
    """Its count stays; each write is heard."""
    served = Served(channels())
    for number in range(1, 50):
        served.ring.put()
        await until(lambda number=number: served.taken == number)
    assert served.channel.wakeups == 49
    assert os.eventfd_read(served.channel.kick_fd) == 49


async def test_kicks_of_a_ring_that_is_not_armed_are_not_heard(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    """A guest that kicks with every request: one kick tells that it does, the others wake nobody."""
    poller = polling(max_us=50, clock=Clock(step=1000))
    served = Served(channels(poller))
    kicks = 0
    for episode in range(1, 4):
        for _ in range(50):
            served.ring.prod += 1
            os.eventfd_write(served.channel.kick_fd, 1)
            kicks += 1
            await until(lambda: served.taken == served.ring.prod)
        assert served.channel.wakeups <= 2 * episode
        await quiet(poller)  # armed: the next one is heard
    assert served.channel.kicks == kicks
    assert not served.channel.muted


async def test_a_kick_between_the_arming_and_the_hearing(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    """The guest saw the event index and kicked before the epoll listened again."""
    poller = polling(max_us=50, clock=Clock(step=1000))
    served = Served(channels(poller))
    served.ring.put()
    await until(lambda: served.taken == 1)
    late = 0

    def arm() -> bool:
        nonlocal late
        more = served.ring.arm()
        if not late and served.channel.muted:
            late = 1
            served.ring.put()
        return more

    served.channel.watch(served.ring.pending, arm)
    os.eventfd_write(served.channel.kick_fd, 1)  # unasked
    await until(lambda: served.taken == 2)
    assert late


async def test_a_kick_that_is_counted_is_not_lost(channels: Callable[..., Channel]) -> None:
    """Somebody asks for the counters between the guest's kick and the loop's turn."""
    served = Served(channels())
    for number in range(1, 20):
        served.ring.put()
        assert served.channel.kicks == number
        await until(lambda number=number: served.taken == number)


async def test_xsa_331_441_one_that_closes_another_that_was_kicked_with_it(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    poller = polling(max_us=0)
    first, second = channels(poller), Served(channels(poller))

    async def pump() -> None:
        while True:
            await first.kicked()
            second.channel.close()

    first.drive(pump())
    os.eventfd_write(first.kick_fd, 1)
    second.ring.put()
    await until(lambda: second.done.cancelled())
    assert second.pumps == 0


def test_vmm_what_is_no_eventfd_is_refused() -> None:
    good = eventfd()
    read, write = os.pipe()
    semaphore = os.eventfd(2, os.EFD_SEMAPHORE)
    for kick, notify, reason in (
        (read, good, "kick: descriptor .* is no eventfd"),
        (good, write, "notify: descriptor .* is no eventfd"),
        (9999, good, "kick: descriptor 9999 is closed"),
        (semaphore, good, "kick: an EFD_SEMAPHORE"),
    ):
        with pytest.raises(VmmError, match=f"domain 7: {reason}"):
            Channel(kick, notify, name="domain 7")
    for fd in (good, read, write, semaphore):
        os.close(fd)


async def test_vmm_counters_at_their_ends_do_not_stall() -> None:
    full = 2**64 - 2
    notify = os.eventfd(full & 0xFFFF_FFFF)  # blocking
    os.eventfd_write(notify, full - (full & 0xFFFF_FFFF))
    kick = os.eventfd(0)
    os.eventfd_write(kick, full)
    channel = Channel(kick, notify, name="x")
    served = Served(channel)
    await until(lambda: served.pumps == 1)
    assert channel.kicks == full
    assert not os.get_blocking(notify)
    channel.notify()
    assert channel.notifications == 1
    assert os.eventfd_read(notify) == full
    channel.notify()
    assert os.eventfd_read(notify) == 1
    channel.close()


class Completions:
    """A source: `finish()` is what another thread or the kernel does."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.eventfd = eventfd()
        self.wake = wake
        self.there = self.readies = 0

    def finish(self, *, tell: bool = True) -> None:
        self.there += 1
        if tell:
            os.eventfd_write(self.eventfd, 1)

    def pending(self) -> bool:
        return self.there > 0

    def ready(self) -> None:
        self.readies += 1
        self.wake()


@pytest.mark.parametrize("max_us", [0, 50])
async def test_completions_wake_the_pump(
    channels: Callable[..., Channel], polling: Callable[..., Poller], max_us: int
) -> None:
    poller = polling(max_us=max_us)
    channel = channels(poller)
    source = Completions(channel.step)
    seen = 0

    async def pump() -> None:
        nonlocal seen
        while True:
            await channel.kicked()
            seen, source.there = seen + source.there, 0

    poller.add_source(source)
    poller.add_source(source)
    channel.drive(pump())
    await quiet(poller)
    for number in range(1, 20):
        source.finish()
        await until(lambda number=number: seen == number)
    await quiet(poller)
    poller.remove_source(source)
    source.finish()
    await until(lambda: seen == 20)  # still used by the other
    poller.remove_source(source)
    poller.remove_source(source)
    source.finish()
    await asyncio.sleep(0.01)
    assert seen == 20
    os.close(source.eventfd)


async def test_completions_are_polled_for(channels: Callable[..., Channel], polling: Callable[..., Poller]) -> None:
    poller = polling(max_us=50, clock=Clock(step=1000))
    served = Served(channels(poller))
    seen = []

    def collect() -> None:
        source.there = 0
        seen.append(True)

    source = Completions(collect)
    poller.add_source(source)
    served.ring.put()
    await until(lambda: served.taken == 1)
    source.finish(tell=False)
    await until(lambda: seen == [True])
    poller.remove_source(source)
    os.close(source.eventfd)


async def test_what_a_poll_took_does_not_wake_again(
    channels: Callable[..., Channel], polling: Callable[..., Poller]
) -> None:
    poller = polling(max_us=50)
    served = Served(channels(poller))
    source = Completions(served.channel.step)
    poller.add_source(source)
    await quiet(poller)
    slices = poller.slices
    os.eventfd_write(source.eventfd, 1)  # its completion is taken already
    await asyncio.sleep(0.01)
    assert (poller.slices, source.readies, served.pumps) == (slices, 0, 0)
    poller.remove_source(source)
    os.close(source.eventfd)


def test_kicked_is_for_driven_coroutines_only() -> None:
    channel = Channel(eventfd(), eventfd(), name="x")

    async def pump() -> None:
        await channel.kicked()

    coro: Coroutine[Any, Any, None] = pump()
    with pytest.raises(RuntimeError):
        asyncio.run(coro)
    channel.close()
