"""xl's disk strings and the numbers of virtual devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.diskspec import DiskSpec, devid_of, parse, vdev_of
from evtchnd.errors import OperatorError

PLAIN = DiskSpec(Path("disk.img"), "xvda", 51712)


@pytest.mark.parametrize(
    "text",
    [
        "format=raw,vdev=xvda,access=rw,target=disk.img",
        "vdev=xvda,target=disk.img",
        "disk.img,raw,xvda,rw",
        "disk.img,raw,xvda,w",
        "disk.img,,xvda",
        " disk.img , raw , xvda , rw ",
        "disk.img,vdev=xvda",
        "vdev=xvda,disk.img,raw,rw",
        "file:disk.img,xvda,w",
        "raw:disk.img,xvda,w",
        "tap:aio:disk.img,xvda,w",
        "phy:disk.img,xvda:disk,w",
        "disk.img,raw,xvda,rw,backendtype=qdisk",
        "disk.img,raw,xvda,rw,backend=0,script=",
        "disk.img,raw,xvda,discard,direct-io-safe",
    ],
)
def test_the_ways_to_say_it(text: str) -> None:
    assert parse(text) == PLAIN


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("disk.img,raw,xvda,ro", {"readonly": True}),
        ("file:disk.img,xvda,r", {"readonly": True}),
        ("disk.img,raw,xvda,cdrom", {"readonly": True, "cdrom": True}),
        ("disk.img,raw,xvda,rw,devtype=cdrom", {"readonly": True, "cdrom": True}),
        ("file:disk.img,xvda:cdrom,r", {"readonly": True, "cdrom": True}),
        ("vdev=xvda,target=a,b=c,rw", {"target": Path("a,b=c,rw")}),
        ("a:b.img,raw,xvda", {"target": Path("a:b.img")}),
        ("disk.img,raw,xvda,no-discard", {"discard": False}),
        ("disk.img,raw,xvda,sector-size=4096,cache=none", {"sector_size": 4096, "direct": True}),
        ("vdev=xvda,sector-size=512,cache=writeback,target=disk.img", {"sector_size": 512}),
    ],
)
def test_what_else_it_may_say(text: str, changes: dict[str, object]) -> None:
    assert parse(text) == DiskSpec(**{**PLAIN.__dict__, **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "vdev is missing"),
        ("disk.img", "vdev is missing"),
        ("target=disk.img,vdev=xvda", "vdev is missing"),  # it belongs to the target
        ("vdev=xvda", "target is missing"),
        (",raw,xvda,rw", "target is missing"),
        ("disk.img,qcow2,xvda", "format qcow2 is not served, only raw is"),
        ("tap:qcow2:disk.img,xvda,w", "format qcow2 is not served"),
        ("vhd:disk.img,xvda,w", "format vhd is not served"),
        ("disk.img,row,xvda", "'row' is no format"),
        ("disk.img,raw,xvda,rx", "'rx' is no access"),
        ("disk.img,raw,xvda,rw,more", "'more' is one word too many"),
        ("disk.img,raw,xvda,rw,speed=9", "'speed' is no key of a disk"),
        ("vdev=xvda,vdev=xvdb,target=a", "vdev is given twice: 'xvda' and 'xvdb'"),
        ("disk.img,raw,xvda,script=block-drbd", "hotplug scripts are not run"),
        ("disk.img,raw,xvda,backend=storage", "backend storage: this daemon serves as domain 0"),
        ("disk.img,raw,xvda,devtype=floppy", "'floppy' is no devtype"),
        ("disk.img,raw,xvda,discard,no-discard", "discard and no-discard are both said"),
        ("vdev=xvda,sector-size=1024,target=d", "'1024' is no sector-size"),
        ("vdev=xvda,cache=writethrough,target=d", "'writethrough' is no cache"),
        ("vdev=xvda,cache=none,cache=none,target=d", "cache is given twice: 'none' and 'none'"),
        ("disk.img,raw,vda", "'vda' is no virtual device"),
        ("a\0b,raw,xvda", "a control character"),
        ("a\nb,raw,xvda", "a control character"),
        ("a\udcffb,raw,xvda", "no UTF-8"),
    ],
)
def test_what_is_refused_says_which_word(text: str, reason: str) -> None:
    with pytest.raises(OperatorError, match=reason.replace("(", r"\(")):
        parse(text)


def test_a_target_is_seen_from_the_clients_folder() -> None:
    assert parse("disk.img,raw,xvda").absolute(Path("/srv")).target == Path("/srv/disk.img")
    assert parse("/a/disk.img,raw,xvda").absolute(Path("/srv")).target == Path("/a/disk.img")


# xen-vbd-interface(7): "Concrete encoding in the VBD interface"; the numbers are those of its tables
@pytest.mark.parametrize(
    ("vdev", "devid"),
    [
        ("xvda", 202 << 8),
        ("xvda1", 202 << 8 | 1),
        ("xvdb", 51728),
        ("xvdp15", 202 << 8 | 15 << 4 | 15),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdz255", 1 << 28 | 25 << 8 | 255),
        ("xvdaa", 1 << 28 | 26 << 8),
        ("xvdba", 1 << 28 | 52 << 8),
        ("sda", 8 << 8),
        ("sdp15", 8 << 8 | 15 << 4 | 15),
        ("hda", 3 << 8),
        ("hdb2", 3 << 8 | 1 << 6 | 2),
        ("hdc", 22 << 8),
        ("hdd63", 22 << 8 | 1 << 6 | 63),
    ],
)
def test_numbers_of_names(vdev: str, devid: int) -> None:
    assert devid_of(vdev) == devid
    assert vdev_of(devid) == vdev


@pytest.mark.parametrize(
    ("vdev", "devid"), [("d0", 51712), ("d0p1", 51713), ("d16", 1 << 28 | 16 << 8), ("51712", 51712), ("0xca00", 51712)]
)
def test_numbers_of_other_names(vdev: str, devid: int) -> None:
    assert devid_of(vdev) == devid


@pytest.mark.parametrize(
    "vdev",
    [
        *("", "xvd", "xvd1", "xvda0", "xvda256", "xvda1000", "hde", "hda64", "sdq", "sda16", "d", "d0p256", "d1048576"),
        *("xvdzzzzz", "-1", "007", "0x", "536870912", "xvdA", "xvda ", "xvda\n", "XVDA", "vda", "\u096b"),
    ],
)
def test_names_that_are_none(vdev: str) -> None:
    with pytest.raises(OperatorError):
        devid_of(vdev)


@given(st.integers(0, (1 << 29) - 1))
def test_a_name_leads_back_to_its_number(devid: int) -> None:
    assert devid_of(vdev_of(devid)) == devid


paths = st.text(min_size=1).filter(lambda s: s.isprintable() and s == s.strip())


@given(
    *(paths, st.integers(0, (1 << 29) - 1), st.booleans(), st.booleans()),
    *(st.booleans(), st.sampled_from([0, 512, 4096]), st.booleans()),
)
def test_the_canonical_string_leads_back(
    path: str, devid: int, readonly: bool, cdrom: bool, discard: bool, sector_size: int, direct: bool
) -> None:
    target = Path("/" + path)
    spec = DiskSpec(target, vdev_of(devid), devid, readonly or cdrom, cdrom, discard, sector_size, direct)
    assert parse(str(spec)) == spec


@given(
    st.text(st.characters(codec="utf-8"))
    | st.lists(st.sampled_from([*"=,: ", "target=", "vdev=xvda", "raw", "file:"])).map("".join)
)
def test_any_text_is_a_disk_or_refused_in_one_line(text: str) -> None:
    try:
        spec = parse(text)
    except OperatorError as exc:
        assert str(exc)
    else:
        assert parse(str(spec)) == spec
