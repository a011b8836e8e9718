"""What ``asyncvmm restore`` refuses before it looks at the snapshot, in words of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

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


def test_two_things_to_wait_for_are_refused(nothing: Path) -> None:
    words = ["snapshot", "take", "--on", "pre-exec", "--on", "after=5", "--out", str(nothing), "--", "true"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert done.output == "asyncvmm: --on: expected one, found pre-exec after=5\n"
