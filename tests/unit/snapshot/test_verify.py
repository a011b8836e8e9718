"""verify says which file is wrong, and where; flatten makes of a chain what needs no other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch
from asyncvmm.snapshot.extents import data_runs
from asyncvmm.snapshot.flatten import flatten
from asyncvmm.snapshot.loading import load
from asyncvmm.snapshot.verify import MOST_PROBLEMS, verify
from tests.support.snapshots import DISK, MIB, id_of, memory_of, page, save


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    save(tmp_path / "full", {1: page("full"), 2: page("full"), 600: page("full")}, memory_mib=4)
    save(
        tmp_path / "s", {1: bytes(4096), 3: page("s"), 1000: page("s")}, base=tmp_path / "full", memory_mib=4, disk=True
    )
    return tmp_path / "s"


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_whole_chain_has_no_problems(chain: Path, tmp_path: Path) -> None:
    found = verify(chain)
    found.raise_for_problems()
    assert found.problems == ()
    assert found.chain == (tmp_path / "full", chain)
    assert found.data_bytes > 5 * 4096


@pytest.mark.parametrize(
    ("name", "at", "offset"),
    [
        ("full/memory.bin", 2 * 4096 + 77, "0x0"),
        ("full/memory.bin", 600 * 4096, "0x200000"),
        ("s/memory.bin", 1001 * 4096 - 1, "0x300000"),
        ("s/memory.bin", 2 * MIB + 5, "0x200005"),
        ("s/disks/root", 3, "0x0"),
        ("s/disks/root", len(DISK) - 1, "0x0"),
    ],
)
def test_what_is_wrong_is_named_with_its_offset(chain: Path, tmp_path: Path, name: str, at: int, offset: str) -> None:
    flip(tmp_path / name, at)
    problems = verify(chain).problems
    assert [problem.what for problem in problems] == [f"{tmp_path / name}, offset {offset}"]


def test_all_that_is_wrong_is_told(chain: Path, tmp_path: Path) -> None:
    flip(tmp_path / "full" / "memory.bin", 4096)
    flip(tmp_path / "full" / "state.bin", 30)
    flip(chain / "disks" / "root", 0)
    os.truncate(chain / "memory.bin", 5 * MIB)
    problems = verify(chain).problems
    text = "\n".join(map(str, problems))
    assert all(name in text for name in ("full/memory.bin", "full/state.bin", "s/disks/root", "s/memory.bin"))
    with pytest.raises(SnapshotDamaged, match=rf"\(and {len(problems) - 1} more\)"):
        verify(chain).raise_for_problems()


def test_a_missing_disk_is_told_beside_the_rest(chain: Path) -> None:
    (chain / "disks" / "root").unlink()
    flip(chain / "memory.bin", 3 * 4096)
    assert len(verify(chain).problems) == 2


def test_not_more_is_told_than_anybody_reads(tmp_path: Path) -> None:
    pages = {256 * number: page(number) for number in range(2 * MOST_PROBLEMS)}
    save(tmp_path / "s", pages, memory_mib=2 * MOST_PROBLEMS)
    for number in pages:
        flip(tmp_path / "s" / "memory.bin", number * 4096)
    assert len(verify(tmp_path / "s").problems) == MOST_PROBLEMS


def test_a_flattened_chain_needs_no_base(chain: Path, tmp_path: Path) -> None:
    with load(chain) as loaded:
        expected, sections, id = memory_of(loaded), loaded.sections, loaded.manifest.id
    flatten(chain)
    shutil.rmtree(tmp_path / "full")
    verify(chain).raise_for_problems()
    with load(chain) as loaded:
        assert len(loaded.layers) == 1
        assert loaded.manifest.base is None
        assert loaded.manifest.id == id
        assert loaded.sections == sections
        assert memory_of(loaded) == expected
        assert data_runs(loaded.layers[0].fd, 4 * MIB) == loaded.manifest.memory.data
        fd = loaded.open_file("disks/root")
    assert os.pread(fd, len(DISK) + 1, 0) == DISK
    os.close(fd)


def test_differences_of_a_flattened_snapshot_stay_so(chain: Path, tmp_path: Path) -> None:
    save(tmp_path / "next", {7: page("next")}, base=chain, memory_mib=4)
    with load(tmp_path / "next") as loaded:
        expected = memory_of(loaded)
    flatten(chain)
    with load(tmp_path / "next", check_memory=True) as loaded:
        assert len(loaded.layers) == 2
        assert memory_of(loaded) == expected


def test_flattening_elsewhere_leaves_the_chain(chain: Path, tmp_path: Path) -> None:
    flatten(chain, tmp_path / "out")
    with load(chain) as old, load(tmp_path / "out") as new:
        assert len(old.layers) == 2
        assert memory_of(old) == memory_of(new)
    with pytest.raises(SnapshotFailed, match="there already"):
        flatten(chain, tmp_path / "out")


def test_a_full_snapshot_stays_as_it_is(tmp_path: Path) -> None:
    save(tmp_path / "s", {1: page(1)})
    before = (tmp_path / "s").stat().st_ino
    assert flatten(tmp_path / "s").id == id_of(tmp_path / "s")
    assert (tmp_path / "s").stat().st_ino == before


def test_flattening_through_a_link_replaces_the_snapshot_not_the_link(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("s")
    flatten(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    with load(chain) as loaded:
        assert loaded.manifest.base is None


def test_a_damaged_chain_is_not_flattened(chain: Path, tmp_path: Path) -> None:
    flip(tmp_path / "full" / "memory.bin", 4096)
    with pytest.raises(SnapshotDamaged, match=r"full/memory\.bin, offset 0x0"):
        flatten(chain)
    save(tmp_path / "full", {}, replace=True, memory_mib=4)
    with pytest.raises(SnapshotMismatch):
        flatten(chain)
    assert sorted(os.listdir(tmp_path)) == ["full", "s"]
