"""Loading: what is whole is loaded; everything else ends in a typed error that says what was found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm import VM
from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch
from asyncvmm.snapshot.flatten import flatten
from asyncvmm.snapshot.inspect import inspect
from asyncvmm.snapshot.lineage import MOST_LAYERS
from asyncvmm.snapshot.loading import MOST_RUNS_WALKED, load
from asyncvmm.snapshot.manifest import MOST_MANIFEST_BYTES, FileRecord, Manifest
from asyncvmm.snapshot.memory_map import PAGE_BYTES
from asyncvmm.snapshot.memory_writer import punch_hole
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.snapshot.state_file import MOST_STATE_BYTES, pack
from asyncvmm.snapshot.verify import verify
from tests.support.snapshots import MIB, SIZE, memory_of, page, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "s", {1: page(1), 9: page(9)}, disk=True)
    return tmp_path / "s"


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three layers; the newest makes page 1 zeros again."""
    save(tmp_path / "full", {1: page("full"), 2: page("full"), 9: page("full")})
    save(tmp_path / "middle", {2: page("middle"), 200: page("middle")}, base=tmp_path / "full")
    save(tmp_path / "s", {1: bytes(4096), 9: page("newest")}, base=tmp_path / "middle")
    return tmp_path / "s"


def rewrite(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    """The manifest anew, its checksum right."""
    manifest = Manifest.from_bytes((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(change(manifest).to_bytes())


def test_a_chain_is_loaded_with_its_layers_in_order(chain: Path) -> None:
    with load(chain, check_memory=True) as loaded:
        assert [link.path.name for link in loaded.links] == ["full", "middle", "s"]
        assert [layer.map.is_difference for layer in loaded.layers] == [False, True, True]
        assert memory_of(loaded) == b"".join(
            {2: page("middle"), 9: page("newest"), 200: page("middle")}.get(number, bytes(4096))
            for number in range(SIZE // PAGE_BYTES)
        )
        assert loaded.saved.memory == loaded.layers[-1].map
        assert loaded.saved.accel == "kvm"


@pytest.mark.parametrize("name", ["full", "middle", "s"])
def test_a_memory_file_that_is_cut_off_after_it_was_loaded_is_found(chain: Path, tmp_path: Path, name: str) -> None:
    with load(chain) as loaded:
        loaded.check_sizes()
        os.truncate(tmp_path / name / "memory.bin", 4096)
        with pytest.raises(SnapshotDamaged, match=name):
            loaded.check_sizes()


def test_a_chain_moves_as_a_whole(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("full", "middle", "s"):
        os.rename(tmp_path / name, tmp_path / "elsewhere" / name)
    load(tmp_path / "elsewhere" / "s", check_memory=True).close()


def test_a_base_is_found_from_a_directory_that_a_link_led_to(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    save(tmp_path / "full", {1: page(1)})
    save(tmp_path / "link" / "s", {2: page(2)}, base=tmp_path / "full")
    save(tmp_path / "next", {3: page(3)}, base=tmp_path / "link" / "s")
    with load(tmp_path / "next") as loaded:
        assert len(loaded.layers) == 3


@given(
    st.lists(
        st.dictionaries(st.integers(0, 255), st.sampled_from([bytes(PAGE_BYTES), page("x"), page("y")]), max_size=12),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=20, deadline=None)
def test_chains_read_as_the_memory_did(
    tmp_path_factory: pytest.TempPathFactory, layers: list[dict[int, bytes]]
) -> None:
    place, memory = tmp_path_factory.mktemp("chain"), bytearray(SIZE)
    base: Path | None = None
    for number, pages in enumerate(layers):
        save(place / f"{number}", pages, base=base)
        base = place / f"{number}"
        for at, content in pages.items():
            memory[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] = content
        with load(base, check_memory=True) as loaded:
            assert memory_of(loaded) == memory


def test_a_link_to_a_snapshot_is_followed(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("s")
    load(tmp_path / "link").close()


@pytest.mark.parametrize("kind", ["nothing", "nothing above", "file", "nul", "long"])
@pytest.mark.parametrize("look", [load, verify, inspect, flatten], ids=lambda look: look.__name__)
def test_where_there_is_no_snapshot_none_is_damaged(tmp_path: Path, kind: str, look: Callable[[Path], object]) -> None:
    path = tmp_path / {"nul": "a\0b", "long": 300 * "a", "nothing above": "a/s"}.get(kind, "s")
    if kind == "file":
        path.touch()
    with pytest.raises(SnapshotError, match="expected a directory") as caught:
        look(path)
    assert type(caught.value) is SnapshotError
    assert str(path) in str(caught.value)


@pytest.mark.anyio
async def test_a_call_that_restores_what_is_not_there_says_so_as_well(tmp_path: Path) -> None:
    for look in (Snapshot.load, VM.restore):
        with pytest.raises(SnapshotError, match="nothing: expected a directory, found No such file") as caught:
            await look(tmp_path / "nothing")
        assert type(caught.value) is SnapshotError


def test_a_directory_without_anything_is_damage(tmp_path: Path) -> None:
    with pytest.raises(SnapshotDamaged, match=r"manifest\.json"):
        load(tmp_path)


FILES = ["manifest.json", "state.bin", "memory.bin", "disks/root"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "link", "device", "socket"])
def test_a_file_that_is_none_is_damage_that_names_it(saved: Path, name: str, kind: str) -> None:
    """A FIFO keeps nobody waiting."""
    path = saved / name
    os.rename(path, saved / "kept")
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(saved / "kept")
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            os.mknod(path, 0o140600)
    with pytest.raises(SnapshotDamaged, match=name):
        load(saved)
    with pytest.raises(SnapshotDamaged):
        verify(saved).raise_for_problems()


def test_a_link_in_a_files_place_is_called_one(saved: Path) -> None:
    os.rename(saved / "memory.bin", saved / "kept")
    (saved / "memory.bin").symlink_to("kept")
    with pytest.raises(SnapshotDamaged, match=r"memory\.bin: expected a file, found a symbolic link"):
        load(saved)


def test_a_path_that_leads_back_to_itself_leads_to_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    found = "loop: expected a directory, found symbolic links that lead nowhere"
    with pytest.raises(SnapshotError, match=found) as caught:
        load(tmp_path / "loop")
    assert type(caught.value) is SnapshotError


@pytest.mark.requires("root")
@pytest.mark.parametrize("name", FILES)
def test_a_device_in_a_files_place_is_damage(saved: Path, name: str) -> None:
    (saved / name).unlink()
    os.mknod(saved / name, 0o020600, os.makedev(1, 5))
    with pytest.raises(SnapshotDamaged, match=name):
        load(saved)


def test_a_folder_that_is_a_link_is_not_followed(saved: Path) -> None:
    os.rename(saved / "disks", saved.parent / "elsewhere")
    (saved / "disks").symlink_to("../elsewhere")
    with pytest.raises(SnapshotDamaged, match="disks/root"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-2, 1])
def test_a_file_of_another_size_is_damage_that_names_it(saved: Path, name: str, change: int) -> None:
    os.truncate(saved / name, (saved / name).stat().st_size + change)
    with pytest.raises(SnapshotDamaged) as caught:
        load(saved)
    assert name in str(caught.value) or name == "manifest.json"


def test_every_flipped_byte_of_manifest_and_state_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save(path, {1: page(1)})
    for name in ("manifest.json", "state.bin"):
        data = (path / name).read_bytes()
        for at in range(len(data)):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(SnapshotError):
                load(path)
        (path / name).write_bytes(data)
    load(path, check_memory=True).close()


@pytest.mark.parametrize("at", [4096, 4097, 8191, 9 * 4096, 10 * 4096 - 1])
def test_a_flipped_bit_of_memory_is_found_if_its_content_is_checked(saved: Path, at: int) -> None:
    with open(saved / "memory.bin", "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    load(saved).close()
    with pytest.raises(SnapshotDamaged, match=r"memory\.bin, offset 0x"):
        load(saved, check_memory=True)


@pytest.mark.parametrize("at", [0, 7, 8, 39])
def test_a_flipped_bit_behind_the_memory_is_not_called_another_snapshots(saved: Path, at: int) -> None:
    with open(saved / "memory.bin", "r+b") as file:
        file.seek(SIZE + at)
        byte = file.read(1)[0]
        file.seek(SIZE + at)
        file.write(bytes([byte ^ 0x80]))
    with pytest.raises(SnapshotDamaged, match="found a damaged trailer"):
        load(saved)


@pytest.mark.parametrize("at", [0, 5 * 4096 + 7, MIB - 1, SIZE - 1])
def test_data_where_there_is_to_be_none_is_found_at_once(saved: Path, at: int) -> None:
    with open(saved / "memory.bin", "r+b") as file:
        file.seek(at)
        file.write(b"x")
    with pytest.raises(SnapshotDamaged, match=rf"memory\.bin, offset {at:#x}: expected zeros, found 0x78"):
        load(saved)


def test_memory_that_was_punched_out_is_found_at_once(saved: Path) -> None:
    fd = os.open(saved / "memory.bin", os.O_RDWR)
    assert punch_hole(fd, 9 * PAGE_BYTES, PAGE_BYTES)
    os.close(fd)
    with pytest.raises(SnapshotDamaged, match="expected data at offset 0x9000, found a hole"):
        load(saved)


def test_scattered_memory_that_was_punched_out_is_found_at_once(tmp_path: Path) -> None:
    pages = {2 * number: page(number) for number in range(MOST_RUNS_WALKED + 1)}
    save(tmp_path / "s", pages, memory_mib=16)
    load(tmp_path / "s").close()
    fd = os.open(tmp_path / "s" / "memory.bin", os.O_RDWR)
    assert punch_hole(fd, 0, 16 * MIB)
    os.close(fd)
    with pytest.raises(SnapshotDamaged, match="a hole"):
        load(tmp_path / "s")


def test_a_copy_without_holes_is_whole(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "copy" / "disks").mkdir(parents=True)
    for name in FILES:
        (tmp_path / "copy" / name).write_bytes((saved / name).read_bytes())
    load(tmp_path / "copy", check_memory=True).close()
    verify(tmp_path / "copy").raise_for_problems()


@pytest.mark.parametrize("name", ["state.bin", "memory.bin"])
def test_a_file_of_another_snapshot_is_damage(saved: Path, tmp_path: Path, name: str) -> None:
    save(tmp_path / "other", {1: page(1), 9: page(9)}, disk=True)
    if name == "state.bin":
        (tmp_path / "other" / name).write_bytes(pack({"vm": b"another"}).ljust((saved / name).stat().st_size, b"\0"))
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(SnapshotDamaged, match=name):
        load(saved)


def test_a_manifest_of_another_snapshot_is_damage(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", {1: page(1), 9: page(9)}, disk=True)
    shutil.copy(tmp_path / "other" / "manifest.json", saved)
    with pytest.raises(SnapshotDamaged, match=r"memory\.bin"):
        load(saved)


def test_another_format_is_a_mismatch(saved: Path) -> None:
    plain = orjson.loads((saved / "manifest.json").read_bytes()) | {"format": 2}
    (saved / "manifest.json").write_bytes(orjson.dumps(plain))
    with pytest.raises(SnapshotMismatch, match="expected format 1, found format 2"):
        load(saved)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("size", [0, 1, 1 << 39])
def test_a_manifest_that_lies_about_sizes_is_damage(saved: Path, name: str, size: int) -> None:
    def lie(manifest: Manifest) -> Manifest:
        data = () if name == "disks/root" else None
        record = attrs.evolve(manifest.files[name], size=size, data=data)
        return attrs.evolve(manifest, files={**manifest.files, name: record})

    rewrite(saved, lie)
    with pytest.raises(SnapshotDamaged, match=name):
        load(saved)


def test_a_manifest_that_lies_about_memory_is_damage(saved: Path) -> None:
    def lie(manifest: Manifest) -> Manifest:
        memory = attrs.evolve(manifest.memory, size=1 << 39)
        return attrs.evolve(manifest, memory=memory, memory_mib=1 << 19, regions=((0, 1 << 39),))

    rewrite(saved, lie)
    with pytest.raises(SnapshotDamaged, match=r"memory\.bin.*bytes"):
        load(saved)


@pytest.mark.parametrize(("name", "most"), [("manifest.json", MOST_MANIFEST_BYTES), ("state.bin", MOST_STATE_BYTES)])
def test_a_file_beyond_all_bounds_is_not_read(saved: Path, name: str, most: int) -> None:
    os.truncate(saved / name, 1 << 40)
    with pytest.raises(SnapshotDamaged, match=f"at most {most} bytes"):
        load(saved)


def test_checksums_that_are_missing_are_found(saved: Path) -> None:
    rewrite(saved, lambda manifest: _with_sums(manifest, ()))
    with pytest.raises(SnapshotDamaged, match="0 in the manifest"):
        load(saved, check_memory=True)


def _with_sums(manifest: Manifest, sums: tuple[int, ...]) -> Manifest:
    record = FileRecord(size=manifest.files["memory.bin"].size, crc32=sums)
    return attrs.evolve(manifest, files={**manifest.files, "memory.bin": record})


@pytest.mark.parametrize("kept", [0, 1])
def test_a_map_without_what_the_memory_file_holds_is_found_at_once(saved: Path, kept: int) -> None:
    """A guest made of it would have zeros there."""

    def lie(manifest: Manifest) -> Manifest:
        sums = manifest.files["memory.bin"].crc32 or ()
        memory = attrs.evolve(manifest.memory, data=manifest.memory.data[:kept])
        return attrs.evolve(_with_sums(manifest, sums[:kept]), memory=memory)

    rewrite(saved, lie)
    with pytest.raises(SnapshotDamaged, match=r"memory\.bin, offset 0x[0-9a-f]+: expected zeros"):
        load(saved)
    assert any("expected zeros" in str(problem) for problem in verify(saved).problems)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"memory_mib": 3}, "memory_mib: expected 2, found 3"),
        ({"memory_mib": 2, "vcpus": 2}, "vcpus: expected 1, found 2"),
        ({}, "memory_mib: expected 2, found 256"),
        ({"memory_mib": 2, "rng": {}}, r"devices: expected \(\), found \('rng',\)"),
        ({"memory_mib": 2, "drives": 3}, "expected a VMConfig's values"),
        ({"memory_mib": "2"}, "expected a VMConfig's values"),
        ({"memory_mib": 2, "speed": 9}, "expected the fields of a VMConfig"),
    ],
)
def test_a_configuration_that_is_not_the_saved_machines_is_damage(saved: Path, config: Any, match: str) -> None:
    rewrite(saved, lambda manifest: attrs.evolve(manifest, config=config))
    with pytest.raises(SnapshotDamaged, match=f"s: saved configuration.*{match}"):
        load(saved)
    with pytest.raises(SnapshotDamaged, match=f"s: saved configuration.*{match}"):
        verify(saved).raise_for_problems()


def test_a_missing_base_is_damage_that_names_it(chain: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "middle")
    with pytest.raises(SnapshotDamaged, match=r"expected a snapshot at .*middle, found No such file"):
        load(chain)


def test_another_base_is_a_mismatch(chain: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "full")
    expected = save(tmp_path / "full", {1: page("full")}).id
    with pytest.raises(SnapshotMismatch, match=f"base of a difference: expected .*, found {expected}"):
        load(chain)


def test_a_base_that_is_a_link_is_not_followed(chain: Path, tmp_path: Path) -> None:
    os.rename(tmp_path / "full", tmp_path / "moved")
    (tmp_path / "full").symlink_to("moved")
    with pytest.raises(SnapshotDamaged, match="base"):
        load(chain)


def test_a_damaged_base_is_named(chain: Path, tmp_path: Path) -> None:
    os.truncate(tmp_path / "full" / "memory.bin", 4096)
    with pytest.raises(SnapshotDamaged, match=r"full/memory\.bin"):
        load(chain)
    (tmp_path / "full" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(SnapshotDamaged, match="full: manifest"):
        load(chain)


def test_a_base_of_another_shape_is_a_mismatch(chain: Path, tmp_path: Path) -> None:
    rewrite(tmp_path / "full", lambda manifest: attrs.evolve(manifest, vcpus=2))
    with pytest.raises(SnapshotMismatch, match="vcpus: expected 1, found 2"):
        load(chain)


def test_a_chain_that_comes_back_to_itself_ends(chain: Path, tmp_path: Path) -> None:
    newest = Manifest.from_bytes((chain / "manifest.json").read_bytes())
    middle = Manifest.from_bytes((tmp_path / "middle" / "manifest.json").read_bytes())
    assert middle.base is not None
    loop = attrs.evolve(middle, base=attrs.evolve(middle.base, id=newest.id, path="../s"))
    (tmp_path / "middle" / "manifest.json").write_bytes(loop.to_bytes())
    with pytest.raises(SnapshotDamaged, match="twice"):
        load(chain)


def test_a_snapshot_that_is_its_own_base_is_damage(chain: Path) -> None:
    def own(manifest: Manifest) -> Manifest:
        assert manifest.base is not None
        return attrs.evolve(manifest, base=attrs.evolve(manifest.base, id=manifest.id, path="."))

    rewrite(chain, own)
    with pytest.raises(SnapshotDamaged, match="twice"):
        load(chain)


def test_a_chain_has_an_end(tmp_path: Path) -> None:
    save(tmp_path / "0", {})
    for number in range(1, MOST_LAYERS + 1):
        save(tmp_path / f"{number}", {number: page(number)}, base=tmp_path / f"{number - 1}")
    with load(tmp_path / f"{MOST_LAYERS - 1}", check_memory=True) as loaded:
        assert len(loaded.layers) == MOST_LAYERS
    with pytest.raises(SnapshotDamaged, match=f"at most {MOST_LAYERS}"):
        load(tmp_path / f"{MOST_LAYERS}")


def test_what_fails_leaves_nothing_open(chain: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.truncate(tmp_path / "full" / "memory.bin", 4096)
    for _ in range(3):
        with pytest.raises(SnapshotDamaged):
            load(chain)
        with pytest.raises(SnapshotDamaged):
            verify(chain).raise_for_problems()
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_twice_is_harmless(saved: Path) -> None:
    loaded = load(saved)
    loaded.close()
    loaded.close()


@pytest.mark.parametrize("name", ["disks/none", "../x", "manifest.json"])
def test_only_its_own_files_are_opened(saved: Path, name: str) -> None:
    with load(saved) as loaded, pytest.raises(SnapshotDamaged, match="none in its manifest"):
        loaded.open_file(name)


@pytest.mark.requires("unprivileged")
def test_a_snapshot_of_somebody_elses_is_no_damage(saved: Path) -> None:
    os.chmod(saved / "state.bin", 0)
    with pytest.raises(SnapshotError, match="Permission denied") as caught:
        load(saved)
    assert not isinstance(caught.value, SnapshotDamaged)
