"""Profiles: what a boot is made of, as plain records. Durations and instants are integer nanoseconds."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class GuestBootProfile:
    """When PID 1 reached each stage: the guest's CLOCK_MONOTONIC in ns, None where it did not say."""

    init_entry_ns: int | None = None
    mounts_done_ns: int | None = None
    uart_access_done_ns: int | None = None
    init_ok_ns: int | None = None
    ready_ns: int | None = None
    command_loop_ns: int | None = None

    def to_dict(self) -> dict[str, int]:
        """The stages that were reached, in boot order."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}
