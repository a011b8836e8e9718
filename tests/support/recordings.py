"""Event lines made by hand, as a VM's file holds them: boots of any length, old and new."""

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
