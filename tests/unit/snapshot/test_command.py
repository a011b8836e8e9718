"""The commands over saved snapshots, as a shell runs them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from asyncvmm.snapshot.inspect import draw, inspect
from tests.support.snapshots import page, save


def snapshot(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "asyncvmm.cli", "snapshot", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    save(tmp_path / "full", {1: page("full")})
    save(tmp_path / "s", {2: page("s")}, base=tmp_path / "full")
    return tmp_path / "s"


def test_inspect_in_a_pipe_is_one_json_object(chain: Path) -> None:
    done = snapshot("inspect", chain)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    facts = orjson.loads(done.stdout)
    assert facts["path"] == str(chain)
    assert facts["logical_bytes"] == 2 << 20
    assert 0 < facts["allocated_bytes"] < facts["chain_bytes"] < 1 << 20
    assert [layer["difference"] for layer in facts["chain"]] == [False, True]
    assert facts["devices"] == []
    assert facts["trigger"] == {"trigger": "pre-exec", "detail": "pid 1"}
    assert facts["config"] == {"memory_mib": 2}
    assert facts == orjson.loads(snapshot("inspect", "--json", chain).stdout)


def test_inspect_on_a_terminal_is_a_table(chain: Path) -> None:
    out = io.StringIO()
    draw(inspect(chain), Console(file=out, force_terminal=True, width=200, color_system=None))
    assert "trigger   pre-exec, detail pid 1" in out.getvalue()
    assert "full, 0.0 MiB" in out.getvalue()


def test_what_a_snapshot_says_is_harmless_to_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "s", {}, devices=("\x1b[2J",), config={"\x1b[2J": "\x1b[2J"}, extra={"trigger": 7, "path": "/x"})
    out = io.StringIO()
    draw(inspect(tmp_path / "s"), Console(file=out, force_terminal=True, width=200, color_system=None))
    assert "\x1b[2J" not in out.getvalue()
    assert inspect(tmp_path / "s")["path"] == str(tmp_path / "s")


def test_verify_says_that_all_is_well(chain: Path) -> None:
    done = snapshot("verify", chain)
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout
    assert "2 in its chain" in done.stdout


def test_verify_names_everything_that_is_wrong(chain: Path, tmp_path: Path) -> None:
    for path, at in ((chain, 2 * 4096), (tmp_path / "full", 4096)):
        with open(path / "memory.bin", "r+b") as file:
            file.seek(at)
            file.write(b"!")
    done = snapshot("verify", chain)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("asyncvmm: ") and "offset 0x0" in line for line in lines)
    assert done.stdout == ""


def test_flatten_makes_it_full(chain: Path, tmp_path: Path) -> None:
    done = snapshot("flatten", "--out", tmp_path / "out", chain)
    assert done.returncode == 0, done.stderr
    done = snapshot("flatten", chain)
    assert done.returncode == 0, done.stderr
    assert orjson.loads(snapshot("inspect", chain).stdout)["chain"][0]["difference"] is False


@pytest.mark.parametrize("command", ["inspect", "verify", "flatten"])
def test_every_error_is_one_line_and_exit_code_2(tmp_path: Path, command: str) -> None:
    done = snapshot(command, tmp_path / "nothing")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith(f"asyncvmm: snapshot {tmp_path / 'nothing'}: expected a directory")
