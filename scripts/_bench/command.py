"""The command line of ``scripts/bench``: choose, measure, print."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _bench.bench import Bench, Measure, Skipped
from asyncvmm.errors import AsyncVMMError

FIGURES = {
    "create_to_first_exit": ("create", "create a VM up to its first exit, beside a C program"),
    "out_exit": ("out_exit", "one OUT exit, beside a C loop; idle and with a busy Python thread"),
    "serial_polled_bytes_per_second": ("polled", "polled serial output, beside QEMU's isa-serial"),
    "toy_first_line": ("toy", "library call to a toy guest's first line, beside QEMU from exec"),
    "loop_stall": ("stall", "longest stall of the loop during a boot"),
    "newline_to_coroutine": ("newline", "a guest's newline to the awaiting coroutine, on both loops"),
    "import_time": ("imports", "import asyncvmm, beside import asyncio"),
    "event_cost": ("events", "one event that nobody hears, or that goes to a file; one phase"),
    "event_stream": ("stream", "events a second into a file, beside plain orjson and write"),
    "telemetry_cost": ("telemetry", "a boot with its events in a file, beside one that nobody listens to"),
    "kick_to_loop": ("kicks", "a guest's kick to the loop, and the loop's interrupt to the guest, beside C"),
    "restore_to_first_exit": ("restore", "restore of a snapshot up to the first exit, and from a shell, beside C"),
    "restore_first_guest_event": (
        "first_event",
        "restore to the guest's first word, with prefetch and without; faults",
    ),
    "clones_curve": ("clones", "one more VM beside 1 to 200: restore, fault, memory; clones a second; beside C"),
    "snapshot_save": ("saving", "a snapshot, beside a plain copy of the touched pages; what its files take up"),
    "snapshot_pause": ("saving:measure_pause", "how long a guest stands whose memory is copied ahead, and otherwise"),
    "trigger_to_paused": ("saving:measure_trigger", "from a snapshot's trigger to two vCPUs standing, beside a kick"),
    "dirty_collect": ("dirty", "finding out what a guest wrote, by dirty rings, beside bitmaps; by size of memory"),
    "restore_first_output": ("restore_peers", "restore to output in hand, beside QEMU, our QEMU machine, and mimobox"),
    "virtqueue_request": ("virtqueue", "a request popped from and pushed back to a virtqueue"),
    "linux_exits_to_ready": ("linux_exits", "userspace exits of a stock Linux until READY, in the lab (--lab)"),
    "linux_disk": ("beside_qemu:measure_disk", "a Linux guest's disk, beside QEMU's, in the lab (--lab)"),
    "linux_net": ("beside_qemu:measure_net", "a Linux guest's network on a TAP, beside QEMU's, in the lab (--lab)"),
    "linux_vsock": ("beside_qemu:measure_vsock", "a Linux guest's vsock, beside QEMU's, in the lab (--lab)"),
}
"""Name: the module that measures it (and its function, if that is not ``measure``), and what it is."""

ONLY_IN_THE_LAB = {"linux_exits_to_ready", "linux_disk", "linux_net", "linux_vsock"}


def main(root: Path, arguments: list[str]) -> int:
    """Run the bench as these arguments say and return the exit code: 0, or 1 if nothing could be measured."""
    options = _parse(arguments)
    if options.list:
        for name, (_, what) in FIGURES.items():
            print(f"{name:32}{what}")
        return 0
    bench = Bench(root, options.quick)
    run = _run_facts(options.quick)
    printed = sum([_measure(bench, name, run) for name in _chosen(options)])
    return 0 if printed else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description="Measure asyncvmm beside its floors and peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to measure (all but the lab's)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--lab", action="store_true", help="those that need the lab, too (minutes)")
    parser.add_argument("--list", action="store_true", help="say what there is to measure")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure named {', '.join(unknown)}; see --list")
    return options


def _chosen(options: argparse.Namespace) -> list[str]:
    if options.names:
        return list(options.names)
    return [name for name in FIGURES if options.lab or name not in ONLY_IN_THE_LAB]


def _run_facts(quick: bool) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
    }


def _measure(bench: Bench, name: str, run: dict[str, Any]) -> int:
    """Measure one name, print its lines, return how many."""
    module, _, function = FIGURES[name][0].partition(":")
    measure: Measure = getattr(importlib.import_module(f"_bench.{module}"), function or "measure")
    bench.say(f"{name} ...")
    begin, load = time.monotonic(), round(os.getloadavg()[0], 2)
    try:
        figures = asyncio.run(measure(bench))
    except (Skipped, AsyncVMMError) as reason:
        bench.say(f"{name}: not measured: {reason}")
        return 0
    except Exception:  # one figure's failure must not cost the others
        bench.say(f"{name}: not measured: {traceback.format_exc()}")
        return 0
    for figure in figures:
        sys.stdout.write(json.dumps({**figure.record(), "run": {**run, "load_average": load}}) + "\n")
    sys.stdout.flush()
    bench.say(f"{name}: {time.monotonic() - begin:.1f} s")
    return len(figures)
