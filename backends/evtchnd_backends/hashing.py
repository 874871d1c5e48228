"""The control ring of a vif: how the guest wants what it receives to be hashed and spread over its queues.

The frontend chooses an algorithm (Toeplitz), the kinds of packets, a key, and a table from hash to queue; each receive
ring has the same key and kinds, and every packet that is hashed carries its hash in an extra.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from evtchnd.errors import GuestError
from evtchnd.grants import GrantTable
from evtchnd.netif import CTRL_REQUEST, CTRL_RESPONSE, Ctrl, CtrlStatus, Hash

# Linux' netback takes as much: XEN_NETBK_MAX_HASH_KEY_SIZE, XEN_NETBK_MAX_HASH_MAPPING_SIZE
MOST_KEY = 40
MOST_MAPPING = 128

NONE, TOEPLITZ = 0, 1
KINDS = int(Hash.IPV4 | Hash.IPV4_TCP | Hash.IPV6 | Hash.IPV6_TCP)


class Hashing:
    """What one frontend has chosen. `queues`: how many it has."""

    def __init__(self, grants: GrantTable, queues: int) -> None:
        self._grants = grants
        self._queues = queues
        self.algorithm = NONE
        self.kinds = 0
        self.key = bytes(MOST_KEY)
        self.mapping: list[int] = []

    @property
    def active(self) -> int:
        """XEN_NETIF_CTRL_HASH_TYPE_* that are hashed; 0: none."""
        return self.kinds if self.algorithm == TOEPLITZ else 0

    def queue(self, value: int) -> int:
        """Where a packet with this hash goes."""
        return self.mapping[value % len(self.mapping)] if self.mapping else value % self._queues

    def params(self) -> dict[str, Any]:
        """Plain values that `restore` understands."""
        return {"algorithm": self.algorithm, "kinds": self.kinds, "key": self.key.hex(), "mapping": self.mapping}

    def restore(self, params: Mapping[str, Any]) -> None:
        """What an earlier worker was told."""
        self.algorithm, self.kinds = params["algorithm"], params["kinds"]
        self.key, self.mapping = bytes.fromhex(params["key"]), list(params["mapping"])

    def answer(self, request: bytes) -> bytes:
        """The response to one request; whatever is wrong in it is in the status."""
        ident, kind, *data = CTRL_REQUEST.unpack(request)
        status, value = self._carry_out(kind, *data)
        return CTRL_RESPONSE.pack(ident, kind, status, value)

    def _carry_out(self, kind: int, first: int, second: int, third: int) -> tuple[CtrlStatus, int]:
        bad = CtrlStatus.INVALID_PARAMETER, 0
        match kind:
            case Ctrl.SET_HASH_ALGORITHM:
                if first not in (NONE, TOEPLITZ):
                    return bad
                self.algorithm = first
            case Ctrl.GET_HASH_FLAGS:
                if self.algorithm == NONE:
                    return CtrlStatus.NOT_SUPPORTED, 0
                return CtrlStatus.SUCCESS, KINDS
            case Ctrl.SET_HASH_FLAGS:
                if first & ~KINDS or self.algorithm == NONE:
                    return bad
                self.kinds = first
            case Ctrl.SET_HASH_KEY:
                if second > MOST_KEY:
                    return CtrlStatus.BUFFER_OVERFLOW, 0
                key = self._read(first, second)
                if key is None:
                    return bad
                self.key = key.ljust(MOST_KEY, b"\0")
            case Ctrl.GET_HASH_MAPPING_SIZE:
                return CtrlStatus.SUCCESS, MOST_MAPPING
            case Ctrl.SET_HASH_MAPPING_SIZE:
                if first > MOST_MAPPING:
                    return bad
                self.mapping = [0] * first
            case Ctrl.SET_HASH_MAPPING:
                if second + third > len(self.mapping):
                    return CtrlStatus.BUFFER_OVERFLOW if second > MOST_MAPPING else bad[0], 0
                table = self._read(first, 4 * second)
                if table is None:
                    return bad
                queues = struct.unpack(f"<{second}I", table)
                if any(queue >= self._queues for queue in queues):
                    return bad
                self.mapping[third : third + second] = queues
            case _:
                return CtrlStatus.NOT_SUPPORTED, 0
        return CtrlStatus.SUCCESS, 0

    def _read(self, gref: int, size: int) -> bytes | None:
        """A copy of the first `size` bytes of a granted page; None: it is not granted."""
        if not size:
            return b""
        try:
            page = self._grants.map(gref, write=False)
        except GuestError:
            return None
        try:
            return bytes(page.view[:size])
        finally:
            page.close()
