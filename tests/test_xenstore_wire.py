"""Header, paths, permissions: what a client sends is refused by name or understood."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.xenstore import wire
from evtchnd.xenstore.wire import XenStoreError

HOME = b"/local/domain/7"


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2**32 - 1), st.integers(0, 9), st.binary(max_size=200))),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_parser_gives_the_same_however_the_stream_is_cut(
    messages: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(wire.pack(*message) for message in messages)
    parser, got, at = wire.Parser(), [], 0
    while at < len(stream):
        step = cuts[at % len(cuts)]
        parser.feed(stream[at : at + step])
        at += step
        while (message := parser.next()) is not None:
            got.append(message)
    assert got == messages
    assert parser.partial == 0


@pytest.mark.parametrize("length", [4097, 2**31, 2**32 - 1])
def test_xsa_38_a_length_above_4096_ends_the_stream(length: int) -> None:
    parser = wire.Parser()
    parser.feed(wire.HEADER.pack(2, 1, 0, length))
    with pytest.raises(wire.ProtocolError, match=str(length)):
        parser.next()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b"/", b"/"),
        (b"/a/b-c_d@e", b"/a/b-c_d@e"),
        (b"data/x", b"/local/domain/7/data/x"),
        (b"/local/domain/7/" + b"x" * 2048, b"/local/domain/7/" + b"x" * 2048),
        (b"x" * 2048, HOME + b"/" + b"x" * 2048),
    ],
)
def test_paths(text: bytes, path: bytes) -> None:
    assert wire.canonical(text, HOME, quota=2048) == path


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"/a/",
        b"//",
        b"/a//b",
        b"a/",
        b"/local/domain/",
        b"/\xff",
        b"/a b",
        b"/a.b",
        b"/a:b",
        b"/%",
        b"@introduceDomain",
        b"/" + b"x" * 2048,
        b"/local/domain/123456/" + b"x" * 2040,
        b"x" * 2049,
    ],
)
def test_xsa_481_paths_that_are_refused(text: bytes) -> None:
    with pytest.raises(XenStoreError) as caught:
        wire.canonical(text, HOME, quota=2048)
    assert caught.value.name == "EINVAL"


def test_special_paths_only_where_they_mean_something() -> None:
    assert wire.canonical(b"@releaseDomain", HOME, special=True) == b"@releaseDomain"
    with pytest.raises(XenStoreError):
        wire.canonical(b"@a//b", HOME, special=True)


@given(st.binary(max_size=60))
def test_any_path_is_refused_or_stays_what_it_is(text: bytes) -> None:
    try:
        path = wire.canonical(text, HOME, special=True)
    except XenStoreError as error:
        assert error.name == "EINVAL"
    else:
        assert wire.canonical(path, HOME, special=True) == path
        assert path in (text, HOME + b"/" + text)


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 3)), min_size=1))
def test_permissions_there_and_back(entries: list[tuple[int, int]]) -> None:
    assert wire.parse_perms(wire.format_perms(tuple(entries))) == tuple(entries)


@pytest.mark.parametrize("text", [b"", b"x0", b"n", b"n-1", b"n65536", b"r1x", b"n0x10", "n\u0661".encode()])
def test_permissions_that_are_refused(text: bytes) -> None:
    with pytest.raises(XenStoreError):
        wire.parse_perms([text])


@given(st.binary(max_size=40))
def test_values_survive_as_text(data: bytes) -> None:
    assert wire.encode(wire.decode(data)) == data


def test_parents() -> None:
    assert wire.parent_of(b"/a") == wire.parent_of(b"/") == b"/"
    assert wire.parent_of(b"/a/b") == b"/a"


def test_an_error_tells_its_name_number_and_place() -> None:
    error = XenStoreError("ENOENT", "/a")
    assert (error.name, error.errno, str(error)) == ("ENOENT", 2, "ENOENT: /a")
    assert isinstance(error, OSError)
