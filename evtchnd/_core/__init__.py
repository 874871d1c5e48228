"""The compiled words: fence, compare-and-swap, grants and batches of requests. Mechanism only, policy stays outside.

One source: the modules here are Cython's pure-Python mode. setup.py compiles them where a C compiler is; elsewhere they
run as they are, about five times slower. `EVTCHND_PURE=1` takes the Python form although the compiled one is there.

words: Mem, Area (raw words) | frames: guest frame -> address | pins: grants | req, blk: blkif batches
answered: a netif ring's page | nettx, netrx, rxslots: netif packets, each with one writev or readv of a TAP
toeplitz: a packet's hash | framelog: copies of packets for a capture
nodes: XenStore's nodes and the map that holds them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType


class _SourceOnly:
    """Finds this package's modules as source, past the compiled ones next to it."""

    _finder = FileFinder(str(Path(__file__).parent), (SourceFileLoader, SOURCE_SUFFIXES))

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(__name__ + "."):
            return cls._finder.find_spec(fullname)
        return None


if os.environ.get("EVTCHND_PURE", "0") not in ("", "0"):
    sys.meta_path.insert(0, _SourceOnly)

from evtchnd._core.blk import BlkRing  # noqa: E402
from evtchnd._core.framelog import FrameLog  # noqa: E402
from evtchnd._core.netrx import RxRing  # noqa: E402
from evtchnd._core.nettx import TxRing  # noqa: E402
from evtchnd._core.req import Req  # noqa: E402
from evtchnd._core.words import COMPILED, Area, Mem, full_fence  # noqa: E402

__all__ = ["COMPILED", "Area", "BlkRing", "FrameLog", "Mem", "Req", "RxRing", "TxRing", "full_fence"]
