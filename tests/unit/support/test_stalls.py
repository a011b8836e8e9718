"""The suite's own watch over the loop: it must see what blocks, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import linecache
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.events.outputs import CallbackOutput
from tests.support.stalls import LONGEST_STALL_S, Bystander, Stall, StallWatch, stolen_s

pytestmark = [pytest.mark.anyio, pytest.mark.stalls]

HERE = Path(__file__).parent
LONG_S = 4 * LONGEST_STALL_S


def busy() -> None:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        hashlib.sha256(b"x" * 100).digest()


async def blame(bystander: Bystander, block: Callable[[], object], *code: Path) -> Stall:
    """What is said of a loop that is blocked. An excuse may spoil one try on a busy machine."""
    for _ in range(5):
        async with StallWatch(bystander, *code) as watch:
            await asyncio.sleep(0.02)
            block()
            await asyncio.sleep(0.02)
        if watch.worst is not None and watch.worst.seconds > LONGEST_STALL_S:
            return watch.worst
    pytest.fail("nobody noticed")


@pytest.mark.parametrize("block", [lambda: time.sleep(LONG_S), busy], ids=["waiting", "computing"])
async def test_a_loop_that_is_blocked_is_noticed_and_by_what(bystander: Bystander, block: Callable[[], object]) -> None:
    assert "test_stalls.py" in (await blame(bystander, block, HERE)).stack


async def test_a_look_at_a_blocked_loop_opens_no_file(bystander: Bystander) -> None:
    """Tests count the descriptors of the process."""
    for _ in range(5):
        linecache.clearcache()
        async with StallWatch(bystander, HERE) as watch:
            await asyncio.sleep(0.02)
            busy()
            read = [name for name, entry in linecache.cache.items() if len(entry) > 1]  # others are to be read yet
            await asyncio.sleep(0.02)
        assert not read
        if watch.worst is not None:
            break
    assert watch.worst is not None
    assert "busy()" in watch.worst.stack


async def test_what_a_test_itself_does_on_the_loop_is_not_blamed(bystander: Bystander) -> None:
    async with StallWatch(bystander) as watch:
        await asyncio.sleep(0.02)
        busy()
        await asyncio.sleep(0.02)
    assert watch.worst is None


async def test_what_the_package_calls_is_blamed(bystander: Bystander) -> None:
    output = CallbackOutput(lambda _: busy())
    assert "busy()" in (await blame(bystander, lambda: output.write(bytearray(b"a line")))).stack


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """More processes than processors."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("busy_machine")
async def test_a_loop_that_only_waits_is_not_blamed_when_the_machine_is_busy(bystander: Bystander) -> None:
    async with StallWatch(bystander, HERE) as watch:
        for _ in range(500):
            await asyncio.sleep(0.001)
    assert watch.worst is None or watch.worst.seconds <= LONGEST_STALL_S


def test_what_a_hypervisor_took_is_read_from_the_kernels_account() -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    assert stolen_s(f"cpu  1 2 3 4 5 6 7 {3 * hertz} 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n") == 3
    assert stolen_s() >= 0
