"""``asyncvmm metrics`` as a process: files, pipes, what grows, what is wrong, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.events.encoding import to_line
from asyncvmm.events.types import AccelProbe, Event, LogLost, PhaseEnded, VmState
from tests.support.openmetrics import values_of

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
PATIENCE_S = 60.0
Start = Callable[..., "subprocess.Popen[bytes]"]

READY = ("asyncvmm_boots_total", "kvm", "ready")
UNREADABLE = ("asyncvmm_lines_unreadable_total",)
BOOT: tuple[Event, ...] = (
    VmState(0, "starting", "new"),
    AccelProbe(1, "kvm"),
    PhaseEnded(7_000_000, "boot", 0, 7_000_000, "total"),
    VmState(7_000_001, "ready", "booting"),
    LogLost(7_000_002, 3),
)


def lines_of(vm: str, events: tuple[Event, ...] = BOOT) -> bytes:
    return b"".join(to_line(event, vm, 0) for event in events)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start ``asyncvmm metrics``; none is left."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*words: object, **options: int) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
            [ASYNCVMM, "metrics", *map(str, words)], **pipes
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with process:
            process.kill()


def run_to_end(process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[int, str, str]:
    output, errors = process.communicate(data, timeout=PATIENCE_S)
    return process.returncode, (output or b"").decode(), errors.decode()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def url_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    match = re.fullmatch(rb"serving (http://\S+/metrics)\n", process.stderr.readline())
    assert match
    return match[1].decode()


def served(url: str) -> dict[tuple[str, ...], float]:
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return values_of(answer.read().decode())


# -- what it reads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [b"", b"\n"])
def test_a_byte_order_mark_before_the_first_line_is_nothing(start: Start, rest: bytes) -> None:
    code, output, errors = run_to_end(start("-"), b"\xef\xbb\xbf" + rest + lines_of("a"))
    assert (code, errors) == (0, "")
    assert values_of(output)[READY] == 1
    assert values_of(output)[UNREADABLE] == 0


def test_files_of_several_vms_are_counted_together(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(lines_of("a") + lines_of("b"))
    (tmp_path / "c").write_bytes(lines_of("c"))
    code, output, errors = run_to_end(start(tmp_path / "a", tmp_path / "c"))
    assert (code, errors) == (0, "")
    values = values_of(output)
    assert values[READY] == 3
    assert values["asyncvmm_phase_duration_seconds_sum", "kvm", "boot", "boot"] == pytest.approx(0.021)
    assert values[("asyncvmm_events_lost_total",)] == 9
    assert values[UNREADABLE] == 0


@pytest.mark.parametrize("words", [(), ("-",), ("-", "-")])
def test_stdin_is_read(start: Start, words: tuple[str, ...]) -> None:
    code, output, _ = run_to_end(start(*words), lines_of("a"))
    assert (code, values_of(output)[READY]) == (0, 1)


def test_stdin_may_be_a_file_or_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(lines_of("a"))
    with (tmp_path / "a").open("rb") as file:
        code, output, _ = run_to_end(start(stdin=file.fileno()))
    assert (code, values_of(output)[READY]) == (0, 1)
    code, output, _ = run_to_end(start(stdin=subprocess.DEVNULL))
    assert (code, values_of(output)[UNREADABLE]) == (0, 0)


def test_a_fifo_is_read_to_its_end(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    process = start(tmp_path / "fifo")
    with (tmp_path / "fifo").open("wb") as fifo:
        fifo.write(lines_of("a"))
    code, output, _ = run_to_end(process)
    assert (code, values_of(output)[READY]) == (0, 1)


def test_lines_that_are_not_events_are_named_and_counted_and_the_rest_is_read(start: Start, tmp_path: Path) -> None:
    bad = [
        b"no JSON\n",
        b"{}\n",
        b'{"v":1,"t_ns":1,"vm":"a","event":"phase","name":"boot","duration_ns":-5}\n',
        b"\0\n",
    ]
    path = tmp_path / "a"
    path.write_bytes(
        bad[0] + lines_of("a") + b"\n" + b"".join(bad[1:]) + b"x" * (2 << 20) + b"\n" + lines_of("b")[:-10]
    )
    code, output, errors = run_to_end(start(path))
    assert code == 0
    assert values_of(output)[READY] == 2
    assert values_of(output)[UNREADABLE] == 6
    assert errors.splitlines() == [
        f"{path}: line 1: not JSON",
        f"{path}: line 8: not an event of asyncvmm",
        f"{path}: line 9: duration_ns is not a number, or out of range",
        f"{path}: line 10: not JSON",
        f"{path}: line 11: longer than 1048576 bytes",
        f"{path}: line 16: not JSON",
    ]


def test_of_many_bad_lines_only_the_first_are_named(start: Start) -> None:
    code, output, errors = run_to_end(start(), lines_of("a") + b"?\n" * 1000)
    assert (code, values_of(output)[UNREADABLE]) == (0, 1000)
    assert len(errors.splitlines()) == 11
    assert errors.endswith("stdin: and 990 more lines\n")


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("/nonexistent/file",), "/nonexistent/file (No such file or directory)"),
        (("/dev",), "/dev, a directory"),
        (("",), "No such file"),
        (("/dev/null", "/nonexistent"), "/nonexistent"),
        (("/dev/null", "--prometheus", "/dev/null"), "expected a file or -, found /dev/null, which is no file\n"),
        (("/dev/null", "--prometheus", "/nonexistent/x"), "--prometheus"),
        (("/dev/null", "--prometheus", ""), "--prometheus"),
        (("/dev/null", "--listen", "9100"), "HOST:PORT"),
        (("/dev/null", "--listen", "192.0.2.1:9100"), "192.0.2.1:9100"),
        (("/dev/null", "--listen", "127.0.0.1:99999"), "HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(start: Start, words: tuple[str, ...], said: str) -> None:
    code, output, errors = run_to_end(start(*words))
    assert (code, output) == (2, "")
    assert re.fullmatch(r"asyncvmm: .*expected .*, found .*\n", errors)
    assert said in errors


@pytest.mark.parametrize("name", ["boot.jsonl", "link"])
def test_a_file_that_is_read_is_not_written_over(start: Start, tmp_path: Path, name: str) -> None:
    file = tmp_path / "boot.jsonl"
    file.write_bytes(lines_of("a"))
    (tmp_path / "link").symlink_to(file)
    code, output, errors = run_to_end(start(file, "--prometheus", tmp_path / name))
    assert (code, output) == (2, "")
    assert re.fullmatch(r"asyncvmm: --prometheus: expected a file that is none of those read, found .*\n", errors)
    assert file.read_bytes() == lines_of("a")


def test_a_file_without_any_event_is_refused_and_nothing_written(start: Start, tmp_path: Path) -> None:
    code, output, errors = run_to_end(start("--prometheus", tmp_path / "out"), b'{"level":"info"}\n')
    assert (code, output) == (2, "")
    assert errors.splitlines()[-1] == "asyncvmm: metrics: expected events of asyncvmm, one a line, found none"
    assert not (tmp_path / "out").exists()


def test_the_library_that_is_missing_is_named(tmp_path: Path) -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; from asyncvmm.cli import main; main(['metrics'])"
    done = subprocess.run([sys.executable, "-c", program], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'asyncvmm[metrics]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_is_gone_is_no_traceback(start: Start, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(stdout=writing)
    os.close(writing)
    code, _, errors = run_to_end(process, lines_of("a"))
    assert (code, errors) == (128 + signal.SIGPIPE, "")


# -- what goes on until it is interrupted ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_file_that_grows_is_followed_and_the_metrics_rewritten(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    path, out = tmp_path / "a", tmp_path / "out"
    path.write_bytes(lines_of("a")[:-5])
    process = start("--follow", path, "--prometheus", out)
    until(lambda: out.exists() and values_of(out.read_text()).get(READY) == 1)
    with path.open("ab") as file:
        file.write(lines_of("a")[-5:] + lines_of("b"))
    until(lambda: values_of(out.read_text()).get(READY) == 2)
    with path.open("ab") as file:
        file.write(lines_of("c"))
    process.send_signal(number)
    assert run_to_end(process) == (0, "", "")
    assert values_of(out.read_text())[READY] in (2, 3)
    assert values_of(out.read_text())[UNREADABLE] == 0


@pytest.mark.parametrize("how", ["replaced", "cut short"])
def test_a_file_that_starts_anew_is_read_from_its_start(start: Start, tmp_path: Path, how: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(lines_of("a") + lines_of("b") + b'{"v":1,')
    url = url_of(start("--follow", path, "--listen", "127.0.0.1:0"))
    until(lambda: served(url).get(READY) == 2)
    if how == "replaced":
        path.rename(tmp_path / "a.1")
    path.write_bytes(lines_of("c"))
    until(lambda: served(url).get(READY) == 3)
    assert served(url)[UNREADABLE] == 0


def test_a_stream_is_served_while_it_comes(start: Start) -> None:
    process = start("--listen", "127.0.0.1:0")
    url = url_of(process)
    assert process.stdin is not None
    for count in (1, 2):
        process.stdin.write(lines_of(str(count)))
        process.stdin.flush()
        until(lambda count=count: served(url).get(READY) == count)  # type: ignore[misc]
    process.stdin.close()
    assert served(url)[READY] == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_an_address_in_use_is_refused(start: Start, tmp_path: Path) -> None:
    url = url_of(start("/dev/null", "--listen", "127.0.0.1:0"))
    code, output, errors = run_to_end(start("/dev/null", "--listen", url.split("/")[2]))
    assert (code, output) == (2, "")
    assert "which is in use" in errors


def test_reading_that_is_interrupted_halfway_writes_nothing(start: Start, tmp_path: Path) -> None:
    process = start("--prometheus", tmp_path / "out")
    assert process.stdin is not None
    process.stdin.write(lines_of("a") + b"?\n")
    process.stdin.flush()
    assert process.stderr is not None
    assert process.stderr.readline() == b"stdin: line 6: not JSON\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert process.stderr.read() == b""
    assert not (tmp_path / "out").exists()


def test_following_costs_next_to_nothing(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(lines_of("a"))
    os.mkfifo(tmp_path / "fifo")
    process = start("--follow", path, tmp_path / "fifo", "--listen", "127.0.0.1:0")
    with (tmp_path / "fifo").open("wb") as fifo:
        fifo.write(lines_of("b"))
    url = url_of(process)
    until(lambda: served(url).get(READY) == 2)

    def ticks() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(2)
    assert ticks() - before < os.sysconf("SC_CLK_TCK") * 2 * 0.2
