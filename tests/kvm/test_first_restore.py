"""The first restore of a process: what it imports is imported in a phase, on a worker thread."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import orjson
import pytest

from asyncvmm import VM
from tests.support.launched import Ready

pytestmark = pytest.mark.anyio
PATIENCE_S = 60

PROGRAM = """
import sys
import anyio, orjson
from asyncvmm import VM
from asyncvmm.snapshot.attempt import RestoreAttempt, choose_machine
from asyncvmm.snapshot.snapshot import Snapshot
import asyncvmm.snapshot.restoring
from asyncvmm.timing.timeline import Timeline

async def main():
    async with await Snapshot.load(sys.argv[1]) as snapshot:
        timeline, choice = Timeline(), await choose_machine(snapshot)
        await RestoreAttempt(snapshot, snapshot.config, "vm", choice, timeline, False).plan()
        planned, mapped = set(sys.modules), set()

        def listen(vm):
            vm.events.attach(lambda event: mapped.update(sys.modules) if event.event == "restore.mapped" else None)

        async with await VM.restore(snapshot, prepare=listen) as vm:
            while vm.restore_profile is None:
                await anyio.sleep(0.001)
            profile = vm.restore_profile.to_dict()
            steps = [(phase.name, phase.start_ns - vm.timeline.start_ns, phase.parent) for phase in vm.timeline.phases]
        late = [name for name in mapped - planned if name.startswith("asyncvmm")]
        phases = [phase.name for phase in timeline.phases]
        print(orjson.dumps({"late": late, "phases": phases, "profile": profile, "steps": steps}).decode())

anyio.run(main)
"""

IMPORTS = """
import sys, time
import anyio
from asyncvmm import VM

began = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "asyncvmm.snapshot.restoring":
            began.append(time.monotonic_ns())

async def main():
    sys.meta_path.insert(0, Watch())
    async with await VM.restore(sys.argv[1]) as vm:
        print(began[0] - vm.timeline.start_ns)

anyio.run(main)
"""


async def saved(vm: Callable[..., VM], where: Path) -> str:
    """A snapshot of a guest that runs on."""
    async with vm("RE") as original:
        await original.boot()
        (await original.snapshot(out=where, then="stop")).close()
    return str(where)


async def test_a_first_restore_begins_before_what_it_imports(vm: Callable[..., VM], tmp_path: Path) -> None:
    snapshot = await saved(vm, tmp_path / "s")
    with anyio.fail_after(PATIENCE_S):
        done = await anyio.run_process([sys.executable, "-c", IMPORTS, snapshot], stderr=sys.stderr)
    assert int(done.stdout) > 0


async def test_a_first_restore_imports_nothing_on_the_loop_and_its_profile_has_no_gap(
    vm: Callable[..., VM], tmp_path: Path
) -> None:
    snapshot = await saved(vm, tmp_path / "s")
    with anyio.fail_after(PATIENCE_S):
        done = await anyio.run_process([sys.executable, "-c", PROGRAM, snapshot], stderr=sys.stderr)
    found = orjson.loads(done.stdout)
    assert found["late"] == []
    assert found["phases"] == ["machine_import"]
    assert ["snapshot_open", 0, "total"] in found["steps"]
    profile = found["profile"]
    assert profile["restore_total"] == profile["total_without_resume"] + profile["restore_misc"]
    assert profile["restore_misc"] > 0


async def test_a_restore_that_is_launched_takes_no_look_at_what_came_before(ready: Ready) -> None:
    async with ready("RE") as snapshot, await VM.restore(snapshot) as vm:
        names = {phase.name for phase in vm.timeline.phases}
        assert "kvm_create_vm" in names
        assert "snapshot_open" not in names
