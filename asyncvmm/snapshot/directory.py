"""SnapshotDirectory: a snapshot being written. It stands aside until it is whole, then takes its place by a rename.

Whatever happens on the way, a kill -9 too, what is at its place is the snapshot that was there before, or none, or the
new one, and nothing half-made: everything is on disk (fsync) before the rename. What a killed process left aside is
removed by the next save to the same place: who writes holds a lock (flock) on its directory, and a dead one holds none.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from asyncvmm.errors import SnapshotFailed
from asyncvmm.snapshot.extents import checksums_in, data_runs
from asyncvmm.snapshot.manifest import MANIFEST, MEMORY, MOST_FILES, STATE, Base, FileRecord, Manifest, is_name
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap
from asyncvmm.snapshot.renaming import exchange, rename_to_nothing
from asyncvmm.snapshot.state_file import pack

_TRIES = 8
_READERS = 2
"""Threads that read what was written, for its checksums: with one, that takes longer than the fsync beside it."""

_LONGEST_STEM = 50
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW

TRAILER_MAGIC = b"AVMMMEM1"


def trailer(id: str) -> bytes:
    """What the memory file holds behind the memory, in a page of its own: whose memory it is."""
    return TRAILER_MAGIC + id.encode()


def base_of(id: str, base: Path, out: Path) -> Base:
    """For the manifest of a difference at ``out``: its base at ``base``, by a path that leads there through no link."""
    return Base(id=id, path=os.path.relpath(os.path.realpath(base), os.path.realpath(out)))


class SnapshotDirectory:
    """A snapshot on its way to ``path``. Calls block: they are for a worker thread.

    Made by ``create``; ends with ``commit`` or ``abort``, which as a context manager it does by itself.
    """

    def __init__(self, path: Path, parent: int, name: str, directory: int, *, replace: bool) -> None:
        self.path = path
        self.id = secrets.token_hex(16)
        """For the manifest."""
        self._parent = parent
        self._name = name
        self._directory = directory
        self._replace = replace
        self._sections: dict[str, bytes] = {}
        self._files: dict[str, int] = {}
        self._memory_size = 0
        self.memory_fd = -1
        """The memory file, empty: what a MemoryWriter writes to."""

    @classmethod
    def create(cls, out: Path, memory_size: int = 0, *, replace: bool = False) -> SnapshotDirectory:
        """Begin one. ``memory_size`` makes the memory file that long. What is at ``out`` already is not overwritten,
        and replaced, whole, only if ``replace`` says so.

        Raises SnapshotFailed: something is there, or nothing can be written there.
        """
        out = Path(out)
        parent = _open_parent(out)
        try:
            if not replace and _is_there(parent, out.name):
                raise SnapshotFailed("snapshot", expected="a path at which nothing is", found=f"{out} there already")
            _remove_leftovers(parent, out.name)
            name, directory = _make_aside(parent, out.name)
        except OSError as error:
            os.close(parent)
            raise _failed(out, error) from None
        except BaseException:
            os.close(parent)
            raise
        made = cls(out, parent, name, directory, replace=replace)
        try:
            made.memory_fd = made.new_file(MEMORY)
            if memory_size:
                os.ftruncate(made.memory_fd, memory_size)
        except BaseException as error:
            made.abort()
            if isinstance(error, OSError):
                raise _failed(out, error) from None
            raise
        return made

    def put(self, name: str, data: bytes) -> None:
        """A section of the state file."""
        self._sections[name] = data

    def new_file(self, name: str) -> int:
        """A new file of the snapshot's own, such as ``disks/root``, open for reading and writing: to be filled before
        ``commit``, which closes it. Raises SnapshotFailed.
        """
        if not is_name(name) or name in self._files or name in (STATE, MANIFEST) or len(self._files) > MOST_FILES - 3:
            raise SnapshotFailed("snapshot", expected="a name for a file", found=name[:80])
        try:
            if "/" in name:
                with suppress(FileExistsError):
                    os.mkdir(name.partition("/")[0], 0o700, dir_fd=self._directory)
            fd = self._files[name] = os.open(name, _NEW_FILE, 0o600, dir_fd=self._directory)
        except OSError as error:
            raise _failed(self.path / name, error) from None
        return fd

    def commit(
        self, manifest: Manifest, sections: Mapping[str, bytes] | None = None, memory: MemoryMap | None = None
    ) -> Manifest:
        """Make it a snapshot: write the state (``put``'s sections and these) and the manifest, and put it in its place.

        ``memory`` is what the memory file holds, if the manifest does not say so. Returns the manifest as written. If
        that fails, nothing has changed, and ``abort`` is to follow. Raises SnapshotFailed.
        """
        if memory is not None:
            manifest = attrs.evolve(manifest, memory=memory)
        try:
            self._write(STATE, pack({**self._sections, **(sections or {})}))
            os.pwrite(self.memory_fd, trailer(manifest.id), manifest.memory.size)
            os.ftruncate(self.memory_fd, manifest.memory.size + PAGE_BYTES)
            manifest = self._described(manifest)
            self._write(MANIFEST, manifest.to_bytes())
            os.fsync(self._files[MANIFEST])
            self._fsync_directories()
            self._take_place()
        except OSError as error:
            raise _failed(self.path, error) from None
        except ValueError as error:
            raise SnapshotFailed("snapshot", expected="plain values", found=str(error)) from None
        self._close()
        return manifest

    def abort(self) -> None:
        """Leave nothing behind. May follow anything, a ``commit`` that succeeded too: that is not undone."""
        if self._directory < 0:
            return
        shutil.rmtree(self._name, ignore_errors=True, dir_fd=self._parent)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    # -- the files ---------------------------------------------------------------------------------------------------

    def _write(self, name: str, data: bytes) -> None:
        fd = self._files[name] = os.open(name, _NEW_FILE, 0o600, dir_fd=self._directory)
        with open(fd, "wb", closefd=False) as file:
            file.write(data)

    def _described(self, manifest: Manifest) -> Manifest:
        """With every file's record. The files are on disk then: that is waited for beside reading them."""
        with ThreadPoolExecutor(1 + _READERS, "snapshot-commit") as threads:
            on_disk = threads.submit(self._fsync_files)
            records = {name: self._record(name, fd, manifest.memory, threads) for name, fd in self._files.items()}
            on_disk.result()
        allocated = sum(os.fstat(fd).st_blocks * 512 for fd in self._files.values())
        return attrs.evolve(manifest, files=records, logical_bytes=manifest.memory.size, allocated_bytes=allocated)

    def _record(self, name: str, fd: int, memory: MemoryMap, threads: Executor) -> FileRecord:
        size = os.fstat(fd).st_size
        if name == STATE:
            return FileRecord(size=size, sha256=sha256(os.pread(fd, size, 0)).hexdigest())
        runs = memory.data if name == MEMORY else data_runs(fd, size)
        sums = tuple(checksum for _, checksum in checksums_in(threads, _READERS, fd, runs, size))
        return FileRecord(size=size, data=None if name == MEMORY else runs, crc32=sums)

    def _fsync_files(self) -> None:
        for fd in self._files.values():
            os.fsync(fd)

    def _fsync_directories(self) -> None:
        for folder in {name.partition("/")[0] for name in self._files if "/" in name}:
            fd = os.open(folder, _OPEN_DIRECTORY, dir_fd=self._directory)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        os.fsync(self._directory)

    # -- its place ---------------------------------------------------------------------------------------------------

    def _take_place(self) -> None:
        if self._replace and _is_there(self._parent, self.path.name):
            if not stat.S_ISDIR(os.stat(self.path.name, dir_fd=self._parent, follow_symlinks=False).st_mode):
                raise SnapshotFailed("snapshot", expected="a snapshot to replace", found=f"{self.path}, no directory")
            exchange(self._parent, self._name, self.path.name)
            os.fsync(self._parent)
            shutil.rmtree(self._name, ignore_errors=True, dir_fd=self._parent)
        else:
            rename_to_nothing(self._parent, self._name, self.path.name)
            os.fsync(self._parent)

    def _close(self) -> None:
        for fd in (*self._files.values(), self._directory, self._parent):
            with suppress(OSError):
                os.close(fd)
        self._files.clear()
        self._directory = self._parent = self.memory_fd = -1


def _failed(path: Path, error: OSError) -> SnapshotFailed:
    return SnapshotFailed("snapshot", expected=f"{path} to be written", found=error.strerror)


def _open_parent(out: Path) -> int:
    if out.name in ("", "..") or "\0" in str(out):
        raise SnapshotFailed("snapshot", expected="a path at which nothing is", found=repr(str(out))[:200])
    try:
        return os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(out, error) from None


def _is_there(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


# -- aside ---------------------------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    return f".{name[:_LONGEST_STEM]}."


def _make_aside(parent: int, name: str) -> tuple[str, int]:
    """A locked directory of this save's own."""
    for _ in range(_TRIES):
        aside = f"{_stem(name)}{secrets.token_hex(8)}.partial"
        os.mkdir(aside, 0o700, dir_fd=parent)
        with suppress(FileNotFoundError):  # taken for a leftover, and removed, before it was locked
            fd = os.open(aside, _OPEN_DIRECTORY, dir_fd=parent)
            if _lock(fd) and os.fstat(fd).st_nlink:
                return aside, fd
            os.close(fd)
    raise SnapshotFailed("snapshot", expected="a directory aside", found=f"{_TRIES} removed by somebody else")


def _remove_leftovers(parent: int, name: str) -> None:
    """Of processes that have died. What cannot be removed stays: that is no reason not to save."""
    pattern = re.compile(re.escape(_stem(name)) + r"[0-9a-f]{16}\.partial")
    for entry in os.listdir(parent):
        if pattern.fullmatch(entry):
            with suppress(OSError):
                _remove_leftover(parent, entry)


def _remove_leftover(parent: int, name: str) -> None:
    fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """False if somebody else has the lock. Where there are no locks, nobody removes anything either."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
