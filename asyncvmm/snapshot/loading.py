"""Loading a snapshot: every check of its files, and of its bases', then what a machine needs to become it.

What is checked is the manifest and the state, whole, and of the memory files whose they are, their size, that no data
is missing, and, at a glance, that there is no other. What they contain is checked only if asked for: that takes as long
as reading them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from asyncvmm.config import VMConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotError
from asyncvmm.machine.saved import MemoryLayer, SavedMachine
from asyncvmm.snapshot.config_record import from_plain
from asyncvmm.snapshot.content import glimpsed_data, problems_of
from asyncvmm.snapshot.directory import TRAILER_MAGIC, trailer
from asyncvmm.snapshot.extents import in_hole
from asyncvmm.snapshot.files import open_base, open_file, open_snapshot, read_file
from asyncvmm.snapshot.lineage import check_base
from asyncvmm.snapshot.manifest import MANIFEST, MEMORY, MOST_MANIFEST_BYTES, STATE, Manifest
from asyncvmm.snapshot.memory_map import PAGE_BYTES
from asyncvmm.snapshot.state_file import MOST_STATE_BYTES, unpack

MOST_RUNS_WALKED = 1024
"""Of more than that, only as many bytes as the file has on disk are looked at."""


@attrs.frozen(kw_only=True)
class Link:
    """One snapshot of a chain: where it is, and its directory and memory file, open."""

    path: Path
    directory: int
    memory: int
    manifest: Manifest


class Loaded:
    """A snapshot that was found whole. Its files stay open until ``close``; a context manager does that.

    manifest: its own. links: its chain, the full snapshot first, itself last. layers: their memory, in the same order.
    sections: its state by name, as bytes. config: the VM's configuration. saved: what a machine's restore takes.
    """

    def __init__(
        self, links: tuple[Link, ...], sections: Mapping[str, bytes], config: VMConfig, resources: ExitStack
    ) -> None:
        self.links = links
        self.sections = sections
        self.config = config
        self.path = links[-1].path
        self.manifest = links[-1].manifest
        self.layers = tuple(MemoryLayer(fd=link.memory, map=link.manifest.memory) for link in links)
        self.saved = SavedMachine(
            accel=self.manifest.machine,
            vcpus=self.manifest.vcpus,
            regions=self.manifest.regions,
            sections=sections,
            cpu=self.manifest.cpu,
            memory=self.manifest.memory,
        )
        self._resources = resources

    def open_file(self, name: str) -> int:
        """Another of its files, such as ``disks/root``, to read; the caller's to close.

        Raises SnapshotDamaged if it is none of the snapshot's, or not there, or of another size; SnapshotError.
        """
        link = self.links[-1]
        record = self.manifest.files.get(name)
        if record is None:
            raise SnapshotDamaged(str(self.path), expected=f"a file {name[:80]}", found="none in its manifest")
        fd = open_file(link.directory, name, self.path)
        try:
            _check_size(str(self.path / name), fd, record.size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check_sizes(self) -> None:
        """What may have changed since and would show in a guest only: whether its memory files are cut off. Takes
        microseconds. Raises SnapshotDamaged."""
        for link in self.links:
            _check_size(str(link.path / MEMORY), link.memory, link.manifest.memory.size + PAGE_BYTES)

    def close(self) -> None:
        """Close its files. Machines made of it keep what they have mapped."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def load(path: Path, *, check_memory: bool = False) -> Loaded:
    """Check the snapshot at ``path`` and open it. Blocks for about a millisecond, or, with ``check_memory``, for as
    long as reading its memory takes.

    One that is replaced meanwhile is loaded as it was, or as it has become.

    Raises SnapshotDamaged, SnapshotMismatch (another format, another base), SnapshotError (nothing there, no
    permission).
    """
    path = Path(path)
    while True:
        before = _identity(path)
        try:
            return _load(path, check_memory)
        except SnapshotDamaged:
            if before is None or before == _identity(path):
                raise


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Which directory is there; None if that cannot be told."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _load(path: Path, check_memory: bool) -> Loaded:
    with ExitStack() as resources:
        links = open_chain(path, resources)
        for link in links:
            check_memory_file(link)
            _glimpse_content(link)
        for name in links[-1].manifest.files.keys() - {MEMORY, STATE}:
            _check_file(links[-1], name)
        sections, config = read_sections(links[-1]), read_config(links[-1])
        if check_memory:
            for link in links:
                _check_content(link)
        return Loaded(links, sections, config, resources.pop_all())


def open_chain(path: Path, resources: ExitStack) -> tuple[Link, ...]:
    """Every snapshot of the chain, the full one first; manifests checked, files not yet.

    Raises SnapshotDamaged, SnapshotMismatch, SnapshotError.
    """
    chain = [_open_link(path, open_snapshot(path), resources)]
    while (base := chain[-1].manifest.base) is not None:
        where = Path(os.path.normpath(chain[-1].path / base.path))
        link = _open_link(where, open_base(chain[-1].directory, base.path, where), resources)
        with _located(str(where)):
            check_base([one.manifest for one in chain], link.manifest)
        chain.append(link)
    return tuple(reversed(chain))


def read_sections(link: Link) -> dict[str, bytes]:
    """The sections of its state. Raises SnapshotDamaged, SnapshotError."""
    data = read_file(link.directory, STATE, link.path, MOST_STATE_BYTES)
    record = link.manifest.files[STATE]
    what = str(link.path / STATE)
    if len(data) != record.size:
        raise SnapshotDamaged(what, expected=f"{record.size} bytes", found=f"{len(data)} bytes")
    with _located(what):
        sections = unpack(data)
    if (found := sha256(data).hexdigest()) != record.sha256:
        raise SnapshotDamaged(what, expected=f"SHA-256 {record.sha256}", found=found)
    return sections


def read_config(link: Link) -> VMConfig:
    """The saved VM's configuration. Raises SnapshotDamaged, also if it is not that of the machine that was saved."""
    manifest = link.manifest
    with _located(str(link.path)):
        config = from_plain(manifest.config)
        for name in ("memory_mib", "vcpus"):
            if (found := getattr(config, name)) != (expected := getattr(manifest, name)):
                raise SnapshotDamaged(f"saved configuration, {name}", expected=expected, found=found)
        if (devices := tuple(config.devices.names)) != tuple(manifest.devices):
            raise SnapshotDamaged("saved configuration, devices", expected=manifest.devices, found=devices)
    return config


def memory_problems(link: Link) -> Iterator[SnapshotDamaged]:
    """Everything that is wrong with what its memory file contains. Raises SnapshotError if it cannot be read."""
    manifest = link.manifest
    path, memory = link.path / MEMORY, manifest.memory
    return problems_of(path, link.memory, manifest.files[MEMORY], memory.data, memory.size)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Errors in the block say what they are about, and where that is."""
    try:
        yield
    except SnapshotError as error:
        error.what = f"{where}: {error.what}"
        raise


def _open_link(path: Path, directory: int, resources: ExitStack) -> Link:
    resources.callback(os.close, directory)
    data = read_file(directory, MANIFEST, path, MOST_MANIFEST_BYTES)
    with _located(str(path)):
        manifest = Manifest.from_bytes(data)
    memory = open_file(directory, MEMORY, path)
    resources.callback(os.close, memory)
    return Link(path=path, directory=directory, memory=memory, manifest=manifest)


def check_memory_file(link: Link) -> None:
    """Its size, whose memory it is, and that no data is missing. Raises SnapshotDamaged, SnapshotError."""
    what, manifest = str(link.path / MEMORY), link.manifest
    size = manifest.memory.size + PAGE_BYTES
    try:
        _check_size(what, link.memory, size)
        if manifest.files[MEMORY].size != size:
            raise SnapshotDamaged(
                what, expected=f"{size} bytes", found=f"{manifest.files[MEMORY].size} in the manifest"
            )
        expected = trailer(manifest.id)
        if (found := os.pread(link.memory, len(expected), manifest.memory.size)) != expected:
            raise SnapshotDamaged(what, expected=f"the memory of {manifest.id}", found=_owner(found))
        _check_allocation(what, link)
    except OSError as error:
        raise SnapshotError(what, expected="a file that can be read", found=error.strerror) from None


def _owner(found: bytes) -> str:
    magic, id = found[: len(TRAILER_MAGIC)], found[len(TRAILER_MAGIC) :].decode("ascii", "replace")
    if not any(found):
        return "nobody's"
    return f"that of {id}" if magic == TRAILER_MAGIC and id.isascii() and id.isalnum() else "a damaged trailer"


def _check_allocation(what: str, link: Link) -> None:
    memory = link.manifest.memory
    if len(memory.data) > MOST_RUNS_WALKED and os.fstat(link.memory).st_blocks * 512 >= memory.data_bytes:
        return
    if (hole := in_hole(link.memory, memory.data)) is not None:
        raise SnapshotDamaged(what, expected=f"data at offset {hole:#x}", found="a hole")


def _glimpse_content(link: Link) -> None:
    path, memory = link.path / MEMORY, link.manifest.memory
    try:
        problem = glimpsed_data(path, link.memory, memory.data, memory.size)
    except OSError as error:
        raise SnapshotError(str(path), expected="a file that can be read", found=error.strerror) from None
    if problem is not None:
        raise problem


def _check_file(link: Link, name: str) -> None:
    fd = open_file(link.directory, name, link.path)
    try:
        _check_size(str(link.path / name), fd, link.manifest.files[name].size)
    finally:
        os.close(fd)


def _check_size(what: str, fd: int, expected: int) -> None:
    if (found := os.fstat(fd).st_size) != expected:
        raise SnapshotDamaged(what, expected=f"{expected} bytes", found=f"{found} bytes")


def _check_content(link: Link) -> None:
    for problem in memory_problems(link):
        raise problem
