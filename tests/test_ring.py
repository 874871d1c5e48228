"""Generic rings: both ends together, against a plain model, and page by page against Xen's own macros in C."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from evtchnd.errors import GuestError
from evtchnd.ring import BackRing, FrontRing, RingLayout

STARTS = [0, 5, 2**32 - 2, 2**32 - 40, 2**31 - 1]
SIZES = [(112, 16), (108, 12), (12, 4), (8, 8), (16, 16), (33, 7), (1, 3), (300, 5), (2000, 2)]


def pages_of(count: int) -> list[bytearray]:
    return [bytearray(4096) for _ in range(count)]


@pytest.mark.parametrize(
    ("sizes", "pages", "entries"),
    [((112, 16), 1, 32), ((112, 16), 2, 64), ((112, 16), 16, 512), ((108, 12), 1, 32), ((12, 4), 1, 256),
     ((8, 8), 1, 256), ((16, 16), 1, 128), ((2000, 2), 1, 2), ((112, 16), 3, 64)],
)  # fmt: skip
def test_entries_round_down(sizes: tuple[int, int], pages: int, entries: int) -> None:
    assert RingLayout(*sizes, pages).entries == entries


def test_there_are_no_other_rings() -> None:
    for args in ((112, 16, 0), (112, 16, 17), (0, 16, 1), (4000, 1, 1)):
        with pytest.raises(ValueError, match="no ring has"):
            RingLayout(*args)
    with pytest.raises(ValueError, match="1 pages for a ring of 2"):
        BackRing(pages_of(1), RingLayout(12, 4, 2))


@pytest.mark.parametrize("jump", [33, 2**31, 2**32 - 1, 1000])
def test_an_index_that_jumps_is_fatal(jump: int) -> None:
    layout = RingLayout(112, 16, 1)
    pages = pages_of(1)
    for start in STARTS:
        front = FrontRing(pages, layout)
        front.preset(start)
        back = BackRing(pages, layout)
        pages[0][0:4] = ((start + jump) & 0xFFFFFFFF).to_bytes(4, "little")
        assert back.pending()
        with pytest.raises(GuestError, match="request index jumped"):
            back.take(1)
        pages[0][8:12] = ((start + jump) & 0xFFFFFFFF).to_bytes(4, "little")
        with pytest.raises(GuestError, match="response index jumped"):
            front.responses(1)


def test_no_more_requests_than_published_responses_allow() -> None:
    layout = RingLayout(112, 16, 1)
    pages = pages_of(1)
    front, back = FrontRing(pages, layout), BackRing(pages, layout)
    for n in range(32):
        front.request(bytes([n]))
    front.push()
    back.take(32)
    back.respond(b"private")
    pages[0][0:4] = (33).to_bytes(4, "little")  # its slot holds a response that nobody has seen yet
    with pytest.raises(GuestError, match="jumped"):
        back.take(1)


def test_an_index_that_goes_back_is_fatal() -> None:
    layout = RingLayout(112, 16, 1)
    pages = pages_of(1)
    front, back = FrontRing(pages, layout), BackRing(pages, layout)
    for _ in range(3):
        front.request(b"")
    front.push()
    back.take(3)
    pages[0][0:4] = (1).to_bytes(4, "little")
    with pytest.raises(GuestError, match="jumped"):
        back.take(1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pages", [1, 2, 3, 16])
def test_every_entry_carries_its_bytes(sizes: tuple[int, int], pages: int) -> None:
    layout = RingLayout(*sizes, pages)
    memory = pages_of(pages)
    front, back = FrontRing(memory, layout), BackRing(memory, layout)
    for turn in range(2):
        requests = [(n * 31 + turn).to_bytes(4, "little") * 500 for n in range(layout.entries)]
        for request in requests:
            front.request(request[: sizes[0]])
        front.push()
        assert back.take(layout.entries) == [request[: sizes[0]] for request in requests]
        for request in requests:
            back.respond(request[: sizes[1]])
        back.push()
        assert front.responses(layout.entries) == [request[: sizes[1]] for request in requests]


def test_xsa_216_the_rest_of_a_response_is_zero() -> None:
    layout = RingLayout(112, 16, 2)
    pages = pages_of(2)
    front, back = FrontRing(pages, layout), BackRing(pages, layout)
    for _ in range(64):
        front.request(b"\xee" * 112)
    front.push()
    back.take(64)
    for _ in range(64):
        back.respond(b"r" * 16)
    with pytest.raises(ValueError, match="answered"):
        back.respond(b"one more")
    memory = b"".join(pages)
    for n in range(64):
        assert memory[64 + 112 * n : 64 + 112 * (n + 1)] == b"r" * 16 + bytes(96)


class TwoEnds(RuleBasedStateMachine):
    """Front and back on the same pages, against two queues."""

    @initialize(sizes=st.sampled_from(SIZES), pages=st.sampled_from([1, 2, 3, 16]), start=st.sampled_from(STARTS))
    def make(self, sizes: tuple[int, int], pages: int, start: int) -> None:
        self.layout = RingLayout(*sizes, pages)
        self.pages = pages_of(pages)
        self.front = FrontRing(self.pages, self.layout)
        self.front.preset(start)
        self.back = BackRing(self.pages, self.layout)
        self.written: deque[bytes] = deque()  # requests not pushed | pushed | taken; responses not pushed | pushed
        self.pushed: deque[bytes] = deque()
        self.taken = 0
        self.answers: deque[bytes] = deque()
        self.published: deque[bytes] = deque()
        self.kick_due = self.event_due = True
        self.serial = 0

    def fresh(self, size: int) -> bytes:
        self.serial += 1
        return (self.serial.to_bytes(4, "little") * 500)[:size]

    def outstanding(self) -> int:
        return len(self.written) + len(self.pushed) + self.taken + len(self.answers) + len(self.published)

    @rule(n=st.integers(1, 40))
    def request(self, n: int) -> None:
        for _ in range(n):
            if self.outstanding() == self.layout.entries:
                with pytest.raises(ValueError, match="full"):
                    self.front.request(b"")
                return
            data = self.fresh(self.layout.req_size)
            self.front.request(data)
            self.written.append(data)

    @rule()
    def push_requests(self) -> None:
        expected = bool(self.written) and self.kick_due
        assert self.front.push() == expected
        if expected:
            self.kick_due = False
        self.pushed.extend(self.written)
        self.written.clear()

    @rule(most=st.integers(0, 50))
    def take(self, most: int) -> None:
        expected = [self.pushed.popleft() for _ in range(min(most, len(self.pushed)))]
        assert self.back.take(most) == expected
        self.taken += len(expected)

    @rule(n=st.integers(1, 40))
    def respond(self, n: int) -> None:
        for _ in range(min(n, self.taken)):
            data = self.fresh(self.layout.rsp_size)
            self.back.respond(data)
            self.answers.append(data)
            self.taken -= 1

    @rule()
    def push_responses(self) -> None:
        expected = bool(self.answers) and self.event_due
        assert self.back.push() == expected
        if expected:
            self.event_due = False
        self.published.extend(self.answers)
        self.answers.clear()

    @rule(most=st.integers(0, 50))
    def responses(self, most: int) -> None:
        expected = [self.published.popleft() for _ in range(min(most, len(self.published)))]
        assert self.front.responses(most) == expected

    @rule()
    def arm_back(self) -> None:
        assert self.back.arm() == bool(self.pushed)
        if not self.pushed:
            self.kick_due = True

    @rule()
    def arm_front(self) -> None:
        assert self.front.arm() == bool(self.published)
        if not self.published:
            self.event_due = True

    @precondition(lambda self: hasattr(self, "front"))
    @invariant()
    def looks(self) -> None:
        assert self.back.pending() == bool(self.pushed)
        assert self.front.pending() == bool(self.published)
        assert self.front.free == self.layout.entries - self.outstanding()


TestTwoEnds = TwoEnds.TestCase


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], ctypes.CDLL]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path("/usr/include/xen/io/ring.h").exists():
        pytest.skip("the C oracle needs a C compiler and libxen-dev")
    folder = tmp_path_factory.mktemp("oracle")
    built = {}
    for req, rsp in SIZES:
        library = folder / f"oracle-{req}-{rsp}.so"
        source = str(Path(__file__).parent / "ring_oracle.c")
        flags = ["-shared", "-fPIC", "-O1", f"-DREQ={req}", f"-DRSP={rsp}", "-o", str(library)]
        subprocess.run([compiler, *flags, source], check=True)
        built[req, rsp] = ctypes.CDLL(str(library))
    return built


STEPS = st.sampled_from(
    ["request", "request", "request", "push_requests", "take", "take", "respond", "respond", "push_responses",
     "response", "response", "arm_back", "arm_front"]
)  # fmt: skip


@given(st.sampled_from(SIZES), st.sampled_from([1, 2, 4, 16]), st.sampled_from(STARTS), st.lists(STEPS, max_size=120))
def test_every_byte_as_in_xen(
    oracles: dict[tuple[int, int], ctypes.CDLL], sizes: tuple[int, int], pages: int, start: int, steps: list[str]
) -> None:
    layout = RingLayout(*sizes, pages)
    ours = pages_of(pages)
    front = FrontRing(ours, layout)
    front.preset(start)
    back = BackRing(ours, layout)
    oracle = oracles[sizes]
    theirs = ctypes.create_string_buffer(4096 * pages)
    assert oracle.setup(theirs, 4096 * pages, ctypes.c_uint32(start)) == layout.entries
    out = ctypes.create_string_buffer(4096)
    due = 0
    for serial, step in enumerate(steps):
        data = bytes((serial * 7 + i) & 0xFF for i in range(max(sizes)))
        if step == "request":
            assert front.free == oracle.free_requests()
            if front.free:
                front.request(data[: sizes[0]])
                oracle.request(data[: sizes[0]])
        elif step == "take":
            for taken in back.take(1) or [None]:
                assert oracle.take(out) == (taken is not None)
                due += taken is not None
                assert taken is None or taken == out.raw[: sizes[0]]
        elif step == "respond" and due:
            due -= 1
            back.respond(data[: sizes[1]])
            oracle.respond(data[: sizes[1]])
        elif step == "response":
            for answer in front.responses(1) or [None]:
                assert oracle.response(out) == (answer is not None)
                assert answer is None or answer == out.raw[: sizes[1]]
        elif step == "push_requests":
            assert front.push() == oracle.push_requests()
        elif step == "push_responses":
            assert back.push() == oracle.push_responses()
        elif step == "arm_back":
            assert back.arm() == oracle.arm_back()
        elif step == "arm_front":
            assert front.arm() == oracle.arm_front()
        assert b"".join(ours) == theirs.raw, step
