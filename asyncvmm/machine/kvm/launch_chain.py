"""LaunchChain: the chain of system calls of a restore, as a runner is told of it (see launch.py and runner.py)."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import attrs

from asyncvmm.machine.kvm.fastpath.binding import Order
from asyncvmm.machine.kvm.fastpath.chain import STEP

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.creation import Creation
    from asyncvmm.machine.kvm.fastpath.chain import Program
    from asyncvmm.machine.kvm.mapped import Pinned
    from asyncvmm.machine.kvm.state.setting import TscPlan


@attrs.frozen(eq=False, kw_only=True)
class LaunchChain:
    """What a launch makes: the program, what it is given but for what a shell holds, and the slots of its vCPU's
    descriptor, and of the TSC offset, which lacks the host's TSC still; 0 if it is complete.

    ahead: how many of its steps are made ahead. steps: where the chain leaves what, or, in a shell, the shell's.
    """

    steps: Creation
    program: Program
    vcpu: int
    clock: int
    ahead: int
    tsc: TscPlan
    given: tuple[int, ...]
    _pinned: Pinned

    def lay_out(self) -> array[int]:
        """The slots of one launch; those for what a shell holds are empty still."""
        return self.program.lay_out(*self.given, *(0,) * (self.program.given - len(self.given)))

    def order(self, slots: array[int], bell: int, ahead: int) -> Order:
        """What a runner is told of it, of which ``ahead`` steps are made."""
        address, _ = slots.buffer_info()
        program, steps = self.program, self._pinned.address + ahead * STEP.size
        count, known = len(program.names) - ahead, program.first + ahead
        return Order(steps, address, count, known, self.vcpu, self.clock, bell)
