"""A hundred VMs of one snapshot at once: each has entropy of its own, and the host's time when it is handed out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.errors import ConfigError
from asyncvmm.events.snapshot_types import RestoreStep
from asyncvmm.events.types import Event, GuestGoDone
from asyncvmm.machine.host_clock import realtime_ahead_ns
from asyncvmm.machine.kvm.launch import Launch
from asyncvmm.snapshot import clones
from tests.kvm.conftest import IN_LAB, PATIENCE_S

pytestmark = pytest.mark.anyio

COUNT = 10 if IN_LAB else 100
LEEWAY_NS = 10_000_000


@attrs.define
class Heard:
    """What was heard of one clone from its beginning on.

    clock_error: how far off the host's its clock was when it said so, and how sure that is, in ns.
    """

    steps: list[str] = attrs.field(factory=list)
    clock_error: tuple[int, int] | None = None
    console: ConsoleReader | None = None

    def listen(self, vm: VM) -> None:
        self.console = vm.console.subscribe()

        def take(event: Event) -> None:
            if isinstance(event, RestoreStep):
                self.steps.append(event.step)
            elif isinstance(event, GuestGoDone):
                self.clock_error = clock_error(vm, event)

        vm.events.attach(take)

    async def random(self) -> bytes:
        """The line it prints."""
        assert self.console is not None
        text = b""
        while b"\n" not in text:
            text += await anext(self.console)
        return text.partition(b"\n")[0]


def clock_error(vm: VM, done: GuestGoDone) -> tuple[int, int] | None:
    assert vm._machine is not None
    placed = vm._machine.guest_instant(done.tsc)
    return None if placed is None else (done.realtime_ns - placed[0] - realtime_ahead_ns(), placed[1])


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Once is enough."""
    return "asyncio", {"use_uvloop": True}


@pytest.mark.stalls
async def test_a_hundred_clones_at_once_all_differ_and_keep_the_hosts_time(guest: Callable[[str], Path]) -> None:
    heard = {number: Heard() for number in range(COUNT)}
    with anyio.fail_after(10 * PATIENCE_S):
        async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
            await original.boot()
            async with await original.snapshot() as snapshot:
                prepare = lambda vm, number: heard[number].listen(vm)  # noqa: E731
                async with snapshot.clones(COUNT, prepare=prepare, at_once=COUNT) as made:
                    randoms = [await heard[number].random() for number in range(COUNT)]
                    assert len(made) == COUNT
    assert len(set(randoms)) == COUNT
    assert all(len(random) == 32 for random in randoms)
    for listener in heard.values():
        assert listener.steps == ["entropy", "clock"]
        assert listener.clock_error is not None
        error, sure = listener.clock_error
        assert abs(error) + sure <= LEEWAY_NS


async def test_one_after_the_other_they_keep_the_hosts_time_as_well(
    guest: Callable[[str], Path], launches: list[Launch]
) -> None:
    """From the second one on they are launched."""
    async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            for _ in range(4):
                heard = Heard()
                async with await VM.restore(snapshot, prepare=heard.listen):
                    await heard.random()
                assert heard.clock_error is not None
                error, sure = heard.clock_error
                assert abs(error) + sure <= LEEWAY_NS
    assert launches


async def test_more_than_are_sensible_in_one_process_have_to_be_insisted_on(
    guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clones, "MOST_CLONES", 1)
    async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match="at most 1 in one process"):
                await snapshot.clones(2).__aenter__()
            async with snapshot.clones(2, beyond_bend=True) as made:
                assert [vm.state for vm in made] == ["ready", "ready"]


async def test_clones_keep_account_of_what_they_write_if_that_is_asked_for(guest: Callable[[str], Path]) -> None:
    async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            async with snapshot.clones(2, track_dirty=True) as made:
                for vm in made:
                    assert vm.config.track_dirty
                    async with await vm.snapshot(base=snapshot) as difference:
                        assert difference.manifest.base is not None
            async with snapshot.clones(1) as made:
                assert not made[0].config.track_dirty


async def test_of_clones_beyond_number_no_more_is_there_than_has_had_its_turn(guest: Callable[[str], Path]) -> None:
    def fail_at_last(_: VM, number: int) -> None:
        if number == 5:
            raise ZeroDivisionError

    async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with anyio.fail_after(PATIENCE_S), pytest.raises(ZeroDivisionError):
                await snapshot.clones(10**12, prepare=fail_at_last, beyond_bend=True).__aenter__()


@pytest.mark.parametrize("flag", ["track_dirty", "beyond_bend"])
async def test_clones_are_asked_for_that_with_true_or_false(guest: Callable[[str], Path], flag: str) -> None:
    seen: list[VM] = []
    async with VM(VMConfig(kernel=guest("clone"), memory_mib=4, accel="kvm")) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            wrong: Any = "no"
            with pytest.raises(ConfigError, match=f"{flag}: expected True or False, found 'no'"):
                await snapshot.clones(2, **{flag: wrong}, prepare=lambda vm, _: seen.append(vm)).__aenter__()
    assert not seen
