"""Where a guest has its shared_info: in a page of its RAM, which it names and may change, in a hole, or nowhere.

Linux and GRUB give it a page of their own, the PV shim a frame that was nothing's. A vCPU that has registered no
vcpu_info of its own has the one in that page.
"""

from __future__ import annotations

import errno
from collections.abc import Container

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE, SHARED_INFO_PENDING, SHARED_INFO_VCPUS, VCPU_INFO_SIZE
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.kvm import INVALID_GFN, XenVm
from evtchnd.vmm.kvm_kernel import KvmKernel
from evtchnd.vmm.physmap import Memory, Physmap, Slot


class SharedInfoPage:
    """Of one domain. `registered`: vCPUs that have a vcpu_info elsewhere; `spare`: a page for a frame without RAM."""

    def __init__(
        self,
        xen: XenVm,
        kernel: KvmKernel,
        bits: EventBits,
        channels: Channels,
        physmap: Physmap,
        ram: Memory,
        vcpus: int,
        registered: Container[int],
        spare: Memory,
    ) -> None:
        self._xen, self._kernel, self._bits, self._channels = xen, kernel, bits, channels
        self._physmap, self._ram, self._vcpus, self._registered = physmap, ram, vcpus, registered
        self._spare = spare
        self._gfn: int | None = None
        self._page: tuple[Memory, int] | None = None  # where the frame is
        self._slot: Slot | None = None  # of `spare`

    def place(self, gfn: int | None) -> int:
        """The page is at `gfn`; what it held is there too. None: nowhere. 0 or a negated error number."""
        with self._channels.lock:
            if gfn is None:
                self.forget()
                return 0
            if gfn == self._gfn:
                return 0
            found = self._physmap.find(gfn)
            if found is not None and found[0] is not self._ram:
                return -errno.EINVAL
            old, content = self._page, bytes(PAGE_SIZE)
            if old is not None:
                content = bytes(old[0].view[old[1] : old[1] + PAGE_SIZE])
            if found is None:
                found = self._in_a_hole(gfn)
            memory, at = self._page = found
            if found != old:
                memory.view[at : at + PAGE_SIZE] = content
            self._channels.ports.long_mode = long_mode = self._xen.long_mode()
            self._bits.move(memory.address + at, long_mode=long_mode)
            self._xen.set_shared_info(gfn)
            self._gfn = gfn
            if memory is not self._spare:
                self._fill_hole()
            for n in range(min(self._vcpus, SHARED_INFO_VCPUS)):
                if n not in self._registered:
                    self._kernel.register(n, (gfn << PAGE_SHIFT) + n * VCPU_INFO_SIZE)
            if old is not None:
                self._raise_late(old, content)
            self._kernel.listen(True)
        return 0

    def _in_a_hole(self, gfn: int) -> tuple[Memory, int]:
        """The spare page becomes the frame; where it is another frame, shared_info is nowhere for a moment."""
        if self._slot is not None:
            self._xen.set_shared_info(INVALID_GFN)
        self._fill_hole()
        self._slot = self._physmap.add(gfn, 1, self._spare)
        return self._spare, 0

    def _fill_hole(self) -> None:
        if self._slot is not None:
            self._physmap.remove(self._slot)
            self._slot = None

    def latch(self, long_mode: bool) -> None:
        """It has the layout of a guest of that width from now on (Xen's hvm_latch_shinfo_size)."""
        with self._channels.lock:
            if self._xen.long_mode() != long_mode:
                self._xen.set_long_mode(long_mode)
            self._channels.ports.long_mode = long_mode
            self._bits.resize(long_mode=long_mode)

    def _raise_late(self, page: tuple[Memory, int], content: bytes) -> None:
        """Events that came to the old page after it was copied."""
        memory, at = page
        now = bytes(memory.view[at : at + PAGE_SIZE])
        for setting in self._channels.ports.table():
            byte, bit = SHARED_INFO_PENDING + setting.port // 8, 1 << setting.port % 8
            if now[byte] & bit and not content[byte] & bit:
                self._kernel.raise_event(setting.port, setting.vcpu)

    def forget(self) -> None:
        """It is nowhere. With `channels.lock`."""
        self._kernel.listen(False)
        for n in range(self._vcpus):
            if n not in self._registered:
                self._kernel.register(n, INVALID_GFN)
        self._xen.set_shared_info(INVALID_GFN)
        self._bits.move(0, long_mode=True)
        self._fill_hole()
        self._gfn = self._page = None
