"""Byte streams: XenStore's ring and the console's, both sides, indices that wrap and indices that lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.errors import GuestError
from evtchnd.stream import CONSOLE, XENSTORE, ByteStream, StreamLayout


def preset(page: bytearray, layout: StreamLayout, index: int) -> None:
    for ring in (layout.to_back, layout.to_front):
        for off in (ring.cons, ring.prod):
            page[off : off + 4] = struct.pack("<I", index & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("layout", "request_at", "reply_at", "words"),
    [(XENSTORE, 0, 1024, (2048, 2052, 2056, 2060)), (CONSOLE, 1024, 0, (3080, 3084, 3072, 3076))],
)
def test_where_the_bytes_lie(layout: StreamLayout, request_at: int, reply_at: int, words: tuple[int, ...]) -> None:
    page = bytearray(4096)
    front, back = ByteStream(page, layout, "front"), ByteStream(page, layout)
    assert front.write(b"request") == 7
    assert page[request_at : request_at + 7] == b"request"
    assert back.available() == 7
    assert back.read(3) == b"req"
    assert back.write(b"ok") == 2
    assert page[reply_at : reply_at + 2] == b"ok"
    cons, prod, reply_cons, reply_prod = (int.from_bytes(page[word : word + 4], "little") for word in words)
    assert (cons, prod, reply_cons, reply_prod) == (3, 7, 0, 2)
    assert front.read(100) == b"ok"
    assert back.read(100) == b"uest"
    assert back.read(100) == b""


@given(
    st.sampled_from([XENSTORE, CONSOLE]),
    st.sampled_from([0, 1000, 2**32 - 2, 2**32 - 700]),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2500)), max_size=40),
)
def test_both_ends_against_plain_queues(layout: StreamLayout, start: int, steps: list[tuple[bool, bool, int]]) -> None:
    page = bytearray(4096)
    preset(page, layout, start)
    ends = {True: ByteStream(page, layout, "front"), False: ByteStream(page, layout, "back")}
    queues = {True: b"", False: b""}  # what this side has written and the other not read
    sizes = {True: layout.to_back.size, False: layout.to_front.size}
    serial = 0
    for front, writing, n in steps:
        if writing:
            data = bytes((serial + i) % 251 for i in range(n))
            taken = ends[front].write(data)
            assert taken == min(n, sizes[front] - len(queues[front]))
            queues[front] += data[:taken]
            serial += taken
        else:
            assert ends[front].read(n) == queues[not front][:n]
            queues[not front] = queues[not front][n:]
        for side in (True, False):
            assert ends[side].room() == sizes[side] - len(queues[side])
            assert ends[side].available() == len(queues[not side])


@pytest.mark.parametrize("layout", [XENSTORE, CONSOLE])
def test_xsa_38_an_impossible_index_kills_the_stream(layout: StreamLayout) -> None:
    for jump in (layout.to_back.size + 1, 2**31, 2**32 - 1):
        page = bytearray(4096)
        back = ByteStream(page, layout)
        page[layout.to_back.prod : layout.to_back.prod + 4] = struct.pack("<I", jump)
        for call in (back.available, lambda back=back: back.read(10)):
            with pytest.raises(GuestError, match=r"ring: producer .* is not within"):
                call()
    for jump in (1, 2**31, 2**32 - layout.to_front.size - 1):
        page = bytearray(4096)
        back = ByteStream(page, layout)
        page[layout.to_front.cons : layout.to_front.cons + 4] = struct.pack("<I", jump)
        for call in (back.room, lambda back=back: back.write(b"x")):
            with pytest.raises(GuestError, match=r"ring: consumer .* is not within"):
                call()
        assert not any(page[: layout.to_front.data] if layout is XENSTORE else page[:1024])


def test_our_own_indices_are_not_believed() -> None:
    page = bytearray(4096)
    front, back = ByteStream(page, XENSTORE, "front"), ByteStream(page, XENSTORE)
    front.write(b"abcdef")
    assert back.read(2) == b"ab"
    page[2048:2052] = struct.pack("<I", 999)  # the guest writes the consumer's index
    assert back.read(10) == b"cdef"
    assert page[2048:2052] == struct.pack("<I", 6)


def test_reset_begins_anew() -> None:
    page = bytearray(4096)
    preset(page, XENSTORE, 77)
    back = ByteStream(page, XENSTORE)
    back.write(b"half a reply")
    back.reset()
    assert not any(page[2048:2064])
    assert (back.available(), back.room()) == (0, 1024)
    back.close()
