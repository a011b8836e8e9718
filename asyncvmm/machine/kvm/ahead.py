"""Ahead: what of a launch is made before it is sent, as it needs no VM: /dev/kvm opened, the snapshot's pages mapped.

It holds addresses and a descriptor, and no page of memory.
"""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from asyncvmm.machine.kvm.fastpath.chain import executor

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.launch_chain import LaunchChain


class Ahead:
    """The first ``steps`` of one launch's chain: 0 if they could not be made, and are to be made with the others.

    ``is_held``: whether what they hold is this one's. It is the run's, as what follows is, once that is no longer so.
    """

    def __init__(self, chain: LaunchChain, slots: array[int]) -> None:
        """Make them. Some 40 us."""
        program, wanted = chain.program, chain.ahead
        address, _ = slots.buffer_info()
        self.steps = 0
        self._process = os.getpid()
        self._made = program.made(slots, wanted)  # what was not made has no result, which ``undo`` heeds
        self.is_held = True  # before there is anything: a signal's handler may raise behind the steps
        if wanted and executor()(program.steps, wanted, address, program.first) == wanted:
            self.steps = wanted
        else:
            self.undo()

    def undo(self) -> None:
        """Give it back, if it is held. On any thread, any number of times."""
        if self.is_held and self._process == os.getpid():  # a child that was forked does not have the mappings
            self.is_held = False
            self._made.undo()

    def __del__(self) -> None:
        if getattr(self, "is_held", False):
            self.undo()
