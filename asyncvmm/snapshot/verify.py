"""Everything about a snapshot that can be checked, over its whole chain: what ``asyncvmm snapshot verify`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import attrs

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.content import problems_of
from asyncvmm.snapshot.files import open_file
from asyncvmm.snapshot.loading import Link, check_memory_file, memory_problems, open_chain, read_config, read_sections
from asyncvmm.snapshot.manifest import MEMORY, STATE

MOST_PROBLEMS = 100
"""Told of; a file that is all wrong has no more to say."""


@attrs.frozen(kw_only=True)
class Verification:
    """What was found: the chain, the full snapshot first, bytes of data in it, and what is wrong with them.

    Each of ``problems`` says which file, and at which offset if it is a part of one.
    """

    chain: tuple[Path, ...]
    data_bytes: int
    problems: tuple[SnapshotDamaged, ...]

    def raise_for_problems(self) -> None:
        """Raises SnapshotDamaged if there are any: the first, and how many more."""
        if not self.problems:
            return
        first, more = self.problems[0], len(self.problems) - 1
        found = f"{first.found} (and {more} more)" if more else first.found
        raise SnapshotDamaged(first.what, expected=first.expected, found=found)


def verify(path: Path) -> Verification:
    """Read all of the snapshot at ``path`` and of those that it is a difference of. Blocks while it does.

    Raises SnapshotDamaged or SnapshotMismatch where the chain cannot be followed, SnapshotError.
    """
    with ExitStack() as resources:
        chain = open_chain(Path(path), resources)
        return Verification(
            chain=tuple(link.path for link in chain),
            data_bytes=sum(_data_bytes(link) for link in chain),
            problems=tuple(islice(_problems(chain), MOST_PROBLEMS)),
        )


def _data_bytes(link: Link) -> int:
    manifest = link.manifest
    return manifest.memory.data_bytes + sum(one.size for name, one in manifest.files.items() if name != MEMORY)


def _problems(chain: Sequence[Link]) -> Iterator[SnapshotDamaged]:
    for link in chain:
        memory, state, config = (_problem(check, link) for check in (check_memory_file, read_sections, read_config))
        yield from filter(None, (memory, state, config))
        if memory is None:  # else it may claim to have any amount of data
            yield from memory_problems(link)
        for name in sorted(link.manifest.files.keys() - {MEMORY, STATE}):
            yield from _file_problems(link, name)


def _problem(check: Callable[[Link], object], link: Link) -> SnapshotDamaged | None:
    try:
        check(link)
    except SnapshotDamaged as problem:
        return problem
    return None


def _file_problems(link: Link, name: str) -> Iterator[SnapshotDamaged]:
    path, record = link.path / name, link.manifest.files[name]
    try:
        fd = open_file(link.directory, name, link.path)
    except SnapshotDamaged as problem:
        yield problem
        return
    try:
        if (size := os.fstat(fd).st_size) != record.size:
            yield SnapshotDamaged(str(path), expected=f"{record.size} bytes", found=f"{size} bytes")
        yield from problems_of(path, fd, record, record.data or (), record.size)
    finally:
        os.close(fd)
