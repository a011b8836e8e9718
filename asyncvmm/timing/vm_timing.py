"""VmTiming: one boot in whole milliseconds, by the step that spent them. A plain record; None means not recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs

from asyncvmm.timing.timeline import Phase


@attrs.frozen(kw_only=True)
class VmTiming:
    """Where one boot's time went, integer milliseconds; None where the step was not recorded or does not apply.

    setup_ms: resources (overlay, cgroup, network helper). boot_ms: kernel to guest ready. overlay_ms: overlay from
    the pool, or new. qemu_cmd_build_ms, qemu_fork_ms: the QEMU command line, and its fork and exec (None on KVM).
    gvproxy_start_ms: the network helper, 0 without a network. guest_wait_ms: waiting for ready. boot_retries: failed
    attempts before this one, 0 for the first; setup_ms and boot_ms describe the attempt that succeeded.
    """

    setup_ms: int | None = None
    boot_ms: int | None = None
    overlay_ms: int | None = None
    qemu_cmd_build_ms: int | None = None
    gvproxy_start_ms: int | None = None
    qemu_fork_ms: int | None = None
    guest_wait_ms: int | None = None
    boot_retries: int | None = None

    @property
    def total_ms(self) -> int | None:
        """setup_ms + boot_ms; None unless both are recorded."""
        if self.setup_ms is None or self.boot_ms is None:
            return None
        return self.setup_ms + self.boot_ms

    def to_dict(self) -> dict[str, int]:
        """What was recorded, total_ms included; names without a value are left out."""
        values = attrs.asdict(self)
        values["total_ms"] = self.total_ms
        return {name: value for name, value in values.items() if value is not None}


def boot_timing(phases: Sequence[Phase], accel: Literal["kvm", "qemu"], retries: int) -> VmTiming:
    """The VmTiming of one boot attempt from its phases. On KVM the qemu_* fields are None, never 0."""
    spent = {phase.name: phase.duration_ns // 1_000_000 for phase in phases}
    on_qemu = accel == "qemu"
    return VmTiming(
        setup_ms=spent.get("setup"),
        boot_ms=spent.get("boot"),
        qemu_cmd_build_ms=spent.get("qemu_cmd_build") if on_qemu else None,
        overlay_ms=spent.get("overlay"),
        gvproxy_start_ms=spent.get("network_helper", 0),
        qemu_fork_ms=spent.get("qemu_fork") if on_qemu else None,
        guest_wait_ms=spent.get("boot_wait"),
        boot_retries=retries,
    )
