"""BootProfile: one boot attempt's marks and sums, its steps, and the text that the log ``asyncvmm.boot`` gets.

Marks are nanoseconds since the VM's start (as ``t_ns`` of events), sums are nanoseconds. None is what was not recorded,
or does not apply: on QEMU all that is KVM's. The total runs from the start of the machine to READY; checking and
reading what is asked for comes before it (VmTiming.setup_ms).
"""

from __future__ import annotations

from typing import Any

import attrs

from asyncvmm.timing.profiles import GuestBootProfile, Profile, left_of, total_of

_UNITS = (("ms", 1_000_000), ("us", 1_000))

_GUEST_LABELS = {
    "init_entry": "init_entry_ns",
    "mounts_done": "mounts_done_ns",
    "uart_access": "uart_access_done_ns",
    "init_ok": "init_ok_ns",
    "ready": "ready_ns",
}


@attrs.define(kw_only=True)
class BootProfile(Profile):
    """Where one boot's time went. ``guest`` grows until command_loop; the flags say what has been logged.

    memory_alloc_duration, memory_register_duration: guest memory reserved, and shown to KVM. kernel_load_duration and
    rootfs_load_duration: copied (the initrd: read) into it. boot_params_duration: what the boot protocol wants there.
    vcpu_create_duration, vcpu_config_duration: vCPUs made, and given CPUID and registers.
    """

    t_total_start: int | None = None
    t_kvm_open: int | None = None
    t_vm_create: int | None = None
    t_memory_setup: int | None = None
    t_kernel_load: int | None = None
    t_rootfs_load: int | None = None
    t_vcpu_setup: int | None = None
    t_boot_start: int | None = None
    t_boot_ready: int | None = None
    t_total_end: int | None = None
    memory_alloc_duration: int | None = None
    memory_register_duration: int | None = None
    kernel_load_duration: int | None = None
    rootfs_load_duration: int | None = None
    vcpu_create_duration: int | None = None
    vcpu_config_duration: int | None = None
    boot_params_duration: int | None = None
    guest: GuestBootProfile = attrs.field(factory=GuestBootProfile)
    host_logged: bool = False
    guest_extension_logged: bool = False
    capture_guest_boot_lines: bool = True

    def mark_boot_ready(self, t_ns: int) -> None:
        """The guest said READY: the boot is over."""
        self.t_boot_ready = self.t_total_end = t_ns

    @property
    def total(self) -> int | None:
        """t_total_start to t_total_end."""
        return _between(self.t_total_start, self.t_total_end)

    def steps(self) -> dict[str, int | None]:
        """The boot's steps by name, in order; host_misc is what the others leave of the total, never below 0."""
        steps = {
            "kvm_open": _between(self.t_total_start, self.t_kvm_open),
            "vm_create": _between(self.t_kvm_open, self.t_vm_create),
            "memory": total_of(self.memory_alloc_duration, self.memory_register_duration),
            "kernel_load": self.kernel_load_duration,
            "rootfs_load": self.rootfs_load_duration,
            "boot_params": self.boot_params_duration,
            "vcpu_setup": total_of(self.vcpu_create_duration, self.vcpu_config_duration),
            "boot_wait": _between(self.t_boot_start, self.t_boot_ready),
        }
        return {**steps, "host_misc": left_of(self.total, steps.values())}

    def totals(self) -> dict[str, int | None]:
        """The total and the steps."""
        return {"total": self.total, **self.steps()}

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived totals by name, those that are None left out; ``guest`` as an object of its own."""
        return {**Profile.to_dict(self), "guest": self.guest.to_dict()}

    def host_lines(self) -> list[str]:
        """The total, then each step that was recorded, with its share."""
        total = self.total or 0
        lines = [f"[boot-profile] total: {duration_text(total)}"]
        for label, duration in self.steps().items():
            if duration is not None and (duration or label != "host_misc"):
                share = f"({share_text(duration, total)})"
                lines.append(f"[boot-profile] {label + ':':<12} {duration_text(duration):>8} {share}")
        return lines

    def guest_lines(self) -> list[str]:
        """The guest's stages up to ready, each with the time since the one before and since init_entry."""
        lines = []
        first = before = None
        for label, name in _GUEST_LABELS.items():
            at = getattr(self.guest, name)
            if at is not None:
                first = at if first is None else first
                lines.append(_guest_line(label, at, at if before is None else before, first))
                before = at
        return lines

    def command_loop_line(self) -> str | None:
        """The last stage, which comes after READY; None before it has come."""
        at = self.guest.command_loop_ns
        if at is None:
            return None
        before = at if self.guest.ready_ns is None else self.guest.ready_ns
        first = before if self.guest.init_entry_ns is None else self.guest.init_entry_ns
        return _guest_line("command_loop", at, before, first)


def duration_text(ns: int) -> str:
    """Whole milliseconds, microseconds or nanoseconds: the largest unit in which it is not 0."""
    for unit, size in _UNITS:
        if ns >= size:
            return f"{ns // size}{unit}"
    return f"{ns}ns"


def share_text(part: int, total: int) -> str:
    """A share in percent with one decimal; 0.0% of nothing."""
    return f"{100 * part / total if total else 0:.1f}%"


def _between(start: int | None, end: int | None) -> int | None:
    return None if start is None or end is None else end - start


def _guest_line(label: str, at: int, before: int, first: int) -> str:
    delta, since = duration_text(max(0, at - before)), duration_text(max(0, at - first))
    return f"[boot-profile][guest] {label:<16} +{delta:>8} (total {since})"
