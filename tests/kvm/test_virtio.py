"""The guest's side of a virtio-mmio device, run by KVM: requests without exits, interrupts by irqfd, resets."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import RngConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.x86.layout import MMIO_BASE, MMIO_SIZE

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Run

pytestmark = pytest.mark.anyio

RNG = DeviceConfig(rng=RngConfig())
BYTES = 16
"""Of one request; virtio.inc."""

QUEUE_NOTIFY, INTERRUPT_ACK, STATUS = 0x050, 0x064, 0x070
USED_BUFFER, CONFIG_CHANGE = 1, 2
DRIVER_OK, NEEDS_RESET = 0x0F, 0x40
HOSTILE = {
    1: "a descriptor table outside RAM",
    2: "a head beyond the queue",
    3: "an available index that jumps",
    4: "a chain that is a circle",
    5: "a buffer outside RAM",
    6: "a buffer at the end of the address space",
}


@attrs.frozen
class Report:
    """What guest virtio.S says at its end."""

    interrupts: int
    reason: int
    used: int
    status: int
    buffers: list[bytes]

    @classmethod
    def of(cls, run: Run) -> Report:
        answer = said(run)
        interrupts, reason, used, status = struct.unpack_from("<4I", answer)
        buffers = [answer[at : at + BYTES] for at in range(16, len(answer), BYTES)]
        return cls(interrupts, reason, used, status, buffers)


def said(run: Run) -> bytes:
    """The output behind READY."""
    greeting, _, answer = run.output.partition(b"\n")
    assert greeting == b"READY"
    return answer


def looks_random(data: bytes) -> bool:
    """No untouched memory, no pattern: bytes of a good source have as few different values once in 10^15 times."""
    return len(data) == BYTES and len(set(data)) > 6


def device_exits(run: Run) -> dict[str, int]:
    """Exits at the device's registers."""
    within = range(MMIO_BASE, MMIO_BASE + MMIO_SIZE)
    counts = {label: entry.count for label, entry in run.exits.by_address.items() if label.startswith("mmio")}
    return {label: count for label, count in counts.items() if int(label.split()[1], 16) in within}


def writes(register: int) -> str:
    return f"mmio-write {MMIO_BASE + register:#x}"


# -- a driver that behaves ---------------------------------------------------------------------------------------------


async def test_random_bytes_arrive_by_interrupt(boot: Boot) -> None:
    async with boot("virtio", devices=RNG) as run:
        assert (await run.end()).code == 0x11
        report = Report.of(run)
    assert (report.interrupts, report.used, report.status) == (3, 3, DRIVER_OK)
    assert report.reason & USED_BUFFER
    assert len(report.buffers) == 3
    assert all(map(looks_random, report.buffers))
    assert len(set(report.buffers)) == 3


async def test_with_event_indices_two_requests_under_one_kick_take_one_interrupt(boot: Boot) -> None:
    async with boot("virtio-event-idx", devices=RNG) as run:
        assert (await run.end()).code == 0x11
        report = Report.of(run)
    assert (report.interrupts, report.used, report.status) == (3 + 1, 3 + 2, DRIVER_OK)
    assert all(map(looks_random, report.buffers))


async def test_kicks_and_acknowledgements_take_no_exit(boot: Boot) -> None:
    async with boot("virtio-more", devices=RNG) as run:
        await run.end()
        assert Report.of(run).interrupts == 9
    exits = device_exits(run)
    assert writes(STATUS) in exits
    assert writes(QUEUE_NOTIFY) not in exits
    assert writes(INTERRUPT_ACK) not in exits


async def test_six_requests_more_are_not_one_exit_more(boot: Boot) -> None:
    found = []
    for name in ("virtio", "virtio-more"):
        async with boot(name, devices=RNG) as run:
            await run.end()
        found.append(device_exits(run))
    assert found[0] == found[1]


async def test_reading_a_register_takes_no_exit(boot: Boot) -> None:
    async with boot("virtio", devices=RNG) as run:
        await run.end()
    assert not [label for label in device_exits(run) if label.startswith("mmio-read")]


# -- resets ------------------------------------------------------------------------------------------------------------


async def test_nothing_is_written_to_a_queues_memory_once_a_reset_has_returned(boot: Boot) -> None:
    async with boot("virtio-reset", devices=RNG) as run:
        assert (await run.end()).code == 0x12
        violated, status = struct.unpack_from("<2I", said(run))
        after = said(run)[8:]
    assert violated == 0
    assert status == 0
    assert looks_random(after), "the device works on after its resets"


# -- a driver that means harm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOSTILE, ids=[name.replace(" ", "-") for name in HOSTILE.values()])
async def test_the_impossible_makes_a_device_need_a_reset_and_no_more(boot: Boot, how: int) -> None:
    async with boot(f"virtio-hostile-{how}", devices=RNG) as run:
        assert (await run.end()).code == 0x13
        status, interrupts, reason = struct.unpack_from("<3I", said(run))
        after = said(run)[12:]
    assert status & NEEDS_RESET
    if how > 1:  # there was a driver to be told
        assert interrupts == 1
        assert reason & CONFIG_CHANGE
    assert looks_random(after), "reset, it serves again"


# -- a VM of the library -----------------------------------------------------------------------------------------------


async def test_the_last_metrics_line_says_what_the_device_did(guest: Callable[[str], Path], tmp_path: Path) -> None:
    lines = tmp_path / "events.jsonl"
    config = VMConfig(kernel=guest("virtio-more"), cmdline="", memory_mib=4, accel="kvm", rng=True)
    async with VM(config) as vm:
        vm.stream_to(lines)
        await vm.boot()
        with anyio.fail_after(100):
            await vm.events.stopped
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    metrics = [event for event in events if event["event"] == "metrics"]
    assert metrics
    entropy = metrics[-1]["entropy"]
    assert entropy["entropy_bytes"] == 9 * BYTES
    assert entropy["entropy_event_count"] == 9
    assert entropy["entropy_event_fails"] == 0
    assert {"vcpu", "uart", "i8042", "vmm", "latencies_us", "utc_timestamp_ms"} <= set(metrics[-1])
