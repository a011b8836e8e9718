"""A boot that is tried again: the host was short of something the first time, as QEMU says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncvmm import VM, MachineError, VMConfig
from asyncvmm.events.types import Event, PhaseEnded, VmTimingEvent
from asyncvmm.machine.qemu.binary import OVERRIDE, find_qemu

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "image")]


@pytest.fixture
def short_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how often QEMU is to find no memory, before it is the real one."""
    failures, wrapper, real = tmp_path / "failures", tmp_path / "qemu", find_qemu().path
    wrapper.write_text(
        f"""#!/bin/sh
case "$*" in *-version*) exec {real} "$@" ;; esac
if [ -s {failures} ]; then
    sed -i 1d {failures}
    echo "cannot set up guest memory: Cannot allocate memory" >&2
    exit 1
fi
exec {real} "$@"
"""
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv(OVERRIDE, str(wrapper))

    def fail(times: int) -> None:
        failures.write_text("once more\n" * times)

    return fail


async def test_a_retry_s_cost_does_not_vanish(short_of_memory: Callable[[int], None]) -> None:
    short_of_memory(1)
    events: list[Event] = []
    async with VM(VMConfig(memory_mib=128, accel="qemu", boot_timeout_s=60)) as vm:
        vm.events.attach(events.append)
        timing = await vm.boot()
    assert timing.boot_retries == 1
    phases = [event for event in events if isinstance(event, PhaseEnded)]
    boots = [(phase.attempt, phase.failed) for phase in phases if phase.name == "boot"]
    assert boots == [(0, True), (1, False)]
    (total,) = [phase for phase in phases if phase.name == "total"]
    (pause,) = [phase for phase in phases if phase.name == "retry_pause"]
    first, second = (phase for phase in phases if phase.name == "boot")
    assert first.duration_ns + pause.duration_ns + second.duration_ns <= total.duration_ns
    assert timing.boot_ms == second.duration_ns // 1_000_000
    assert vm.boot_profile.t_total_start == second.start_ns
    (told,) = [event for event in events if isinstance(event, VmTimingEvent)]
    assert told.boot_retries == 1


async def test_a_host_that_stays_short_is_given_up(short_of_memory: Callable[[int], None]) -> None:
    short_of_memory(9)
    events: list[Event] = []
    async with VM(VMConfig(memory_mib=128, accel="qemu", boot_timeout_s=60)) as vm:
        vm.events.attach(events.append)
        with pytest.raises(MachineError, match="Cannot allocate memory"):
            await vm.boot()
    boots = [event for event in events if isinstance(event, PhaseEnded) and event.name == "boot"]
    assert [(phase.attempt, phase.failed) for phase in boots] == [(0, True), (1, True), (2, True)]
