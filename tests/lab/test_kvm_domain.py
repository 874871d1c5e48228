"""A domain whose ports are in KVM: the soft VMM's tests and those of test_kvm.py, unchanged, where KVM knows Xen."""

from __future__ import annotations

from evtchnd.vmm.kvm import XenHvm
from evtchnd.vmm.kvm_machine import Machine
from test_kvm import *  # noqa: F403
from test_kvm import daemon, on_kvm, other, vmm  # noqa: F401


def test_this_kvm_knows_all_of_xen() -> None:
    with Machine() as machine:
        assert machine.has == ~XenHvm(0)
