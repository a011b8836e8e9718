"""A VM that has not been booted, and what it says of itself. How it lives is in tests/kvm and tests/qemu."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, ConfigError, GuestStopped, StateError, VMConfig
from asyncvmm.events.types import Event, VmError, VmState

pytestmark = pytest.mark.anyio

CALLS: dict[str, Callable[[VM], Coroutine[Any, Any, None]]] = {
    "pause": lambda vm: vm.pause(),
    "resume": lambda vm: vm.resume(),
    "input": lambda vm: vm.console.write(b"x"),
}


def test_a_vm_can_be_made_without_a_loop() -> None:
    vm = VM()
    assert (vm.state, vm.accel, vm.exits, vm.timing) == ("new", None, None, None)
    assert vm.name
    assert VM().name != vm.name


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_what_needs_a_running_guest_is_refused_before_the_boot(
    call: Callable[[VM], Coroutine[Any, Any, None]],
) -> None:
    with pytest.raises(StateError):
        await call(VM())


def test_exits_of_a_vm_that_does_not_run_cannot_be_traced() -> None:
    with pytest.raises(StateError):
        VM().trace_exits()


@pytest.mark.parametrize("asked", [True, False])
async def test_devices_of_a_vm_that_does_not_run_cannot_be_used(asked: bool) -> None:
    vm = VM(VMConfig(balloon=asked, vsock=asked, virtio_console=asked))
    for call in (lambda: vm.balloon.set(1), lambda: vm.balloon.stats(), lambda: vm.balloon.hint_free_pages()):
        with pytest.raises(StateError, match="balloon"):
            await call()
    with pytest.raises(StateError, match="vsock"):
        await vm.vsock.connect(1)
    assert dict(vm.ports) == {}
    await vm.stop()
    with pytest.raises(StateError, match="vsock"):
        await vm.vsock.connect(1)


async def test_metrics_of_a_new_vm_say_that_nothing_has_happened() -> None:
    groups = VM().metrics.flush().groups
    assert groups["balloon"]["inflate_count"] == groups["block"]["read_count"] == groups["vcpu"]["exit_io_in"] == 0


async def test_a_new_vm_can_be_shut_down_and_stopped() -> None:
    vm = VM()
    await vm.shutdown()
    await vm.stop()
    assert vm.state == "stopped"
    with pytest.raises(GuestStopped):
        await vm.events.ready
    assert await vm.events.stopped == "stopped"
    assert [event async for event in vm.events] == []
    assert [chunk async for chunk in vm.console] == []


async def test_a_boot_that_is_refused_fails_the_vm_and_all_who_wait(tmp_path: Path) -> None:
    vm = VM(VMConfig(kernel=tmp_path / "nosuch", accel="qemu"))
    events: list[Event] = []
    vm.events.attach(events.append)
    waiting: list[str] = []

    async def wait() -> None:
        with pytest.raises(ConfigError):
            await vm.events.listener
        waiting.append("over")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        with pytest.raises(ConfigError) as caught:
            await vm.boot()
    assert waiting == ["over"]
    assert vm.state == "failed"
    assert "nosuch" in str(caught.value)
    assert [event.kind for event in events if isinstance(event, VmError)] == [type(caught.value).__name__]
    assert [event.state for event in events if isinstance(event, VmState)] == ["starting", "failed"]
    with pytest.raises(StateError):
        await vm.boot()


def test_an_output_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        VM().stream_to(tmp_path / "no" / "such" / "file")


@pytest.mark.parametrize("name", ["x" * 5000, "a/b", "../..", "two\nlines", "tab\t", "nul\0", "Ünïcode", "%s", "-x"])
async def test_any_name_will_do(name: str, toy_guest: Path, temporary_directory: Path) -> None:
    """It is in events, threads and processes; it must break none of them, or be refused at once."""
    lines: list[bytes] = []
    try:
        vm = VM(VMConfig(name=name, kernel=toy_guest, memory_mib=4, boot_timeout_s=0.3, accel="auto"))
    except ConfigError:
        return
    vm.stream_to(lines.append)
    with pytest.raises(Exception, match="not ready within"):
        await vm.boot()
    assert lines
