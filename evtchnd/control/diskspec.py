"""xl's disk strings (xl-disk-configuration(5)) and virtual device names (xen-vbd-interface(7)).

`format=raw,vdev=xvda,access=rw,target=disk.img`, the positional `disk.img,raw,xvda,rw`, and the old `file:disk.img,xvda,w`.
Also used by the command line: imports nothing but errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from evtchnd.errors import OperatorError


@dataclass(frozen=True)
class DiskSpec:
    """One disk of a domain."""

    target: Path  # file or block device
    vdev: str  # the name that the guest shows: xvda, xvda1, sda, hdc, d3p1
    devid: int  # its number in XenStore, 51712 for xvda
    readonly: bool = False
    cdrom: bool = False

    def absolute(self, folder: Path) -> DiskSpec:
        """The same disk with its target seen from `folder` (the client's current one)."""
        return replace(self, target=folder / self.target)

    def __str__(self) -> str:
        """The canonical string: `parse(str(spec)) == spec`."""
        raise NotImplementedError


def parse(text: str) -> DiskSpec:
    """One disk string. OperatorError with the offending word."""
    raise NotImplementedError


def devid_of(vdev: str) -> int:
    """The device number of a name such as xvda, xvdb2, sda, hdc1, d0p1, or of a plain number. OperatorError."""
    raise NotImplementedError


def vdev_of(devid: int) -> str:
    """The name of a device number, as xvd* where that is possible, else the number itself."""
    raise NotImplementedError


_ = re
