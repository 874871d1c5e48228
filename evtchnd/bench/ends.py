"""A connected block ring as a C frontend takes it over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ends:
    """Descriptors of the RAM's memfd and the two eventfds; byte offsets in the RAM; first grants of rows of pages."""

    ram: int
    kick: int
    notify: int
    ring_offset: int
    indirect_offset: int
    gref: int
    indirect_gref: int
