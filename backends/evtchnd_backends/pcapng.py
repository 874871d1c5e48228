"""pcapng's blocks that frame a capture (draft-ietf-opsawg-pcapng): a section, its one interface, what became of it.

    block    u32 type, length | body | u32 length      a multiple of 4 bytes, in this host's order (SHB's magic tells)
    option   u16 code, length | value, filled up to 4 bytes; code 0 ends them

The packets' blocks are written where the packets are (evtchnd/_core/framelog.py).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

SECTION, INTERFACE, STATISTICS = 0x0A0D0D0A, 1, 5
_MAGIC, _VERSION, _NO_LENGTH = 0x1A2B3C4D, (1, 0), -1
LINKTYPE_ETHERNET = 1
_SHB_USERAPPL = 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_NANOSECONDS = b"\x09"  # 10^-9 s
_ISB_STARTTIME, _ISB_ENDTIME, _ISB_IFRECV, _ISB_IFDROP, _ISB_USRDELIV = 2, 3, 4, 5, 8


def section(application: str) -> bytes:
    """Begins a file, or a part of one that knows nothing of what is before it. `application`: who writes it."""
    body = struct.pack("=IHHq", _MAGIC, *_VERSION, _NO_LENGTH)
    return _block(SECTION, body, {_SHB_USERAPPL: application.encode()})


def interface(name: str, description: str, snap: int) -> bytes:
    """The section's interface 0, Ethernet, its times in nanoseconds; `snap`: the most that is kept of a frame."""
    body = struct.pack("=HxxI", LINKTYPE_ETHERNET, snap)
    options = {_IF_NAME: name.encode(), _IF_DESCRIPTION: description.encode(), _IF_TSRESOL: _NANOSECONDS}
    return _block(INTERFACE, body, options)


def statistics(began: int, ended: int, *, frames: int, dropped: int) -> bytes:
    """What became of interface 0: frames in the section, and those that found no room. Times in ns since 1970."""
    counted = {_ISB_IFRECV: frames + dropped, _ISB_IFDROP: dropped, _ISB_USRDELIV: frames}
    options = {_ISB_STARTTIME: _time(began), _ISB_ENDTIME: _time(ended)}
    options |= {code: struct.pack("=Q", count) for code, count in counted.items()}
    return _block(STATISTICS, struct.pack("=I", 0) + _time(ended), options)


def _time(ns: int) -> bytes:
    return struct.pack("=II", ns >> 32, ns & 0xFFFFFFFF)


def _block(kind: int, body: bytes, options: Mapping[int, bytes]) -> bytes:
    for code, value in options.items():
        body += struct.pack("=HH", code, len(value)) + value + bytes(-len(value) & 3)
    body += bytes(4)
    length = struct.pack("=I", 12 + len(body))
    return struct.pack("=I", kind) + length + body + length
