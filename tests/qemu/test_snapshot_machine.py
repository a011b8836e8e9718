"""QemuMachine.save and restore: a toy guest for what can go wrong, and one Linux with devices for what must go on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from asyncvmm.device_config import RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import MachineError, SnapshotDamaged, SnapshotFailed, SnapshotMismatch, StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.snapshot import codec
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import PATIENCE_S, Witness, holdings, running
from tests.support.requirements import require

pytestmark = pytest.mark.anyio

MIB = 1 << 20
MEMORY_MIB = 32
SOME_TSC_KHZ = 2_000_000
DEBUG_EXIT = b"\x04"


@pytest.fixture(scope="session")
def qemu() -> QemuBinary:
    require("qemu")
    return find_qemu()


@pytest.fixture
def plan(toy_guest: Path) -> BootPlan:
    return BootPlan(name="toy", memory_mib=MEMORY_MIB, vcpus=1, kernel=toy_guest, initrd=None, tsc_khz=SOME_TSC_KHZ)


@attrs.frozen
class Taken:
    """A machine that was saved, and its memory file."""

    machine: SavedMachine
    file: Path

    def plan(self, fd: int) -> RestorePlan:
        return RestorePlan(saved=self.machine, layers=(MemoryLayer(fd=fd, map=self.machine.memory),))

    async def checksum(self) -> str:
        return await anyio.to_thread.run_sync(lambda: hashlib.md5(self.file.read_bytes()).hexdigest())


async def take(machine: QemuMachine, file: Path, memory_mib: int = MEMORY_MIB) -> Taken:
    """Save a paused machine."""
    with file.open("w+b") as opened:
        saved = await machine.save(MemoryWriter(opened.fileno(), memory_mib << 20))
    return Taken(saved, file)


@asynccontextmanager
async def restored(
    plan: BootPlan, taken: Taken, qemu: QemuBinary, **options: Any
) -> AsyncIterator[tuple[QemuMachine, Witness]]:
    """A machine restored, its vCPUs held, and stopped at the end. The memory file is closed once it is there."""
    witness = Witness()
    machine = QemuMachine(plan, Timeline(), witness.take, qemu=qemu, **options)
    with taken.file.open("rb") as file:
        await machine.restore(taken.plan(file.fileno()))
    try:
        yield machine, witness
    finally:
        await machine.stop()


async def refused(plan: BootPlan, restore_plan: RestorePlan, qemu: QemuBinary, error: type[Exception]) -> str:
    """A restore that fails so, and leaves nothing; what it says."""
    before = holdings()
    witness = Witness()
    machine = QemuMachine(plan, Timeline(), witness.take, qemu=qemu)
    with anyio.fail_after(PATIENCE_S), pytest.raises(error) as caught:
        await machine.restore(restore_plan)
    assert not holdings() - before
    assert not witness.effects
    return str(caught.value)


@pytest.fixture
async def taken(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> Taken:
    """The toy, saved when it had said hello."""
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        return await take(machine, tmp_path / "memory")


# -- the toy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tsc_khz", [SOME_TSC_KHZ, None], ids=["microvm", "q35"])
async def test_a_restored_guest_goes_on_where_it_was_saved_and_so_does_the_original(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, tsc_khz: int | None
) -> None:
    plan = attrs.evolve(plan, tsc_khz=tsc_khz)
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        taken = await take(machine, tmp_path / "memory")
        # The kernel is in the snapshot: its file may be gone.
        elsewhere = attrs.evolve(plan, kernel=tmp_path / "gone", appended=b"")
        async with restored(elsewhere, taken, qemu) as (clone, heard):
            await clone.write("console", b"clone\n")
            await clone.resume()
            await heard.until_said("console", b"CLONE\n")
            assert heard.output("console") == b"CLONE\n"
            assert not heard.output("control")
            assert clone.guest_instant(1) is None
            await machine.resume()
            await machine.write("console", b"original\n")
            await witness.until_said("console", b"ORIGINAL\n")
            assert not witness.stops
            await clone.write("console", DEBUG_EXIT)
            assert (await heard.until_stopped()).code == 0x2A


@pytest.mark.requires("kvm")
async def test_a_guest_on_qemus_kvm_goes_on_as_well(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    async with running(plan, qemu, accel="kvm") as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        taken = await take(machine, tmp_path / "memory")
    async with restored(plan, taken, qemu, accel="kvm") as (clone, heard):
        await clone.resume()
        await clone.write("console", b"x")
        await heard.until_said("console", b"X")
    with taken.file.open("rb") as file:
        said = await refused(plan, taken.plan(file.fileno()), qemu, SnapshotMismatch)
    assert "restored accelerator: expected kvm, found tcg" in said


async def test_a_restored_guest_is_held_until_it_is_resumed(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    async with restored(plan, taken, qemu) as (clone, heard):
        await clone.write("console", b"x")
        await anyio.sleep(0.1)
        assert not heard.effects
        await clone.resume()
        await heard.until_said("console", b"X")
        await clone.pause()
        await clone.write("console", b"y")
        await clone.resume()
        await heard.until_said("console", b"Y")
        assert not heard.stops


@pytest.mark.parametrize("size", [1, 2, 17, 10_000])
async def test_what_was_typed_and_not_read_yet_is_read_by_original_and_clone(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, size: int
) -> None:
    typed = (b"0123456789abcdefghijklmnopqrstuvwxyz\n" * 1000)[:size]
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        before = witness.output("console")
        await machine.pause()
        await machine.write("console", typed)
        taken = await take(machine, tmp_path / "memory")
        assert ("serial" in taken.machine.sections) == (size > 1), "the toy uses no FIFO"
        async with restored(plan, taken, qemu) as (clone, heard):
            await clone.resume()
            await heard.until_said("console", typed.upper())
            await clone.write("console", b"!")
            await heard.until_said("console", b"!")
            assert heard.output("console") == typed.upper() + b"!"
        await machine.resume()
        await witness.until_said("console", typed.upper())
        assert witness.output("console") == before + typed.upper()


async def test_what_a_clone_writes_stays_its_own(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    before = await taken.checksum()
    async with (
        restored(plan, taken, qemu) as (one, first),
        restored(plan, taken, qemu) as (other, second),
    ):
        for clone, heard, text in ((one, first, b"one\n"), (other, second, b"other\n"), (one, first, b"more\n")):
            await clone.resume()
            await clone.write("console", text)
            await heard.until_said("console", text.upper())
        assert first.output("console") == b"ONE\nMORE\n"
        assert second.output("console") == b"OTHER\n"
    assert await taken.checksum() == before


async def test_a_machine_saved_again_without_running_gives_the_same(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        first, second = await take(machine, tmp_path / "a"), await take(machine, tmp_path / "b")
        assert first.machine == second.machine
        assert await first.checksum() == await second.checksum()
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")
        await machine.pause()
        assert (await take(machine, tmp_path / "c")).machine.sections != first.machine.sections


async def test_a_restored_machine_can_be_saved_and_restored(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, tmp_path: Path
) -> None:
    for generation in range(3):
        async with restored(plan, taken, qemu) as (clone, heard):
            await clone.resume()
            await clone.write("console", b"%d\n" % generation)
            await heard.until_said("console", b"%d\n" % generation)
            await clone.pause()
            again = await take(clone, tmp_path / f"memory{generation}")
            assert len(again.machine.sections["qemu"]) < 2 * len(taken.machine.sections["qemu"])
            assert abs(again.machine.memory.data_bytes - taken.machine.memory.data_bytes) < MIB
            await clone.resume()
            await clone.write("console", b"on\n")
            await heard.until_said("console", b"ON\n")
        taken = again


async def test_a_snapshot_that_may_only_be_read_is_copied(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    async with restored(plan, taken, qemu) as (clone, heard):
        await clone.resume()
        await clone.write("console", b"x")
        await heard.until_said("console", b"X")


async def test_the_phases_of_a_restore_are_recorded(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    timeline = Timeline()
    machine = QemuMachine(plan, timeline, lambda _: None, qemu=qemu)
    with taken.file.open("rb") as file:
        await machine.restore(taken.plan(file.fileno()))
    await machine.stop()
    assert [phase.name for phase in timeline.phases] == [
        "qemu_cmd_build",
        "memory_state_write",
        "qemu_fork",
        "qemu_qmp_connect",
        "device_state_restore",
    ]


# -- what cannot be saved ----------------------------------------------------------------------------------------------


async def test_a_running_machine_is_not_saved(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    async with running(plan, qemu) as (machine, _):
        with pytest.raises(StateError, match="paused"):
            await take(machine, tmp_path / "memory")
        await machine.pause()
    with pytest.raises(StateError):
        await take(machine, tmp_path / "memory")


async def test_a_difference_is_refused_and_precopy_does_nothing(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    async with running(plan, qemu) as (machine, _):
        with (tmp_path / "memory").open("w+b") as file:
            writer = MemoryWriter(file.fileno(), MEMORY_MIB << 20)
            await machine.precopy(writer)
            assert not writer.bytes_written
            await machine.pause()
            with pytest.raises(SnapshotFailed, match="difference"):
                await machine.save(writer, difference_of="base")
            machine.saved_as("base")
            await machine.save(writer)


async def test_a_vsock_device_keeps_a_machine_from_being_saved(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    plan = attrs.evolve(plan, devices=DeviceConfig(vsock=VsockConfig(uds_path=tmp_path / "vsock")))
    async with running(plan, qemu) as (machine, witness):
        await machine.pause()
        with pytest.raises(SnapshotFailed, match="vsock"):
            await take(machine, tmp_path / "memory")
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")


@attrs.define
class FullDisk:
    """A MemoryWriter that finds no more room."""

    size: int = MEMORY_MIB << 20

    def write(self, offset: int, data: object) -> None:
        raise SnapshotFailed("memory file", expected="room", found="No space left on device")


@pytest.mark.parametrize("generation", ["booted", "restored"])
async def test_a_full_disk_leaves_the_machine_to_run_on_and_to_be_saved_later(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, taken: Taken, generation: str
) -> None:
    start = running(plan, qemu) if generation == "booted" else restored(plan, taken, qemu)
    async with start as (machine, witness):
        await machine.resume()
        await machine.write("console", b"a")
        await witness.until_said("console", b"A")
        await machine.pause()
        with pytest.raises(SnapshotFailed, match="No space"):
            await machine.save(FullDisk())  # type: ignore[arg-type]
        await machine.resume()
        await machine.write("console", b"b")
        await witness.until_said("console", b"B")
        await machine.pause()
        again = await take(machine, tmp_path / "again")
        async with restored(plan, again, qemu) as (clone, heard):
            await clone.resume()
            await clone.write("console", b"c")
            await heard.until_said("console", b"C")


@pytest.mark.parametrize("turns", [0, 2, 6, 16])
@pytest.mark.parametrize("generation", ["booted", "restored"])
async def test_a_cancelled_save_leaves_the_machine_to_run_on(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, taken: Taken, generation: str, turns: int
) -> None:
    start = running(plan, qemu) if generation == "booted" else restored(plan, taken, qemu)
    async with start as (machine, witness):
        await machine.pause()
        before = holdings()
        task = asyncio.ensure_future(take(machine, tmp_path / "cancelled"))
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        del task
        assert not holdings() - before
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")
        assert not witness.stops


async def test_a_qemu_that_dies_while_it_is_saved_is_reported(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        await machine.pause()
        task = asyncio.ensure_future(take(machine, tmp_path / "memory"))
        await anyio.lowlevel.checkpoint()
        assert machine._process is not None
        assert machine._process.child is not None
        machine._process.child.kill()
        with suppress(MachineError, StateError):
            await task
        assert "SIGKILL" in (await witness.until_stopped()).detail
        del task
    assert not holdings() - before


# -- what cannot be restored -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [0, 4096, (MEMORY_MIB << 20) - 4096])
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
