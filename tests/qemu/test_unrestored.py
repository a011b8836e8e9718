"""What keeps a QEMU machine from being restored: another machine, another QEMU, damage. Nothing is left of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from asyncvmm.device_config import RngConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import MachineError, SnapshotDamaged, SnapshotMismatch, StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.snapshot import codec
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import SOME_TSC_KHZ, TOY_MIB, holdings
from tests.support.qemu_saved import Taken, refused, restored

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vcpus": 2}, "restored vcpus: expected 1, found 2"),
        ({"memory_mib": 64}, "restored memory_mib: expected 32, found 64"),
        ({"tsc_khz": None}, "restored machine: expected microvm, found q35"),
        ({"tsc_khz": SOME_TSC_KHZ + 1000}, "restored TSC: expected 2000000 kHz, found 2001000 kHz"),
        ({"devices": DeviceConfig(rng=RngConfig())}, "restored devices: expected [], found ['virtio-rng-device"),
    ],
)
async def test_another_machine_is_refused_with_what_differs(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, change: dict[str, Any], words: str
) -> None:
    with taken.file.open("rb") as file:
        said = await refused(attrs.evolve(plan, **change), taken.plan(file.fileno()), qemu, SnapshotMismatch)
    assert words in said


async def test_another_qemu_is_refused(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    newer = attrs.evolve(qemu, version=(99, 1))
    with taken.file.open("rb") as file:
        assert "found 99.1" in await refused(plan, taken.plan(file.fileno()), newer, SnapshotMismatch)


async def test_a_snapshot_of_kvm_is_refused(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    with taken.file.open("rb") as file:
        of_kvm = attrs.evolve(taken.plan(file.fileno()), saved=attrs.evolve(taken.machine, accel="kvm"))
        assert "one of kvm" in await refused(plan, of_kvm, qemu, SnapshotMismatch)


async def test_layers_of_memory_are_refused(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    with taken.file.open("rb") as file:
        whole = taken.plan(file.fileno())
        assert "2 files" in await refused(plan, attrs.evolve(whole, layers=whole.layers * 2), qemu, SnapshotMismatch)


@pytest.mark.parametrize("size", [0, 4096, (TOY_MIB << 20) - 4096])
async def test_a_memory_file_that_is_too_short_is_damaged_and_left_as_it_is(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, size: int
) -> None:
    os.truncate(taken.file, size)
    with taken.file.open("rb") as file:
        assert f"found {size} bytes" in await refused(plan, taken.plan(file.fileno()), qemu, SnapshotDamaged)
    assert taken.file.stat().st_size == size


def cut_at_the_end(state: bytes) -> bytes:
    return state[: len(state) * 2 // 3]


def no_state(_: bytes) -> bytes:
    return b"no state of a machine at all"


def another_device(state: bytes) -> bytes:
    assert state.count(b"\x06serial") >= 1
    return state.replace(b"\x06serial", b"\x06cereal")


def postcopy(state: bytes) -> bytes:
    """MIG_CMD_POSTCOPY_ADVISE and _LISTEN before the memory: a thread of QEMU's waits for more, which never comes."""
    at = state.index(b"\1\0\0\0\2\3ram")
    return state[:at] + b"\x08\0\3\0\0" + b"\x08\0\4\0\0"


@pytest.mark.parametrize("damage", [cut_at_the_end, no_state, another_device, postcopy])
async def test_a_state_that_qemu_cannot_read_is_damaged(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, damage: Callable[[bytes], bytes]
) -> None:
    sections = {"qemu": damage(taken.machine.sections["qemu"])}
    broken = attrs.evolve(taken, machine=attrs.evolve(taken.machine, sections=sections))
    with broken.file.open("rb") as file:
        said = await refused(plan, broken.plan(file.fileno()), qemu, SnapshotDamaged)
    assert re.search("QEMU: exit status 1: .*(load of migration|loadvm) failed", said)


@pytest.mark.parametrize(
    "section", [b"", b"[]", codec.encode({"console": 7}), codec.encode({"console": bytes(1 << 17)})]
)
async def test_input_that_is_none_is_damaged(plan: BootPlan, qemu: QemuBinary, taken: Taken, section: bytes) -> None:
    sections = {**taken.machine.sections, "serial": section}
    broken = attrs.evolve(taken, machine=attrs.evolve(taken.machine, sections=sections))
    with broken.file.open("rb") as file:
        await refused(plan, broken.plan(file.fileno()), qemu, SnapshotDamaged)


async def test_no_state_is_damaged(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    none = attrs.evolve(taken, machine=attrs.evolve(taken.machine, sections={}))
    with none.file.open("rb") as file:
        assert "found none" in await refused(plan, none.plan(file.fileno()), qemu, SnapshotDamaged)


async def test_a_qemu_that_will_not_start_is_quoted(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, tmp_path: Path
) -> None:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho cannot allocate memory >&2; exit 1\n")
    path.chmod(0o755)
    with taken.file.open("rb") as file:
        said = await refused(plan, taken.plan(file.fileno()), attrs.evolve(qemu, path=path), MachineError)
    assert "cannot allocate memory" in said


@pytest.mark.parametrize("turns", range(0, 60, 10))
async def test_a_restore_cancelled_leaves_nothing(plan: BootPlan, qemu: QemuBinary, taken: Taken, turns: int) -> None:
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    with taken.file.open("rb") as file:
        async with anyio.create_task_group() as group:
            group.start_soon(machine.restore, taken.plan(file.fileno()))
            for _ in range(turns):
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
    await machine.stop()
    assert not holdings() - before


async def test_a_machine_becomes_another_once(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    async with restored(plan, taken, qemu) as (clone, _):
        with taken.file.open("rb") as file, pytest.raises(StateError, match="new machine"):
            await clone.restore(taken.plan(file.fileno()))
