"""Frames for a soft guest: made, and checked to the last byte. Ethernet, IPv4, IPv6, UDP, ICMP echo, ARP; no options.

Every payload says which frame it is of: a number, then bytes that follow from it, so that what was cut, mixed or
repeated is seen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from evtchnd.guest.domain import GuestFault

ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
TCP = 6
UDP = 17

_ETHERNET = struct.Struct("!6s6sH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_NUMBER = struct.Struct("!Q")
HEADERS4 = _ETHERNET.size + _IPV4.size + _UDP.size


@dataclass(frozen=True)
class Way:
    """From one end to the other: 6 bytes of MAC, 4 or 16 of address, a UDP port each."""

    mac: bytes
    peer_mac: bytes
    address: bytes
    peer: bytes
    port: int = 7000
    peer_port: int = 7001

    def back(self) -> Way:
        """The other direction."""
        return Way(self.peer_mac, self.mac, self.peer, self.address, self.peer_port, self.port)


def checksum(data: bytes, start: int = 0) -> int:
    """RFC 1071's sum, not inverted, folded to 16 bits."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def payload(number: int, size: int) -> bytes:
    """`size` (at least 8) bytes that say they are frame `number`'s."""
    unit = _NUMBER.pack((number * 0x9E3779B97F4A7C15 + 1) & 0xFFFFFFFFFFFFFFFF)
    return (_NUMBER.pack(number) + unit * (size // 8))[:size]


def check_payload(data: bytes) -> int:
    """Whose payload it is. GuestFault: it is not what `payload` made."""
    if len(data) < 8:
        raise GuestFault(f"a payload of {len(data)} bytes")
    (number,) = _NUMBER.unpack_from(data)
    if data != payload(number, len(data)):
        raise GuestFault(f"frame {number}: its {len(data)} bytes are not those that were sent")
    return int(number)


def pseudo(source: bytes, destination: bytes, proto: int, size: int) -> int:
    """The sum over the pseudo-header, IPv4's or IPv6's."""
    return checksum(source + destination + struct.pack("!II", size, proto))


def ip(way: Way, proto: int, body: bytes, *, ident: int = 0) -> bytes:
    """An Ethernet frame with an IP packet around `body`."""
    if len(way.address) == 4:
        head = _IPV4.pack(0x45, 0, 20 + len(body), ident, 0, 64, proto, 0, way.address, way.peer)
        head = head[:10] + struct.pack("!H", 0xFFFF ^ checksum(head)) + head[12:]
        kind = ETH_P_IP
    else:
        head = _IPV6.pack(6 << 28, len(body), proto, 64, way.address, way.peer)
        kind = ETH_P_IPV6
    return _ETHERNET.pack(way.peer_mac, way.mac, kind) + head + body


def udp(way: Way, data: bytes, *, blank: bool = False) -> bytes:
    """A UDP datagram; `blank`: its checksum is the pseudo-header's only, as NETTXF_csum_blank has it."""
    size = _UDP.size + len(data)
    begin = pseudo(way.address, way.peer, UDP, size)
    head = _UDP.pack(way.port, way.peer_port, size, 0)
    value = begin if blank else 0xFFFF ^ checksum(head + data, begin) or 0xFFFF
    return ip(way, UDP, head[:6] + struct.pack("!H", value) + data)


def arp_reply(request: bytes, mac: bytes) -> bytes:
    """The answer to an ARP request for whoever has `mac`."""
    sender, sender_ip, asked = request[22:28], request[28:32], request[38:42]
    head = _ETHERNET.pack(sender, mac, ETH_P_ARP) + request[14:20] + struct.pack("!H", 2)
    return head + mac + asked + sender + sender_ip


def udp_data(frame: bytes, *, blank: bool) -> bytes:
    """A UDP frame's data. GuestFault: a length or a checksum is wrong (`blank`: it must be the pseudo-header's)."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == ETH_P_IP:
        size, proto = int.from_bytes(frame[16:18], "big") - 20, frame[23]
        if checksum(frame[14:34]) != 0xFFFF:
            raise GuestFault("IPv4's own checksum is wrong")
        source, destination, body = frame[26:30], frame[30:34], frame[34:]
    elif kind == ETH_P_IPV6:
        size, proto = int.from_bytes(frame[18:20], "big"), frame[20]
        source, destination, body = frame[22:38], frame[38:54], frame[54:]
    else:
        raise GuestFault(f"no IP: {kind:#x}")
    if proto != UDP or size > len(body) or int.from_bytes(body[4:6], "big") != size:
        raise GuestFault(f"no UDP datagram of {size} bytes in {len(frame)}")
    body = body[:size]
    begin = pseudo(source, destination, UDP, size)
    if blank:
        if int.from_bytes(body[6:8], "big") != begin:
            raise GuestFault("a blank checksum is not the pseudo-header's")
    elif checksum(body, begin) != 0xFFFF:
        raise GuestFault("UDP's checksum is wrong")
    return body[8:]
