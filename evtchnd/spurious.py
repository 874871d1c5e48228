"""Kicks that bring no work: how long a channel is not heard after them.

A guest that kicks for nothing wakes its server each time (XSA-332). As Xen's own late EOI does
(drivers/xen/events/events_base.c, xen_irq_lateeoi_locked): the first few in a row are free, then the channel is heard
again after a delay that doubles with each of them, and is back to none with a kick that brings work. Two things
differ. Xen's delays are counted in ticks of 1 to 10 ms and grow to a second; a disk of a guest that has such kicks by
mistake would stand still for a second, and so they end at a tenth here. And a domain has one budget however many
channels it has: the delay grows with those that are late now, each has an equal share, up to Xen's second.
"""

from __future__ import annotations

# Kicks in a row that cost nothing. A ring that is armed while its guest pushes has one now and then, since the last
# look takes what the guest kicks for: two to nine of a hundred in checked loads of a disk, and never nine in a row.
FREE = 8
FIRST_S = 0.001
LONGEST_S = 0.1
LONGEST_OF_MANY_S = 1.0
_MOST_DOUBLINGS = 7


def delay_s(in_a_row: int, late: int = 0, *, free: int = FREE) -> float:
    """After `in_a_row` of them, while `late` other channels of the domain are not heard. 0: it is heard at once."""
    beyond = in_a_row - free
    if beyond <= 0:
        return 0.0
    doublings = min(beyond - 1, _MOST_DOUBLINGS)
    return min(min(FIRST_S * (1 << doublings), LONGEST_S) * (1 + late), LONGEST_OF_MANY_S)
