"""Every step at which a block worker can die, every order of its answers: finite, and run to the end.

A case is a plan (what the guest asks, how many at a time, in which order they are answered) and the numbers of the
points (evtchnd/_core/points.py) at which one worker after the other dies. The workers are forks that end by SIGKILL at
their point; the guest looks at what it has got, another one writes newer data where writes were answered, and the last
worker restores the ring and serves it to the end. Then the image, the answers (each once), the guest's grants and the
journal are what the model says (crashguest.py).

    depth 1 to 4    every order of answers; writes, writes that overlap, reads, all operations mixed with one that is
                    refused; answered one by one or together; I/O in the order of requests or of answers. Up to 2:
                    indirect requests too, up to 3: as many again that wait in the ring, and a second death in the
                    worker that restores, at each of its points
    depth 5 to 32   all operations mixed; in order, reversed, each one first, each one last, 20 seeded shuffles
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context

from evtchnd._core.blk import watch
from evtchnd._core.points import DUE, FIRST, LABELS, PASSED
from evtchnd.abi import PAGE_SIZE
from evtchnd.bench.crashguest import BLOCKS, Guest
from evtchnd.bench.crashring import Worker
from evtchnd.blkif import X86_32, X86_64, Layout, Op
from evtchnd.errors import EvtchndError, HostError
from evtchnd.guest.domain import GuestFault

SHUFFLES = 20
DEEPEST = 32
ABIS = (X86_64, X86_32)
# Close to where the free-running indices wrap, and to the ring's end.
START = 2**32 - 7
MIXES = ("writes", "overlap", "reads", "mixed")


@dataclass(frozen=True)
class Plan:
    """What the guest asks and how it is served. `pump`: by the backend's own pump, its io_uring and a file."""

    layout: Layout
    mix: str
    order: tuple[int, ...]
    count: int  # requests in the ring
    push_each: bool = False
    early: bool = False  # all I/O before the first answer; of a pump: all of it by io_uring
    fresh: bool = False  # the first worker begins a new ring
    twice: bool = False  # a second worker dies, too
    pump: bool = False

    def __str__(self) -> str:
        how = [name for name in ("push_each", "early", "fresh", "twice", "pump") if getattr(self, name)]
        return " ".join([self.layout.name, self.mix, f"{self.count} in order {list(self.order)}", *how])

    @property
    def segments(self) -> int:
        """Blocks of the longest request."""
        return {"indirect": 12, "overlap": 2}.get(self.mix, 1)

    def requests(self) -> Iterator[tuple[Op, list[int]]]:
        """Operations and blocks. INDIRECT: one that is refused."""
        for n in range(self.count):
            if self.mix == "writes":
                yield Op.WRITE, [n]
            elif self.mix == "overlap":
                yield Op.WRITE, [n % 2, n % 2 + 1]
            elif self.mix == "reads":
                yield Op.READ, [n]
            elif self.mix == "indirect":
                yield (Op.READ if n % 2 else Op.WRITE), list(range(4 * n, 4 * n + 12))
            else:
                yield (
                    (Op.WRITE, [n]),
                    (Op.READ, [n - 1]),
                    (Op.DISCARD, [n]),
                    (Op.WRITE, [n - 1]),
                    (Op.INDIRECT, [n]),
                    (Op.FLUSH_DISKCACHE, [0]),
                )[n % 6]


@dataclass
class Tally:
    """What was run, and what went wrong: plan, points, labels, reason."""

    run: int = 0
    failures: list[str] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Of another process."""
        self.run += other.run
        self.failures += other.failures
        self.labels |= other.labels


def orders(depth: int, seed: int) -> list[tuple[int, ...]]:
    """All of them up to depth 4; then those that the module's text names, without doubles."""
    straight = tuple(range(depth))
    if depth <= 4:
        return list(itertools.permutations(straight))
    chance = random.Random(f"{seed} {depth}")
    found = [straight, straight[::-1]]
    for n in straight:
        rest = straight[:n] + straight[n + 1 :]
        found += [(n, *rest), (*rest, n)]
    found += [tuple(chance.sample(straight, depth)) for _ in range(SHUFFLES)]
    return list(dict.fromkeys(found))


def plans(seed: int) -> Iterator[Plan]:
    """All of them, without the pump's."""
    for layout in ABIS:
        for depth in range(1, 5):
            for order, push_each, early in itertools.product(orders(depth, seed), (False, True), (False, True)):
                for mix in (*MIXES, "indirect") if depth <= 2 else MIXES:
                    yield Plan(layout, mix, order, depth, push_each, early)
                if depth <= 3:
                    yield Plan(layout, "mixed", order, 2 * depth, push_each, early)
        for depth in range(1, 4):
            yield Plan(layout, "mixed", tuple(range(depth)), depth, fresh=depth == 1)
            yield Plan(layout, "mixed", tuple(range(depth))[::-1], depth, twice=True)
            yield Plan(layout, "overlap", tuple(range(depth))[::-1], depth, push_each=True, twice=True)
        for depth in range(5, DEEPEST + 1):
            for order in orders(depth, seed):
                yield Plan(layout, "mixed", order, depth)


def pump_plans(seed: int) -> Iterator[Plan]:
    """Those that the backend's own pump serves."""
    for layout in ABIS:
        for depth in range(1, 5):
            for order, push_each in itertools.product(orders(depth, seed), (False, True)):
                for mix, early in (("mixed", False), ("overlap", True)):
                    yield Plan(layout, mix, order, depth, push_each, early, pump=True)
        yield Plan(layout, "mixed", (0,), 1, fresh=True, pump=True)
        yield Plan(layout, "indirect", (1, 0), 2, pump=True)
        for depth in range(5, DEEPEST + 1, 9):
            for order in orders(depth, seed):
                yield Plan(layout, "mixed", order, depth, pump=True)


class Bench:
    """The guests of this process: one for each layout and length of requests, made anew when a case has failed."""

    def __init__(self) -> None:
        self._guests: dict[tuple[int, int, bool], tuple[Guest, int]] = {}

    def guest(self, plan: Plan) -> Guest:
        """The one for it."""
        key = (plan.layout.abi, plan.segments, plan.pump)
        if key not in self._guests:
            if plan.pump:  # a real file: io_uring and the page cache behave as they do there
                image, name = tempfile.mkstemp(prefix="evtchnd-crash-")
                os.unlink(name)  # noqa: PTH108
            else:
                image = os.memfd_create("image", os.MFD_CLOEXEC)
            os.ftruncate(image, BLOCKS * PAGE_SIZE)
            self._guests[key] = (Guest(plan.layout, image, segments=plan.segments, start=START), image)
        return self._guests[key][0]

    def drop(self, plan: Plan) -> None:
        """After a case that failed: nobody knows what is pinned."""
        guest, image = self._guests.pop((plan.layout.abi, plan.segments, plan.pump))
        with suppress(GuestFault, RuntimeError, BufferError):
            guest.close()
        os.close(image)

    def close(self) -> None:
        """All of them."""
        for guest, image in self._guests.values():
            with suppress(GuestFault):  # its last case has failed
                guest.close()
            os.close(image)
        self._guests = {}

    # ---- cases

    def points(self, plan: Plan, deaths: Sequence[int] = ()) -> list[str]:
        """The labels that the worker after those deaths passes, when it lives. HostError if it does not."""
        guest = self.guest(plan)
        if wrong := self._case(guest, plan, [*deaths, 0]):
            raise HostError(f"{plan}: {wrong}")
        return [LABELS[guest.watch.load(FIRST + 4 * n)] for n in range(guest.watch.load(PASSED))]

    def case(self, plan: Plan, deaths: Sequence[int]) -> str:
        """Workers that die at those points, one after the other; -> what was wrong in the end, or ""."""
        return self._case(self.guest(plan), plan, deaths)

    def _case(self, guest: Guest, plan: Plan, deaths: Sequence[int]) -> str:
        """A death at point 0 is none: that worker serves to its end."""
        for op, blocks in plan.requests():
            guest.ask(op, blocks)
        guest.publish()
        for life, due in enumerate(deaths):
            died, trouble = self._live(guest, plan, due, fresh=plan.fresh and life == 0)
            if trouble:
                return trouble
            if wrong := guest.collect():
                return wrong
            if not died:
                break
            guest.overwrite()
        else:
            passed = guest.watch.load(PASSED)
            try:
                if plan.pump:
                    _, trouble = self._live(guest, plan, 0, fresh=False)
                    if trouble:
                        return trouble
                else:
                    _live_in_order(guest, plan)
            finally:
                guest.watch.store(PASSED, passed)
        return guest.verdict()

    def _live(self, guest: Guest, plan: Plan, due: int, *, fresh: bool) -> tuple[bool, str]:
        """One worker's life in a fork; -> whether it died at its point, and what else went wrong."""
        guest.watch.store(DUE, due)
        guest.watch.store(PASSED, 0)
        if fresh:
            guest.forget()
        if plan.pump:
            from evtchnd.bench.crashpump import Pump  # a smaller process forks faster

            pump = Pump(guest, plan.order, push_each=plan.push_each, direct=plan.early, again=not fresh)
            status = fork(guest, pump.serve, pump.parent)
        else:
            status = fork(guest, lambda: _live_in_order(guest, plan))
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and due:
            return True, ""
        if status:
            return False, f"a worker ended with {os.waitstatus_to_exitcode(status)}"
        return False, ""


def _live_in_order(guest: Guest, plan: Plan) -> None:
    worker = Worker(guest)
    worker.serve(plan.order, take=len(plan.order), push_each=plan.push_each, early=plan.early)
    worker.close()


def fork(guest: Guest, life: Callable[[], None], parent: Callable[[int], None] | None = None) -> int:
    """`life` in a fork that is watched; `parent` gets its pid meanwhile; -> its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            watch(guest.watch)
            life()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if parent is not None:
        parent(pid)
    return os.waitpid(pid, 0)[1]


def enumerate_plan(bench: Bench, plan: Plan, tally: Tally, keep: Callable[[], bool]) -> None:
    """Every point of a plan for which `keep()` says so, and for `twice` every point of the next worker."""
    try:
        labels = bench.points(plan)
    except (HostError, GuestFault) as exc:
        tally.failures.append(f"{plan}: without a death: {exc}")
        bench.drop(plan)
        return
    tally.labels.update(labels)
    for due in range(1, len(labels) + 1):
        deaths: list[tuple[int, ...]] = [(due,)] if keep() else []
        if plan.twice and deaths:
            try:
                after = bench.points(plan, (due,))
            except (HostError, GuestFault) as exc:
                tally.failures.append(f"{plan}: died at {labels[due - 1]} ({due}): {exc}")
                bench.drop(plan)
                continue
            tally.labels.update(after)
            deaths = [(due,), *((due, second) for second in range(1, len(after) + 1) if keep())]
        for each in deaths:
            try:
                wrong = bench.case(plan, each)
            except (EvtchndError, GuestFault) as exc:
                wrong = str(exc)
            tally.run += 1
            if wrong:
                tally.failures.append(f"{plan}: died at {labels[due - 1]} {each}: {wrong}")
                bench.drop(plan)


@dataclass(frozen=True)
class Share:
    """How much is run, 1 is all: of plans of depth 1 and 2 with one death, of the others, of the pump's."""

    small: float = 1.0
    large: float = 1.0
    pump: float = 1.0

    def of(self, plan: Plan) -> float:
        """What holds for it."""
        if plan.pump:
            return self.pump
        return self.small if plan.count <= 2 and not plan.twice else self.large


def part(number: int, of: int, share: Share, seed: int) -> Tally:
    """A process' part: every `of`-th plan."""
    chance = random.Random(f"{seed} {number}")
    done = Tally()
    gc.collect()
    gc.freeze()  # a fork's collection would copy every page
    bench = Bench()
    everything = itertools.chain(plans(seed), pump_plans(seed))
    for plan in itertools.islice(everything, number, None, of):
        # half of it by whole plans, half by points: a small share sees many plans, and runs few without a death
        rate = share.of(plan) ** 0.5
        if chance.random() < rate:
            enumerate_plan(bench, plan, done, lambda rate=rate: chance.random() < rate)  # type: ignore[misc]
    bench.close()
    return done


def tally(share: Share, seed: int, *, processes: int | None = None) -> Tally:
    """All of it, in as many processes as there are CPUs."""
    count = processes or os.cpu_count() or 1
    if count == 1:
        return part(0, 1, share, seed)
    total = Tally()
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for each in [pool.submit(part, number, count, share, seed) for number in range(count)]:
            total.add(each.result())
    return total


def run(share: Share, seed: int) -> dict[str, float]:
    """Readings: crash_points.run, crash_points.failed, crash_points.labels (of those that have a name, passed)."""
    done = tally(share, seed)
    return {
        "crash_points.run": done.run,
        "crash_points.failed": len(done.failures),
        "crash_points.labels": len(done.labels),
    }
