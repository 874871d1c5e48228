# cython: boundscheck=False, wraparound=False, annotation_typing=False
"""Toeplitz' hash of a packet's addresses and ports, as a guest asks for it on netif's control ring (io/netif.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

from evtchnd._core.words import Mem

if not cython.compiled:
    from evtchnd._core.words import copy, get8, put8, u32

COMPILED: bool = bool(cython.compiled)

# Numbers in the code are C constants: XEN_NETIF_CTRL_HASH_TYPE_IPV4 1, _IPV4_TCP 2, _IPV6 4, _IPV6_TCP 8; the types are
# the bits' numbers. A key has 40 bytes; `key` has zeros behind, since the window runs past what is hashed by a byte.


class Toeplitz:
    """kinds: XEN_NETIF_CTRL_HASH_TYPE_* bits of the packets that are hashed, 0: none | value: of the last one"""

    if TYPE_CHECKING:
        kinds: int
        value: int

    def __init__(self) -> None:
        self.kinds = 0
        self.value = 0
        self.key = Mem(bytearray(48))
        self.tuple = Mem(bytearray(40))

    def set_key(self, key: Any) -> None:
        """At most 40 bytes."""
        for i in range(48):
            put8(self.key.p, i, key[i] if i < len(key) else 0)

    def hash(self, p: Any, frame: int, length: int) -> int:
        """Of the Ethernet frame at `p` + `frame`; -> the hash's type, -1: it has none.

        Over addresses; and ports where it is TCP, no fragment, and TCP is asked for.
        """
        kinds = self.kinds
        ethertype = get8(p, frame + 12) << 8 | get8(p, frame + 13)
        if ethertype == 0x0800 and length >= 34 and kinds & 3:
            tcp = get8(p, frame + 23) == 6 and not (get8(p, frame + 20) & 0x3F or get8(p, frame + 21))
            copy(self.tuple.p, 0, p, frame + 26, 8)
            n = 8
            ports = frame + 14 + ((get8(p, frame + 14) & 15) << 2)
            kind = 0
        elif ethertype == 0x86DD and length >= 54 and kinds & 12:
            tcp = get8(p, frame + 20) == 6
            copy(self.tuple.p, 0, p, frame + 22, 32)
            n = 32
            ports = frame + 54
            kind = 2
        else:
            return -1
        if tcp and kinds >> (kind + 1) & 1:
            copy(self.tuple.p, n, p, ports, 4)
            n += 4
            kind += 1
        elif not kinds >> kind & 1:
            return -1
        self.slide(n)
        return kind

    def slide(self, n: int) -> int:
        """The hash of the first `n` bytes of `tuple`: a window of 32 bits slides over the key, a bit a bit."""
        value = 0
        window = 0
        for i in range(5):
            window = window << 8 | get8(self.key.p, i)
        for i in range(n):
            byte = get8(self.tuple.p, i)
            for bit in range(8):
                if byte >> (7 - bit) & 1:
                    value ^= u32(window >> (8 - bit))
            low = u32(window)
            window = low << 8 | get8(self.key.p, 5 + i)
        self.value = value
        return 0
