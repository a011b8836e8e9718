"""The metrics of a Linux on the QEMU machine, count by count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DeviceConfig, DriveConfig
from asyncvmm.events.types import Metrics
from asyncvmm.guest.archive import workload_archive
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.metrics.vm_metrics import VmMetrics
from tests.support.qemu_machine import PATIENCE_S, default_image, running, tsc_khz

pytestmark = pytest.mark.anyio

MIB = 1 << 20
WORK = """
dd if=/dev/vda of=/dev/null bs=1M count=4
dd if=/dev/zero of=/dev/vdb bs=1M count=3 conv=fsync
stty raw -F /dev/hvc0
head -c 10000 /dev/zero >/dev/hvc0
head -c 5 /dev/hvc0 >/dev/null
echo all done
sleep 1000
"""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """What a guest did is no loop's affair: one will do."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def plan(tmp_path: Path) -> BootPlan:
    image = default_image()
    drives = (DriveConfig(path="root", id="root", read_only=True), DriveConfig(path="data", id="data"))
    for drive in drives:
        (tmp_path / drive.path).write_bytes(bytes(8 * MIB))
    return BootPlan(
        name="metrics",
        memory_mib=128,
        vcpus=1,
        kernel=image.kernel,
        initrd=image.initrd,
        appended=workload_archive(("sh", "-c", WORK), ()),
        cmdline="console=ttyS0 8250.nr_uarts=1 panic=-1 quiet",
        tsc_khz=tsc_khz(),
        devices=DeviceConfig(drives=drives, balloon=BalloonConfig(), console=ConsoleConfig()),
        resources=Resources(drives=tuple(DriveResource(drive, tmp_path / drive.path) for drive in drives)),
    )


async def test_the_last_flush_tells_what_the_guest_did(plan: BootPlan, qemu: QemuBinary) -> None:
    metrics = VmMetrics()
    async with running(plan, qemu, metrics=metrics) as (machine, witness):
        port, bulk = machine.ports["console"], b""
        with anyio.fail_after(PATIENCE_S):
            while len(bulk) < 10_000:
                bulk += await port.receive()
            await port.send(b"hello")
        await witness.until_said("console", b"all done")
        assert machine.balloon is not None
        for _ in range(2):
            await machine.balloon.stats()
        await machine.write("console", b"typed ahead")

    groups = metrics.flush(0, 0).groups
    root, data = groups["block_root"], groups["block_data"]
    assert (data["write_bytes"], data["write_count"] != 0, data["flush_count"] != 0) == (3 * MIB, True, True)
    assert isinstance(root["read_bytes"], int)
    assert 4 * MIB <= root["read_bytes"] <= 8 * MIB, "and what the kernel reads ahead, or looking for partitions"
    assert (root["write_bytes"], root["flush_count"]) == (0, 0)
    assert isinstance(root["read_agg"], dict)
    assert root["read_agg"]["sum_us"] > 0
    assert [groups["block"][name] for name in ("execute_fails", "invalid_reqs_count")] == [0, 0]
    assert groups["block"]["write_bytes"] == data["write_bytes"]
    said = sum(len(witness.output(name)) for name in ("console", "control"))
    assert (groups["uart"]["write_count"], groups["uart"]["read_count"]) == (said, len(b"typed ahead"))
    assert (groups["console"]["tx_bytes_count"], groups["console"]["rx_bytes_count"]) == (len(bulk), 5)
    assert groups["balloon"]["stats_updates_count"] == 2


@pytest.mark.requires("qemu", "image")
async def test_a_vm_tells_its_metrics_every_so_often_and_at_the_end() -> None:
    config = VMConfig(accel="qemu", metrics_interval_s=0.5, balloon=BalloonConfig(stats_interval_s=1))
    async with VM(config) as vm:
        told: list[Metrics] = []
        vm.events.attach(lambda event: told.append(event) if isinstance(event, Metrics) else None)
        await vm.boot()
        assert told, "a boot takes longer than that"
        async with vm.events.subscribe(types=[Metrics]) as metrics:
            with anyio.fail_after(PATIENCE_S):
                while vm.balloon.latest is None:
                    await anext(metrics)
        await vm.pause()
        latencies = vm.metrics.flush().groups["latencies_us"]
        assert isinstance(latencies["pause_vm"], int)
        assert latencies["pause_vm"] > 0
        await vm.resume()
        before = len(told)
    assert len(told) > before
    assert sum(int(str(event.groups["balloon"]["stats_updates_count"])) for event in told) >= 1
    said = sum(int(str(event.groups["uart"]["write_count"])) for event in told)
    assert said >= len(vm.console.tail)
