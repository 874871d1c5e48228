"""The configuration: layers of files, every fault with its file and key, defaults that hold together."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evtchnd.control import config
from evtchnd.control.config import Config, ConfigError, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "evtchnd.toml"


def faults(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines() == caught.value.faults
    return [line.replace(f"{path.parent}/", "") for line in caught.value.faults]


def dropin(file: Path, name: str, text: str) -> Path:
    folder = Path(f"{file}.d")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    file.write_text("")
    assert load(file) == Config()
    assert Config().vmm_socket == Path("/run/evtchnd/vmm.sock")
    assert Config().control_socket == Path("/run/evtchnd/control.sock")
    assert Config().xenstore_socket == Path("/run/evtchnd/xenstored.sock")


def test_every_default_is_within_its_own_limits() -> None:
    """Defaults are not validated when a Struct is made."""
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config()


def test_every_number_says_why_it_is_what_it_is() -> None:
    source = Path(config.__file__).read_text()
    for struct in (config.Limits, config.Poll, config.Vbd):
        body = source.split(f"class {struct.__name__}(", 1)[1].split("\nclass ", 1)[0].splitlines()
        for name in struct.__struct_fields__:
            line = next(i for i, text in enumerate(body) if text.startswith(f"    {name}: "))
            above = list(itertools.takewhile(lambda text: text.strip(), reversed(body[:line])))
            # two that belong together may share a reason
            assert any(text.strip().startswith("#") for text in above), f"{struct.__name__}.{name} has no reason"


def test_dropins_lie_over_the_file_key_by_key_in_the_order_of_names(file: Path) -> None:
    file.write_text("log_level='debug'\n[limits]\ndomains=7\ndisks=8\n[[domains]]\ndomid=1\n")
    dropin(file, "20-b.toml", "[limits]\ndisks=10\n[[domains]]\ndomid=3\n")
    dropin(file, "10-a.toml", "[limits]\ndisks=9\n[poll]\nmax_us=0\n[[domains]]\ndomid=2\n")
    dropin(file, "30-c.conf", "no toml at all")
    got = load(file)
    assert (got.log_level, got.limits.domains, got.limits.disks, got.poll.max_us) == ("debug", 7, 10, 0)
    assert [domain.domid for domain in got.domains] == [1, 2, 3]


def test_each_fault_names_the_file_that_said_it(file: Path) -> None:
    file.write_text("foo=1\n[vbd]\nmax_ring_page_order=9\n")
    dropin(file, "a.toml", "[vbd]\nbar=2\n[limits]\nhello_s='soon'\n[[domains]]\ndomid=0\n")
    dropin(file, "b.toml", "[[domains]]\ndomid=5\nfoo=1\n[[domains]]\ndisks=[1]\n")
    assert sorted(faults(file)) == [
        "evtchnd.toml.d/a.toml:domains[0].domid: expected int >= 1",
        "evtchnd.toml.d/a.toml:limits.hello_s: expected float, got str",
        "evtchnd.toml.d/a.toml:vbd.bar: no such key",
        "evtchnd.toml.d/b.toml:domains[0].foo: no such key",
        "evtchnd.toml.d/b.toml:domains[1].disks[0]: expected str, got int",
        "evtchnd.toml:foo: no such key",
        "evtchnd.toml:vbd.max_ring_page_order: expected int <= 4",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("runtime_dir=3", "evtchnd.toml:runtime_dir: expected str, got int"),
        ("runtime_dir='run'", "evtchnd.toml:runtime_dir: must be an absolute path"),
        ("vbd=1", "evtchnd.toml:vbd: expected object, got int"),
        ("domains=1", "evtchnd.toml:domains: expected array, got int"),
        ("domains=[1]", "evtchnd.toml:domains[0]: expected object, got int"),
        ("log_level='loud'", "evtchnd.toml:log_level: invalid enum value 'loud'"),
        ("[vbd]\nengine='aio'", "evtchnd.toml:vbd.engine: invalid enum value 'aio'"),
        ("[vbd]\nmax_indirect_segments=11", "11 fit without indirection"),
        ("[vbd]\nmax_indirect_segments=4097", "evtchnd.toml:vbd.max_indirect_segments: expected int <= 4096"),
        ("[vbd]\nmax_queues=0", "evtchnd.toml:vbd.max_queues: expected int >= 1"),
        ("[vbd]\nmax_queues=5", "vbd.max_queues: rings of 16 pages (vbd.max_ring_page_order) leave room for 4"),
        ("[limits]\nrestart_pause_s=60", "evtchnd.toml:limits.restart_pause_s: above limits.restart_pause_max_s (30)"),
        ("[limits]\ndomains=true", "evtchnd.toml:limits.domains: expected int, got bool"),
        ("'a.b'=1", "evtchnd.toml:a.b: no such key"),
        ("[[domains]]\ndomid=1\nxenstore={nodes=0}", "evtchnd.toml:domains[0].xenstore.nodes: expected int >= 1"),
        ("[[domains]]\ndomid=1\nxenstore={node=5}", "evtchnd.toml:domains[0].xenstore.node: no such key"),
        (
            "[[domains]]\ndomid=1\nxenstore={unread_s=5}",
            "evtchnd.toml:domains[0].xenstore.unread_s: is the same for all",
        ),
        ("[[domains]]\ndomid=32752", "evtchnd.toml:domains[0].domid: expected int <= 32751"),
        ("[[domains]]\ndomid=1\n[[domains]]\ndomid=1", "domains[1].domid: domain 1 has an entry already"),
        (
            "[[domains]]\ndomid=1\ndisks=['/a,raw,xvda,rw', 'b,raw,xvdb,rw']",
            "evtchnd.toml:domains[0].disks[1]: target 'b' must be an absolute path",
        ),
        ("[[domains]]\nname='x'", "domains[0].name: no such key"),
        ("[[domains]]\ndisks=[]", "evtchnd.toml:domains[0]: key domid is missing"),
        ("[[domains]]\ndomid=1\ndisks=['/a,raw']", "domains[0].disks[0]: vdev is missing (vdev=xvda)"),
        (
            "[[domains]]\ndomid=1\ndisks=['/a,raw,xvda', '/b,raw,51712']",
            "domains[0].disks[1]: vdev 51712 is taken by disks[0]",
        ),
        ("[[domains]]\ndomid=1\nvifs=['bridge=br0', 'brigde=br1']", "domains[0].vifs[1]: 'brigde' is no key of a vif"),
        ("[[domains]]\ndomid=1\nvifs=['devid=1', '']", "domains[0].vifs[1]: devid 1 is taken by vifs[0]"),
        ("[vif]\nmax_queues=0", "vif.max_queues: expected int >= 1"),
        ("a=1\nb=\n", "evtchnd.toml:2: Invalid value"),
        ("a='\n", "evtchnd.toml:1: "),
    ],
)
def test_a_fault_is_one_line_with_file_key_and_reason(file: Path, text: str, fault: str) -> None:
    file.write_text(text)
    (line,) = faults(file)
    assert fault in line
    assert re.match(r"evtchnd\.toml:[^:]+: .+", line)


def test_a_file_that_cannot_be_read_is_named(file: Path) -> None:
    assert faults(file) == ["evtchnd.toml: No such file or directory"]
    file.write_bytes(b"log_level='\xff'")
    assert faults(file) == ["evtchnd.toml: byte 11 is no UTF-8"]


def test_a_wall_of_faults_ends(file: Path) -> None:
    file.write_text("".join(f"k{number}=1\n" for number in range(1000)))
    assert len(faults(file)) == 20


def test_vifs_of_a_domain_have_the_numbers_of_their_places(file: Path) -> None:
    file.write_text("[[domains]]\ndomid=7\nvifs=['bridge=br0', 'devid=5,rate=1MB/s', '']\n")
    assert [(spec.devid, spec.bridge) for spec in load(file).domains[0].vif_specs] == [
        *((0, "br0"), (5, "xenbr0"), (2, "xenbr0")),
    ]


def test_disks_of_a_domain_are_read(file: Path) -> None:
    file.write_text("[[domains]]\ndomid=7\ndisks=['vdev=xvda,target=/srv/a,b.img', 'phy:/dev/sdz,xvdb,r']\n")
    first, second = load(file).domains[0].disk_specs
    assert (first.target, first.devid, first.readonly) == (Path("/srv/a,b.img"), 51712, False)
    assert (second.target, second.devid, second.readonly) == (Path("/dev/sdz"), 51728, True)


def test_the_command_line_goes_last() -> None:
    changed = config.replace(Config(), runtime_dir="/tmp/x", single_process=True)
    assert (changed.runtime_dir, changed.single_process, changed.limits) == ("/tmp/x", True, config.Limits())


values = st.recursive(
    st.booleans()
    | st.integers(-5, 2**40)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="ascii"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["domid", "disks", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    ["runtime_dir", "limits", "poll", "vbd", "domains", "nodes", "max_us", "engine", "hello_s", "x", "a.b"]
)
tables = st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=4), max_size=5)


@given(tables)
def test_whatever_a_file_says_ends_as_a_config_or_as_faults(tree: dict[str, object]) -> None:
    merged: dict[str, object] = {}
    origins = config._Origins()
    config._lay_over(merged, tree, origins, "f")
    got, wrong = config._convert(merged)
    assert isinstance(got, Config)
    for key, reason in [*wrong, *config._cross_checks(got)]:
        assert key and reason and "\n" not in reason
        assert origins.name(key).startswith("f:"), key


def test_quotas_of_one_domain(file: Path) -> None:
    file.write_text("[xenstore]\nwatches=7\n[[domains]]\ndomid=1\nxenstore={nodes=5}\n[[domains]]\ndomid=2\n")
    config = load(file)
    own = config.xenstore_of(1)
    assert own is not None
    assert (own.nodes, own.watches, own.transactions) == (5, 7, 10)
    assert (config.xenstore_of(2), config.xenstore_of(3)) == (None, None)
