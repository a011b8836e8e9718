"""``boot --progress`` and ``run --progress`` as processes on a pseudo-terminal, with a real Linux in them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import orjson
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.progress import Progress
from asyncvmm.terminal import status_line
from tests.support.screen import Terminal

pytestmark = pytest.mark.requires("qemu", "image")

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
PATIENCE_S = 60.0
SUMMARY = re.compile(r"ready in \d+ ms on qemu: setup \d+ ms, boot \d+ ms, guest_wait \d+ ms")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(100) as terminal:
        yield terminal


def start(*words: str, stderr: int, stdout: int = subprocess.PIPE, **env: str) -> subprocess.Popen[bytes]:
    command, *options = words
    return subprocess.Popen(
        [ASYNCVMM, command, "--accel", "qemu", "--progress", *options],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm", **env},
    )


def finish(process: subprocess.Popen[bytes], code: int = 0) -> bytes:
    """Its stdout; it must end with ``code``."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    return output


def test_a_boot_shows_its_steps_and_leaves_its_summary(terminal: Terminal) -> None:
    before = terminal.settings()
    assert finish(start("boot", "--serial-lines", stderr=terminal.slave)) == b""
    screen = terminal.screen()
    summary, rest = screen.lines
    assert SUMMARY.fullmatch(summary)
    assert rest == ""
    assert {"accel", "boot_wait"} <= {frame.split()[2] for frame in screen.frames if frame}
    assert any(" on qemu " in frame for frame in screen.frames)
    assert max(map(len, screen.frames)) < 100
    assert terminal.settings() == before


@pytest.mark.anyio
async def test_the_loop_goes_on_meanwhile(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test marked anyio fails if its loop stands still."""
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        line = status_line(stream)
    async with VM(VMConfig(accel="qemu", serial_lines=True)) as vm:
        with Progress(vm.events, line):
            await vm.boot()
    screen = await anyio.to_thread.run_sync(terminal.screen)
    assert SUMMARY.fullmatch(screen.lines[0])


def test_json_lines_go_elsewhere_meanwhile(terminal: Terminal) -> None:
    output = finish(start("boot", "--jsonl", "-", stderr=terminal.slave))
    states = [record["state"] for record in map(orjson.loads, output.splitlines()) if "state" in record]
    assert states[-1] == "stopped"
    assert SUMMARY.fullmatch(terminal.screen().lines[0])


def test_where_json_lines_are_on_the_terminal_nothing_else_is(terminal: Terminal) -> None:
    finish(start("boot", "--jsonl", "-", stderr=terminal.slave, stdout=terminal.slave))
    *lines, rest = terminal.output().split(b"\r\n")
    assert rest == b""
    assert all(orjson.loads(line)["v"] == 1 for line in lines)


@pytest.mark.parametrize("jsonl", [(), ("--jsonl", "-")], ids=["alone", "with JSON lines"])
def test_in_a_pipe_it_is_silent(jsonl: tuple[str, ...]) -> None:
    process = start("boot", *jsonl, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, b"")
    assert all(orjson.loads(line)["v"] == 1 for line in output.splitlines())
    assert bool(output) == bool(jsonl)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_boot_leaves_an_empty_line(terminal: Terminal, number: signal.Signals) -> None:
    before = terminal.settings()
    process = start("boot", stderr=terminal.slave)
    terminal.until("boot_wait")
    process.send_signal(number)
    assert finish(process, 128 + number) == b""
    assert terminal.screen().lines == [""]
    assert terminal.settings() == before


def test_a_boot_that_fails_leaves_the_error_alone(terminal: Terminal) -> None:
    finish(start("boot", "--timeout", "0.5", stderr=terminal.slave), 2)
    error = "asyncvmm: boot: expected READY, found not ready within 0.5 s, state booting"
    assert terminal.screen().lines == [error, ""]


def test_run_shows_its_boot_and_then_leaves_the_terminal_to_the_workload(terminal: Terminal) -> None:
    process = start("run", "--", "sh", "-c", "echo from the guest", stderr=terminal.slave, stdout=terminal.slave)
    finish(process)
    first, *rest = terminal.screen().lines
    assert SUMMARY.fullmatch(first)
    assert [line for line in rest if line] == ["from the guest"]


def test_a_dumb_terminal_gets_the_summary_only(terminal: Terminal) -> None:
    finish(start("boot", stderr=terminal.slave, TERM="dumb"))
    assert SUMMARY.fullmatch(terminal.output().decode().removesuffix("\r\n"))


def test_no_colour_is_used_where_none_is_wanted(terminal: Terminal) -> None:
    finish(start("boot", stderr=terminal.slave, NO_COLOR="1"))
    assert not re.search(rb"\x1b\[(?:\d+;)*[34][0-7]", terminal.output())
