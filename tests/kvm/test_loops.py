"""A VM belongs to the event loop that it was started on: from another one it is refused, and goes on as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from asyncvmm import VM, StateError
from tests.support.echoing import echoed

Make = Callable[..., VM]

CALLS: dict[str, Callable[[VM], Coroutine[Any, Any, object]]] = {
    "boot": lambda vm: vm.boot(),
    "pause": lambda vm: vm.pause(),
    "resume": lambda vm: vm.resume(),
    "snapshot": lambda vm: vm.snapshot(),
    "go": lambda vm: vm.go(),
    "shutdown": lambda vm: vm.shutdown(),
    "stop": lambda vm: vm.stop(),
    "console input": lambda vm: vm.console.write(b"x"),
    "balloon": lambda vm: vm.balloon.set(1),
    "vsock": lambda vm: vm.vsock.connect(1),
}


@pytest.fixture
def home() -> Iterator[asyncio.Runner]:
    """The loop that VMs are started on."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def elsewhere() -> Iterator[asyncio.Runner]:
    """Another loop."""
    with asyncio.Runner() as runner:
        yield runner


async def _restored(original: VM) -> VM:
    await original.boot()
    async with await original.snapshot(then="stop") as snapshot:
        return await VM.restore(snapshot)


async def _refused(vm: VM, what: str) -> StateError:
    with pytest.raises(StateError) as caught:
        await CALLS[what](vm)
    return caught.value


@pytest.mark.parametrize("restored", [False, True])
def test_every_call_from_another_loop_is_refused_and_does_no_harm(
    vm: Make, home: asyncio.Runner, elsewhere: asyncio.Runner, restored: bool
) -> None:
    used = vm("RE")
    if restored:
        used = home.run(_restored(used))
    else:
        home.run(used.boot())
    for what in CALLS:
        error = elsewhere.run(_refused(used, what))
        if what != "boot":
            assert (error.what, error.expected) == (what, "the event loop that the VM was started on")
            assert (error.found, error.state) == ("another one", "ready")
    assert home.run(echoed(used, b"alive")) == b"alive"
    home.run(used.stop())


def test_a_vm_whose_loop_is_closed_is_refused_elsewhere(vm: Make, elsewhere: asyncio.Runner) -> None:
    used = vm("RE")
    with asyncio.Runner() as home:
        home.run(used.boot())
        home.run(used.stop())
    elsewhere.run(used.stop())  # there is nothing left to be done
    assert "closed" in str(elsewhere.run(_refused(used, "pause")))


def test_a_vm_that_was_made_on_one_loop_is_booted_on_another(
    vm: Make, home: asyncio.Runner, elsewhere: asyncio.Runner
) -> None:
    async def made() -> VM:
        return vm("RE")

    used = elsewhere.run(made())
    home.run(used.boot())
    home.run(used.stop())
