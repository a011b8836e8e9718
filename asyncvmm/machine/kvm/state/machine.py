"""A KVM machine's sections, read in the order in which nothing gets lost between two of them.

The vCPUs stand still, but timers do not: the PIT's tick goes to the interrupt controllers and from there to a local
APIC. So devices come first, then the controllers, then the vCPUs: a tick that comes in between is seen where it went.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncvmm.machine.kvm.platform import Board
from asyncvmm.machine.kvm.state.vcpu import save_vcpu
from asyncvmm.machine.kvm.state.vm import save_vm


def save_sections(vm_fd: int, vcpu_fds: Sequence[int], board: Board) -> dict[str, bytes]:
    """``board``, ``vm`` and a ``vcpu<n>`` for each vCPU, none of which may run. Raises KvmIoctlError."""
    sections = {"board": board.state().encode(), "vm": save_vm(vm_fd)}
    return {**sections, **{f"vcpu{index}": save_vcpu(fd) for index, fd in enumerate(vcpu_fds)}}
