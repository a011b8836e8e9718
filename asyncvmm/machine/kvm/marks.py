"""When a restored machine came to life, and what that cost: for its restore events, at no cost to later exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from asyncvmm.machine.kvm.faults import NO_FAULTS, Faults
from asyncvmm.timing.timeline import Span

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.vcpu import Vcpu


@attrs.define
class RestoreMarks:
    """CLOCK_MONOTONIC ns, None for what has not come yet.

    mapped_ns: memory and the state that KVM holds are in place, and the vCPUs had not been let go; where the restore is
    launched, the devices emulated here follow. resumed_ns: the vCPUs were let go. entered_ns: the guest was entered by
    the vCPU that was the first to come out with an exit to userspace, at first_exit_ns; faults: that vCPU's page faults
    in between.
    """

    mapped_ns: int
    resumed_ns: int | None = None
    entered_ns: int | None = None
    first_exit_ns: int | None = None
    faults: Faults = NO_FAULTS

    def resume_span(self) -> tuple[Span, ...]:
        """The phase from letting the vCPUs go to entering the guest, if there was one."""
        if self.resumed_ns is None or self.entered_ns is None:
            return ()
        return (Span("resume_kvm_run", self.resumed_ns, max(self.resumed_ns, self.entered_ns)),)

    def watch(self, vcpus: Sequence[Vcpu], tell: Callable[[], object]) -> None:
        """Have the first exit of these noted; ``tell`` is called on that vCPU's thread."""

        def note(entered_ns: int, exit_ns: int, faults: Faults) -> None:
            if self.first_exit_ns is None:
                self.entered_ns, self.first_exit_ns, self.faults = entered_ns, exit_ns, faults
                for vcpu in vcpus:
                    vcpu.on_first_exit = None
                tell()

        for vcpu in vcpus:
            vcpu.on_first_exit = note
