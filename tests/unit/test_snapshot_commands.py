"""What ``asyncvmm restore`` refuses before it looks at the snapshot, in words of the command line."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from asyncvmm.accel import choose_accel
from asyncvmm.cli import main
from asyncvmm.snapshot.clones import MOST_CLONES


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A directory that is not there."""
    return tmp_path / "nothing"


def test_more_clones_than_are_sensible_want_an_option_that_can_be_typed(nothing: Path) -> None:
    done = CliRunner().invoke(main, ["restore", str(nothing), "--clones", str(MOST_CLONES + 1)])
    assert done.exit_code == 2
    assert done.output == (
        f"asyncvmm: --clones: expected at most {MOST_CLONES}, or --beyond-bend as well, found {MOST_CLONES + 1}\n"
    )


def test_with_it_or_with_fewer_the_snapshot_is_looked_at(nothing: Path) -> None:
    for words in (["--clones", str(MOST_CLONES)], ["--clones", str(MOST_CLONES + 1), "--beyond-bend"]):
        done = CliRunner().invoke(main, ["restore", str(nothing), *words])
        assert done.exit_code == 2
        assert str(nothing) in done.output


def test_a_directory_without_a_name_is_refused() -> None:
    done = CliRunner().invoke(main, ["snapshot", "take", "--on", "pre-exec", "--out", "", "--", "true"])
    assert done.exit_code == 2
    assert done.output == "asyncvmm: --out: expected a path that a directory can have, found ''\n"


@pytest.mark.parametrize(
    ("words", "which"),
    [
        (["snapshot", "flatten", "{0}", "--out", ""], "--out"),
        (["snapshot", "flatten", ""], "DIR"),
        (["snapshot", "verify", ""], "DIR"),
        (["snapshot", "inspect", ""], "DIR"),
        (["restore", ""], "DIR"),
        (["restore", "{0}", "--jsonl", ""], "--jsonl"),
        (["snapshot", "--on", "pre-exec", "--out", "{0}", "--jsonl", "", "--", "true"], "--jsonl"),
        (["snapshot", "--on", "pre-exec", "--out", "{0}", "--kernel", "", "--", "true"], "--kernel"),
        (["boot", "--kernel", ""], "--kernel"),
        (["boot", "--initrd", ""], "--initrd"),
        (["boot", "--jsonl", ""], "--jsonl"),
        (["run", "--jsonl", "", "--", "true"], "--jsonl"),
        (["image", "build", "--rootfs", ""], "--rootfs"),
        (["image", "build", "--modules", ""], "--modules"),
        (["timeline", ""], "FILE..."),
        (["timeline", "/dev/null", "--html", ""], "--html"),
    ],
    ids=str,
)
def test_a_path_without_a_name_is_refused_before_anything_is_done(
    nothing: Path, words: list[str], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for the current directory."""
    nothing.mkdir()
    monkeypatch.chdir(nothing)
    monkeypatch.setenv("ASYNCVMM_HOME", str(nothing / "home"))
    done = CliRunner().invoke(main, [word.format(nothing / "s") for word in words])
    assert done.exit_code == 2
    assert done.output == f"asyncvmm: {which}: expected a path, found ''\n"
    assert not list(nothing.iterdir())


VSOCK = "snapshot: expected devices that QEMU can save, found vsock, a vhost-user device"
DRIVE = (
    "saving drives: expected overlay=True or read_only=True, so that the image stays as it is, "
    "found drive drive0, which writes to {0}/image"
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--accel", "qemu", "--vsock", "{0}/v"), VSOCK),
        (("--accel", "qemu", "--drive", "{0}/image"), DRIVE),
        (("--accel", "kvm", "--drive", "{0}/image"), DRIVE),
        (("--drive", "{0}/image,root"), DRIVE),
    ],
    ids=str,
)
def test_devices_that_cannot_be_saved_are_refused_before_there_is_a_guest(
    nothing: Path, words: tuple[str, ...], said: str
) -> None:
    nothing.mkdir()
    (nothing / "image").write_bytes(bytes(1 << 20))
    saving = ("snapshot", "--on", "pre-exec", "--out", "{0}/s", "--jsonl", "{0}/lines", *words, "--", "true")
    done = CliRunner().invoke(main, [word.format(nothing) for word in saving])
    assert done.exit_code == 2
    assert done.output == f"asyncvmm: {said.format(nothing)}\n"
    assert [path.name for path in nothing.iterdir()] == ["image"]


@pytest.mark.requires("qemu")
def test_for_that_the_machine_is_found_out_first(nothing: Path) -> None:
    if anyio.run(choose_accel).accel != "qemu":
        pytest.skip("KVM is chosen, which saves a vsock device")
    nothing.mkdir()
    words = ["--jsonl", f"{nothing}/lines", "--vsock", f"{nothing}/v", "--", "true"]
    done = CliRunner().invoke(main, ["snapshot", "--on", "pre-exec", "--out", f"{nothing}/s", *words])
    assert (done.exit_code, done.output) == (2, f"asyncvmm: {VSOCK}\n")
    assert not list(nothing.iterdir())


@pytest.mark.parametrize(("typed", "meant"), [("flaten", "flatten"), ("verfy", "verify"), ("inspct", "inspect")])
def test_a_command_of_snapshot_that_is_misspelt_is_answered_with_a_hint(typed: str, meant: str) -> None:
    done = CliRunner().invoke(main, ["snapshot", typed, "DIR"], prog_name="asyncvmm")
    assert done.exit_code == 2
    assert done.output.startswith(f"asyncvmm: No such command '{typed}'. Did you mean '{meant}'?")
    assert done.output.endswith(" (see asyncvmm snapshot --help)\n")


def test_the_shell_completes_paths_as_files() -> None:
    env = {"COMP_WORDS": "asyncvmm restore s", "COMP_CWORD": "2", "_ASYNCVMM_COMPLETE": "bash_complete"}
    done = CliRunner().invoke(main, [], prog_name="asyncvmm", env=env, complete_var="_ASYNCVMM_COMPLETE")
    assert done.output == "file,s\n"


def test_a_command_for_the_guest_comes_behind_the_options() -> None:
    done = CliRunner().invoke(main, ["snapshot", "sleep", "5"])
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    assert done.output.startswith("asyncvmm: No such command 'sleep'")
    for words in (["--", "sleep", "5"], ["--out", "s", "--", "sleep", "5"]):
        done = CliRunner().invoke(main, ["snapshot", *words], prog_name="asyncvmm")
        assert done.output == "asyncvmm: Missing option '--on'. (see asyncvmm snapshot take --help)\n"


def test_two_things_to_wait_for_are_refused(nothing: Path) -> None:
    words = ["snapshot", "take", "--on", "pre-exec", "--on", "after=5", "--out", str(nothing), "--", "true"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert done.output == "asyncvmm: --on: expected one, found pre-exec after=5\n"
