"""A boot whose event reader dies half-way boots all the same, and says so once."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.events.outputs import Target
from asyncvmm.events.types import Event, VmState

pytestmark = [pytest.mark.anyio, pytest.mark.requires("kvm")]

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")


class Reader:
    """Where the events go; ``die`` is its end."""

    def __init__(self, target: Target, die: Callable[[], None]) -> None:
        self.target = target
        self.die = die


def on_a_pipe(stack: ExitStack) -> Reader:
    reader, writer = os.pipe()
    stack.callback(os.close, writer)
    return Reader(writer, lambda: os.close(reader))


def on_a_fifo(stack: ExitStack) -> Reader:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return Reader(path, lambda: os.close(reader))


def on_a_unix_socket(stack: ExitStack) -> Reader:
    path = stack.enter_context(tempfile.TemporaryDirectory()) + "/s"
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(path)
    server.listen()

    def die() -> None:
        server.accept()[0].close()

    return Reader(f"unix:{path}", die)


def a_callback(stack: ExitStack) -> Reader:
    dead: list[bool] = []

    def take(data: bytes) -> None:
        if dead:
            raise RuntimeError("boom")

    return Reader(take, lambda: dead.append(True))


def a_full_disk(stack: ExitStack) -> Reader:
    return Reader("/dev/full", lambda: None)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("reader", [on_a_pipe, on_a_fifo, on_a_unix_socket, a_callback, a_full_disk])
async def test_a_reader_that_dies_during_a_boot_does_not_stop_it(
    reader: Callable[[ExitStack], Reader],
    stack: ExitStack,
    guest: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    found, events = reader(stack), list[Event]()
    with caplog.at_level(logging.WARNING, "asyncvmm"):
        async with VM(VMConfig(kernel=guest("foreign"), cmdline="BRE", memory_mib=4, accel="kvm")) as machine:
            sink = machine.stream_to(found.target)
            machine.events.attach(events.append)

            def kill(event: Event) -> None:
                if isinstance(event, VmState) and event.state == "booting":
                    found.die()

            machine.events.attach(kill)
            await machine.boot()
            assert machine.state == "ready"
            assert machine.boot_profile.total is not None
    assert 0 < sink.lost < len(events) + 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "is gone, its lines are dropped" in warning


def test_the_command_says_so_once(guest: Callable[[str], Path]) -> None:
    words = ("boot", "--accel", "kvm", "--memory", "4", "--kernel", guest("foreign"), "--jsonl", "/dev/full")
    done = subprocess.run(
        [ASYNCVMM, *words, "--cmdline", "BRO"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "/dev/full" in line]
    assert "No space left on device" in line
