"""Clears single event bits of a shared_info page that others write at the same time: KVM, and the guest's vCPUs.

A guest chooses where the page is, and may move it (`move`).

Setting is KVM's (`XenVm.send`). Clearing takes an atomic and, which Python has only through libatomic.so.1.
"""

from __future__ import annotations

import ctypes

from evtchnd.abi import SHARED_INFO_MASK_32, SHARED_INFO_MASK_64, SHARED_INFO_PENDING
from evtchnd.errors import HostError

_SEQ_CST = 5


class EventBits:
    """Of the page at `address` of this process, which has to stay; 0: there is none. HostError without libatomic."""

    def __init__(self, address: int = 0, *, long_mode: bool) -> None:
        try:
            self._and = ctypes.CDLL("libatomic.so.1")["__atomic_fetch_and_4"]
        except OSError as error:
            raise HostError("libatomic.so.1 is missing: install Debian's libatomic1") from error
        self._and.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int)
        self._and.restype = ctypes.c_uint32
        self.move(address, long_mode=long_mode)

    def move(self, address: int, *, long_mode: bool) -> None:
        """It is another page from now on."""
        self._address = address
        self._pending = address + SHARED_INFO_PENDING
        self._mask = address + (SHARED_INFO_MASK_64 if long_mode else SHARED_INFO_MASK_32)

    def resize(self, *, long_mode: bool) -> None:
        """The same page, laid out for the other width."""
        self.move(self._address, long_mode=long_mode)

    def clear_pending(self, port: int) -> bool:
        """Whether it was pending."""
        return self._clear(self._pending, port)

    def clear_mask(self, port: int) -> bool:
        """Whether it was masked."""
        return self._clear(self._mask, port)

    def _clear(self, words: int, port: int) -> bool:
        if not self._address:
            return False
        bit = 1 << port % 32
        return bool(self._and(words + port // 32 * 4, ~bit & 0xFFFFFFFF, _SEQ_CST) & bit)
