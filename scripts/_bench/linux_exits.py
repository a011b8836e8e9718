"""Userspace exits of a stock Linux from start to READY, console quiet, counted where KVM is of the hardware kind."""

from __future__ import annotations

import json
import subprocess
import sys

from _bench.bench import Bench, Skipped
from _bench.figure import Figure, Target

TIMEOUT_S = 900
_PROGRAM = """
import asyncio, json
from asyncvmm import VM, VMConfig

async def main():
    async with VM(VMConfig(memory_mib=256, accel="kvm", boot_timeout_s=600)) as vm:
        timing = await vm.boot()
        exits = vm.exits
        by_address = {label: entry.count for label, entry in exits.by_address.items()}
        by_reason = {label: entry.count for label, entry in exits.by_reason.items()}
        print(json.dumps({"total": exits.total, "unmapped": exits.unmapped, "boot_ms": timing.boot_ms,
                          "by_reason": by_reason, "by_address": by_address}))

asyncio.run(main())
"""


async def measure(bench: Bench) -> list[Figure]:
    """linux_exits_to_ready: one boot in the lab."""
    counted = json.loads(_run_in_lab(bench))
    by_address = sorted(counted.pop("by_address").items(), key=lambda item: -item[1])
    return [
        Figure(
            name="linux_exits_to_ready",
            unit="exits",
            ours=[float(counted["total"])],
            target=Target("ours", "<=", 3000),
            conditions={"python_thread": "idle", "vcpus": 1, "memory_mib": 256, "where": "lab"},
            detail={**counted, "most_at": dict(by_address[:16])},
        )
    ]


def _run_in_lab(bench: Bench) -> str:
    """The program's last line."""
    words = [str(bench.root / "scripts" / "lab"), sys.executable, "-c", _PROGRAM]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Skipped(f"the lab ended with {done.returncode}")
    return lines[-1]
