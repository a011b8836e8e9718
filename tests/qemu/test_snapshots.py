"""Snapshots of a real Linux through the public VM and the command line, on QEMU/TCG."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import orjson
import pytest

from asyncvmm import VM, DriveConfig, VMConfig, VsockConfig
from asyncvmm.accel import choose_accel
from asyncvmm.errors import SnapshotFailed, TriggerImpossible
from asyncvmm.events.outputs import open_output
from asyncvmm.events.snapshot_types import RestoreStep
from asyncvmm.events.types import Event, VmState
from asyncvmm.snapshot.predicate import Predicate
from asyncvmm.snapshot.predicates import after, console, pre_exec
from asyncvmm.snapshot.resources import MAX_MS, SnapshotResources
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.snapshot_commands import Runs

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "image")]

PATIENCE_S = 120
SAY = "echo random=$(head -c16 /dev/urandom | od -An -tx1 | tr -d ' \n') time=$(date +%s.%N)"
MOST_CLOCK_ERROR_S = 2.0
"""TCG's clones share two cores; how exact the clock is, is the lab's to say."""


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The snapshot is shared, so is the loop."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
async def held(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Snapshot, str]]:
    """A guest saved one step before its workload ran; and what that said in the original, which ran on."""
    out = tmp_path_factory.mktemp("snapshots") / "held"
    when = SnapshotResources(on_pre_exec=True, quiesce_ms=10, out_path=out)
    taken: list[Snapshot] = []
    async with VM(VMConfig(accel="qemu", workload=("sh", "-c", SAY))) as vm:

        async def take() -> None:
            taken.append(await vm.snapshot(when))

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                group.start_soon(take)
                await anyio.lowlevel.checkpoint()
                reader = vm.console.subscribe()
                await vm.boot()
            said = await answer(vm, reader)
    async with taken[0] as snapshot:
        yield snapshot, said


async def answer(vm: VM, reader: Any) -> str:
    assert await vm.events.exit == 0
    text = reader.take().decode()
    found = re.search(r"random=[0-9a-f]{32} time=[0-9.]+", text)
    assert found, text
    return found[0]


async def test_every_clone_says_something_else_at_the_right_time(held: tuple[Snapshot, str]) -> None:
    snapshot, original = held
    readers: dict[int, Any] = {}
    steps: list[Event] = []

    def prepare(vm: VM, number: int) -> None:
        readers[number] = vm.console.subscribe()
        vm.events.attach(steps.append)

    with anyio.fail_after(PATIENCE_S):
        async with snapshot.clones(3, prepare=prepare) as clones:
            answers = [await answer(clone, readers[number]) for number, clone in enumerate(clones)]
            now = time.time()
    randoms = {text.split()[0] for text in [*answers, original]}
    assert len(randoms) == 4
    for text in answers:
        assert abs(now - float(text.split("time=")[1])) < PATIENCE_S
    assert {step.step for step in steps if isinstance(step, RestoreStep)} >= {"entropy"}


async def test_the_manifest_says_which_machine_made_it_and_that_the_workload_waits(held: tuple[Snapshot, str]) -> None:
    snapshot, _ = held
    assert snapshot.manifest.machine == "qemu"
    assert snapshot.manifest.window
    assert snapshot.manifest.extra["trigger"]["trigger"] == "pre_exec"


@pytest.mark.parametrize(
    "when", [SnapshotResources(on_pre_exec=True), pre_exec(), pre_exec() | after(MAX_MS)], ids=["policy", "one", "any"]
)
async def test_a_snapshot_that_is_asked_for_as_the_boot_begins_has_the_workload_held(
    when: SnapshotResources | Predicate, tmp_path: Path
) -> None:
    taken: list[Snapshot] = []
    async with VM(VMConfig(accel="qemu", workload=("sh", "-c", SAY))) as vm:

        async def take() -> None:
            taken.append(await vm.snapshot(when, out=tmp_path / "s"))

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                group.start_soon(take)
                await vm.boot()
            assert await vm.events.exit == 0, "it was let go"
    async with taken[0] as snapshot:
        assert snapshot.guest.in_window
        assert snapshot.manifest.window


async def armed(vm: VM, when: SnapshotResources | Predicate, out: Path | None = None) -> asyncio.Task[Snapshot]:
    """A call for a snapshot that was begun before the boot."""
    task = asyncio.create_task(vm.snapshot(when, out=out))
    await anyio.lowlevel.checkpoint()
    return task


@pytest.mark.parametrize(
    "when",
    [SnapshotResources(on_pre_exec=True, at_heartbeat=1, after_ms=0), pre_exec() | after(0)],
    ids=["policy", "any"],
)
async def test_a_workload_is_let_go_though_something_else_came_first(when: SnapshotResources | Predicate) -> None:
    async with VM(VMConfig(accel="qemu", workload=("true",))) as vm:
        with anyio.fail_after(PATIENCE_S):
            call = await armed(vm, when)
            await vm.boot()
            async with await call as snapshot:
                assert snapshot.manifest.extra["trigger"]["trigger"] != "pre_exec"
            assert await vm.events.exit == 0


async def test_a_workload_that_was_let_run_cannot_be_saved_before_its_exec() -> None:
    async with VM(VMConfig(accel="qemu", workload=("sleep", "600"))) as vm:
        with anyio.fail_after(PATIENCE_S):
            await vm.boot()
            await vm.events.pre_exec
            for when in (SnapshotResources(on_pre_exec=True), pre_exec(), pre_exec() & after(0)):
                with pytest.raises(TriggerImpossible, match="ask before boot"):
                    await vm.snapshot(when)
            async with await vm.snapshot(pre_exec() | after(1)) as snapshot:
                assert snapshot.manifest.extra["trigger"]["detail"] == "1 ms"
                assert not snapshot.manifest.window
        assert vm.state == "ready"


QEMUS_PHASES = ("qemu_cmd_build", "qemu_fork", "qemu_qmp_connect")


async def test_a_restores_profile_has_all_that_qemu_took_until_its_vcpus_ran(held: tuple[Snapshot, str]) -> None:
    snapshot, _ = held
    with anyio.fail_after(PATIENCE_S):
        async with await VM.restore(snapshot) as vm:
            took, profile = vm.timeline.durations(), vm.restore_profile
            await vm.pause()
            await vm.resume()
            assert vm.timeline.durations()["resume_kvm_run"] == took["resume_kvm_run"], "that is no restore's"
    assert profile is not None
    assert profile.vm_arch_setup == sum(took[name] for name in QEMUS_PHASES)
    assert profile.to_dict() == {
        "vm_arch_setup": profile.vm_arch_setup,
        "memory_state_write": took["memory_state_write"],
        "device_state_restore": took["device_state_restore"],
        "resume_kvm_run": took["resume_kvm_run"],
        "total_without_resume": profile.total_without_resume,
        "total_with_resume": profile.total_with_resume,
        "restore_total": took["total"],
        "restore_misc": profile.restore_misc,
    }


async def test_a_guest_on_qemu_has_no_first_exit_that_could_be_told(held: tuple[Snapshot, str]) -> None:
    snapshot, _ = held
    told: list[str] = []

    def listen(vm: VM) -> None:
        vm.events.attach(lambda event: told.append(event.event))

    with anyio.fail_after(PATIENCE_S):
        async with await VM.restore(snapshot, prepare=listen) as vm:
            assert await vm.events.exit == 0
    assert [name for name in told if name.startswith("restore.")] == [
        "restore.mapped",
        "restore.first_guest_event",
        "restore.step",
        "restore.step",
        "restore.profile",
    ]


async def test_a_difference_is_kvms_alone(held: tuple[Snapshot, str]) -> None:
    snapshot, _ = held
    async with await VM.restore(snapshot, paused=True) as vm:
        with pytest.raises(SnapshotFailed):
            await vm.snapshot(base=snapshot)
        assert vm.state == "paused"


async def test_a_difference_is_refused_before_anything_is_waited_for_or_held(held: tuple[Snapshot, str]) -> None:
    snapshot, _ = held
    states: list[str] = []

    def take(event: Event) -> None:
        if isinstance(event, VmState):
            states.append(event.state)

    with anyio.fail_after(PATIENCE_S):
        async with await VM.restore(snapshot) as vm:
            vm.events.attach(take)
            for when in (None, console(rb"never")):
                with pytest.raises(SnapshotFailed, match=r"snapshot base: expected none on QEMU, .*found ") as caught:
                    await vm.snapshot(when, base=snapshot)
                assert caught.value.found == snapshot.path
            assert states == []


@pytest.mark.parametrize("accel", ["qemu", "auto"])
async def test_a_vm_that_is_yet_to_boot_is_refused_a_base_as_well(held: tuple[Snapshot, str], accel: Any) -> None:
    snapshot, _ = held
    with anyio.move_on_after(1):
        async with VM(VMConfig(accel=accel, workload=("true",), track_dirty=True)) as vm:
            with pytest.raises(SnapshotFailed, match="snapshot base: expected none on QEMU"):
                await vm.snapshot(pre_exec(), base=snapshot)
            assert vm.state == "new"
            return
    pytest.fail("it waits")


async def test_a_vm_that_cannot_be_saved_is_refused_a_snapshot_before_it_boots(tmp_path: Path) -> None:
    for devices, said in (
        ({"vsock": VsockConfig(uds_path=tmp_path / "v")}, "vsock, a vhost-user device"),
        ({"drives": [DriveConfig(path=tmp_path / "image")]}, f"drive drive0, which writes to {tmp_path / 'image'}"),
    ):
        async with VM(VMConfig(accel="qemu", workload=("true",), **devices)) as vm:
            with anyio.move_on_after(1):
                with pytest.raises(SnapshotFailed) as caught:
                    await vm.snapshot(pre_exec(), out=tmp_path / "s")
                assert caught.value.found == said
                assert vm.state == "new"
                continue
        pytest.fail("it waits")
    assert not os.listdir(tmp_path)


async def test_a_vm_whose_machine_turns_out_not_to_save_it_is_refused_one_as_soon_as_it_is_ready(
    tmp_path: Path,
) -> None:
    if (await choose_accel()).accel != "qemu":
        pytest.skip("KVM is chosen, which saves a vsock device")
    config = VMConfig(workload=("sleep", "600"), vsock=VsockConfig(uds_path=tmp_path / "v"))
    refused: list[SnapshotFailed] = []

    async def take() -> None:
        with pytest.raises(SnapshotFailed, match="vsock") as caught:
            await vm.snapshot(console(rb"never"), out=tmp_path / "s")
        refused.append(caught.value)

    with anyio.fail_after(PATIENCE_S):
        async with VM(config) as vm, anyio.create_task_group() as group:
            group.start_soon(take)
            await anyio.lowlevel.checkpoint()
            assert not refused
            await vm.boot()
    assert refused
    assert os.listdir(tmp_path) == []


async def test_a_listener_that_cannot_come_any_more_counts_as_parked() -> None:
    async with VM(VMConfig(accel="qemu", workload=("true",))) as vm:
        with anyio.fail_after(PATIENCE_S):
            await vm.boot()
            async with await vm.snapshot(SnapshotResources(on_listener=True)) as snapshot:
                assert snapshot.manifest.extra["trigger"]["trigger"] == "parked"


async def test_a_workload_can_be_held_without_a_snapshot() -> None:
    async with VM(VMConfig(accel="qemu", workload=("echo", "let go"), pre_exec_window=True)) as vm:
        with anyio.fail_after(PATIENCE_S):
            await vm.boot()
            await vm.events.pre_exec
            with pytest.raises(TimeoutError):
                with anyio.fail_after(0.3):
                    await vm.events.exit
            await vm.go()
            assert await vm.events.exit == 0


# -- the command line --------------------------------------------------------------------------------------------------


async def test_a_clone_is_stopped_as_soon_as_its_workload_has_ended(held: tuple[Snapshot, str], tmp_path: Path) -> None:
    snapshot, _ = held
    states: list[str] = []
    with anyio.fail_after(PATIENCE_S), closing(open_output(str(tmp_path / "output"))) as output:
        runs = Runs(2, None, output)

        async def finish(vm: VM, number: int) -> None:
            await runs.finish(vm, number)
            states.append(vm.state)

        async with snapshot.clones(2, prepare=runs.prepare, identity=finish):
            assert states == ["stopped", "stopped"]
    lines = sorted((tmp_path / "output").read_text().splitlines())
    assert [line[:10] for line in lines] == ["0: random=", "1: random="]
    assert runs.code == 0


def asyncvmm(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "asyncvmm"), *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("commands")
    words = ("--on", "pre-exec", "--quiesce-ms", "5", "--accel", "qemu", "--jsonl", "s.jsonl", "--out", "s")
    done = asyncvmm(directory, "snapshot", *words, "--", "sh", "-c", f"{SAY}; exit 3")
    assert (done.returncode, done.stdout) == (0, ""), done
    assert "saved 256 MiB" in done.stderr
    assert "(pre_exec: " in done.stderr
    return directory


def test_the_command_saves_and_tells(saved: Path) -> None:
    names = [orjson.loads(line)["event"] for line in (saved / "s.jsonl").read_bytes().splitlines()]
    assert names.index("snapshot.trigger") < names.index("snapshot.saved")


def test_restored_clones_prefix_their_lines_and_give_the_workloads_exit_code(saved: Path) -> None:
    done = asyncvmm(saved, "restore", "s", "--clones", "2", "--jsonl", "r.jsonl")
    assert done.returncode == 3, done
    lines = sorted(done.stdout.splitlines())
    assert [line[:10] for line in lines] == ["0: random=", "1: random="]
    assert lines[0][3:] != lines[1][3:]
    events = [orjson.loads(line) for line in (saved / "r.jsonl").read_bytes().splitlines()]
    assert len({event["vm"] for event in events}) == 2
    assert {"restore.mapped", "restore.first_guest_event", "restore.profile"} <= {event["event"] for event in events}


def test_events_for_which_there_is_no_room_are_said_to_be_lost_once_and_where(saved: Path) -> None:
    done = asyncvmm(saved, "restore", "s", "--clones", "2", "--jsonl", "/dev/full")
    assert done.returncode == 3, done
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == "event output /dev/full is gone, its lines are dropped: No space left on device\n"


def test_so_are_those_for_a_stdout_that_has_no_room(saved: Path) -> None:
    command = [str(Path(sys.executable).parent / "asyncvmm"), "restore", "s", "--clones", "2", "--jsonl", "-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=saved, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
        )
    assert done.returncode == 3, done
    lines = [line for line in done.stderr.splitlines() if "random=" not in line]
    assert lines == ["stdout is gone, its lines are dropped: No space left on device"]


def test_events_that_can_go_nowhere_are_refused_with_the_path_and_the_reason(saved: Path) -> None:
    os.mkfifo(saved / "fifo")
    for target, expected, found in (
        ("fifo", "a FIFO with a reader, or a file (for a socket, unix:PATH)", "No such device or address"),
        ("no/file", "something to write to", "No such file or directory"),
        ("s", "something to write to", "Is a directory"),
    ):
        done = asyncvmm(saved, "restore", "s", "--jsonl", target)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"asyncvmm: event output {target}: expected {expected}, found {found}\n"


def test_one_restored_guest_has_stdout_to_itself(saved: Path) -> None:
    done = asyncvmm(saved, "restore", "s")
    assert done.returncode == 3, done
    assert done.stdout.startswith("random=")


def test_a_snapshot_is_inspected_verified_and_refused_when_it_is_there_already(saved: Path) -> None:
    facts = orjson.loads(asyncvmm(saved, "snapshot", "inspect", "s").stdout)
    assert facts["machine"] == "qemu"
    assert asyncvmm(saved, "snapshot", "verify", "s").returncode == 0
    again = asyncvmm(saved, "snapshot", "--on", "pre-exec", "--out", "s", "--accel", "qemu", "--", "true")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_ready_ends_the_command_as_any_other(tmp_path: Path, number: int, code: int) -> None:
    words = ["snapshot", "--on", "pre-exec", "--out", "s", "--accel", "qemu", "--jsonl", "lines", "--", "true"]
    with subprocess.Popen([str(Path(sys.executable).parent / "asyncvmm"), *words], cwd=tmp_path) as command:
        while not (tmp_path / "lines").exists() or b"booting" not in (tmp_path / "lines").read_bytes():
            time.sleep(0.05)
        command.send_signal(number)
        assert command.wait(PATIENCE_S) == code
    assert os.listdir(tmp_path) == ["lines"]


@pytest.mark.parametrize("on", ["never", "heartbeat=", "after=-1", "heartbeat=x", "pre-exec=1"])
def test_a_trigger_that_is_none_is_one_line_and_exit_code_2(tmp_path: Path, on: str) -> None:
    done = asyncvmm(tmp_path, "snapshot", "--on", on, "--out", "s", "--", "true")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_listener_that_cannot_come_any_more_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["snapshot", "--on", "listener", "--out", "s", "--accel", "qemu", "--jsonl", "lines"]
    done = asyncvmm(tmp_path, *words, "--", "sh", "-c", "echo no such file; exit 3")
    assert done.returncode == 2, done
    found = "the workload has ended with exit code 3"
    assert done.stderr == f"asyncvmm: snapshot trigger: expected a listener, found {found}\n"
    assert done.stdout.strip() == "no such file"
    assert os.listdir(tmp_path) == ["lines"]
    events = [orjson.loads(line) for line in (tmp_path / "lines").read_bytes().splitlines()]
    (told,) = [event for event in events if event["event"].startswith("snapshot.")]
    assert (told["event"], told["kind"], told["found"]) == ("snapshot.failed", "TriggerImpossible", found)
