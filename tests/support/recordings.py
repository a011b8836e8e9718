"""Event lines made by hand, as a VM's file holds them: boots of any length, old and new, and restores."""

from __future__ import annotations

import orjson

MS = 1_000_000
STAGES = ("init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop")


def line(event: str, t_ns: int, vm: str = "a1b2", **fields: object) -> bytes:
    """One event line."""
    return orjson.dumps({"v": 1, "ts": "", "t_ns": t_ns, "vm": vm, "event": event, **fields}) + b"\n"


def phase(
    name: str, start_ns: int, duration_ns: int, parent: str | None = None, vm: str = "a1b2", **fields: object
) -> bytes:
    """The line of a phase."""
    told = {"name": name, "start_ns": start_ns, "duration_ns": duration_ns, "parent": parent, "failed": False}
    return line("phase", start_ns + duration_ns, vm, **{**told, "attempt": 0, **fields})


def boot(vm: str = "a1b2", wait_ms: int = 80, *, clock: bool = True, total: bool = True) -> list[bytes]:
    """A boot of 19 + ``wait_ms`` + 1 ms on QEMU; without ``total`` and ``clock`` as older programs wrote it."""
    wait, top = wait_ms * MS, "total" if total else None
    end = (20 + wait_ms) * MS
    lines = [
        line("accel.probe", 2 * MS, vm, accel="qemu"),
        phase("accel", MS, 9 * MS, top, vm),
        phase("setup", 10 * MS, 5 * MS, top, vm),
        phase("qemu_fork", 15 * MS, 400_000, "boot", vm),
        phase("boot_wait", 16 * MS, wait, "boot", vm),
        phase("boot", 15 * MS, wait + 2 * MS, top, vm, **({"residual_ns": 1_600_000} if total else {})),
    ]
    if total:
        lines.append(phase("total", MS, end - MS, None, vm, residual_ns=3 * MS))
    for number, stage in enumerate(STAGES):
        guest_ns = (wait_ms - 20 + 2 * number) * MS
        lines.append(line("guest.boot_time", end - 4 * MS, vm, stage=stage, guest_ns=guest_ns))
    lines.append(line("guest.ready", end - 4 * MS, vm))
    if clock:
        tied = {"offset_ns": 20 * MS, "error_ns": 500_000, "source": "paired"}
        lines.append(line("boot.profile", end, vm, total=wait, guest_clock=tied, guest={"ready_ns": MS}))
    lines.append(line("vm.state", end + MS, vm, state="stopped", previous="ready"))
    return lines


def restore(vm: str = "a1b2", guest_ms: int = 40) -> list[bytes]:
    """A restore that was called for 1 ms before the VM was made; its guest is heard of ``guest_ms`` after the call."""
    heard = {"kind": "serial", "minor_faults": 3, "major_faults": 0}
    return [
        line("vm.state", 0, vm, state="starting", previous="new", accel="kvm", snapshot="s"),
        phase("memory_register", 3 * MS, 2 * MS, "total", vm),
        phase("total", MS, 9 * MS, None, vm, residual_ns=7 * MS),
        line("restore.mapped", 10 * MS, vm, duration_ns=11 * MS, snapshot="s"),
        line("vm.state", 11 * MS, vm, state="ready", previous="paused"),
        line("restore.first_exit", 15 * MS, vm, duration_ns=16 * MS),
        phase("resume_kvm_run", 11 * MS, 4 * MS, None, vm),
        line("restore.first_guest_event", (guest_ms - 1) * MS, vm, duration_ns=guest_ms * MS, **heard),
        line("restore.step", guest_ms * MS, vm, step="entropy", duration_ns=MS),
        line("vm.state", 100 * MS, vm, state="stopped", previous="ready"),
    ]
