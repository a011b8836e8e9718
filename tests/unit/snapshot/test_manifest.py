"""Manifests: what was written comes back, what was changed is refused, and so is what cannot be."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch
from asyncvmm.snapshot.manifest import MOST_MANIFEST_BYTES, Base, FileRecord, Manifest, is_name
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap
from tests.fuzz.mutation import mutate
from tests.fuzz.script import Script
from tests.support.snapshots import MIB, manifest_of

FILES = {
    "memory.bin": FileRecord(size=MIB + PAGE_BYTES, crc32=(1, 0xFFFFFFFF)),
    "state.bin": FileRecord(size=10, sha256="0" * 64),
    "disks/root": FileRecord(size=5000, data=((0, PAGE_BYTES),), crc32=(7,)),
}
WHOLE = manifest_of("0123456789abcdef" * 2, 1, files=FILES, image={"kernel": "a" * 64, "initrd": None}, window=True)
DIFFERENCE = manifest_of(
    "fedcba9876543210" * 2,
    1,
    files=FILES,
    base=Base(id=WHOLE.id, path="../base"),
    memory=MemoryMap(size=MIB, zero=((0, PAGE_BYTES),), is_difference=True),
)


@pytest.mark.parametrize("manifest", [WHOLE, DIFFERENCE], ids=["full", "difference"])
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_a_manifest_that_was_laid_out_anew_comes_back() -> None:
    laid_out = orjson.dumps(dict(reversed(orjson.loads(WHOLE.to_bytes()).items())), option=orjson.OPT_INDENT_2)
    assert Manifest.from_bytes(laid_out) == WHOLE


def test_every_flipped_bit_is_found() -> None:
    data = WHOLE.to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(SnapshotError):
                Manifest.from_bytes(bytes(flipped))


def test_every_truncation_is_found() -> None:
    data = WHOLE.to_bytes().rstrip()
    for size in range(len(data)):
        with pytest.raises(SnapshotDamaged):
            Manifest.from_bytes(data[:size])


def test_another_format_is_a_mismatch_that_says_which() -> None:
    with pytest.raises(SnapshotMismatch, match="expected format 1, found format 2"):
        Manifest.from_bytes(orjson.dumps(orjson.loads(WHOLE.to_bytes()) | {"format": 2}))


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b'{"format": 1}', b'{"format": true}', b"\xff", b"{"])
def test_what_is_no_manifest_is_damage(data: bytes) -> None:
    with pytest.raises(SnapshotDamaged):
        Manifest.from_bytes(data)


def sha(data: str) -> dict[str, Any]:
    return {"size": 1, "sha256": data}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "0" * 31),
        ("id", "0" * 32 + "\n"),
        ("id", "A" * 32),
        ("machine", "xen"),
        ("created", "yesterday"),
        ("asyncvmm", ""),
        ("memory_mib", 0),
        ("memory_mib", True),
        ("memory_mib", 2),
        ("vcpus", 0),
        ("vcpus", 1 << 40),
        ("regions", []),
        ("regions", [[0, MIB // 2]]),
        ("regions", [[0, MIB], [0, MIB]]),
        ("regions", [[1, MIB]]),
        ("regions", [[0, -MIB]]),
        ("regions", [[0, MIB, 0]]),
        ("regions", [[1 << 60, MIB]]),
        ("regions", [[0.0, MIB]]),
        ("memory", {}),
        ("cpu", []),
        ("devices", "serial"),
        ("devices", [1]),
        ("config", None),
        ("window", 1),
        ("image", {"rootfs": None}),
        ("image", {"kernel": "short"}),
        ("extra", []),
        ("logical_bytes", -1),
        ("allocated_bytes", 1.5),
        ("base", {"id": "0" * 32, "path": "../base"}),
        ("files", {}),
        ("files", {"memory.bin": {"size": 1, "crc32": []}}),
    ],
)
def test_a_field_that_cannot_be_is_damage_that_names_it(field: str, value: Any) -> None:
    with pytest.raises(SnapshotDamaged) as caught:
        Manifest.from_dict(WHOLE.to_dict() | {field: value})
    assert field.split("_")[0] in caught.value.what or field in str(caught.value)


@pytest.mark.parametrize("path", ["", "/absolute", "a\0b", "x" * 5000, 7, None])
def test_a_base_that_is_no_relative_path_is_damage(path: Any) -> None:
    with pytest.raises(SnapshotDamaged, match="base"):
        Manifest.from_dict(DIFFERENCE.to_dict() | {"base": {"id": WHOLE.id, "path": path}})


def test_a_difference_without_a_base_is_damage() -> None:
    with pytest.raises(SnapshotDamaged, match="a base for a difference"):
        Manifest.from_dict(DIFFERENCE.to_dict() | {"base": None})


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "/etc/passwd",
        "../memory.bin",
        "disks/..",
        "disks/../../x",
        "a/b/c",
        "a//b",
        "a/",
        ".x",
        "a\0",
        "é",
    ],
)
def test_names_that_lead_out_of_the_directory_are_refused(name: str) -> None:
    assert not is_name(name)
    files = WHOLE.to_dict()["files"] | {name: {"size": 1, "data": [], "crc32": []}}
    with pytest.raises(SnapshotDamaged, match="names of files"):
        Manifest.from_dict(WHOLE.to_dict() | {"files": files})


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("state.bin", {"size": 1, "crc32": []}),
        ("state.bin", {"size": 1, "sha256": "0" * 63}),
        ("state.bin", {"size": -1, "sha256": "0" * 64}),
        ("memory.bin", {"size": 1, "data": [], "crc32": []}),
        ("memory.bin", {"size": 1, "crc32": [-1]}),
        ("memory.bin", {"size": 1, "crc32": [1 << 32]}),
        ("memory.bin", {"size": 1, "crc32": [0.5]}),
        ("disks/root", {"size": 1, "data": [0, 2], "crc32": []}),
        ("disks/root", {"size": 1 << 60, "data": [], "crc32": []}),
        ("disks/root", []),
    ],
)
def test_a_file_record_that_cannot_be_is_damage(name: str, record: Any) -> None:
    with pytest.raises(SnapshotDamaged):
        Manifest.from_dict(WHOLE.to_dict() | {"files": WHOLE.to_dict()["files"] | {name: record}})


def test_what_is_not_plain_is_not_written() -> None:
    with pytest.raises(ValueError, match="manifest"):
        manifest_of("0" * 32, config={"x": object()}).to_bytes()


def test_what_is_too_large_to_be_read_is_not_written() -> None:
    with pytest.raises(ValueError, match="the most"):
        manifest_of("0" * 32, config={"x": "y" * MOST_MANIFEST_BYTES}).to_bytes()


@given(st.binary(max_size=60))
def test_any_change_is_a_manifest_or_a_typed_error(script: bytes) -> None:
    plain = mutate(orjson.loads(orjson.dumps(DIFFERENCE.to_dict())), Script(script))
    try:
        found = Manifest.from_dict(plain)
    except SnapshotError:
        return
    assert found.to_dict() == plain
