"""What README shows is run for real: its Python program and its shell commands, as they stand there.

./scripts/demo and ./scripts/test are not: they install packages, and the second runs this. The recipes for jq, DuckDB,
pandas and Polars are run by tests/consumers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from asyncvmm import VM, VMConfig
from tests.support.readme import README, block_with, blocks

pytestmark = pytest.mark.requires("qemu", "image")

PATIENCE_S = 120


def commands() -> list[str]:
    """The shell commands, without what is said of them."""
    return [re.sub(r"\s+# .*", "", line) for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are run, one after the other."""
    return tmp_path_factory.mktemp("readme")


def run(command: str, directory: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_the_python_program_runs_and_prints_milliseconds_and_machine(directory: Path) -> None:
    program = block_with("python", "timing.total_ms")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    milliseconds, accel = done.stdout.split()
    assert int(milliseconds) > 0
    assert accel in ("kvm", "qemu")
    assert done.stderr == ""


def test_the_snapshot_program_runs_and_has_three_clones(directory: Path) -> None:
    program = block_with("python", "SnapshotResources(")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert (done.stdout, done.stderr) == ("['ready', 'ready', 'ready']\n", "")


def test_readme_shows_the_commands_that_are_run_here() -> None:
    assert [command.split()[1] for command in commands()] == [
        *("doctor", "image", "boot", "run"),
        *("-s", "run"),
        *("snapshot", "restore", "snapshot"),
        *("boot", "boot", "timeline", "metrics"),
    ]


def test_the_shell_commands_do_what_is_said_of_them(directory: Path) -> None:
    outputs: dict[str, str] = {}
    for command in commands():
        name = " ".join([command.split()[1], *(word for word in ("--drive", "inspect") if word in command)])
        outputs.setdefault(name, run(command, directory))
    assert orjson.loads(outputs["doctor"])["kvm"]["verdict"] in ("fast", "slow", "unusable", "absent")
    assert Path(outputs["image"].strip()).is_dir()
    assert [orjson.loads(line)["v"] for line in outputs["boot"].splitlines()]
    assert outputs["run"].startswith("Linux ")
    assert "inet 10." in outputs["run --drive"]
    assert any((directory / "data.img").read_bytes()[:512])
    assert len({line.partition(": ")[2] for line in outputs["restore"].splitlines() if "UTC" not in line}) == 5
    assert orjson.loads(outputs["snapshot inspect"].splitlines()[-1])["window"] is True
    assert "against [1]" in outputs["timeline"]
    assert "boot_wait" in outputs["timeline"]
    assert "</html>" in (directory / "t.html").read_text()
    assert orjson.loads((directory / "t.json").read_bytes())["traceEvents"]
    assert "asyncvmm_boots_total" in (directory / "boot.prom").read_text()


def test_every_option_of_boot_and_run_is_named() -> None:
    from asyncvmm.cli import boot
    from asyncvmm.cli import run as run_command

    for command in (boot, run_command):
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in README, parameter.opts


def test_the_json_line_shown_has_the_schemas_form() -> None:
    from jsonschema import Draft202012Validator

    from asyncvmm.events.schema import schema

    match = re.search(r'^    (\{"v":1.*?\})$', README, re.MULTILINE | re.DOTALL)
    assert match is not None
    Draft202012Validator(schema()).validate(orjson.loads(match[1]))


def test_the_public_names_in_the_table_exist() -> None:
    vm = VM(VMConfig(workload=("uname", "-a")))
    for name in set(re.findall(r"\bvm\.([a-z_.]+)", README)):
        thing: object = vm
        for part in name.rstrip(".").split("."):
            thing = getattr(thing, part)


def test_the_devices_shown_can_be_asked_for() -> None:
    names: dict[str, VMConfig] = {}
    exec(block_with("python", "DriveConfig"), names)
    assert names["config"].devices.count == 6


def test_the_collectors_shown_take_a_vm() -> None:
    names: dict[str, object] = {}
    exec(block_with("python", "trace_boot"), names)
    watched = names["watched"]
    assert callable(watched)
    assert watched(VM()).events.listening
