"""Saving: a snapshot comes to its place whole, or nothing changes there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncvmm.errors import SnapshotFailed
from asyncvmm.snapshot import renaming
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.loading import load
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.snapshot.verify import verify
from tests.support.snapshots import DISK, MIB, SECTIONS, SIZE, manifest_of, memory_of, page, save

ROOT = Path(__file__).parents[3]

STRIDE = os.environ.get("ASYNCVMM_KILL_STRIDE", "7")
"""1 kills at every line; that takes minutes."""


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    manifest = save(tmp_path / "s", {1: page(1), 255: page(255)}, disk=True)
    with load(tmp_path / "s") as loaded:
        assert loaded.manifest == manifest
        assert loaded.sections == SECTIONS
        assert memory_of(loaded) == bytes(4096) + page(1) + bytes(253 * 4096) + page(255) + bytes(SIZE - 256 * 4096)
        fd = loaded.open_file("disks/root")
    assert os.pread(fd, 2 * len(DISK), 0) == DISK
    os.close(fd)


def test_the_manifest_tells_sizes(tmp_path: Path) -> None:
    manifest = save(tmp_path / "s", {number: page(number) for number in range(16)}, disk=True)
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert {str(file.relative_to(tmp_path / "s")): file.stat().st_size for file in files} == {
        name: record.size for name, record in manifest.files.items()
    }
    assert manifest.allocated_bytes == sum(file.stat().st_blocks * 512 for file in files)
    assert manifest.logical_bytes == SIZE


def test_zeros_take_no_room(tmp_path: Path) -> None:
    manifest = save(tmp_path / "s", {0: page(0)}, memory_mib=1024)
    assert manifest.logical_bytes == 1 << 30
    assert manifest.allocated_bytes < MIB


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    save(tmp_path / "s", {}, disk=True)
    paths = [tmp_path / "s", *(tmp_path / "s").rglob("*")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths)


def test_sections_can_be_put_one_by_one(tmp_path: Path) -> None:
    with SnapshotDirectory.create(tmp_path / "s", SIZE) as made:
        made.put("vm", b"1")
        made.put("board", b"2")
        made.commit(manifest_of(made.id), {"vcpu0": b"3"}, MemoryMap(size=SIZE))
    with load(tmp_path / "s") as loaded:
        assert loaded.sections == {"vm": b"1", "board": b"2", "vcpu0": b"3"}


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "dangling link"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "s"
    match kind:
        case "directory":
            save(out, {})
        case "empty directory":
            out.mkdir()
        case "file":
            out.touch()
        case _:
            out.symlink_to("nowhere")
    with pytest.raises(SnapshotFailed, match="there already"):
        SnapshotDirectory.create(out)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("rename", ["renameat2", "rename"])
def test_what_came_meanwhile_is_not_overwritten(tmp_path: Path, rename: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rename == "rename":  # as on a file system that knows no renameat2
        monkeypatch.setattr(renaming, "_renameat2", lambda: renaming._missing)
    with SnapshotDirectory.create(tmp_path / "s", SIZE) as made:
        (tmp_path / "s").mkdir()
        with pytest.raises(SnapshotFailed, match="File exists"):
            made.commit(manifest_of(made.id))
    assert os.listdir(tmp_path) == ["s"]
    assert os.listdir(tmp_path / "s") == []


def test_a_file_system_that_knows_no_renameat2_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renaming, "_renameat2", lambda: renaming._missing)
    save(tmp_path / "s", {1: page(1)})
    verify(tmp_path / "s").raise_for_problems()
    with pytest.raises(SnapshotFailed, match="not implemented"):
        save(tmp_path / "s", {}, replace=True)
    verify(tmp_path / "s").raise_for_problems()
    assert os.listdir(tmp_path) == ["s"]


def test_a_snapshot_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path / "s", {1: page("old")})
    with load(tmp_path / "s") as old:
        save(tmp_path / "s", {1: page("new")}, replace=True)
        assert memory_of(old)[4096:8192] == page("old")
    with load(tmp_path / "s", check_memory=True) as new:
        assert memory_of(new)[4096:8192] == page("new")
    assert os.listdir(tmp_path) == ["s"]


def test_only_a_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file")
    with pytest.raises(SnapshotFailed, match="no directory"):
        save(tmp_path / "s", {}, replace=True)
    assert (tmp_path / "s").read_text() == "a file"
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("out", ["", ".", "..", "missing/s", "file/s", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SnapshotFailed), SnapshotDirectory.create(Path(out), SIZE) as made:
        made.commit(manifest_of(made.id))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.requires("unprivileged")
def test_a_directory_of_somebody_elses_is_refused() -> None:
    with pytest.raises(SnapshotFailed, match="Permission denied"):
        SnapshotDirectory.create(Path("/s"))


def test_a_read_only_file_system_is_refused() -> None:
    with pytest.raises(SnapshotFailed):
        SnapshotDirectory.create(Path("/proc/s"))


@pytest.mark.parametrize("name", ["memory.bin", "state.bin", "manifest.json", "../x", "/x", "a/b/c", ".x", ""])
def test_other_files_have_names_of_their_own(tmp_path: Path, name: str) -> None:
    with SnapshotDirectory.create(tmp_path / "s") as made, pytest.raises(SnapshotFailed, match="a name for a file"):
        made.new_file(name)


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SnapshotFailed, match="plain values"):
        save(tmp_path / "s", {1: page(1)}, config={"not plain": object()})
    with pytest.raises(SnapshotFailed, match="plain values"), SnapshotDirectory.create(tmp_path / "s", SIZE) as made:
        made.commit(manifest_of(made.id), {"../section": b""})
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    save(tmp_path / "s", {1: page(1)}, disk=True)
    with pytest.raises(SnapshotFailed):
        save(tmp_path / "s", {1: page(1)})
    SnapshotDirectory.create(tmp_path / "t").abort()
    load(tmp_path / "s").close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_abort_after_commit_undoes_nothing(tmp_path: Path) -> None:
    made = SnapshotDirectory.create(tmp_path / "s", SIZE)
    made.commit(manifest_of(made.id))
    made.abort()
    made.abort()
    verify(tmp_path / "s").raise_for_problems()


def test_a_leftover_goes_with_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / ".s.0123456789abcdef.partial"
    (leftover / "disks").mkdir(parents=True)
    (leftover / "memory.bin").write_bytes(b"x")
    kept = [".t.0123456789abcdef.partial", ".s.0123456789abcdef.partial.x", ".s.short.partial"]
    for name in kept:
        (tmp_path / name).mkdir()
    save(tmp_path / "s", {})
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "s"])


def test_what_is_no_directory_of_a_save_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".s.0123456789abcdef.partial").symlink_to("mine")
    save(tmp_path / "s", {})
    assert (tmp_path / "mine" / "file").exists()


def test_a_save_under_way_is_no_leftover(tmp_path: Path) -> None:
    with SnapshotDirectory.create(tmp_path / "s", SIZE) as slow:
        save(tmp_path / "s", {1: page("quick")})
        with pytest.raises(SnapshotFailed, match="File exists"):
            slow.commit(manifest_of(slow.id))
    with load(tmp_path / "s") as loaded:
        assert memory_of(loaded)[4096:8192] == page("quick")
    assert os.listdir(tmp_path) == ["s"]


def test_of_saves_at_the_same_moment_one_succeeds(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        try:
            save(tmp_path / "s", {1: page(number)})
        except SnapshotFailed:
            return False
        return True

    for _ in range(10):
        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(attempt, range(4))) == 1
        verify(tmp_path / "s").raise_for_problems()
        assert os.listdir(tmp_path) == ["s"]
        os.rename(tmp_path / "s", tmp_path / "old")
        subprocess.run(["rm", "-r", tmp_path / "old"], check=True)


def test_of_replacing_saves_at_the_same_moment_all_succeed(tmp_path: Path) -> None:
    save(tmp_path / "s", {})
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: save(tmp_path / "s", {1: page(number)}, replace=True), range(12)))
    verify(tmp_path / "s").raise_for_problems()
    save(tmp_path / "s", {}, replace=True)
    assert os.listdir(tmp_path) == ["s"]


def test_what_is_replaced_meanwhile_is_loaded_old_or_new(tmp_path: Path) -> None:
    save(tmp_path / "s", {})

    def replace() -> None:
        for number in range(60):
            save(tmp_path / "s", {1: page(number)}, replace=True)

    with ThreadPoolExecutor(1) as thread:
        replacing = thread.submit(replace)
        while not replacing.done():
            load(tmp_path / "s", check_memory=True).close()
        replacing.result()


def test_a_leftover_that_is_looked_at_is_left_alone(tmp_path: Path) -> None:
    """Whoever holds the lock is alive."""
    leftover = tmp_path / ".s.0123456789abcdef.partial"
    leftover.mkdir()
    fd = os.open(leftover, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    save(tmp_path / "s", {})
    assert leftover.exists()
    os.close(fd)


@pytest.mark.parametrize("scenario", ["first", "replacing", "flattening"])
def test_a_save_killed_at_any_moment_leaves_the_old_one_or_none(tmp_path: Path, scenario: str) -> None:
    program = [sys.executable, "-m", "tests.support.killed_saves", scenario, str(tmp_path), STRIDE]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100, "hardly a line of a save was found"


@pytest.mark.requires("root", "mount-namespaces")
def test_a_full_disk_is_a_typed_error_and_leaves_nothing(small_disk: Path) -> None:
    save(small_disk / "old", {1: page(1)})
    for pages in (1, 40):
        save(small_disk / "s", {number: page(number) for number in range(pages)})
        verify(small_disk / "s").raise_for_problems()
        subprocess.run(["rm", "-r", small_disk / "s"], check=True)
    for pages in range(122, 140):  # full by the state, by the trailer, by the memory
        with pytest.raises(SnapshotFailed, match="No space left"):
            save(small_disk / "s", {number: page(number) for number in range(pages)})
        assert os.listdir(small_disk) == ["old"]
    verify(small_disk / "old").raise_for_problems()


@pytest.mark.requires("root", "mount-namespaces")
def test_a_disk_without_room_for_the_state_is_a_typed_error(small_disk: Path) -> None:
    with SnapshotDirectory.create(small_disk / "s", SIZE) as made, pytest.raises(SnapshotFailed, match="No space left"):
        made.commit(manifest_of(made.id), {"qemu": bytes(MIB)})
    assert os.listdir(small_disk) == []
