"""The 2-level event bits in a guest's shared_info page, as a hypervisor sets them.

    struct shared_info {                                64-bit guest      32-bit guest
        struct vcpu_info {                              64 bytes each, 32 of them
            uint8_t  evtchn_upcall_pending;             +0                +0
            uint8_t  evtchn_upcall_mask;                +1                +1
            unsigned long evtchn_pending_sel;           +8                +4
            ...
        } vcpu_info[32];
        unsigned long evtchn_pending[bits in a long];   @2048, 512 bytes  @2048, 128 bytes
        unsigned long evtchn_mask[bits in a long];      @2560             @2176
        ...

One word at a time, by plain loads and stores: for a VMM whose guest runs under the VMM's own lock. A guest on real
vCPUs changes these words at any time, and there KVM sets them (KVM_XEN_HVM_EVTCHN_SEND).
Source: xen/include/public/xen.h, arch-x86/xen.h; order of the steps: xen/common/event_2l.c.
"""

from __future__ import annotations

from evtchnd.abi import (
    PAGE_SIZE,
    SHARED_INFO_MASK_32,
    SHARED_INFO_MASK_64,
    SHARED_INFO_PENDING,
    SHARED_INFO_VCPUS,
    VCPU_INFO_PENDING_SEL_32,
    VCPU_INFO_PENDING_SEL_64,
    VCPU_INFO_SIZE,
    VCPU_INFO_UPCALL_PENDING,
)


class SharedInfo:
    """The event bits of one page, a writable view of 4096 bytes that is released by `close`. ValueError."""

    def __init__(self, page: memoryview, *, vcpus: int, long_mode: bool = True) -> None:
        if len(page) != PAGE_SIZE:
            raise ValueError(f"shared_info has {PAGE_SIZE} bytes, not {len(page)}")
        if not 0 < vcpus <= SHARED_INFO_VCPUS:
            raise ValueError(f"{vcpus} vCPUs: shared_info has room for {SHARED_INFO_VCPUS}")
        self._bytes = page
        self._vcpus = vcpus
        size = 8 if long_mode else 4
        self._words = page.cast("Q" if long_mode else "I")
        self._bits = size * 8
        self._pending = SHARED_INFO_PENDING // size
        self._mask = (SHARED_INFO_MASK_64 if long_mode else SHARED_INFO_MASK_32) // size
        self._sel = (VCPU_INFO_PENDING_SEL_64 if long_mode else VCPU_INFO_PENDING_SEL_32) // size
        self._vcpu = VCPU_INFO_SIZE // size

    def wipe(self) -> None:
        """As a guest finds it: zeros, nothing pending, nothing masked."""
        for i in range(len(self._words)):
            self._words[i] = 0

    def set_pending(self, port: int, vcpu: int) -> bool:
        """Raises `port`; True: `vcpu` has to be told (its upcall was not pending yet).

        The order is the contract: pending, mask, selector, upcall.
        """
        if not self._set(self._pending + port // self._bits, port % self._bits):
            return False
        return not self.masked(port) and self._select(port, vcpu)

    def unmask(self, port: int, vcpu: int) -> bool:
        """EVTCHNOP_unmask; True: `vcpu` has to be told."""
        if not self._clear(self._mask + port // self._bits, port % self._bits):
            return False
        return self.pending(port) and self._select(port, vcpu)

    def mask(self, port: int) -> None:
        self._set(self._mask + port // self._bits, port % self._bits)

    def masked(self, port: int) -> bool:
        return bool(self._words[self._mask + port // self._bits] >> port % self._bits & 1)

    def pending(self, port: int) -> bool:
        return bool(self._words[self._pending + port // self._bits] >> port % self._bits & 1)

    def clear(self, port: int) -> bool:
        """Clears the pending bit; whether it was set. Selector and upcall stay, as when Xen frees a port."""
        return self._clear(self._pending + port // self._bits, port % self._bits)

    def take(self, port: int) -> bool:
        """What a guest's handler does: clears the pending bit, and what pointed at it when it was the last."""
        if not self.clear(port):
            return False
        word = port // self._bits
        if not self._words[self._pending + word] & ~self._words[self._mask + word]:
            for vcpu in range(self._vcpus):
                sel = vcpu * self._vcpu + self._sel
                self._clear(sel, word)
                if not self._words[sel]:
                    self._bytes[vcpu * VCPU_INFO_SIZE + VCPU_INFO_UPCALL_PENDING] = 0
        return True

    def upcall_pending(self, vcpu: int) -> bool:
        return bool(self._bytes[vcpu * VCPU_INFO_SIZE + VCPU_INFO_UPCALL_PENDING])

    def close(self) -> None:
        """Lets go of the page. Can be called twice."""
        self._words.release()
        self._bytes.release()

    def _select(self, port: int, vcpu: int) -> bool:
        if not self._set(vcpu * self._vcpu + self._sel, port // self._bits):
            return False
        upcall = vcpu * VCPU_INFO_SIZE + VCPU_INFO_UPCALL_PENDING
        told = self._bytes[upcall]
        self._bytes[upcall] = 1
        return not told

    def _set(self, word: int, bit: int) -> bool:
        """Whether it was clear."""
        old = self._words[word]
        self._words[word] = old | 1 << bit
        return not old >> bit & 1

    def _clear(self, word: int, bit: int) -> bool:
        """Whether it was set."""
        old = self._words[word]
        self._words[word] = old & ~(1 << bit)
        return bool(old >> bit & 1)
