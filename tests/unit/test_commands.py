"""What a workload prints gets to stdout however slowly that is read, or the command says that it did not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import anyio
import pytest

from asyncvmm.commands import WorkloadOutput
from asyncvmm.errors import HostError
from asyncvmm.events.outputs import Output, open_output
from asyncvmm.events.types import GuestExit, GuestPreExec
from asyncvmm.vm import VM

pytestmark = pytest.mark.anyio

PATIENCE_S = 30.0
PIECE = bytes(range(256)) * 256


@pytest.fixture
def pipe() -> Iterator[tuple[int, Output]]:
    """A pipe: the descriptor to read from, and the output that leads there."""
    reading, writing = os.pipe()
    output = open_output(writing)
    os.close(writing)
    yield reading, output
    output.close()
    os.close(reading)


def printed_while_nobody_reads(vm: VM, pieces: int, lost: int = 0) -> None:
    """Have the workload print that many pieces and end; ``lost`` bytes never got to the console."""
    vm.events.publish(GuestPreExec(1))
    for number in range(pieces):
        vm.console.feed(PIECE, 0 if number else lost)
    vm.events.publish(GuestExit(2, 0))


async def read_all(fd: int, copied: anyio.Event) -> bytes:
    """Read until all is copied and the pipe is empty."""
    heard = bytearray()
    os.set_blocking(fd, False)
    while True:
        done = copied.is_set()
        try:
            heard += os.read(fd, 65536)
        except BlockingIOError:
            if done:
                return bytes(heard)
            await anyio.sleep(0.001)


async def copy(vm: VM, pipe: tuple[int, Output], pieces: int, *, lost: int = 0, capacity: int) -> tuple[bytes, str]:
    """What a slow reader gets of a workload's output, and the error at its end."""
    reading, writing = pipe
    output = WorkloadOutput(vm, capacity)
    printed_while_nobody_reads(vm, pieces, lost)
    copied, error = anyio.Event(), ""
    heard = b""

    async def read() -> None:
        nonlocal heard
        heard = await read_all(reading, copied)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            try:
                await output.copy_to(writing)
            except HostError as refusal:
                error = str(refusal)
            copied.set()
    return heard, error


async def test_a_slow_reader_of_a_workload_loses_nothing(pipe: tuple[int, Output]) -> None:
    heard, error = await copy(VM(), pipe, 64, capacity=64 * len(PIECE))
    assert heard == PIECE * 64
    assert error == ""


async def test_what_a_reader_far_too_slow_has_lost_is_an_error_after_the_rest(pipe: tuple[int, Output]) -> None:
    heard, error = await copy(VM(), pipe, 5, capacity=3 * len(PIECE))
    assert heard == PIECE * 3
    assert (
        error == f"stdout: expected a reader that keeps up, found {2 * len(PIECE)} bytes of the workload's output lost"
    )


async def test_bytes_lost_before_they_got_to_the_console_are_an_error_as_well(pipe: tuple[int, Output]) -> None:
    heard, error = await copy(VM(), pipe, 1, lost=7, capacity=len(PIECE))
    assert heard == PIECE
    assert "found 7 bytes" in error


async def test_what_comes_before_the_workload_and_after_it_is_not_its_output(pipe: tuple[int, Output]) -> None:
    vm = VM()
    vm.console.feed(b"boot messages", 0)
    reading, writing = pipe
    output = WorkloadOutput(vm)
    vm.events.publish(GuestPreExec(1))
    vm.console.feed(b"workload", 0)
    vm.events.publish(GuestExit(2, 0))
    vm.console.feed(b"reboot: Power down", 0)
    await output.copy_to(writing)
    assert os.read(reading, 4096) == b"workload"
