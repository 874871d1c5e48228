"""evtchnd-micro's command line: what it refuses, each in one line, before there is a guest. (Guests: tests/lab.)"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from evtchnd.errors import OperatorError
from evtchnd.vmm import micro
from evtchnd.vmm.guest_words import GuestWords
from evtchnd.vmm.hypercalls import Shutdown, name_of
from evtchnd.vmm.kvm_machine import Io, Mmio
from evtchnd.vmm.legacy_ports import name_of as port_or_page
from evtchnd.vmm.legacy_ports import read, write
from evtchnd.vmm.tally import Tally
from kvmguest import why_no_kvm
from test_kernel_image import pvh_elf


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("512", 512 << 20),
        ("2G", 2 << 30),
        ("65536K", 64 << 20),
        ("1GiB", 1 << 30),
        ("64mb", 64 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert micro.size_of(text) == size


@pytest.mark.parametrize("text", ["", "M", "1T", "-5M", "1M", "4097K", "99999999G", "512 M", "0x10M"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        micro.size_of(text)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    (tmp_path / "kernel").write_bytes(pvh_elf())
    return tmp_path / "kernel"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that it ends with, and that it ends with 1."""
    before = os.listdir("/proc/self/fd")
    assert micro.main([str(word) for word in arguments]) == 1
    assert os.listdir("/proc/self/fd") == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("evtchnd-micro: ")
    return lines[0]


def test_what_is_not_there(kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = tmp_path / "none"
    assert f"kernel {none}: No such file or directory" in said(capsys, "--kernel", none)
    assert f"module {none}: No such file or directory" in said(capsys, "--kernel", kernel, "--initrd", none)
    assert f"module {none}: No such" in said(capsys, "--kernel", kernel, "--module", f"{none} with arguments")
    assert f"disk xvda: {none}: No such" in said(capsys, "--kernel", kernel, "--disk", f"{none},raw,xvda,rw")
    assert "qcow2" in said(capsys, "--kernel", kernel, "--disk", f"{none},qcow2,xvda,rw")
    assert "'brigde' is no key of a vif" in said(capsys, "--kernel", kernel, "--vif", "brigde=br0")
    assert "domid 32752: 1 to 32751" in said(capsys, "--kernel", kernel, "--domid", 0x7FF0)


def test_a_kernel_that_cannot_be_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel"
    for data, reason in (
        (b"no kernel at all", "no kernel: neither an ELF file nor a bzImage"),
        (pvh_elf(note=None), "no PVH entry (Xen's ELF note 18)"),
        (pvh_elf(machine=183), "for another machine (arm64)"),
    ):
        path.write_bytes(data)
        assert said(capsys, "--kernel", path).startswith(f"evtchnd-micro: kernel {path}: {reason}")


def test_no_daemon_or_no_kvm(kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "--kernel", kernel, "--socket", tmp_path / "vmm.sock")
    # in this order: a machine without KVM, one whose KVM knows nothing of Xen, and no daemon
    expected = "/dev/kvm: " if why_no_kvm() or "Xen" in line else f"{tmp_path / 'vmm.sock'}: No such file"
    assert expected in line


@pytest.mark.parametrize(
    "arguments", [[], ["--kernel", "k", "--vcpus", "5"], ["--kernel", "k", "--memory", "x"], ["--kern", "k"]]
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        micro.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: evtchnd-micro")


def test_a_disk_is_opened_as_it_is_asked_for(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(8192))
    image.chmod(0o600)
    for text, cache, flags in (
        (f"{image},raw,xvda,rw", "writeback", os.O_RDWR),
        (f"{image},raw,xvda,ro", "writeback", os.O_RDONLY),
        (f"format=raw,vdev=xvdb,access=ro,devtype=cdrom,target={image}", "writeback", os.O_RDONLY),
    ):
        disk = micro.open_disk(text, cache)
        try:
            info = Path(f"/proc/self/fdinfo/{disk.fd}").read_text()
            opened = int(info.split("flags:")[1].split()[0], 8)
            assert opened & os.O_ACCMODE == flags
            assert opened & os.O_CLOEXEC
            assert not opened & os.O_DIRECT
            assert disk.readonly == (flags == os.O_RDONLY)
        finally:
            os.close(disk.fd)
    try:
        disk = micro.open_disk(f"{image},raw,xvda,rw", "none")
    except OperatorError as error:
        assert "no O_DIRECT there?" in str(error)  # a tmpfs of an older kernel
    else:
        flags = int(Path(f"/proc/self/fdinfo/{disk.fd}").read_text().split("flags:")[1].split()[0], 8)
        os.close(disk.fd)
        assert flags & os.O_DIRECT


@pytest.mark.parametrize(
    ("port", "value", "reason"),
    [
        (0x604, 0x34, Shutdown.POWEROFF),
        (0x604, 0x24, None),  # another sleep state
        (0xCF9, 0x06, Shutdown.REBOOT),
        (0xCF9, 0x02, None),
        (0x64, 0xFE, Shutdown.REBOOT),
        (0x64, 0xD1, None),
        (0x92, 1, Shutdown.REBOOT),
        (0x80, 1, None),
    ],
)
def test_writes_that_end_a_guest(port: int, value: int, reason: Shutdown | None) -> None:
    asked = write(Io(port, 1, value, read=False))
    assert (asked and asked[0]) == reason


def test_reads_of_what_is_not_there() -> None:
    assert [read(Io(port, 1, 0, read=True)) for port in (0x40, 0x61, 0x64, 0x71, 0x3F8, 0xCFC)] == [
        0,
        0x20,
        0,
        0,
        255,
        255,
    ]
    assert read(Mmio(0xFEC00000, 4, 0, read=True)) == 255


def test_a_guest_that_tries_every_port_costs_little() -> None:
    accesses = Tally(most=10)
    for port in range(1000):
        accesses.count(port_or_page(Io(port, 1, 0, read=True)))
        accesses.count(port_or_page(Io(3, 1, 0, read=False)))
    assert len(accesses.counts) == 11
    assert accesses.counts["port 0x3"] == 1001
    assert accesses.counts.total() == 2000
    assert port_or_page(Mmio(0xFEC00123, 4, 0, read=True)) == "address 0xfec00000"


def test_names_of_hypercalls() -> None:
    assert name_of(12, (7 | 5 << 6, 0)) == "memory_op.add_to_physmap"
    assert name_of(32, (4,)) == "event_channel_op.send"
    assert name_of(34, (99,)) == "hvm_op.99"
    assert name_of(13, (1,)) == "multicall"
    assert name_of(55, (1,)) == "hypercall.55"


def words_of(pipe: int) -> bytes:
    """All that is in a pipe."""
    os.set_blocking(pipe, False)
    data = b""
    try:
        while part := os.read(pipe, 1 << 20):
            data += part
    except BlockingIOError:
        pass
    return data


def test_a_guest_that_talks_without_end_waits_for_nobody() -> None:
    """Its first words are there, and how many of them are not."""
    reader, writer = os.pipe()
    try:
        words = GuestWords(writer, rate=1, burst=10_000)
        words.write(b"first words\n")
        words.drain(10)
        assert words_of(reader) == b"first words\n"
        for _ in range(1000):
            words.write(b"x" * 999 + b"\n")
        words.close(10)
        said = words_of(reader)
    finally:
        os.close(reader)
        os.close(writer)
    text, _, notice = said.partition(b"\n[")
    assert text.startswith(b"x" * 999 + b"\n")
    left_out = int(notice.split()[0])
    assert notice == b"%d bytes of the guest's are left out]\n" % left_out
    assert 9000 < len(text) < 11000
    assert len(text) + left_out == 1_000_000


def test_a_reader_that_has_stopped_stalls_no_guest() -> None:
    reader, writer = os.pipe()
    words = GuestWords(writer, rate=1 << 30, burst=1 << 30)
    for _ in range(100):
        words.write(bytes(1 << 16))
    words.close(0.1)
    assert words._thread.is_alive()  # in a write that blocks
    os.close(reader)
    words._thread.join(10)
    assert not words._thread.is_alive()
    words.write(bytes(1 << 20))
    assert len(words._waiting) <= 1 << 19
    os.close(writer)
