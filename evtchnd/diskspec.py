"""xl's disk strings (xl-disk-configuration(5)) and virtual device names (xen-vbd-interface(7)).

`format=raw,vdev=xvda,access=rw,target=disk.img`; positional `disk.img,raw,xvda,rw`; the old `file:disk.img,xvda,w`.

Two keys are evtchnd's own, xl does not know them:
    sector-size=512|4096         the guest's sectors; without it a device's own, and 512 of a file
    cache=writeback|none         writeback: through the host's page cache (the default); none: O_DIRECT
The command line uses this too: it imports nothing but errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from evtchnd.errors import OperatorError

# xen-vbd-interface: the major numbers that Linux' own disks had, and the two encodings of xvd*
_IDE0, _SCSI, _IDE1, _XVD = 3, 8, 22, 202
_EXTENDED = 1 << 28
_DEVID_MAX = (1 << 29) - 1

_ACCESS = {"ro": True, "r": True, "rw": False, "w": False}
# What xl knows and this daemon does not serve gets an answer of its own.
_OTHER_FORMATS = frozenset({"qcow", "qcow2", "vhd", "vhdx", "vmdk", "qed", "vdi"})
_OLD_PREFIX = re.compile(r"(?:tap2?:)?(?:(?P<raw>file|phy|raw|aio)|(?P<other>[a-z0-9]+)):(?=.)")
_FLAGS = frozenset({"cdrom", "direct-io-safe", "discard", "no-discard"})
_KEYS = frozenset(
    {"target", "format", "vdev", "access", "devtype", "backendtype", "backend", "script", "sector-size", "cache"}
)
_SECTOR_SIZES = {"512": 512, "4096": 4096}
_DIRECT = {"none": True, "writeback": False}


@dataclass(frozen=True)
class DiskSpec:
    """One disk of a domain."""

    target: Path  # file or block device
    vdev: str  # the name that the guest shows: xvda, xvda1, sda, hdc, d3p1
    devid: int  # its number in XenStore, 51712 for xvda
    readonly: bool = False
    cdrom: bool = False
    discard: bool = True  # offered where the target can do it
    sector_size: int = 0  # bytes; 0: as the target has them
    direct: bool = False  # cache=none

    def absolute(self, folder: Path) -> DiskSpec:
        """The same disk with its target seen from `folder` (the client's current one)."""
        return replace(self, target=folder / self.target)

    def __str__(self) -> str:
        """The canonical string: `parse(str(spec)) == spec`."""
        flags = ",cdrom" if self.cdrom else ""
        flags += "" if self.discard else ",no-discard"
        flags += f",sector-size={self.sector_size}" if self.sector_size else ""
        flags += ",cache=none" if self.direct else ""
        access = "ro" if self.readonly else "rw"
        return f"format=raw,vdev={self.vdev},access={access}{flags},target={self.target}"


def parse(text: str) -> DiskSpec:
    """One disk string. OperatorError names the offending word.

    `target=` takes the rest of the string, commas too. direct-io-safe, discard and backendtype say what may be done,
    and by whom: accepted, and of no consequence (discard is offered where the target can do it, without `no-discard`).
    """
    said: dict[str, str] = {}
    flags: set[str] = set()
    positions = ["target", "format", "vdev", "access"]
    rest = text.strip()
    if not rest.isprintable():
        # it goes into log lines, XenStore and JSON
        raise OperatorError("a disk string has a control character, or a byte that is no UTF-8")
    while rest:
        if rest.startswith("target="):
            word, rest = rest, ""
        else:
            word, _, rest = rest.partition(",")
            word, rest = word.strip(), rest.lstrip()
        key, equals, value = word.partition("=")
        if word in _FLAGS:
            flags.add(word)
            continue
        if not (equals and key in _KEYS):
            if equals and re.fullmatch(r"[a-z-]+", key) and "target" in said:
                raise OperatorError(f"'{key}' is no key of a disk")
            if not positions:
                raise OperatorError(f"'{word}' is one word too many")
            key, value = positions[0], word
            if key == "target":
                value = _old_prefix(word, said, positions)
        if key in said:
            raise OperatorError(f"{key} is given twice: '{said[key]}' and '{value}'")
        if key in positions:
            positions.remove(key)
        said[key] = value
    return _spec(said, flags)


def _old_prefix(word: str, said: dict[str, str], positions: list[str]) -> str:
    """`file:disk.img` -> `disk.img`; an old string has no word for the format."""
    found = _OLD_PREFIX.match(word)
    if not found:
        return word
    if found["other"] and found["other"] not in _OTHER_FORMATS and not word.startswith("tap"):
        return word  # a file with a colon in its name
    if "format" in positions:
        positions.remove("format")
    said["format"] = found["other"] or "raw"
    return word[found.end() :]


def _spec(said: dict[str, str], flags: set[str]) -> DiskSpec:
    form = said.get("format", "") or "raw"
    if form in _OTHER_FORMATS:
        raise OperatorError(f"format {form} is not served, only raw is (qemu-img convert makes one)")
    if form not in ("raw", "aio"):
        raise OperatorError(f"'{form}' is no format of a disk (raw)")
    if said.get("script"):
        raise OperatorError("script: hotplug scripts are not run; give the device that the script would make")
    if said.get("backend", "0") not in ("0", "Domain-0"):
        raise OperatorError(f"backend {said['backend']}: this daemon serves as domain 0")
    vdev, _, suffix = said.get("vdev", "").partition(":")
    kind = suffix or said.get("devtype", "") or ("cdrom" if "cdrom" in flags else "disk")
    if kind not in ("disk", "cdrom"):
        raise OperatorError(f"'{kind}' is no devtype (disk, cdrom)")
    if not vdev:
        raise OperatorError("vdev is missing (vdev=xvda)")
    access = said.get("access", "") or ("ro" if kind == "cdrom" else "rw")
    if access not in _ACCESS:
        raise OperatorError(f"'{access}' is no access (ro, rw)")
    if not said.get("target"):
        raise OperatorError("target is missing (target=/path/disk.img)")
    if {"discard", "no-discard"} <= flags:
        raise OperatorError("discard and no-discard are both said")
    sector_size = said.get("sector-size", "")
    if sector_size and sector_size not in _SECTOR_SIZES:
        raise OperatorError(f"'{sector_size}' is no sector-size (512, 4096)")
    cache = said.get("cache", "") or "writeback"
    if cache not in _DIRECT:
        raise OperatorError(f"'{cache}' is no cache (writeback, none)")
    return DiskSpec(
        target=Path(said["target"]),
        vdev=vdev,
        devid=devid_of(vdev),
        readonly=_ACCESS[access] or kind == "cdrom",
        cdrom=kind == "cdrom",
        discard="no-discard" not in flags,
        sector_size=_SECTOR_SIZES.get(sector_size, 0),
        direct=_DIRECT[cache],
    )


def devid_of(vdev: str) -> int:
    """The device number of a name such as xvda, xvdb2, sda, hdc1, d0p1, or of a plain number. OperatorError."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|0|[1-9][0-9]{0,9}", vdev):
        number = int(vdev, 0)
        if number > _DEVID_MAX:
            raise OperatorError(f"vdev {vdev} is above {_DEVID_MAX}")
        return number
    name = re.fullmatch(r"(xvd|hd|sd)([a-z]{1,5})([1-9][0-9]{0,2})?", vdev)
    plain = re.fullmatch(r"d([0-9]{1,7})(?:p([0-9]{1,3}))?", vdev)
    if name:
        kind, disk, partition = name[1], _letters_to_number(name[2]), int(name[3] or 0)
    elif plain:
        kind, disk, partition = "xvd", int(plain[1]), int(plain[2] or 0)
    else:
        raise OperatorError(f"'{vdev}' is no virtual device (xvda, sda1, hdc, d0p1, 51712)")
    disks, partitions = {"xvd": (1 << 20, 256), "hd": (4, 64), "sd": (16, 16)}[kind]
    if disk >= disks or partition >= partitions:
        raise OperatorError(f"'{vdev}' is out of range: {kind} has {disks} disks of {partitions - 1} partitions")
    if kind == "hd":
        return (_IDE0 if disk < 2 else _IDE1) << 8 | (disk & 1) << 6 | partition
    if kind == "sd":
        return _SCSI << 8 | disk << 4 | partition
    if disk < 16 and partition < 16:
        return _XVD << 8 | disk << 4 | partition
    return _EXTENDED | disk << 8 | partition


def vdev_of(devid: int) -> str:
    """The name of a device number, `devid_of` backwards; a number that has no name as text."""
    kind, disk, partition = "", 0, 0
    if devid & _EXTENDED:
        kind, disk, partition = "xvd", devid >> 8 & 0xFFFFF, devid & 0xFF
    elif devid >> 8 == _XVD:
        kind, disk, partition = "xvd", devid >> 4 & 0xF, devid & 0xF
    elif devid >> 8 == _SCSI:
        kind, disk, partition = "sd", devid >> 4 & 0xF, devid & 0xF
    elif devid >> 8 in (_IDE0, _IDE1):
        kind, disk, partition = "hd", (devid >> 6 & 3) + (2 if devid >> 8 == _IDE1 else 0), devid & 0x3F
    name = f"{kind}{_number_to_letters(disk)}{partition or ''}"
    try:
        return name if kind and devid_of(name) == devid else str(devid)
    except OperatorError:
        return str(devid)


def _letters_to_number(letters: str) -> int:
    """a -> 0, z -> 25, aa -> 26."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _number_to_letters(number: int) -> str:
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
