"""``asyncvmm timeline`` as a user runs it: a drawing on stdout, complaints on stderr, page and trace written whole."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from tests.support.recordings import boot, line

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
Ran = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ran(tmp_path: Path) -> Ran:
    """Run ``asyncvmm timeline WORDS`` in a directory with the files a.jsonl and b.jsonl."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(boot("aaaa")))
    (tmp_path / "b.jsonl").write_bytes(b"".join([*boot("b1", 120), *boot("b2", 121)]))

    def run(*words: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [ASYNCVMM, "timeline", *words],
            cwd=tmp_path,
            input=given,
            capture_output=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        )

    return run


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("asyncvmm: ")
    for word in words:
        assert word in complaint


def test_a_boot_is_drawn_as_plain_text_in_a_pipe(ran: Ran) -> None:
    done = ran("a.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("VM aaaa  a.jsonl: total 99.0 ms on qemu, READY at 96.0 ms\n")
    assert "\x1b" not in done.stdout
    assert not [text for text in done.stdout.splitlines() if text != text.rstrip()]


def test_several_files_are_compared(ran: Ran) -> None:
    done = ran("a.jsonl", "b.jsonl")
    assert "[2] b.jsonl: 2 boots" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("b.jsonl: total +40.5 ms (+40.9%), more than the spread (1.00 ms)")


def test_one_vm_of_many_can_be_picked(ran: Ran) -> None:
    done = ran("b.jsonl", "--vm", "b2")
    assert done.stdout.count("VM b") == 1
    assert "[1]" not in ran("a.jsonl", "b.jsonl", "--vm", "b2").stdout
    assert_refused(ran("b.jsonl", "--vm", "nosuch"), "expected a VM named nosuch", "found b1, b2")


def test_of_many_vms_some_are_drawn_and_all_compared(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_bytes(b"".join(event for n in range(11) for event in boot(f"v{n}", 80 + n)))
    done = ran("many.jsonl")
    assert "3 more VMs not drawn; --vm NAME draws one" in done.stdout
    assert "[1] many.jsonl: 11 boots" in done.stdout
    assert "IQR 5.00 ms" in done.stdout


def test_stdin_is_read_too(ran: Ran) -> None:
    done = ran("-", given=b"".join(boot("from-stdin")))
    assert "VM from-stdin  stdin: total" in done.stdout
    assert_refused(ran("-", "-"), "stdin once")


def test_what_is_not_understood_is_told_by_file_and_line_and_the_rest_drawn(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_bytes(b"rubbish\x1b[2J\n" + b"".join(boot("cut"))[:-9])
    done = ran("cut.jsonl", "a.jsonl")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "cut.jsonl: line 1: not an event of asyncvmm",
        "cut.jsonl: line 17: cut off: the file ends in the middle of it",
    ]
    assert "VM cut" in done.stdout
    assert "VM aaaa" in done.stdout


def test_a_file_without_an_event_is_told_if_another_has_some(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    done = ran("empty", "a.jsonl")
    assert done.stderr == "empty: no event of asyncvmm\n"
    assert "VM aaaa" in done.stdout
    assert_refused(ran("empty", "empty"), "expected events of asyncvmm, one a line", "found none in empty, empty")


def test_what_cannot_be_read_is_refused(ran: Ran) -> None:
    assert_refused(ran("nosuch"), "expected a readable file, found nosuch (No such file or directory)")
    assert_refused(ran("."), "(Is a directory)")
    assert_refused(ran(), "Missing argument")


def test_the_page_and_the_trace_are_written_beside_the_drawing(ran: Ran, tmp_path: Path) -> None:
    done = ran("a.jsonl", "--html", "t.html", "--perfetto", "t.json")
    assert done.stdout.startswith("VM aaaa")
    assert (tmp_path / "t.html").read_text("utf-8").startswith("<!doctype html>")
    assert orjson.loads((tmp_path / "t.json").read_bytes())["traceEvents"]


def test_an_output_on_stdout_has_it_to_itself(ran: Ran) -> None:
    assert orjson.loads(ran("a.jsonl", "--perfetto", "-").stdout)["displayTimeUnit"] == "ms"
    page = ran("a.jsonl", "--html", "-").stdout
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")


def test_outputs_that_would_destroy_something_are_refused(ran: Ran, tmp_path: Path) -> None:
    before = (tmp_path / "a.jsonl").read_bytes()
    assert_refused(ran("a.jsonl", "--html", "./a.jsonl"), "none of the files read")
    assert_refused(ran("a.jsonl", "--html", "out", "--perfetto", "out"), "an output each")
    assert_refused(ran("a.jsonl", "--html", "-", "--perfetto", "-"), "an output each")
    assert_refused(ran("a.jsonl", "--html", "nosuch/out"), "nosuch/out (No such file or directory)")
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_reader_that_goes_away_ends_it_quietly(ran: Ran, tmp_path: Path) -> None:
    done = subprocess.run(
        f"{ASYNCVMM} timeline a.jsonl | true", shell=True, cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert b"Traceback" not in done.stderr


def test_an_output_in_ascii_gets_no_more_than_that(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"".join(boot("caf\u00e9")))
    done = ran("c.jsonl", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "VM caf\\xe9" in done.stdout


def test_a_terminal_gets_colours(ran: Ran, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    env.pop("NO_COLOR", None)
    subprocess.run([ASYNCVMM, "timeline", "a.jsonl"], cwd=tmp_path, stdout=slave, env=env, timeout=60, check=True)
    os.close(slave)
    drawn = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\x1b[34m" in drawn
    assert "boot_wait" in drawn


def test_a_huge_file_of_other_things_is_read_through(ran: Ran, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.write(b"x" * (3 << 20) + b"\n")
        file.writelines([line("serial.line", 1, port="COM1", text="x" * 60)] * 100_000)
        file.writelines(boot("huge"))
    done = ran("huge")
    assert done.stderr == "huge: line 1: longer than 1048576 bytes\n"
    assert "VM a1b2" in done.stdout
    assert "VM huge" in done.stdout
