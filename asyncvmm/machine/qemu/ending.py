"""Why the guest of a QEMU stopped, told once: from what QMP said last, and from how the child ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from asyncvmm.effects import Stopped, StopReason
from asyncvmm.errors import AsyncVMMError, SnapshotDamaged
from asyncvmm.machine.pacing import Pacer
from asyncvmm.machine.qemu.child import Child, start_error
from asyncvmm.machine.qemu.qmp import QmpEvent
from asyncvmm.machine.qemu.reasons import debug_exit_code, is_contention, reason_of_halt, reason_of_shutdown


class GuestEnd:
    """The end is an effect for ``pacer``. ``failure`` is what went wrong on our side, None for nothing."""

    def __init__(self, pacer: Pacer) -> None:
        self.failure: str | None = None
        self._pacer = pacer
        self._reason: StopReason | None = None
        self._told = False

    def be_silent(self) -> None:
        """An end that was asked for is no news."""
        self._told = True

    def hear(self, event: QmpEvent) -> None:
        """Something that QEMU says of its own accord."""
        if event.name == "SHUTDOWN":
            self._reason = self._reason or reason_of_shutdown(event.data)
        elif event.name == "GUEST_PANICKED":
            self._reason = "panic"

    def hear_halt(self, status: Mapping[str, Any]) -> None:
        """The vCPUs stopped unasked, query-status says how: QEMU lives on, the guest does not."""
        reason = reason_of_halt(status)
        if reason is not None and self._reason is None:
            self.tell(reason, f"QEMU: {status.get('status')}")

    def fail(self, error: Exception) -> None:
        """A device of ours went wrong: the guest cannot be served any more."""
        self.failure = f"device: {type(error).__name__}: {error}"
        self.tell("machine", self.failure)

    def tell_end(self, child: Child) -> None:
        """The child has ended."""
        code = debug_exit_code(child.status or 0, child.last_words())
        if self._reason is not None:
            self.tell(self._reason, "")
        elif code is not None:
            self.tell("debug-exit", "", code)
        else:
            self.tell("machine", child.describe_end())

    def of_start(self, child: Child, *, reads_state: bool) -> AsyncVMMError:
        """The child has ended before its guest ran, or while it read a saved state: the error that says why."""
        if self.failure is not None:
            return start_error("a device failed", self.failure, retryable=False)
        found = child.describe_end()
        retryable = is_contention(child.status or 0, child.last_words())
        if reads_state and not retryable:
            return SnapshotDamaged("QEMU's state", expected="one that QEMU can read", found=found)
        return start_error("QEMU refused to start", found, retryable=retryable)

    def tell(self, reason: StopReason, detail: str, code: int | None = None) -> None:
        """Say so, unless it was said already."""
        if not self._told:
            self._told = True
            self._pacer.put([Stopped(reason, detail, code=code, t_ns=time.monotonic_ns())])
