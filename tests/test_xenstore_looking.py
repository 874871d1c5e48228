"""How long the loop looks before it sleeps: by a clock and a loop that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evtchnd.channel import MOST_SKIPPED
from evtchnd.xenstore.looking import Looking


class Loop:
    """What Looking uses of one."""

    def __init__(self) -> None:
        self.now = 0
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> Any:
        self.soon.append(callback)
        return callback

    def turns(self, us: int, step: int = 1) -> int:
        """Turns for so many microseconds, while there is something to do; -> for how many."""
        begin = self.now
        while self.soon and self.now < begin + us * 1000:
            self.now += step * 1000
            soon, self.soon = self.soon, []
            for callback in soon:
                callback()
        return (self.now - begin) // 1000


def looking(max_us: int = 50) -> tuple[Loop, Looking]:
    loop = Loop()
    return loop, Looking(max_us, clock=lambda: loop.now, loop=loop)  # type: ignore[arg-type]


def test_it_looks_for_the_window_and_no_longer() -> None:
    loop, look = looking()
    look.came()
    assert 50 <= loop.turns(1000) <= 53
    assert not loop.soon


def test_the_window_begins_when_what_came_is_served() -> None:
    loop, look = looking()
    look.came()
    loop.now += 40_000  # a request that took so long
    assert 50 <= loop.turns(1000) <= 53


def test_without_a_window_it_sleeps_at_once() -> None:
    loop, look = looking(0)
    look.came()
    assert not loop.soon


def test_a_client_that_comes_again_is_waited_for() -> None:
    loop, look = looking()
    for _ in range(100):
        look.came()
        loop.turns(30)
        assert loop.soon


def test_clients_that_come_seldom_are_not_waited_for() -> None:
    loop, look = looking()
    spent = 0
    for _ in range(100):
        look.came()
        spent += loop.turns(1000)
        loop.now += 10_000_000
    # 50 + 25 + 12 + 6, once
    assert spent < 120


def test_short_sleeps_that_never_pay_are_tried_ever_more_seldom() -> None:
    loop, look = looking()
    spent = []
    for _ in range(20_000):
        look.came()
        spent.append(loop.turns(1000))
        loop.now += 60_000
    # the last tries lie MOST_SKIPPED apart; each is a window and its halves
    assert sum(spent[-MOST_SKIPPED:]) < 240
    # and one that pays brings the window back
    while not loop.soon:
        look.came()
        if not loop.soon:
            loop.now += 60_000
    for _ in range(3):
        loop.turns(5)
        look.came()
    assert loop.turns(1000) >= 48


def test_a_new_client_is_waited_for_whatever_the_others_did() -> None:
    loop, look = looking()
    for _ in range(20):
        look.came()
        loop.turns(1000)
        loop.now += 30_000  # just too late, each time
    look.came()
    assert not loop.soon
    look.joined()
    look.came()
    assert 50 <= loop.turns(1000) <= 53


def test_closed_it_looks_no_more() -> None:
    loop, look = looking()
    look.close()
    look.came()
    assert not loop.soon
