"""A chain of snapshots as one full snapshot, which needs no base: what ``asyncvmm snapshot flatten`` does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import attrs

from asyncvmm.errors import SnapshotDamaged, SnapshotFailed
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.lineage import merge
from asyncvmm.snapshot.loading import Loaded, load
from asyncvmm.snapshot.manifest import MEMORY, STATE, Manifest
from asyncvmm.snapshot.memory_map import MemoryMap, Run

_COPY_BYTES = 64 << 20
_COPIED_IN_PIECES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What copy_file_range says where it cannot copy."""


def flatten(path: Path, out: Path | None = None) -> Manifest:
    """Make one full snapshot of the chain of ``path``, at ``out``, or in the place of ``path``. Blocks while it does.

    It keeps its id: it is the same VM, and what is a difference of it stays one. All of the chain is checked first. A
    full one stays in its place as it is.
    Raises SnapshotDamaged, SnapshotMismatch, SnapshotFailed, SnapshotError.
    """
    with load(Path(path), check_memory=True) as loaded:
        if out is None and loaded.manifest.base is None:
            return loaded.manifest
        place = Path(os.path.realpath(path)) if out is None else Path(out)
        with SnapshotDirectory.create(place, loaded.manifest.memory.size, replace=out is None) as made:
            return _write(loaded, made)


def _write(loaded: Loaded, made: SnapshotDirectory) -> Manifest:
    try:
        memory = _copy_memory(loaded, made.memory_fd)
        _copy_files(loaded, made)
    except OSError as error:
        raise SnapshotFailed("snapshot", expected=f"{made.path} to be written", found=error.strerror) from None
    return made.commit(attrs.evolve(loaded.manifest, base=None), loaded.sections, memory)


def _copy_memory(loaded: Loaded, target: int) -> MemoryMap:
    pieces = merge([layer.map for layer in loaded.layers])
    for offset, size, layer in pieces:
        _copy(loaded.layers[layer].fd, target, offset, size)
    return MemoryMap(size=loaded.manifest.memory.size, data=_joined(pieces))


def _joined(pieces: tuple[tuple[int, int, int], ...]) -> tuple[Run, ...]:
    """Pieces of several layers, one behind the other, are one run."""
    runs: list[Run] = []
    for offset, size, _ in pieces:
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((offset, size))
    return tuple(runs)


def _copy_files(loaded: Loaded, made: SnapshotDirectory) -> None:
    for name in sorted(loaded.manifest.files.keys() - {MEMORY, STATE}):
        record = loaded.manifest.files[name]
        source, target = loaded.open_file(name), made.new_file(name)
        try:
            os.ftruncate(target, record.size)
            for offset, size in record.data or ():
                _copy(source, target, offset, min(size, record.size - offset))
        finally:
            os.close(source)


def _copy(source: int, target: int, offset: int, size: int) -> None:
    """Within the kernel where that can be: on some file systems both then share the blocks. Raises OSError."""
    end = offset + size
    while offset < end:
        done = _copy_piece(source, target, offset, min(end - offset, _COPY_BYTES))
        if not done:
            raise SnapshotDamaged("snapshot", expected=f"data at offset {offset:#x}", found="the end of the file")
        offset += done


def _copy_piece(source: int, target: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, offset, offset)
    except OSError as error:
        if error.errno not in _COPIED_IN_PIECES:
            raise
    return os.pwrite(target, os.pread(source, min(size, 1 << 20), offset), offset)
