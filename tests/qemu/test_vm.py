"""The public VM with a real Linux, the default image on QEMU/TCG: a life on each event loop, seen from all sides."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import attrs
import orjson
import pytest
from jsonschema import Draft202012Validator

from asyncvmm import VM, BootError, GuestStopped, StateError, VMConfig, VmTiming
from asyncvmm.device_config import DriveConfig
from asyncvmm.events.schema import schema
from asyncvmm.events.types import (
    Event,
    GuestBootTime,
    GuestExit,
    GuestHeartbeat,
    GuestListener,
    GuestPreExec,
    GuestReady,
    VmState,
)
from asyncvmm.timing.profiles import GuestBootProfile

pytestmark = pytest.mark.requires("qemu", "image")

PATIENCE_S = 120
STAGES = ["init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop"]
WORKLOAD = """
echo "hello from $(uname -s), $GREETING"
nc -l -p 8080 &
read line
echo "read <$line>"
echo READY; echo BOOT_TIME:ready:1; echo heartbeat counter=99; echo workload-exit code=0
exit 7
"""


@attrs.define
class Life:
    """What was seen of one VM from new to stopped."""

    vm: VM
    timing: VmTiming = attrs.field(factory=VmTiming)
    profile: GuestBootProfile = attrs.field(factory=GuestBootProfile)
    events: list[Event] = attrs.field(factory=list)
    iterated: list[Event] = attrs.field(factory=list)
    output: str = ""
    milestones: dict[str, Any] = attrs.field(factory=dict)
    refusals: dict[str, str] = attrs.field(factory=dict)
    silent_while_paused: bool = False
    records: list[dict[str, Any]] = attrs.field(factory=list)

    def names(self, prefix: str = "") -> list[str]:
        return [event.event for event in self.events if event.event.startswith(prefix)]

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


async def live(jsonl: Path) -> Life:
    config = VMConfig(accel="qemu", workload=("sh", "-c", WORKLOAD), env=("GREETING=well met",), name="life")
    vm = VM(config)
    life = Life(vm)
    vm.events.attach(life.events.append)
    vm.stream_to(jsonl)
    with anyio.fail_after(PATIENCE_S):
        async with vm, anyio.create_task_group() as tasks:
            tasks.start_soon(iterate, life)
            await refuse(life, "pause of a new VM", vm.pause)
            console = vm.console.subscribe()
            life.timing = await vm.boot()
            await refuse(life, "second boot", vm.boot)
            await refuse(life, "resume of a running VM", vm.resume)
            life.milestones = {
                "ready": await vm.events.ready,
                "pre_exec": await vm.events.pre_exec,
                "listener": await vm.events.listener,
            }
            await until_heartbeats(life, 2)
            await pause_a_while(life)
            await vm.console.write(b"typed\n")
            life.milestones["exit"] = await vm.events.exit
            life.profile = vm.guest_profile
            await vm.shutdown()
            life.milestones["stopped"] = await vm.events.stopped
            life.output = console.take().decode().replace("\r\n", "\n")
            await vm.stop()
            await refuse(life, "boot of a stopped VM", vm.boot)
            await refuse(life, "input to a stopped VM", lambda: vm.console.write(b"x"))
    return life


async def iterate(life: Life) -> None:
    async for event in life.vm.events:
        life.iterated.append(event)


async def refuse(life: Life, what: str, call: Callable[[], Any]) -> None:
    try:
        await call()
    except StateError as error:
        life.refusals[what] = str(error)


async def until_heartbeats(life: Life, count: int) -> None:
    async with life.vm.events.subscribe(types=[GuestHeartbeat]) as heartbeats:
        while len(life.of(GuestHeartbeat)) < count:
            await anext(heartbeats)


async def pause_a_while(life: Life) -> None:
    """Longer than a heartbeat's period: none may come."""
    await life.vm.pause()
    await anyio.sleep(0.05)
    before = len(life.events)
    await anyio.sleep(1.5)
    life.silent_while_paused = len(life.events) == before
    await refuse(life, "input to a paused VM", lambda: life.vm.console.write(b"x"))
    await life.vm.resume()


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    jsonl = tmp_path_factory.mktemp("life") / "events.jsonl"
    life = anyio.run(live, jsonl, backend_options={"use_uvloop": request.param})
    life.records = [orjson.loads(line) for line in jsonl.read_bytes().splitlines()]
    return life


# -- timing ------------------------------------------------------------------------------------------------------------

RECORDED: dict[str, Callable[[VmTiming, int], bool]] = {
    "setup_ms": lambda timing, value: value >= 0,
    "boot_ms": lambda timing, value: value >= (timing.guest_wait_ms or 0),
    "qemu_cmd_build_ms": lambda timing, value: value >= 0,
    "gvproxy_start_ms": lambda timing, value: value == 0,
    "qemu_fork_ms": lambda timing, value: value >= 0,
    "guest_wait_ms": lambda timing, value: value > 0,
    "boot_retries": lambda timing, value: value == 0,
    "total_ms": lambda timing, value: value == (timing.setup_ms or 0) + (timing.boot_ms or 0),
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_applies_to_a_boot_on_qemu_is_recorded(life: Life, name: str) -> None:
    value = life.timing.to_dict()[name]
    assert isinstance(value, int)
    assert RECORDED[name](life.timing, value)


def test_nothing_else_is_recorded(life: Life) -> None:
    assert set(life.timing.to_dict()) == set(RECORDED)
    assert life.timing.overlay_ms is None
    assert life.vm.timing is life.timing


def test_the_guests_stages_are_in_order(life: Life) -> None:
    values = [getattr(life.profile, f"{stage}_ns") for stage in STAGES]
    assert all(isinstance(value, int) and value > 0 for value in values)
    assert values == sorted(values)


# -- events ------------------------------------------------------------------------------------------------------------


def test_states_follow_one_another(life: Life) -> None:
    states = [(event.previous, event.state) for event in life.of(VmState)]
    assert states == [
        ("new", "starting"),
        ("starting", "booting"),
        ("booting", "ready"),
        ("ready", "paused"),
        ("paused", "ready"),
        ("ready", "stopped"),
    ]


def test_guest_events_come_in_the_contracts_order(life: Life) -> None:
    assert [event.stage for event in life.of(GuestBootTime)] == STAGES
    names = [name for name in life.names("guest.") if name not in ("guest.boot_time", "guest.heartbeat")]
    assert names == ["guest.ready", "guest.pre_exec", "guest.listener", "guest.exit"]


def test_accelerator_phases_and_timing_are_told(life: Life) -> None:
    names = life.names()
    assert names.index("accel.probe") < names.index("guest.ready") < names.index("vm.timing")
    phases = {record["name"] for record in life.records if record["event"] == "phase"}
    assert {"accel", "setup", "boot", "boot_wait", "qemu_cmd_build", "qemu_fork", "qemu_qmp_connect"} <= phases
    timing = next(record for record in life.records if record["event"] == "vm.timing")
    assert life.timing.to_dict().items() <= timing.items()


def test_heartbeats_count_up_from_one(life: Life) -> None:
    counters = [event.counter for event in life.of(GuestHeartbeat)]
    assert counters == list(range(1, len(counters) + 1))
    assert len(counters) >= 2


def test_milestones_give_their_events(life: Life) -> None:
    assert isinstance(life.milestones["ready"], GuestReady)
    assert isinstance(life.milestones["pre_exec"], GuestPreExec)
    assert life.milestones["exit"] == 7
    assert life.milestones["stopped"] == "shutdown"
    listener = life.milestones["listener"]
    assert isinstance(listener, GuestListener)
    assert (listener.proto.removesuffix("6"), listener.port) == ("tcp", 8080)


def test_an_iteration_sees_the_same_and_ends_with_the_vm(life: Life) -> None:
    assert life.iterated == [event for event in life.events if event in life.iterated]
    assert life.iterated[-1] == life.of(VmState)[-1]


def test_json_lines_fit_the_schema_and_miss_nothing(life: Life) -> None:
    validator = Draft202012Validator(schema())
    for record in life.records:
        validator.validate(record)
        assert (record["v"], record["vm"]) == (1, "life")
    assert [record["event"] for record in life.records] == life.names()


# -- the workload ------------------------------------------------------------------------------------------------------


def test_the_workload_has_its_environment_and_a_console_both_ways(life: Life) -> None:
    assert "hello from Linux, well met\n" in life.output
    assert "read <typed>\n" in life.output


def test_what_a_workload_prints_is_no_marker(life: Life) -> None:
    assert "heartbeat counter=99\n" in life.output
    assert len(life.of(GuestReady)) == len(life.of(GuestExit)) == 1


def test_a_paused_guest_shows_no_life(life: Life) -> None:
    assert life.silent_while_paused


def test_calls_that_do_not_fit_the_state_are_refused(life: Life) -> None:
    assert set(life.refusals) == {
        "pause of a new VM",
        "second boot",
        "resume of a running VM",
        "input to a paused VM",
        "boot of a stopped VM",
        "input to a stopped VM",
    }


# -- several, and ends in any state ------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["ready", "paused"])
async def test_two_vms_live_in_one_program_and_end_in_whatever_state(end: str) -> None:
    vms = [VM(VMConfig(accel="qemu", memory_mib=128)) for _ in range(2)]
    with anyio.fail_after(PATIENCE_S):
        async with vms[0], vms[1]:
            async with anyio.create_task_group() as tasks:
                for vm in vms:
                    tasks.start_soon(vm.boot)
            if end == "paused":
                await vms[0].pause()
            assert [vm.state for vm in vms] == [end, "ready"]
            await vms[0].stop()
            assert [vm.state for vm in vms] == ["stopped", "ready"]
            with pytest.raises(GuestStopped):
                await vms[0].events.exit
            await vms[1].shutdown()
    assert await vms[1].events.stopped == "shutdown"


@pytest.mark.anyio
async def test_a_root_without_a_file_system_fails_the_boot_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"nonsense" * 65536)
    vm = VM(VMConfig(accel="qemu", drives=[DriveConfig(path=tmp_path / "image", root=True, read_only=True)]))
    with anyio.fail_after(PATIENCE_S), pytest.raises(BootError) as caught:
        await vm.boot()
    assert caught.value.reason == "init-error"
    assert caught.value.found == f"init-error (the root file system: {os.strerror(errno.EINVAL)})"
    assert b"no root on vda: Invalid argument" in caught.value.serial_tail
    assert vm.state == "failed"
