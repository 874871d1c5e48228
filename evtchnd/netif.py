"""netif's words that both ends share: flags, statuses, extras, slots (xen/include/public/io/netif.h).

tx request   u32 gref | u16 offset | u16 flags | u16 id | u16 size      12 bytes; response u16 id | s16 status
rx request   u16 id | u16 pad | u32 gref                                 8 bytes
rx response  u16 id | u16 offset | u16 flags | s16 status                8 bytes
extra        u8 type | u8 flags | 6 bytes by type                        over a tx request or an rx response
ctrl request u16 id | u16 type | u32 data[3]                            16 bytes
ctrl response u16 id | u16 type | u32 status | u32 data                 12 bytes
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from evtchnd.errors import GuestError

TX_REQUEST = struct.Struct("<IHHHH")
TX_RESPONSE = struct.Struct("<Hh")
RX_REQUEST = struct.Struct("<HHI")
RX_RESPONSE = struct.Struct("<HHHh")
EXTRA = struct.Struct("<BB6s")
EXTRA_GSO = struct.Struct("<BBHBBH")
CTRL_REQUEST = struct.Struct("<HHIII")
CTRL_RESPONSE = struct.Struct("<HHII")

TX_SLOTS_AFTER_HEAD = 18
"""XEN_NETIF_NR_SLOTS_MIN: what every backend takes."""
MOST_FRAME = 65535 + 14 + 8
"""An IP packet, its Ethernet header and two VLAN tags."""
MOST_SNAP = 262144
"""Bytes of a frame in a capture: as tcpdump, and more than any has."""


class TxFlag(IntFlag):
    """NETTXF_*."""

    CSUM_BLANK = 1
    DATA_VALIDATED = 2
    MORE_DATA = 4
    EXTRA_INFO = 8


class RxFlag(IntFlag):
    """NETRXF_*."""

    DATA_VALIDATED = 1
    CSUM_BLANK = 2
    MORE_DATA = 4
    EXTRA_INFO = 8


class Extra(IntEnum):
    """XEN_NETIF_EXTRA_TYPE_*; XDP is Linux' (include/xen/interface/io/netif.h)."""

    GSO = 1
    MCAST_ADD = 2
    MCAST_DEL = 3
    HASH = 4
    XDP = 5


EXTRA_MORE = 1


class Gso(IntEnum):
    """XEN_NETIF_GSO_TYPE_*."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 2


class Status(IntEnum):
    """NETIF_RSP_*."""

    DROPPED = -2
    ERROR = -1
    OKAY = 0
    NULL = 1


class Ctrl(IntEnum):
    """XEN_NETIF_CTRL_TYPE_*."""

    GET_HASH_FLAGS = 1
    SET_HASH_FLAGS = 2
    SET_HASH_KEY = 3
    GET_HASH_MAPPING_SIZE = 4
    SET_HASH_MAPPING_SIZE = 5
    SET_HASH_MAPPING = 6
    SET_HASH_ALGORITHM = 7


class CtrlStatus(IntEnum):
    """XEN_NETIF_CTRL_STATUS_*."""

    SUCCESS = 0
    NOT_SUPPORTED = 1
    INVALID_PARAMETER = 2
    BUFFER_OVERFLOW = 3


class Hash(IntFlag):
    """XEN_NETIF_CTRL_HASH_TYPE_*."""

    IPV4 = 1
    IPV4_TCP = 2
    IPV6 = 4
    IPV6_TCP = 8


def parse_mac(text: str) -> bytes:
    """6 bytes of "00:16:3e:01:02:03". GuestError."""
    parts = text.split(":")
    try:
        if len(parts) != 6 or any(len(part) != 2 for part in parts):
            raise ValueError
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise GuestError(f"mac: {text[:32]!r} is no address") from None
