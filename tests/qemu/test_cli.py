"""The commands that boot, as processes: their output, and how they end when they are interrupted, killed or cut off."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from jsonschema import Draft202012Validator

from asyncvmm.events.schema import schema
from tests.support.holdings import descendants, is_running

pytestmark = pytest.mark.requires("qemu", "image")

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
PATIENCE_S = 60.0
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(temporary_directory: Path) -> Iterator[Start]:
    """Start the command; whatever is left of it at the end is a failure."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([ASYNCVMM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
    assert not list(temporary_directory.iterdir())


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def qemu_of(process: subprocess.Popen[bytes]) -> int:
    """The process id of QEMU, once it runs."""

    def found() -> list[int]:
        return [pid for pid in descendants(process.pid) if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until(found)
    return found()[0]


def read_until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    assert process.stdout is not None
    heard = b""
    while text not in heard:
        assert select.select([process.stdout], [], [], PATIENCE_S)[0], heard
        chunk = os.read(process.stdout.fileno(), 65536)
        assert chunk, heard
        heard += chunk
    return heard


# -- what they print ---------------------------------------------------------------------------------------------------


def test_boot_prints_json_lines_and_nothing_else(start: Start) -> None:
    process = start("boot", "--accel", "qemu", "--jsonl", "-")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, b"")
    validator = Draft202012Validator(schema())
    records = [orjson.loads(line) for line in output.splitlines()]
    for record in records:
        validator.validate(record)
    names = [record["event"] for record in records]
    assert {"accel.probe", "vm.state", "phase", "guest.boot_time", "guest.ready", "vm.timing"} <= set(names)
    assert [record["state"] for record in records if record["event"] == "vm.state"][-1] == "stopped"


@pytest.mark.parametrize(("script", "code"), [("echo out; echo err >&2; exit 3", 3), ("kill -9 $$", 137)])
def test_run_gives_the_workloads_output_and_exit_code(start: Start, script: str, code: int, tmp_path: Path) -> None:
    process = start("run", "--accel", "qemu", "--jsonl", str(tmp_path / "events"), "--", "sh", "-c", script)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (code, b"")
    assert output.replace(b"\r", b"") == (b"out\nerr\n" if code == 3 else b"")
    assert b'"guest.exit"' in (tmp_path / "events").read_bytes()


def test_a_boot_that_takes_too_long_is_one_line_and_exit_code_2(start: Start) -> None:
    process = start("boot", "--accel", "qemu", "--timeout", "0.3")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (2, b"")
    assert errors == b"asyncvmm: boot: expected READY, found not ready within 0.3 s, state booting\n"


# -- how they end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["boot", "run"])
def test_a_signal_ends_command_and_guest_quietly(start: Start, number: signal.Signals, moment: str) -> None:
    if moment == "boot":
        process = start("boot", "--accel", "qemu")
    else:
        process = start("run", "--accel", "qemu", "--", "sh", "-c", "echo go; sleep 1000")
        read_until(process, b"go\n")
    qemu = qemu_of(process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors, output) == (128 + number, b"", b"")
    assert not is_running(qemu)


@pytest.mark.parametrize("delay_s", [0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4])
def test_an_interrupt_while_starting_is_quiet_too(start: Start, delay_s: float) -> None:
    process = start("boot", "--accel", "qemu")
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    # Before the command has begun, the signal is Python's to answer.
    assert process.returncode == -signal.SIGINT or (process.returncode, errors) == (130, b"")


def test_a_command_that_is_killed_takes_qemu_with_it(start: Start) -> None:
    process = start("boot", "--accel", "qemu")
    qemu = qemu_of(process)
    process.kill()
    process.wait()
    until(lambda: not is_running(qemu))


def test_a_reader_that_never_reads_does_not_keep_a_command_from_being_ended(start: Start) -> None:
    process = start("run", "--accel", "qemu", "--", "yes")
    read_until(process, b"y")
    qemu = qemu_of(process)
    time.sleep(1)  # the pipe is full long since
    process.terminate()
    process.wait(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert not is_running(qemu)


def test_a_reader_that_goes_away_ends_the_command(start: Start) -> None:
    process = start("run", "--accel", "qemu", "--", "yes")
    read_until(process, b"y")
    qemu = qemu_of(process)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=PATIENCE_S) == 128 + signal.SIGPIPE
    assert not is_running(qemu)
