"""The block ring's layouts against Xen's header, and what a frontend may write into XenStore."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.blkif import LAYOUTS, SEGMENT, X86_32, X86_64, Layout, Op
from evtchnd.errors import GuestError
from evtchnd_backends import blkif as keys

PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#define __XEN_INTERFACE_VERSION__ 0x00040d00
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#ifdef X86_32
#pragma pack(push, 4)
#endif
#include <xen/io/blkif.h>
#ifdef X86_32
#pragma pack(pop)
#endif
static void dump(const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++) printf("%02x", ((const unsigned char *)p)[i]);
    putchar('\n');
}
int main(void)
{
    struct blkif_request r; struct blkif_request_discard d; struct blkif_request_indirect i; struct blkif_response a;
    memset(&r, 0, sizeof r); memset(&d, 0, sizeof d); memset(&i, 0, sizeof i); memset(&a, 0, sizeof a);
    r.operation = BLKIF_OP_WRITE; r.nr_segments = 11; r.handle = 0x0304; r.id = 0x1112131415161718;
    r.sector_number = 0x2122232425262728;
    for (int s = 0; s < 11; s++) {
        r.seg[s].gref = 0x31000000 + s; r.seg[s].first_sect = s % 4; r.seg[s].last_sect = 7 - s % 4;
    }
    d.operation = BLKIF_OP_DISCARD; d.flag = 1; d.handle = 0x0304; d.id = 0x1112131415161718;
    d.sector_number = 0x2122232425262728; d.nr_sectors = 0x4142434445464748;
    i.operation = BLKIF_OP_INDIRECT; i.indirect_op = BLKIF_OP_READ; i.nr_segments = 0x0506; i.handle = 0x0304;
    i.id = 0x1112131415161718; i.sector_number = 0x2122232425262728;
    for (int s = 0; s < 8; s++) i.indirect_grefs[s] = 0x51000000 + s;
    a.id = 0x1112131415161718; a.operation = BLKIF_OP_FLUSH_DISKCACHE; a.status = BLKIF_RSP_EOPNOTSUPP;
    dump(&r, sizeof r); dump(&d, sizeof d); dump(&i, sizeof i); dump(&a, sizeof a);
}
"""


@pytest.mark.parametrize("layout", [X86_64, X86_32], ids=lambda layout: layout.name)
def test_layouts_are_those_of_the_header(layout: Layout, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/xen/io/blkif.h").exists():
        pytest.skip("no C compiler or no libxen-dev")
    source = tmp_path / "dump.c"
    source.write_text(PROGRAM)
    define = ["-DX86_32"] if layout is X86_32 else []
    subprocess.run([compiler, *define, "-o", tmp_path / "dump", source], check=True)
    lines = subprocess.run([tmp_path / "dump"], check=True, capture_output=True, text=True).stdout.split()
    ident, sector = 0x1112131415161718, 0x2122232425262728
    segments = [(0x31000000 + s, s % 4, 7 - s % 4) for s in range(11)]
    assert layout.request(Op.WRITE, ident, sector, segments, handle=0x0304).hex() == lines[0]
    discard = layout.discard_request(ident, sector, 0x4142434445464748, flag=1, handle=0x0304).hex()
    assert lines[1].startswith(discard)
    grefs = [0x51000000 + s for s in range(8)]
    indirect = layout.indirect_request(Op.READ, ident, sector, 0x0506, grefs, handle=0x0304).hex()
    # the header pads the 32-bit form to 64 bytes only when it is compiled for i386
    assert len(indirect) == 128 and indirect.startswith(lines[2]) and not int(indirect[len(lines[2]) :] or "0", 16)
    assert layout.response.pack(ident, Op.FLUSH_DISKCACHE, -2).hex() == lines[3]
    assert (layout.request_size, layout.response_size) == (len(lines[0]) // 2, len(lines[3]) // 2)
    assert SEGMENT.size == 8


def nodes(**changes: str | None) -> dict[str, str]:
    base = {"ring-ref": "8", "event-channel": "3", "protocol": "x86_64-abi"}
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in {**base, **named}.items() if value is not None}


def rings(found: dict[str, str]) -> keys.Rings:
    """As blkback reads them: first what holds for all queues, then what that leads to."""
    first = {name: value for name, value in found.items() if name in keys.SHARED_NODES}
    rest = keys.queue_nodes(first, max_order=4, max_queues=4)
    read = {**first, **{name: value for name, value in found.items() if name in rest}}
    return keys.frontend_rings(read, max_order=4, max_queues=4)


NAMES = (*keys.SHARED_NODES, "event-channel", "ring-ref", "ring-ref0", "ring-ref1", "queue-0/ring-ref")


def test_one_page_under_either_name() -> None:
    assert rings(nodes()) == keys.Rings(X86_64, (keys.Queue((8,), 3),))
    other = nodes(ring_ref=None, ring_ref0="9", ring_page_order="0")
    assert rings(other) == keys.Rings(X86_64, (keys.Queue((9,), 3),))
    # Linux writes ring-ref, and ring-page-order beside it only for more
    assert rings(nodes(ring_page_order="0")).queues[0].grefs == (8,)


@pytest.mark.parametrize("size", [{"ring_page_order": "2"}, {"num_ring_pages": "4"}])
def test_several_pages(size: dict[str, str]) -> None:
    refs: dict[str, str] = {f"ring-ref{index}": str(20 + index) for index in range(4)}
    assert rings({**nodes(ring_ref=None, **size), **refs}).queues[0].grefs == (20, 21, 22, 23)


def test_protocols() -> None:
    assert rings(nodes(protocol="x86_32-abi")).layout is X86_32
    # as Linux' and QEMU's backends on x86 take it
    assert rings(nodes(protocol=None)).layout is X86_32


def test_a_ring_in_a_log_line() -> None:
    one = rings(nodes(protocol="x86_64-abi", event_channel="3"))
    assert str(one) == "x86_64-abi, 1 ring page, port 3"
    assert str(keys.Rings(X86_32, (keys.Queue((8, 9), 4),))) == "x86_32-abi, 2 ring pages, port 4"
    two = keys.Rings(X86_64, (keys.Queue((8,), 4), keys.Queue((9,), 5)))
    assert str(two) == "x86_64-abi, 2 queues of 1 ring page, ports 4, 5"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"ring_ref": "abc"}, "ring-ref: 'abc' is no number"),
        ({"ring_ref": "-1"}, "ring-ref: '-1' is no number"),
        ({"ring_ref": ""}, "ring-ref: '' is no number"),
        ({"ring_ref": " 8"}, "ring-ref: ' 8' is no number"),
        ({"ring_ref": "1_0"}, "ring-ref: '1_0' is no number"),
        ({"ring_ref": "\u0663"}, "ring-ref: '\u0663' is no number"),
        ({"ring_ref": "4294967296"}, "ring-ref: '4294967296' is no number"),
        ({"ring_ref": "9" * 4000}, f"ring-ref: '{'9' * 32}...' is no number"),
        ({"ring_ref": "8\n7"}, r"ring-ref: '8\n7' is no number"),
        ({"ring_ref": None}, "ring-ref0: missing"),
        ({"event_channel": None}, "event-channel: missing"),
        ({"event_channel": "0"}, "event-channel: port 0 is never valid"),
        ({"protocol": "arm-abi"}, "protocol: 'arm-abi' is none of x86_64-abi, x86_32-abi"),
        ({"ring_page_order": "5"}, "ring-page-order: 5 is above the limit of 4"),
        ({"ring_page_order": "1"}, "ring-ref0: missing"),
        ({"num_ring_pages": "3"}, "num-ring-pages: 3 is no power of two up to 16"),
        ({"ring_page_order": "1", "ring_ref0": "8", "ring_ref1": "8"}, "ring-ref: the same page twice: [8, 8]"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, str | None], line: str) -> None:
    with pytest.raises(GuestError) as caught:
        rings(nodes(**wrong))
    assert str(caught.value) == line


def queues(count: int, **changes: str | None) -> dict[str, str]:
    """What Linux writes for `count` queues of one page; a `__` in a name of `changes` is a `/`."""
    base = {"multi-queue-num-queues": str(count), "protocol": "x86_64-abi"}
    for index in range(count):
        base |= {f"queue-{index}/ring-ref": str(20 + index), f"queue-{index}/event-channel": str(5 + index)}
    named = {name.replace("__", "/").replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in {**base, **named}.items() if value is not None}


def test_several_queues() -> None:
    found = rings(queues(3))
    assert found == keys.Rings(X86_64, tuple(keys.Queue((20 + index,), 5 + index) for index in range(3)))
    # the top level is not theirs
    assert rings({**queues(2), "ring-ref": "99", "event-channel": "98"}) == rings(queues(2))
    # one queue lies there
    assert rings(nodes(multi_queue_num_queues="1")) == rings(nodes())
    pages = {f"queue-{queue}/ring-ref{page}": str(20 + 2 * queue + page) for queue in range(2) for page in range(2)}
    two = rings({**queues(2, queue_0__ring_ref=None, queue_1__ring_ref=None, ring_page_order="1"), **pages})
    assert [queue.grefs for queue in two.queues] == [(20, 21), (22, 23)]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"multi_queue_num_queues": "0"}, "multi-queue-num-queues: 0 queues, 1 to 4 are possible"),
        ({"multi_queue_num_queues": "5"}, "multi-queue-num-queues: 5 queues, 1 to 4 are possible"),
        ({"multi_queue_num_queues": "4294967295"}, "multi-queue-num-queues: 4294967295 queues, 1 to 4 are possible"),
        ({"multi_queue_num_queues": "two"}, "multi-queue-num-queues: 'two' is no number"),
        ({"multi_queue_num_queues": "-2"}, "multi-queue-num-queues: '-2' is no number"),
        ({"multi_queue_num_queues": "1"}, "ring-ref0: missing"),
        ({"multi_queue_num_queues": "3"}, "queue-2/ring-ref0: missing"),
        ({"queue_1__ring_ref": None}, "queue-1/ring-ref0: missing"),
        ({"queue_1__ring_ref": "x"}, "queue-1/ring-ref: 'x' is no number"),
        ({"queue_0__event_channel": None}, "queue-0/event-channel: missing"),
        ({"queue_1__event_channel": "0"}, "queue-1/event-channel: port 0 is never valid"),
        ({"queue_1__event_channel": "5"}, "event-channel: one port for two queues: [5, 5]"),
        ({"queue_1__ring_ref": "20"}, "ring-ref: the same page twice: [20, 20]"),
    ],
)
def test_what_is_wrong_with_queues_is_named(wrong: dict[str, str | None], line: str) -> None:
    with pytest.raises(GuestError) as caught:
        rings(queues(2, **wrong))
    assert str(caught.value) == line


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.one_of(st.integers(-1, 1 << 33).map(str), st.sampled_from(list(LAYOUTS)), st.text(max_size=6)),
    )
)
def test_any_nodes_give_a_ring_or_a_guest_error(found: dict[str, str]) -> None:
    try:
        found_rings = rings(found)
    except GuestError as error:
        assert "\n" not in str(error)
    else:
        assert 1 <= len(found_rings.queues) <= 4
        for queue in found_rings.queues:
            assert len(queue.grefs) in (1, 2, 4, 8, 16) and queue.port
        assert keys.Rings.from_params(found_rings.params()) == found_rings


def test_features() -> None:
    found = keys.features(
        sectors=100,
        sector_size=512,
        physical_sector_size=4096,
        readonly=True,
        cdrom=True,
        max_queues=4,
        max_ring_page_order=4,
        max_indirect_segments=0,
    )
    assert found["info"] == "7" and found["max-ring-pages"] == "16"
    assert found["multi-queue-max-queues"] == "4" and found["feature-persistent"] == found["feature-discard"] == "0"
    # what does not work is not offered
    assert not {"feature-max-indirect-segments", "discard-granularity", "feature-barrier"} & set(found)
