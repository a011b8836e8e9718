"""The public VM on /dev/kvm with a guest of other people's making (tests/guests/kvm/foreign.S): how boots go, and fail.

The guest's command line is its program, a letter a step; see its source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import anyio
import orjson
import pytest
from jsonschema import Draft202012Validator

from asyncvmm import VM, BootError, GuestStopped, StateError
from asyncvmm.events.schema import schema
from asyncvmm.events.types import Event, GuestExit, VmError, VmState
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

PATIENCE_S = 60
MOST_RSS_GROWTH = 64 << 20

Make = Callable[..., VM]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# -- a boot that goes well ---------------------------------------------------------------------------------------------


async def test_ready_on_the_console_of_a_foreign_guest_counts(vm: Make) -> None:
    async with vm("BRE") as machine:
        timing = await machine.boot()
        assert (machine.state, machine.accel) == ("ready", "kvm")
        assert machine.guest_profile.ready_ns == 7
        assert timing is machine.timing


async def test_on_kvm_the_timing_has_what_applies_and_nothing_of_qemu(vm: Make) -> None:
    async with vm("RE") as machine:
        timing = await machine.boot()
    recorded = {"setup_ms", "boot_ms", "gvproxy_start_ms", "guest_wait_ms", "boot_retries", "total_ms"}
    assert set(timing.to_dict()) == recorded
    assert (timing.gvproxy_start_ms, timing.boot_retries) == (0, 0)
    assert (timing.qemu_cmd_build_ms, timing.qemu_fork_ms, timing.overlay_ms) == (None, None, None)


async def test_every_json_line_of_a_boot_fits_the_schema(vm: Make) -> None:
    lines: list[bytes] = []
    async with vm("BRE", serial_lines=True) as machine:
        machine.stream_to(lines.append)
        await machine.boot()
    records = [orjson.loads(line) for line in b"".join(lines).splitlines()]
    for record in records:
        await anyio.to_thread.run_sync(Draft202012Validator(schema()).validate, record)
    names = [record["event"] for record in records]
    for name in ("accel.probe", "vm.state", "phase", "guest.boot_time", "guest.ready", "vm.timing", "serial.line"):
        assert name in names
    assert [record["state"] for record in records if record["event"] == "vm.state"] == [
        "starting",
        "booting",
        "ready",
        "stopped",
    ]


async def test_what_is_typed_comes_back(vm: Make) -> None:
    async with vm("RE") as machine:
        await machine.boot()
        console = machine.console.subscribe()
        await machine.console.write(b"over\n")
        heard = b""
        with anyio.fail_after(PATIENCE_S):
            while b"over\n" not in heard:
                heard += await anext(console)


async def test_a_paused_vm_takes_no_input_and_goes_on_when_resumed(vm: Make) -> None:
    async with vm("RE") as machine:
        await machine.boot()
        await machine.pause()
        with pytest.raises(StateError, match="paused"):
            await machine.console.write(b"x")
        with pytest.raises(StateError, match="paused"):
            await machine.pause()
        await machine.resume()
        with pytest.raises(StateError, match="ready"):
            await machine.resume()
        lines = machine.console.lines()
        await machine.console.write(b"on\n")
        with anyio.fail_after(PATIENCE_S):
            assert await anext(lines) == "on"
        await lines.aclose()  # type: ignore[attr-defined]


async def test_exits_can_be_counted_and_traced(vm: Make) -> None:
    async with vm("RE") as machine:
        await machine.boot()
        assert machine.exits is not None
        assert machine.exits.by_address["out 0x3f8"].count >= len("READY\n")
        async for traced in machine.trace_exits():
            assert traced.vcpu == 0
            break


async def test_a_vm_boots_once(vm: Make) -> None:
    async with vm("RE") as machine:
        await machine.boot()
        with pytest.raises(StateError, match="a new VM"):
            await machine.boot()
    with pytest.raises(StateError, match="a new VM"):
        await machine.boot()


async def test_a_vm_that_is_being_stopped_boots_no_more_and_leaves_nothing(
    vm: Make, holdings: Callable[[], Holdings]
) -> None:
    before, machine = holdings(), vm("RE")
    booting = asyncio.ensure_future(machine.boot())  # begins when the stop has
    await machine.stop()
    with pytest.raises(StateError):
        await booting
    assert machine.state == "stopped"
    assert holdings() == before


async def test_a_stopped_vm_boots_no_more_and_stops_again(vm: Make) -> None:
    machine = vm("RE")
    await machine.stop()
    await machine.stop()
    assert machine.state == "stopped"
    with pytest.raises(StateError):
        await machine.boot()
    with pytest.raises(GuestStopped):
        await machine.events.ready


# -- boots that fail ---------------------------------------------------------------------------------------------------

ENDS = {
    "T": ("triple-fault", "SHUTDOWN"),
    "O": ("shutdown", "IO"),
    "X": ("reset", "IO"),
    "D": ("debug-exit", "IO"),
    "PH": ("panic", None),
    "PX": ("panic", None),
}


@pytest.mark.parametrize(("program", "reason", "last_exit"), [(word, *end) for word, end in ENDS.items()])
async def test_a_guest_that_ends_before_ready_fails_the_boot_with_the_evidence(
    vm: Make, program: str, reason: str, last_exit: str | None
) -> None:
    machine = vm("B" + program)
    events: list[Event] = []
    machine.events.attach(events.append)
    with anyio.fail_after(PATIENCE_S), pytest.raises(BootError) as caught:
        await machine.boot()
    error = caught.value
    assert error.reason == reason
    assert error.last_exit == last_exit or last_exit is None
    check_evidence(error)
    assert error.serial_tail.startswith(b"BOOT_TIME:ready:7\n")
    assert machine.state == "failed"
    assert [event.state for event in events if isinstance(event, VmState)] == ["starting", "booting", "failed"]
    assert len([event for event in events if isinstance(event, VmError)]) == 1


def check_evidence(error: BootError) -> None:
    assert error.last_exit is not None
    assert error.rip is not None
    assert error.exits is not None
    assert error.exits.total > 0
    assert {"accel", "setup", "kernel_load"} <= error.phases.keys()
    assert len(error.serial_tail) <= 4096
    assert "\n" not in str(error)


@pytest.mark.parametrize("program", ["N", "L"], ids=["binary rubbish", "a line without end"])
async def test_a_guest_that_prints_for_ever_times_out_in_bounded_memory(vm: Make, program: str) -> None:
    before = resident_bytes()
    machine = vm(program, boot_timeout_s=2.0, stall_timeout_s=1.0)
    reader = machine.console.subscribe()
    with pytest.raises(BootError) as caught:
        await machine.boot()
    assert caught.value.reason == "timeout"
    check_evidence(caught.value)
    assert len(caught.value.serial_tail) == 4096
    assert reader.take()
    assert resident_bytes() - before < MOST_RSS_GROWTH


async def test_a_guest_that_prints_and_is_silent_is_stalled(vm: Make) -> None:
    machine = vm("BH", boot_timeout_s=60.0, stall_timeout_s=0.3)
    with anyio.fail_after(PATIENCE_S / 2), pytest.raises(BootError) as caught:
        await machine.boot()
    assert caught.value.reason == "stalled"
    check_evidence(caught.value)
    assert caught.value.found == "no sign of life for 0.3 s"


async def test_a_guest_that_is_silent_runs_into_the_timeout_if_that_is_shorter(vm: Make) -> None:
    machine = vm("BH", boot_timeout_s=0.5)
    with pytest.raises(BootError) as caught:
        await machine.boot()
    assert caught.value.reason == "timeout"


# -- what can happen after READY ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "reason"), [("T", "triple-fault"), ("PH", "panic")])
async def test_a_guest_that_dies_after_ready_raises_wherever_somebody_waits(
    vm: Make, program: str, reason: str
) -> None:
    async with vm("RW" + program) as machine:
        await machine.boot()
        subscription = machine.events.subscribe(types=[GuestExit])
        await machine.console.write(b"!")
        with anyio.fail_after(PATIENCE_S), pytest.raises(GuestStopped) as caught:
            await machine.events.exit
        assert caught.value.reason == reason
        assert caught.value.exits is not None
        with pytest.raises(GuestStopped):
            await anext(subscription)
        assert await machine.events.stopped == reason
        assert machine.state == "failed"
        with pytest.raises(StateError):
            await machine.console.write(b"x")


@pytest.mark.parametrize(("program", "reason"), [("O", "shutdown"), ("X", "reset"), ("D", "debug-exit")])
async def test_a_guest_that_ends_itself_after_ready_has_simply_stopped(vm: Make, program: str, reason: str) -> None:
    async with vm("RW" + program) as machine:
        await machine.boot()
        await machine.console.write(b"!")
        with anyio.fail_after(PATIENCE_S):
            async for _ in machine.events:
                pass
        assert await machine.events.stopped == reason
        assert machine.state == "stopped"
        await machine.shutdown()
    assert machine.state == "stopped"


async def test_nothing_a_workload_prints_on_the_console_counts(vm: Make) -> None:
    async with vm("BRWFE") as machine:
        await machine.boot()
        lines = machine.console.lines()
        events: list[str] = []
        machine.events.attach(lambda event: events.append(event.event))
        await machine.console.write(b"!")
        await machine.events.pre_exec
        await machine.console.write(b"done\n")
        with anyio.fail_after(PATIENCE_S):
            async for line in lines:
                if line == "done":
                    break
        assert b"BOOT_TIME:command_loop:9\n" in machine.console.tail
        assert events == ["guest.pre_exec"]
        assert (machine.guest_profile.ready_ns, machine.guest_profile.command_loop_ns) == (7, None)


@pytest.mark.parametrize(("program", "state"), [("RT", "failed"), ("RO", "stopped")])
async def test_a_guest_that_ends_right_after_ready_was_booted_and_is_not_ready_any_more(
    vm: Make, program: str, state: str
) -> None:
    async with vm(program) as machine:
        timing = await machine.boot()
        assert timing.total_ms is not None
        await machine.events.stopped
        await anyio.sleep(0.01)
        assert machine.state == state


@pytest.mark.parametrize("delay_s", [0, 0.001, 0.003, 0.01, 0.03, 0.1])
async def test_stopping_a_vm_ends_its_boot(vm: Make, delay_s: float) -> None:
    machine = vm("H")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(boot_that_is_stopped, machine)
        await anyio.sleep(delay_s)
        await machine.stop()
        assert machine.state == "stopped"


async def boot_that_is_stopped(machine: VM) -> None:
    with pytest.raises(StateError, match=r"stop\(\)|a new VM"):
        await machine.boot()


async def test_shutdown_waits_no_longer_than_it_is_told_for_a_deaf_guest(vm: Make) -> None:
    async with vm("RE") as machine:
        await machine.boot()
        with anyio.fail_after(PATIENCE_S / 2):
            await machine.shutdown(timeout_s=0.2)
        assert machine.state == "stopped"


async def test_vms_run_side_by_side_in_one_program(vm: Make) -> None:
    async with vm("RE") as first, vm("RE") as second, anyio.create_task_group() as tasks:
        tasks.start_soon(first.boot)
        tasks.start_soon(second.boot)
        await first.events.ready
        await second.events.ready
        assert first.name != second.name
