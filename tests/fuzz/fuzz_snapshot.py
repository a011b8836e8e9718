"""A chain of three snapshots that somebody tampered with: manifests, states, memory files, directories."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
from rich.console import Console

from asyncvmm.errors import SnapshotError, SnapshotFailed
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.snapshot.flatten import flatten
from asyncvmm.snapshot.inspect import draw, inspect
from asyncvmm.snapshot.loading import Loaded, load
from asyncvmm.snapshot.manifest import MANIFEST, MEMORY, STATE
from asyncvmm.snapshot.verify import verify
from tests.fuzz.mutation import mutate
from tests.fuzz.script import Script
from tests.support.snapshots import MIB, SIZE, memory_of, page, save

PLACE = "/dev/shm" if os.path.isdir("/dev/shm") else None
NAMES = ("full", "middle", "s")
FILES = (MANIFEST, STATE, MEMORY, "disks/root")
MOST_FILE_BYTES = 4 * MIB
_NUMBERS = (0, 1, 2, 255, 256, 257, 1 << 20, (1 << 32) - 1, 1 << 32, 1 << 52, (1 << 63) - 1)
_PATHS = (
    ".",
    "..",
    "../s",
    "../middle",
    "../full",
    "/",
    "disks",
    "memory.bin",
    "../" * 40 + "etc",
    "\ud800",
    "x" * 4096,
)

_KINDS = ("nothing", "fifo", "directory", "empty", "full", "../full", "../s", "memory.bin", "state.bin", "nowhere")
"""The last ones are targets of links: none leads further up than to the chain's own directory, or not at all."""

Tree = dict[str, dict[str, bytes]]
"""The files of each snapshot."""

Odd = dict[tuple[str, str], str]
"""What is to be made in the place of a file of a snapshot, or, with no name, of the snapshot."""


def run(data: bytes) -> None:
    """Only SnapshotError comes out, nothing stays open, and what is said to be whole is."""
    script = Script(data)
    open_before = len(os.listdir("/proc/self/fd"))
    with TemporaryDirectory(dir=PLACE) as name:
        place = Path(name)
        tree = {snapshot: dict(files) for snapshot, files in _template().items()}
        while not script.ended:
            script.pick((_manifest, _manifest, _manifest, _numbers, _bytes, _size, _swap))(tree, script)
            if script.byte() % 4 == 0:
                break
        _write(tree, _odd(script), place)
        _use(place / "s")
    assert len(os.listdir("/proc/self/fd")) == open_before, "something stayed open"


def _use(path: Path) -> None:
    whole = _tried(lambda: verify(path))
    _tried(lambda: draw(inspect(path), Console(file=io.StringIO(), width=100)))
    loaded = _tried(lambda: load(path))
    if loaded is None:
        return
    with loaded:
        _check(loaded)
        for section in loaded.sections.values():
            _tried(partial(decode, section))
        checked = _tried(lambda: load(path, check_memory=True))
        if checked is not None:
            checked.close()
        assert not (whole is not None and not whole.problems and checked is None), "whole, but not to be loaded"
        flat = _tried(lambda: flatten(path, path.with_name("flat")))
        assert flat is None or checked is not None, "flattened, though damaged"
        if flat is not None:
            with load(path.with_name("flat"), check_memory=True) as other:
                assert memory_of(other) == memory_of(loaded)


def _check(loaded: Loaded) -> None:
    """What a machine relies on."""
    manifest = loaded.manifest
    assert sum(size for _, size in manifest.regions) == manifest.memory.size <= MOST_FILE_BYTES
    assert not loaded.layers[0].map.is_difference
    for layer in loaded.layers:
        assert os.fstat(layer.fd).st_size == layer.map.size + 4096 == manifest.memory.size + 4096
        for offset, size in (*layer.map.data, *layer.map.zero):
            assert 0 <= offset < offset + size <= layer.map.size
            assert offset % 4096 == size % 4096 == 0


def _tried(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except SnapshotFailed:
        raise
    except SnapshotError:
        return None


@cache
def _kept() -> TemporaryDirectory[str]:
    """The chain as it was saved."""
    directory = TemporaryDirectory(dir=PLACE)
    _save_chain(Path(directory.name))
    return directory


@cache
def _template() -> Tree:
    place = Path(_kept().name)
    return {
        snapshot: {file: (place / snapshot / file).read_bytes() for file in FILES if (place / snapshot / file).exists()}
        for snapshot in NAMES
    }


def _save_chain(place: Path) -> None:
    save(place / "full", {number: page(number) for number in (0, 1, 5, 6, 255)})
    save(place / "middle", {1: bytes(4096), 6: page("six"), 9: page("nine")}, base=place / "full")
    save(place / "s", {5: bytes(4096), 9: page("newest"), 254: page("near the end")}, base=place / "middle", disk=True)


# -- what is done to it --------------------------------------------------------------------------------------------


def _manifest(tree: Tree, script: Script) -> None:
    files = tree[script.pick(NAMES[::-1])]
    plain = _plain(files)
    if plain is None:
        return
    if script.byte() % 4 == 0 and isinstance(plain.get("base"), dict):
        plain["base"] = {"id": plain["base"].get("id"), "path": script.pick(_PATHS)}
    else:
        plain = mutate(plain, script)
    _sign(files, plain)


def _numbers(tree: Tree, script: Script) -> None:
    """Runs and sizes that are nearly right."""
    files = tree[script.pick(NAMES[::-1])]
    plain = _plain(files)
    if plain is None or not isinstance(plain.get("memory"), dict):
        return
    where = script.pick(("data", "zero", "size", "memory_mib", "crc32"))
    number = script.pick(_NUMBERS)
    if where in ("data", "zero") and isinstance(plain["memory"].get(where), list):
        numbers = plain["memory"][where]
        numbers[script.byte() % (len(numbers) + 1) :] = [number] * (script.byte() % 4)
    elif where == "crc32" and isinstance(plain.get("files"), dict):
        plain["files"][MEMORY] = {"size": SIZE + 4096, "crc32": [number] * (script.byte() % 4)}
    elif where == "size":
        size = script.byte() % 8 * MIB
        plain["memory"]["size"], plain["memory_mib"], plain["regions"] = size, size // MIB, [[0, size]]
        plain["config"] = {"memory_mib": size // MIB}
        files[MEMORY] = files[MEMORY][:SIZE].ljust(size, b"\0")[:size] + files[MEMORY][SIZE:]
        if isinstance(plain.get("files"), dict):
            plain["files"][MEMORY] = {"size": size + 4096, "crc32": [1]}
    else:
        plain["memory_mib"] = number
    _sign(files, plain)


def _bytes(tree: Tree, script: Script) -> None:
    """A few of any file; of a state, with the manifest saying so too if need be."""
    files = tree[script.pick(NAMES[::-1])]
    name = script.pick([name for name in FILES if name in files])
    data = bytearray(files[name])
    for _ in range(1 + script.byte() % 3):
        at = script.number(3) % (len(data) + 1)
        data[at : at + script.byte() % 4] = script.data(script.byte() % 8)
    if name == STATE and script.byte() % 8 == 0:
        data = bytearray(encode(script.data(9)) + script.data(20))
    files[name] = bytes(data)
    plain = _plain(files)
    if name == STATE and script.flag() and plain is not None and isinstance(plain.get("files"), dict):
        plain["files"][STATE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _sign(files, plain)


def _size(tree: Tree, script: Script) -> None:
    files = tree[script.pick(NAMES[::-1])]
    name = script.pick([name for name in FILES if name in files])
    size = script.pick((0, 1, len(files[name]) - 1, len(files[name]) + 1, 4096, script.number(2)))
    files[name] = files[name][:size].ljust(size, b"\0")


def _swap(tree: Tree, script: Script) -> None:
    one, other = tree[script.pick(NAMES)], tree[script.pick(NAMES)]
    name = script.pick([name for name in FILES if name in one and name in other])
    one[name], other[name] = other[name], one[name]


def _plain(files: dict[str, bytes]) -> dict[str, Any] | None:
    try:
        plain = orjson.loads(files[MANIFEST])
    except orjson.JSONDecodeError:
        return None
    return plain if isinstance(plain, dict) else None


def _sign(files: dict[str, bytes], plain: Any) -> None:
    """A checksum that is right: whoever lies on purpose has one, too."""
    if isinstance(plain, dict):
        plain.pop("checksum", None)
        try:
            digest = hashlib.sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).hexdigest()
            files[MANIFEST] = orjson.dumps(plain | {"checksum": digest})
        except orjson.JSONEncodeError:
            return


def _write(tree: Tree, odd: Odd, place: Path) -> None:
    """Only makes new things, through no link, and deletes nothing: what is odd is made in a file's place."""
    for snapshot, files in tree.items():
        folder = place / snapshot
        if _made_odd(folder, odd.get((snapshot, ""))):
            continue
        folder.mkdir()
        disks_are_odd = _made_odd(folder / "disks", odd.get((snapshot, "disks")))
        for name, data in files.items():
            if name.startswith("disks/"):
                if disks_are_odd:
                    continue
                (folder / "disks").mkdir()
            if not _made_odd(folder / name, odd.get((snapshot, name))):
                _write_file(folder / name, data, _template()[snapshot].get(name), Path(_kept().name, snapshot, name))


def _write_file(path: Path, data: bytes, kept: bytes | None, source: Path) -> None:
    if data is kept:  # nobody writes to it
        os.link(source, path)
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        _write_sparse(fd, data[:MOST_FILE_BYTES])
    finally:
        os.close(fd)


def _write_sparse(fd: int, data: bytes) -> None:
    os.ftruncate(fd, len(data))
    step = 1 << 14
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        if piece.count(0) == len(piece):
            continue
        for start in range(0, len(piece), 4096):
            if any(part := piece[start : start + 4096]):
                os.pwrite(fd, part, at + start)


def _odd(script: Script) -> Odd:
    """What is not the file, or directory, that it should be."""
    odd: Odd = {}
    while not script.ended and len(odd) < 4:
        odd[script.pick(NAMES[::-1]), script.pick((*FILES, "", "disks"))] = script.pick(_KINDS)
    return odd


def _made_odd(path: Path, kind: str | None) -> bool:
    """Whether there is now something else at ``path``, or is to be nothing."""
    match kind:
        case None:
            return False
        case "nothing":
            return True
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "empty":
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        case _:
            assert not kind.startswith("/")
            assert ".." not in kind[3:]
            path.symlink_to(kind)
    return True
