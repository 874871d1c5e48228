"""The VMM's messages: round trips, every refusal, and the document's structs compiled by a C compiler."""

from __future__ import annotations

import errno
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd import protocol as p
from evtchnd.errors import VmmError
from evtchnd.protocol import State, Type, WireError

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ports = st.integers(1, p.MAX_PORTS - 1)
text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=21)
memory_entries = st.builds(
    p.MemoryEntry,
    slot=st.integers(0, p.MAX_SLOTS - 1),
    fd_index=st.just(0),
    gfn=st.integers(0, 2**39),
    pages=st.integers(1, 2**39),
    offset=st.integers(0, 2**40).map(lambda n: n * 4096),
)
grant_entries = st.builds(
    p.GrantEntry,
    index=st.integers(0, p.MAX_GRANT_FRAMES - 1),
    fd_index=st.just(0),
    offset=st.integers(0, 2**40).map(lambda n: n * 4096),
)
port_lists = st.lists(ports, min_size=1, max_size=p.MAX_FDS, unique=True).flatmap(
    lambda ports: st.permutations(range(len(ports))).map(lambda indices: tuple(zip(ports, indices, strict=True)))
)
bodies = st.one_of(
    st.builds(p.Hello, u32, u64),
    st.builds(p.HelloReply, u32, u64, u32, u32, u32, u32, u32),
    *(
        st.builds(
            cls,
            domid=st.integers(1, 0x7FEF),
            flags=st.sampled_from([0, 1]),
            vcpus=st.integers(1, 4096),
            uuid=st.binary(min_size=16, max_size=16),
            name=text,
        )
        for cls in (p.Register, p.Resume)
    ),
    st.builds(p.TableBegin, st.just(3), st.integers(0, 4095)),
    st.builds(p.TableChunk, st.just(1), st.lists(memory_entries, min_size=1, max_size=20).map(tuple)),
    st.builds(p.TableChunk, st.just(2), st.lists(grant_entries, min_size=1, max_size=20).map(tuple)),
    st.integers(1, 126).map(lambda n: p.TableChunk(3, tuple(p.PortEntry(i + 1, 2 * i, 2 * i + 1) for i in range(n)))),
    st.builds(p.TableCommit, st.sampled_from([1, 2, 3])),
    memory_entries,
    grant_entries,
    st.builds(p.SlotRemove, u32),
    st.builds(p.GrantFrameRemove, u32),
    st.builds(p.XenStore, ports, st.integers(0, 2**40).map(lambda n: n * 4096)),
    st.just(p.Start()),
    st.builds(p.PortClosed, ports | st.just(p.ALL_PORTS)),
    st.builds(p.Disk, u32, st.integers(0, 3), st.from_regex(r"[a-z0-9]{1,16}", fullmatch=True)),
    st.builds(p.DiskRemove, u32),
    st.builds(
        p.Vif,
        st.integers(0, 65535),
        st.integers(1, 64),
        st.binary(min_size=5, max_size=5).map(lambda rest: b"\x02" + rest),
        st.just(0) | st.integers(68, 65521),
    ),
    st.builds(p.VifRemove, u32),
    st.builds(p.Release, u32),
    st.just(p.Ping()),
    st.builds(p.Console, ports, st.integers(0, 2**40 - 1)),
    st.builds(p.BindPorts, port_lists),
    st.builds(p.BindPortsReply, port_lists),
    st.builds(p.UnbindPorts, st.lists(ports, min_size=1, max_size=4095).map(tuple)),
    st.builds(p.Ack, st.sampled_from([t for t, spec in p.MESSAGES.items() if spec.reply is None])),
    st.builds(p.ErrorReply, st.sampled_from(Type), st.integers(1, 4095), text),
)


@given(bodies, u32)
def test_what_was_packed_is_unpacked(message: p.Body, id: int) -> None:
    data = p.pack(message, id=id)
    header, back = p.unpack(data, message.nfds)
    assert (type(back), back) == (type(message), message)
    assert (header.type, header.id, header.nfds, header.is_reply) == (message.type, id, message.nfds, message.reply)
    assert p.pack(back, id=id) == data


@given(bodies, st.data())
def test_a_changed_message_is_refused_or_another_valid_one(message: p.Body, data: st.DataObject) -> None:
    packed = bytearray(p.pack(message, id=1))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for mangled in (bytes(packed), bytes(packed[:cut])):
        try:
            header, back = p.unpack(mangled, message.nfds)
        except WireError as e:
            assert "\n" not in str(e)
            assert 0 < e.errno < 4096
        else:
            # what was accepted is canonical: nothing in it was overlooked
            assert isinstance(back, p.ErrorReply) or p.pack(back, id=header.id) == mangled


@given(st.binary(max_size=300), st.sampled_from(Type), st.integers(0, 3), st.integers(0, 3))
def test_any_body_is_refused_or_valid(body: bytes, kind: Type, flags: int, nfds: int) -> None:
    data = p.HEADER.pack(p.MAGIC, kind, flags, 7, p.HEADER_SIZE + len(body), nfds) + body
    try:
        p.unpack(data, nfds)
    except WireError as e:
        assert e.header is not None
        assert e.header.id == 7


def message(kind: int, body: bytes = b"", *, flags: int = 0, nfds: int = 0, reserved: bytes = bytes(12)) -> bytes:
    head = p.HEADER.pack(p.MAGIC, kind, flags, 9, p.HEADER_SIZE + len(body), nfds)
    return head[:20] + reserved + body


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


ENTRY = struct.Struct("<IIQQQ")
REGISTER = p.pack(p.Register(7, 1, 2, name="web"), id=0)[32:]
BAD = {
    "EBADMSG flags 0x4": message(17, flags=4),
    "EBADMSG flags 0x8000": message(17, flags=0x8000),
    "EBADMSG flags 0x2": message(17, flags=2),
    "EBADMSG reserved": message(17, reserved=b"\0" * 11 + b"\1"),
    "ENOSYS type 999": message(999),
    "ENOSYS type 0": message(0),
    "EINVAL 4 bytes of body, 0 expected": message(17, words(0)),
    "EINVAL 1 descriptors, 0 expected": message(17, nfds=1),
    "EINVAL 0 descriptors, 1 expected": message(7, ENTRY.pack(0, 0, 0, 1, 0)),
    "EINVAL reserved bytes": message(1, words(1, 1, 0, 0)),
    "EINVAL domain 0": message(2, b"\0\0" + REGISTER[2:]),
    "EINVAL domain 32752": message(2, b"\xf0\x7f" + REGISTER[2:]),
    "EINVAL domain 7: unknown flags 0x2": message(2, REGISTER[:4] + words(2) + REGISTER[8:]),
    "EINVAL domain 7: 0 vCPUs": message(2, REGISTER[:8] + words(0) + REGISTER[12:]),
    "EOPNOTSUPP domain 7: grant table version 2": message(2, REGISTER[:12] + words(2) + REGISTER[16:]),
    "EINVAL domain 7: name: bytes after": message(2, REGISTER[:32] + b"a\0b".ljust(64, b"\0")),
    "EINVAL domain 7: name: 'a\\nb'": message(2, REGISTER[:32] + b"a\nb".ljust(64, b"\0")),
    "EINVAL domain 7: name: not UTF-8": message(3, REGISTER[:32] + b"\xff".ljust(64, b"\0")),
    "EINVAL table kind 9": message(4, words(9, 1)),
    "E2BIG table of 513 entries": message(4, words(1, 513)),
    "EINVAL table kind 0 is unknown": message(6, words(0, 0)),
    "EINVAL table chunk: cut off": message(5, words(1)),
    "EINVAL table chunk: 4294967295 entries": message(5, words(1, 0xFFFFFFFF)),
    "EINVAL table chunk without": message(5, words(1, 0)),
    "EINVAL none left out": message(5, words(1, 1) + ENTRY.pack(0, 1, 0, 1, 0), nfds=1),
    "EINVAL index is used twice": message(5, words(3, 1) + words(5, 0, 0, 0), nfds=1),
    "EINVAL port 5: unknown flags": message(5, words(3, 1) + words(5, 0, 1, 1), nfds=2),
    "ERANGE memory slot 512": message(7, ENTRY.pack(512, 0, 0, 1, 0), nfds=1),
    "EINVAL descriptor index must be 0": message(7, ENTRY.pack(0, 1, 0, 1, 0), nfds=1),
    "EINVAL memory slot 3: no pages": message(7, ENTRY.pack(3, 0, 0, 0, 0), nfds=1),
    "EINVAL memory slot 3: offset 0x800": message(7, ENTRY.pack(3, 0, 0, 1, 2048), nfds=1),
    "EINVAL memory slot 3: gfn 0xffffffffffffffff": message(7, ENTRY.pack(3, 0, 2**64 - 1, 2, 0), nfds=1),
    "EINVAL pages wraps": message(7, ENTRY.pack(3, 0, 1, 2**64 - 1, 0), nfds=1),
    "EINVAL memory slot 3: offset 0xfffffffffffff000 wraps": message(7, ENTRY.pack(3, 0, 0, 1, 2**64 - 4096), nfds=1),
    "ERANGE grant frame 64": message(9, struct.pack("<IIQ", 64, 0, 0), nfds=1),
    "EINVAL grant frame 1: offset 0x1": message(9, struct.pack("<IIQ", 1, 0, 1), nfds=1),
    "ERANGE port 0": message(11, struct.pack("<IIQ", 0, 0, 0), nfds=1),
    "EINVAL xenstore page: offset": message(11, struct.pack("<IIQ", 1, 0, 1), nfds=1),
    "ERANGE port 4096": message(13, words(4096, 0)),
    "EINVAL disk 5: unknown flags": message(14, words(5, 4) + b"xvda".ljust(16, b"\0"), nfds=1),
    "EINVAL disk 5: vdev '../x'": message(14, words(5, 0) + b"../x".ljust(16, b"\0"), nfds=1),
    "EINVAL disk 5: vdev has": message(14, words(5, 0) + bytes(16), nfds=1),
    "ERANGE port 0: not in": message(18, struct.pack("<IIQ", 0, 0, 5)),
    "EINVAL console page: gfn 0x10000000000": message(18, struct.pack("<IIQ", 2, 0, 1 << 40)),
    "EINVAL Console: reserved bytes": message(18, struct.pack("<IIQ", 2, 1, 5)),
    "EINVAL no port to bind": message(32, words(0, 0)),
    "EINVAL port list: 2 entries": message(32, words(2, 0, 5, 0), nfds=1),
    "EINVAL port is named twice": message(32, words(2, 0, 5, 0, 5, 1), nfds=2),
    "EINVAL 0 ports to unbind": message(33, words(0, 0)),
    "EINVAL error reply: cut off": message(17, words(5), flags=3),
    "EINVAL error reply: errno 0": message(17, words(0, 0), flags=3),
    "EINVAL error reply: length 9": message(17, words(5, 9) + b"reason", flags=3),
    "EINVAL descriptors came with an error": message(17, words(5, 0), flags=3, nfds=1),
    "EINVAL in a reply that is empty": message(17, words(0), flags=1),
}


@pytest.mark.parametrize("why", BAD)
def test_refusals_say_why(why: str) -> None:
    name, _, reason = why.partition(" ")
    data = BAD[why]
    with pytest.raises(WireError) as caught:
        p.unpack(data, p.HEADER.unpack_from(data)[5])
    assert caught.value.errno == getattr(errno, name)
    assert reason in str(caught.value)
    assert caught.value.header is not None  # it can be answered


def test_vmm_the_count_of_descriptors_is_the_headers() -> None:
    with pytest.raises(WireError, match="2 descriptors came, the header says 0"):
        p.unpack(p.pack(p.Ping(), id=1), 2)


@pytest.mark.parametrize("data", [b"", b"\0", p.pack(p.Ping(), id=1)[:31], b"EVCX" + p.pack(p.Ping(), id=1)[4:]])
def test_what_has_no_header_ends_the_connection(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        p.unpack(data, 0)
    assert caught.value.header is None


def test_a_size_that_lies_is_answered() -> None:
    data = bytearray(p.pack(p.Ping(), id=5))
    for size in (0, 31, 33, 0xFFFFFFFF):
        data[12:16] = size.to_bytes(4, "little")
        with pytest.raises(WireError) as caught:
            p.unpack(bytes(data), 0)
        assert caught.value.errno == errno.EBADMSG
        assert caught.value.header == p.Header(17, 0, 5, 0)


def test_reasons_are_one_line_and_cut_between_characters() -> None:
    reason = "ä" * 600 + "\nrest"
    _, back = p.unpack(p.pack(p.ErrorReply(12, 5, reason), id=1), 0)
    assert isinstance(back, p.ErrorReply)
    assert back.reason == "ä" * 512
    _, back = p.unpack(p.pack(p.ErrorReply(12, 5, "x" + reason), id=1), 0)
    assert isinstance(back, p.ErrorReply)
    assert back.reason == "x" + "ä" * 511
    _, back = p.unpack(p.pack(p.ErrorReply(12, 5, "two\nlines \udcff"), id=1), 0)
    assert isinstance(back, p.ErrorReply)
    assert back.reason == "two lines ?"


def test_an_error_becomes_a_reply() -> None:
    assert p.ErrorReply.of(7, VmmError("no", errno.ENOENT)) == p.ErrorReply(7, errno.ENOENT, "no")
    assert p.ErrorReply.of(7, ValueError("what")).errno == errno.EINVAL
    assert p.ErrorReply.of(7, OSError(errno.EBUSY, "busy")).errno == errno.EBUSY


def test_values_that_do_not_fit_are_refused_by_the_sender() -> None:
    for wrong in (lambda: p.pack(p.SlotRemove(-1), id=1), lambda: p.pack(p.Release(2**32), id=1)):
        with pytest.raises(VmmError):
            wrong()
    with pytest.raises(VmmError, match="descriptor index must be 0"):
        p.pack(p.MemoryEntry(0, 1, 0, 1, 0), id=1)
    with pytest.raises(VmmError, match="descriptors in a message"):
        p.TableChunk(1, tuple(p.MemoryEntry(i, i, i, 1, 0) for i in range(254)))


def test_tables_name_the_pair_that_overlaps() -> None:
    entries = [p.MemoryEntry(4, 0, 100, 10, 0), p.MemoryEntry(2, 0, 0, 50, 0), p.MemoryEntry(9, 0, 49, 2, 0)]
    with pytest.raises(VmmError, match=r"slots 2 \(0x0 \+ 0x32 pages\) and 9 \(0x31\) overlap"):
        p.check_table(entries)
    p.check_table(entries[:2])
    p.check_table([*entries[:2], p.MemoryEntry(9, 0, 50, 50, 0)])
    with pytest.raises(VmmError, match="memory slot 4 is there twice"):
        p.check_table([entries[0], p.MemoryEntry(4, 0, 500, 1, 0)])
    with pytest.raises(VmmError, match="grant frame 3 is there twice"):
        p.check_table([p.GrantEntry(3, 0, 0), p.GrantEntry(3, 0, 4096)])
    with pytest.raises(VmmError, match="port 3 is there twice"):
        p.check_table([p.PortEntry(3, 0, 1), p.PortEntry(3, 2, 3)])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=6))
def test_overlap_is_what_a_set_of_frames_says(slots: list[tuple[int, int]]) -> None:
    entries = [p.MemoryEntry(n, 0, gfn, pages, 0) for n, (gfn, pages) in enumerate(slots)]
    frames = [frame for gfn, pages in slots for frame in range(gfn, gfn + pages)]
    if len(set(frames)) == len(frames):
        p.check_table(entries)
    else:
        with pytest.raises(VmmError):
            p.check_table(entries)


def test_states() -> None:
    state = State.NEW
    for kind in (Type.HELLO, Type.PING, Type.REGISTER, Type.TABLE_BEGIN, Type.SLOT_ADD, Type.START, Type.RELEASE):
        state = p.after(state, kind)
    assert state is State.GONE
    for state, kind in [
        (State.NEW, Type.REGISTER),
        (State.NEW, Type.PING),
        (State.GREETED, Type.HELLO),
        (State.GREETED, Type.SLOT_ADD),
        (State.SERVED, Type.TABLE_BEGIN),
        (State.SERVED, Type.START),
        (State.GONE, Type.PING),
        (State.SERVED, Type.BIND_PORTS),  # the daemon's
    ]:
        with pytest.raises(VmmError) as caught:
            p.after(state, kind)
        assert caught.value.errno == errno.EPROTO


# ---- docs/protocol.md ------------------------------------------------------------------------------------------


def test_every_message_is_in_the_table_of_the_document() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (\w+) \|", DOCUMENT, re.MULTILINE)
    who = {(True, False): "VMM", (False, True): "daemon", (True, True): "both"}
    assert rows == [(str(int(t)), t.name, who[spec.vmm, spec.daemon]) for t, spec in p.MESSAGES.items()]
    assert set(p.MESSAGES) == set(Type)


SIZES = {
    "evtchnd_header": p.HEADER.size,
    "number": p.SlotRemove.layout.size,
    "hello": p.Hello.layout.size,
    "hello_reply": p.HelloReply.layout.size,
    "registration": p.Register.layout.size,
    "table_begin": p.TableBegin.layout.size,
    "table_chunk": p.TableChunk.layout.size,
    "table_commit": p.TableCommit.layout.size,
    "memory_entry": p.MemoryEntry.layout.size,
    "grant_entry": p.GrantEntry.layout.size,
    "port_entry": p.PortEntry.layout.size,
    "xenstore": p.XenStore.layout.size,
    "disk": p.Disk.layout.size,
    "vif": p.Vif.layout.size,
    "console": p.Console.layout.size,
    "evtchnd_error": p.ErrorReply.head.size,
    "port_list": p.BindPorts.layout.size,
    "unbind": p.UnbindPorts.layout.size,
}


def test_a_c_compiler_lays_out_the_documents_structs_as_we_do(tmp_path: Path) -> None:
    """Sizes against our layouts, offsets against those that the document states; and one message byte by byte."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    code = "".join(re.findall(r"```c\n(.*?)```", DOCUMENT, re.DOTALL))
    checks = []
    for name, inner in re.findall(r"^struct (\w+) \{(.*?)^\};", code, re.DOTALL | re.MULTILINE):
        for field, offset in re.findall(r"(\w+)(?:\[\w+\])?;\s*/\*\s+(\d+) ", inner):
            checks.append(f"_Static_assert(offsetof(struct {name}, {field}) == {offset}, {name!r});".replace("'", '"'))
        checks.append(f'_Static_assert(sizeof(struct {name}) == {SIZES[name]}, "size of {name}");')
    assert len(checks) > 60
    # arrays of a variable length are flexible ones to the compiler
    code = re.sub(r"\[(?:len|n)\];", "[];", code)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n#include <unistd.h>\n"
        + code
        + "\n".join(checks)
        + """
int main(void) {
    struct { struct evtchnd_header h; struct registration r; } m = {
        { 0x48435645, 2, 0, 77, sizeof m, 0, { 0 } },
        { .domid = 7, .flags = 1, .vcpus = 2, .grant_version = 1, .name = "web" } };
    memset(m.r.uuid, 0xab, 16);
    return write(1, &m, sizeof m) != sizeof m;
}
"""
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-std=c11", "-Wall", "-Werror", "-o", program, source], check=True, timeout=60)
    out = subprocess.run([program], check=True, capture_output=True, timeout=60).stdout
    assert out == p.pack(p.Register(7, 1, 2, uuid=b"\xab" * 16, name="web"), id=77)


def test_the_documents_numbers_are_the_codes() -> None:
    rows = dict(re.findall(r"^\| (.+?) \| ([^|]+?) \| [^|]*\|$", DOCUMENT.partition("## Limits")[2], re.MULTILINE))
    assert int(rows["message"].split()[0]) == p.MAX_MESSAGE
    assert int(rows["descriptors in a message"]) == p.MAX_FDS
    assert int(rows["slots of guest memory"]) == p.MAX_SLOTS
    assert int(rows["grant frames"]) == p.MAX_GRANT_FRAMES
    assert rows["ports"] == f"1..{p.MAX_PORTS - 1}"
    assert rows["guest frame number"] == f"below 2^{p.MAX_GFN.bit_length() - 1}"
    assert int(rows["reason of an error"].split()[0]) == p.MAX_REASON
