"""A file is written whole or not at all, and stays what it was besides."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from asyncvmm.errors import HostError
from asyncvmm.whole_file import write_whole


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "out", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "out").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_file_that_is_there_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"something longer")
    path.chmod(0o600)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_goes_on_pointing_to_the_file(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "file"
    link.symlink_to(path)
    write_whole(link, b"data")
    assert link.is_symlink()
    assert path.read_bytes() == b"data"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_fifo_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write_whole(path, b"data")
    reader.join(30)
    assert got == [b"data"]
    assert path.is_fifo()


def test_a_device_is_written_to_and_stays_one() -> None:
    write_whole(Path("/dev/null"), b"data")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(HostError, match="No space left"):
        write_whole(Path("/dev/full"), b"data")


@pytest.mark.parametrize("name", ["nosuch/out", ".", "a\0b", "x" * 300])
def test_where_no_file_can_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match="expected a file that can be written"):
        write_whole(tmp_path / name, b"data")
