"""What a restore does before there is a machine: where that takes its time it is a phase."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import attrs
import pytest

from asyncvmm.machine.base import AccelName
from asyncvmm.snapshot.attempt import RestoreAttempt, choose_machine
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.guest_record import SECTION, GuestRecord
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.timing.timeline import Timeline
from tests.support.snapshots import SIZE, manifest_of

pytestmark = pytest.mark.anyio


def snapshot_of(machine: AccelName, where: Path) -> Snapshot:
    """Of no VM at all, as that machine would have made it."""
    with SnapshotDirectory.create(where) as made:
        manifest = attrs.evolve(manifest_of(made.id), machine=machine, extra={"plan": {}})
        memory = MemoryWriter(made.memory_fd, SIZE).map()
        made.commit(manifest, {SECTION: GuestRecord().to_section()}, memory)
    return Snapshot.open(where)


async def phases_of_a_plan(machine: AccelName, where: Path) -> dict[str, str | None]:
    """The phases of what comes before the machine, with their parents."""
    timeline = Timeline()
    with closing(snapshot_of(machine, where)) as snapshot, timeline.phase("total"):
        choice = await choose_machine(snapshot)
        attempt = RestoreAttempt(snapshot, snapshot.config, "vm", choice, timeline, track_dirty=False)
        await attempt.plan()
        assert attempt.made_plan is not None
    return {phase.name: phase.parent for phase in timeline.phases}


@pytest.mark.requires("qemu")
@pytest.mark.stalls
async def test_finding_out_what_a_restore_on_qemu_runs_on_is_a_phase(tmp_path: Path) -> None:
    assert (await phases_of_a_plan("qemu", tmp_path / "s"))["accel"] == "total"


@pytest.mark.stalls
async def test_a_restore_on_kvm_finds_out_itself_whether_that_can_be_had(tmp_path: Path) -> None:
    assert "accel" not in await phases_of_a_plan("kvm", tmp_path / "s")
