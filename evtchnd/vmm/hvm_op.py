"""HYPERVISOR_hvm_op: the parameters that a toolstack leaves for a guest, and how events interrupt it.

Source: xen/include/public/hvm/hvm_op.h, params.h.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from enum import IntEnum

from evtchnd.abi import DOMID_SELF
from evtchnd.vmm.guest_pointer import Layout, Pointers


class Hvmop(IntEnum):
    SET_PARAM = 0
    GET_PARAM = 1
    SET_PCI_INTX_LEVEL = 2
    SET_ISA_IRQ_LEVEL = 3
    SET_PCI_LINK_ROUTE = 4
    FLUSH_TLBS = 5
    PAGETABLE_DYING = 9
    GET_TIME = 10
    GET_MEM_TYPE = 15
    SET_EVTCHN_UPCALL_VECTOR = 23
    GUEST_REQUEST_VM_EVENT = 24
    ALTP2M = 25


class HvmParam(IntEnum):
    CALLBACK_IRQ = 0
    STORE_PFN = 1
    STORE_EVTCHN = 2
    PAE_ENABLED = 4
    TIMER_MODE = 10
    IDENT_PT = 12
    CONSOLE_PFN = 17
    CONSOLE_EVTCHN = 18
    VM_GENERATION_ID_ADDR = 34


_NR_PARAMS = 39
_CALLBACK_TYPE_SHIFT, _CALLBACK_VECTOR = 56, 2
_FIRST_VECTOR = 0x10  # the processor's own are below
# What a guest may set itself (xen/arch/x86/hvm/hvm.c, hvm_allow_set_param); others are the toolstack's.
_SETTABLE = frozenset({HvmParam.CALLBACK_IRQ, HvmParam.PAE_ENABLED, 15, 37})

_PARAM = Layout("HHIQ")  # domid, pad, index, value
_UPCALL_VECTOR = Layout("IB3x")  # vcpu, vector


class HvmOp:
    """The calls of one domain. `call` raises GuestError for bad pointers, OSError where KVM refuses.

    `set_vector(vector)`: the upcall of all vCPUs (0: none); `set_vcpu_vector(vcpu, vector)`: one's own;
    `latch(long_mode)`: shared_info is as 32-bit or 64-bit code has it from now on.
    """

    def __init__(
        self,
        domid: int,
        vcpus: int,
        params: Mapping[int, int],
        set_vector: Callable[[int], None],
        set_vcpu_vector: Callable[[int, int], None],
        latch: Callable[[bool], None],
    ) -> None:
        self._domid, self._vcpus = domid, vcpus
        self._first = dict(params)
        self.params = dict(params)
        self._set_vector, self._set_vcpu_vector, self._latch = set_vector, set_vcpu_vector, latch

    def offer(self, params: Mapping[int, int]) -> None:
        """More that the toolstack leaves."""
        self._first |= params
        self.params |= params

    def reset(self) -> None:
        """As before the guest's first call."""
        self.params = dict(self._first)
        self._set_vector(0)

    def call(self, guest: Pointers, op: int, arg: int) -> int:
        """0 or a negated error number."""
        match op:
            case Hvmop.SET_PARAM | Hvmop.GET_PARAM:
                dom, pad, index, value = guest.take(_PARAM, arg)
                if dom not in (DOMID_SELF, self._domid):
                    return -errno.ESRCH
                if index >= _NR_PARAMS:
                    return -errno.EINVAL
                if op == Hvmop.SET_PARAM:
                    return self._set(index, value, guest.long_mode)
                guest.put(_PARAM, arg, dom, pad, index, self.params.get(index, 0))
                return 0
            case Hvmop.SET_EVTCHN_UPCALL_VECTOR:
                vcpu, vector = guest.take(_UPCALL_VECTOR, arg)
                if vector < _FIRST_VECTOR:
                    return -errno.EINVAL
                if vcpu >= self._vcpus:
                    return -errno.ENOENT
                self._set_vcpu_vector(vcpu, vector)
                return 0
        # PAGETABLE_DYING among them: Xen has it for shadow page tables only, and Linux asks whether it is there
        return -errno.ENOSYS

    def _set(self, index: int, value: int, long_mode: bool) -> int:
        if index not in _SETTABLE:
            return -errno.EPERM
        if index == HvmParam.CALLBACK_IRQ:
            kind, vector = value >> _CALLBACK_TYPE_SHIFT, value & 0xFF
            if kind == _CALLBACK_VECTOR:
                if vector < _FIRST_VECTOR:
                    return -errno.EINVAL
                self._set_vector(vector)
            elif value == 0:
                self._set_vector(0)
            elif value != 1:
                # 1 is what Linux says when every vCPU has its own vector; a GSI or PCI's INTx is not there
                return -errno.EINVAL
            # A 64-bit kernel need not write the hypercall page's MSR, by which KVM knows it from a 32-bit boot loader.
            self._latch(long_mode)
        self.params[index] = value
        return 0
