"""Where a guest has its shared_info: in a page of its RAM, which it names and may change, or nowhere.

A vCPU that has registered no vcpu_info of its own has the one in that page.
"""

from __future__ import annotations

import errno
from collections.abc import Container

from evtchnd.abi import PAGE_SHIFT, PAGE_SIZE, SHARED_INFO_PENDING, SHARED_INFO_VCPUS, VCPU_INFO_SIZE
from evtchnd.vmm.channels import Channels
from evtchnd.vmm.event_bits import EventBits
from evtchnd.vmm.kvm import INVALID_GFN, XenVm
from evtchnd.vmm.kvm_kernel import KvmKernel
from evtchnd.vmm.physmap import Memory, Physmap


class SharedInfoPage:
    """Of one domain. `registered`: vCPUs that have a vcpu_info elsewhere."""

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
    ) -> None:
        self._xen, self._kernel, self._bits, self._channels = xen, kernel, bits, channels
        self._physmap, self._ram, self._vcpus, self._registered = physmap, ram, vcpus, registered
        self._gfn: int | None = None

    def place(self, gfn: int | None) -> int:
        """The page is in RAM, at `gfn`; what it held is there too. None: nowhere. 0 or a negated error number."""
        with self._channels.lock:
            before = self._gfn
            if gfn is None or gfn == before:
                if gfn is None:
                    self.forget()
                return 0
            found = self._physmap.find(gfn)
            if found is None or found[0] is not self._ram:
                return -errno.EINVAL
            memory, at = found
            content = bytes(PAGE_SIZE) if before is None else self._physmap.read(before << PAGE_SHIFT, PAGE_SIZE)
            memory.view[at : at + PAGE_SIZE] = content
            self._channels.ports.long_mode = long_mode = self._xen.long_mode()
            self._bits.move(memory.address + at, long_mode=long_mode)
            self._xen.set_shared_info(gfn)
            self._gfn = gfn
            for n in range(min(self._vcpus, SHARED_INFO_VCPUS)):
                if n not in self._registered:
                    self._kernel.register(n, (gfn << PAGE_SHIFT) + n * VCPU_INFO_SIZE)
            if before is not None:
                self._raise_late(before, content)
            self._kernel.listen(True)
        return 0

    def latch(self, long_mode: bool) -> None:
        """It has the layout of a guest of that width from now on (Xen's hvm_latch_shinfo_size)."""
        with self._channels.lock:
            if self._xen.long_mode() != long_mode:
                self._xen.set_long_mode(long_mode)
            self._channels.ports.long_mode = long_mode
            self._bits.resize(long_mode=long_mode)

    def _raise_late(self, before: int, content: bytes) -> None:
        """Events that came to the old page after it was copied."""
        now = self._physmap.read(before << PAGE_SHIFT, PAGE_SIZE)
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
        self._gfn = None
