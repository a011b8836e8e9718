"""Small snapshots of no VM at all, for tests of what is in a snapshot's directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from asyncvmm.snapshot.directory import SnapshotDirectory, base_of
from asyncvmm.snapshot.lineage import merge
from asyncvmm.snapshot.loading import Loaded
from asyncvmm.snapshot.manifest import Manifest
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap
from asyncvmm.snapshot.memory_writer import MemoryWriter

MIB = 1 << 20
SIZE = 2 * MIB
"""Of their memory, unless told otherwise: the least that a VM can have."""
SECTIONS = {"vm": b"the VM", "vcpu0": bytes(range(256)), "empty": b""}
DISK = b"a disk" + bytes(9000) + b"and its end"


def manifest_of(id: str, memory_mib: int = SIZE // MIB, **changes: Any) -> Manifest:
    """A manifest that is as it must be."""
    made = Manifest(
        id=id,
        machine="kvm",
        created="2026-11-21T12:00:00.000000Z",
        asyncvmm="0.1.0",
        memory_mib=memory_mib,
        vcpus=1,
        regions=((0, memory_mib * MIB),),
        memory=MemoryMap(size=memory_mib * MIB),
        cpu={"vendor": "GenuineIntel"},
        devices=(),
        config={"memory_mib": memory_mib},
        extra={"trigger": {"trigger": "pre-exec", "detail": "pid 1"}},
    )
    return attrs.evolve(made, **changes)


def save(
    out: Path,
    pages: Mapping[int, bytes],
    *,
    base: Path | None = None,
    memory_mib: int = SIZE // MIB,
    disk: bool = False,
    replace: bool = False,
    **changes: Any,
) -> Manifest:
    """A snapshot at ``out``: memory that is zeros but for ``pages`` by number, or that of ``base`` but for them."""
    with SnapshotDirectory.create(out, replace=replace) as made:
        writer = MemoryWriter(made.memory_fd, memory_mib * MIB, is_difference=base is not None)
        for number, page in pages.items():
            writer.write(number * PAGE_BYTES, page)
        if disk:
            _fill(made.new_file("disks/root"), DISK)
        if base is not None:
            changes["base"] = base_of(id_of(base), base, out)
        manifest = manifest_of(made.id, memory_mib)
        return made.commit(attrs.evolve(manifest, **changes), SECTIONS, writer.map())


def id_of(path: Path) -> str:
    """The id of the snapshot there."""
    return Manifest.from_bytes((path / "manifest.json").read_bytes()).id


def memory_of(loaded: Loaded) -> bytes:
    """All of its memory, put together of its layers."""
    memory = bytearray(loaded.manifest.memory.size)
    for offset, size, layer in merge([layer.map for layer in loaded.layers]):
        memory[offset : offset + size] = os.pread(loaded.layers[layer].fd, size, offset)
    return bytes(memory)


def page(text: str | int) -> bytes:
    """A page that says so."""
    return str(text).encode().ljust(PAGE_BYTES, b".")


def _fill(fd: int, data: bytes) -> None:
    os.ftruncate(fd, len(data))
    for start in range(0, len(data), PAGE_BYTES):
        if part := data[start : start + PAGE_BYTES].rstrip(b"\0"):
            os.pwrite(fd, part, start)
