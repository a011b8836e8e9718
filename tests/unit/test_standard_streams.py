"""The command line with stdin, stdout or stderr closed or full: an exit code and one line, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncvmm.events.encoding import to_line
from asyncvmm.events.types import GuestReady

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
READS_STDIN = ("timeline -", "metrics -")
WRITES_STDOUT = ("schema", "timeline FILE", "timeline FILE --html -", "metrics FILE", "--help")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of JSON lines."""
    path = tmp_path / "boot.jsonl"
    path.write_bytes(to_line(GuestReady(5), "a", 0))
    return path


def in_a_shell(words: str, redirection: str, file: Path) -> tuple[int, str]:
    command = f'"$0" {words.replace("FILE", str(file))} {redirection}'
    done = subprocess.run(["sh", "-c", command, str(ASYNCVMM)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", READS_STDIN)
def test_a_closed_stdin_is_refused_in_one_line(words: str, file: Path) -> None:
    code, errors = in_a_shell(words, "<&-", file)
    assert code == 2
    assert errors.startswith("asyncvmm: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.parametrize("words", WRITES_STDOUT)
def test_a_stdout_that_takes_nothing_is_told_in_one_line(words: str, redirection: str, file: Path) -> None:
    code, errors = in_a_shell(words, redirection, file)
    assert code == 2
    assert errors.startswith("asyncvmm: stdout: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("words", WRITES_STDOUT)
def test_a_reader_that_is_gone_ends_the_command_as_sigpipe_would(words: str, file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [str(ASYNCVMM), *words.replace("FILE", str(file)).split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_json_lines_for_a_closed_stdout_are_refused(file: Path) -> None:
    code, errors = in_a_shell(f"boot --jsonl - --kernel {file}", ">&-", file)
    assert code == 2
    assert errors == "asyncvmm: stdout: expected something to write to, found one that is closed, or open for reading\n"


@pytest.mark.parametrize("redirection", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stderr_costs_the_line_alone(redirection: str, file: Path) -> None:
    code, errors = in_a_shell("timeline /nonexistent", redirection, file)
    assert (code, errors) == (2, "")
