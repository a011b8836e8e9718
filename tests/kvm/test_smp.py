"""Two vCPUs: one starts the other, they wake each other, and both make exits at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.anyio


async def test_two_vcpus_start_and_wake_each_other(boot: Boot) -> None:
    async with boot("smp", vcpus=2) as run:
        assert (await run.end()).code == 0x44
        assert run.output == b"012"


async def test_the_statistics_of_both_add_up(boot: Boot) -> None:
    async with boot("smp", vcpus=2) as run:
        await run.end()
    exits = run.exits
    assert exits.by_address["out 0x1000"].count == 500
    assert exits.by_address["out 0x1001"].count == 500
    assert exits.unmapped == 1000
    assert exits.by_address["out 0x3f8"].count == 3
    assert exits.total == sum(entry.count for entry in exits.by_address.values()) == 1000 + 3 + 1


async def test_two_vcpus_pause_and_resume_while_they_work(boot: Boot) -> None:
    async with boot("smp", vcpus=2) as run:
        while not run.ends:
            await run.machine.pause()
            await run.machine.resume()
            await anyio.sleep(0.003)
        assert run.ends[0].code == 0x44
        assert run.output == b"012"


async def test_a_vcpu_that_is_never_started_does_not_keep_the_machine_from_stopping(boot: Boot) -> None:
    async with boot("spin", vcpus=4) as run:
        await run.said(b".")
        await run.machine.pause()
        await run.machine.resume()
        await run.machine.stop()
        assert run.ends == []
