from __future__ import annotations

import contextlib
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.guest import cpio

names = st.text("abc-_.é", min_size=1, max_size=8).filter(lambda part: part not in (".", ".."))
entries = st.dictionaries(names, st.binary(max_size=50)).map(
    lambda files: [cpio.file(name, data) for name, data in files.items()]
)


@given(entries)
def test_what_is_written_reads_back_in_order_of_name(files: list[cpio.Entry]) -> None:
    assert cpio.read(cpio.write(files)) == sorted(files, key=lambda entry: entry.name)


@given(entries, st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_change_the_bytes(files: list[cpio.Entry], random: object) -> None:
    shuffled = sorted(files, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert cpio.write(files) == cpio.write(shuffled)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_read_or_are_refused_with_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(cpio.CpioError):
        cpio.read(data)


@given(entries, st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_damaged_archive_reads_or_is_refused_with_a_typed_error(
    files: list[cpio.Entry], at: int, patch: bytes
) -> None:
    archive = bytearray(cpio.write(files, align=4))
    archive[at : at + len(patch)] = patch
    with contextlib.suppress(cpio.CpioError):
        cpio.read(bytes(archive))


def test_parents_are_added_before_their_children() -> None:
    archive = cpio.read(cpio.write([cpio.file("a/b/c", b"")]))
    assert [(entry.name, stat.S_ISDIR(entry.mode)) for entry in archive] == [
        ("a", True),
        ("a/b", True),
        ("a/b/c", False),
    ]


def test_two_archives_behind_each_other_read_as_one() -> None:
    both = cpio.write([cpio.file("a", b"1")]) + cpio.write([cpio.file("b", b"2")], align=4)
    assert [entry.name for entry in cpio.read(both)] == ["a", "b"]


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/..", "./a", "a\0b", cpio.TRAILER, "x" * 4096])
def test_a_name_that_leaves_the_root_or_ends_the_archive_is_refused(name: str) -> None:
    with pytest.raises(cpio.CpioError):
        cpio.write([cpio.file(name, b"")])


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(cpio.CpioError, match="twice"):
        cpio.write([cpio.file("a", b""), cpio.directory("a")])


def test_more_entries_than_allowed_are_refused() -> None:
    with pytest.raises(cpio.CpioError, match="more than 1 entries"):
        cpio.read(cpio.write([cpio.file("a", b""), cpio.file("b", b"")]), max_entries=1)


@pytest.mark.requires("cpio")
def test_the_cpio_program_unpacks_files_links_and_modes(tmp_path: Path) -> None:
    archive = cpio.write([cpio.file("d/run", b"#!/bin/sh\n", 0o755), cpio.symlink("d/link", "run")])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "d/link").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "d/link").is_symlink()
    assert stat.S_IMODE((tmp_path / "d/run").stat().st_mode) == 0o755
