"""A Linux guest's disk, network and sockets beside QEMU's, in the lab: the same kernel, image, devices and work.

QEMU is this host's binary, taken into the lab with its libraries, run on KVM there. Where both work with processor
time that is emulated, ratios are what counts.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _bench.bench import Bench, Skipped
from _bench.build import build_static
from _bench.figure import Figure, Target

TIMEOUT_S = 900
ROUND_MS = 1500
GOAL = 0.5
DISK_BYTES = 128 << 20
HERE = Path(__file__).parent / "peers"
FIRMWARE = (
    *(f"/usr/share/qemu/{name}.bin" for name in ("bios-microvm", "linuxboot_dma", "pvh", "kvmvapic")),
    *("/usr/share/qemu/qboot.rom", "/usr/share/seabios/bios-256k.bin"),
)
QEMU = "qemu-system-x86_64"


async def measure_disk(bench: Bench) -> list[Figure]:
    """linux_disk."""
    return _measure(bench, "disk")


async def measure_net(bench: Bench) -> list[Figure]:
    """linux_net."""
    return _measure(bench, "net")


async def measure_vsock(bench: Bench) -> list[Figure]:
    """linux_vsock."""
    return _measure(bench, "vsock")


def _measure(bench: Bench, kind: str) -> list[Figure]:
    found = json.loads(_run_in_lab(bench, kind))
    return [_figure(kind, name, machines, found) for name, machines in found["samples"].items()]


def _figure(kind: str, name: str, machines: dict[str, list[dict[str, float]]], found: dict[str, Any]) -> Figure:
    is_rate = "round trip" in name or "4 KiB" in name
    field, unit = ("per_s", "operations/s") if is_rate else ("mb_per_s", "MB/s")
    return Figure(
        name=f"linux_{kind}",
        unit=unit,
        ours=[sample[field] for sample in machines["kvm"]],
        peer_name="QEMU on the same KVM" + (", the host kernel's vhost-vsock" if kind == "vsock" else ""),
        peer=[sample[field] for sample in machines["qemu"]],
        target=Target("ratio", ">=", GOAL),
        conditions={"work": name, "where": "lab", "vcpus": 1, "memory_mib": 256},
        detail={
            "latency_us": {machine: _latencies(samples) for machine, samples in machines.items()},
            "qemu": found["qemu"],
        },
    )


def _latencies(samples: list[dict[str, float]]) -> dict[str, float]:
    """Of the round in the middle, by its median."""
    middle = sorted(samples, key=lambda sample: sample["p50_us"])[len(samples) // 2]
    return {name: middle[name] for name in ("p50_us", "p99_us")}


def _run_in_lab(bench: Bench, kind: str) -> str:
    """The program's last line."""
    work = build_static(bench, HERE / "io_work.c")
    carried = [work, *_qemu()]
    words = [str(bench.root / "scripts" / "lab"), "--timeout", str(TIMEOUT_S), "--qemu", shlex.join(_disks(bench))]
    words += [word for path in carried for word in ("--with", str(path))]
    words += [sys.executable, str(HERE / "inside.py"), kind, str(work), str(bench.rounds(5, 1)), str(ROUND_MS)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S + 60, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Skipped(f"the lab ended with {done.returncode}")
    return lines[-1]


def _disks(bench: Bench) -> list[str]:
    """Words for the outer machine: a disk for each guest, /dev/vdc and /dev/vdd in the lab."""
    words = []
    for index in range(2):
        path = bench.cache / f"disk{index}"
        with path.open("wb") as disk:
            disk.truncate(DISK_BYTES)
        drive = f"if=none,id=bench{index},file={path},format=raw,cache=unsafe"
        words += ["-drive", drive, "-device", f"virtio-blk-pci,drive=bench{index}"]
    return words


def _qemu() -> Iterator[Path]:
    """QEMU, the libraries the dynamic linker will ask for, and its firmware. Raises Skipped."""
    binary = shutil.which(QEMU)
    if binary is None:
        raise Skipped(f"no {QEMU}")
    yield Path(binary)
    listing = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    yield from (Path(found) for found in re.findall(r"=> (/\S+) \(0x", listing))
    yield from filter(Path.exists, map(Path, FIRMWARE))
