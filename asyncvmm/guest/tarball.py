"""Reading tar archives that nobody has checked into a ``FileTree``: plain ones, and the layers of container images.

Only the headers are read here; a file's ``Content`` says where in the unpacked archive its bytes are. What bounds the
work: the bytes that archives unpack to, the number of their entries, and the size of one header record.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree, Node, split

MAX_UNPACKED = 32 << 30
"""Most bytes that all archives of one root, and the files in them, may come to."""

WHITEOUT, OPAQUE, RESERVED = ".wh.", ".wh..wh..opq", ".wh..wh."

_CHUNK = 1 << 20
_BLOCK = 512
_MAX_HEADER = 1 << 20
_MAX_HEADERS = 512 << 20
_XATTR = "SCHILY.xattr."
_MAX_ID = 2**32 - 2
_TYPES = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE), stat.S_IFREG),
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error, lzma.LZMAError)


@attrs.frozen
class Content:
    """Where a file's bytes are: from ``offset`` in the file ``path``. ``pieces``: of a sparse file, (place, size)."""

    path: Path
    offset: int = 0
    pieces: tuple[tuple[int, int], ...] | None = None


class Allowance:
    """What may still be unpacked."""

    def __init__(self, size: int = MAX_UNPACKED) -> None:
        self._size = self._left = size

    def take(self, size: int) -> None:
        """Raises ImageError if it is more than is left."""
        self._left -= size
        if self._left < 0:
            raise ImageError("root file system", expected=f"at most {self._size} bytes unpacked", found="more")


def add_tar(tree: FileTree, path: Path, scratch: Path, allowance: Allowance, *, layer: bool = False) -> None:
    """Add an archive's files to the tree; as a ``layer`` its whiteouts first take files of lower layers away.

    ``scratch`` is a directory that gets the archive unpacked if it is compressed (gzip, bzip2, xz, zstd), and that
    must outlive the tree. Raises ImageError.
    """
    try:
        unpacked = _unpacked(path, scratch, allowance)
        with unpacked.open("rb") as stream:
            members = list(_members(_Careful(stream), unpacked, tree, allowance, layer))
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(f"archive {path}", expected="a tar archive", found=f"damage: {error}") from error
    for parts, node, link in members:
        if link is None:
            tree.put(parts, node)
        else:
            tree.link(parts, link)


Member = tuple[list[str], Node, list[str] | None]
"""A path, its file, or the path of what it is a hard link to."""


def _members(stream: _Careful, path: Path, tree: FileTree, allowance: Allowance, layer: bool) -> Iterator[Member]:
    size = path.stat().st_size
    with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:", errorlevel=2) as archive:
        while (info := archive.next()) is not None:
            stream.next_header()
            archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
            parts = split(info.name)
            if layer and parts and parts[-1].startswith(WHITEOUT):
                _white_out(tree, parts)
                continue
            yield parts, _node(info, path, size, allowance), split(info.linkname) if info.islnk() else None
        _check_end(stream, archive.offset, size)


def _check_end(stream: _Careful, offset: int, size: int) -> None:
    """tarfile takes any damaged header for the end; the real one is a block of zeros, or the file's."""
    stream.seek(offset)
    if offset < size and stream.read(_BLOCK).strip(b"\0"):
        raise ImageError("archive", expected="tar headers to its end", found=f"something else at byte {offset}")


def _white_out(tree: FileTree, parts: list[str]) -> None:
    if parts[-1] == OPAQUE:
        tree.clear(parts[:-1])
    elif not parts[-1].startswith(RESERVED):
        hidden = split("/".join([*parts[:-1], parts[-1][len(WHITEOUT) :]]))
        if len(hidden) == len(parts):
            tree.remove(hidden)


def _node(info: tarfile.TarInfo, path: Path, size: int, allowance: Allowance) -> Node:
    kind = stat.S_IFREG if info.islnk() else _TYPES.get(info.type)
    if kind is None or not (0 <= info.uid <= _MAX_ID and 0 <= info.gid <= _MAX_ID):
        found = f"type {info.type!r} of {info.uid}:{info.gid}"
        raise ImageError(
            f"archive member {info.name[:200]!r}", expected="a file of a known type and owner", found=found
        )
    node = Node(kind | info.mode & 0o7777, info.uid, info.gid, _time_ns(info.mtime))
    if kind == stat.S_IFLNK:
        node.target = _target(info)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.rdev = _device(info)
    elif info.isreg():
        allowance.take(info.size)
        node.size, node.content = info.size, _content(info, path, size)
    node.xattrs = {
        key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith(_XATTR)
    }
    return node


def _content(info: tarfile.TarInfo, path: Path, size: int) -> Content:
    sparse = getattr(info, "sparse", None)
    pieces = None if sparse is None else tuple((int(place), int(length)) for place, length in sparse)
    stored = info.size if pieces is None else sum(length for _, length in pieces)
    inside = all(0 <= place <= place + length <= info.size for place, length in pieces or ())
    if info.size < 0 or not inside or info.offset_data + stored > size:
        found = f"{stored} bytes at {info.offset_data} of {size}"
        raise ImageError(f"archive member {info.name[:200]!r}", expected="content inside the archive", found=found)
    return Content(path, info.offset_data, pieces)


def _device(info: tarfile.TarInfo) -> tuple[int, int]:
    if not (0 <= info.devmajor < 1 << 12 and 0 <= info.devminor < 1 << 20):
        found = f"{info.devmajor}:{info.devminor}"
        raise ImageError(f"archive member {info.name[:200]!r}", expected="a device number of Linux", found=found)
    return info.devmajor, info.devminor


def _target(info: tarfile.TarInfo) -> str:
    target = info.linkname
    if not target or "\0" in target or len(target.encode("utf-8", "surrogateescape")) > 4095:
        raise ImageError(f"archive member {info.name[:200]!r}", expected="a link's target", found=repr(target[:200]))
    return target


def _time_ns(seconds: float) -> int:
    """Within what every file system can hold: 1970 to 2106."""
    return int(min(max(seconds, 0), 2**32 - 1) * 1_000_000_000)


class _Careful:
    """A file of which no header, and not all of them together, takes more than an honest one: tarfile keeps them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._header, self._headers = 0, 0
        self.seek, self.tell, self.close = stream.seek, stream.tell, stream.close

    def next_header(self) -> None:
        self._header = 0

    def read(self, size: int = -1) -> bytes:
        self._header += size
        self._headers += size
        if size < 0 or self._header > _MAX_HEADER or self._headers > _MAX_HEADERS:
            raise ImageError("archive", expected=f"headers of at most {_MAX_HEADER} bytes", found=self._header)
        return self._stream.read(size)


def _unpacked(path: Path, scratch: Path, allowance: Allowance) -> Path:
    with path.open("rb") as stream:
        magic = stream.read(6)
    opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    target = scratch / f"{len(list(scratch.iterdir()))}.tar"
    with opener(path) as source, target.open("xb") as out:
        while chunk := source.read(_CHUNK):
            allowance.take(len(chunk))
            out.write(chunk)
    return target


@contextmanager
def _gzip(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path) as stream:
        yield cast("IO[bytes]", stream)


@contextmanager
def _bzip2(path: Path) -> Iterator[IO[bytes]]:
    with bz2.open(path) as stream:
        yield cast("IO[bytes]", stream)


@contextmanager
def _xz(path: Path) -> Iterator[IO[bytes]]:
    with lzma.open(path) as stream:
        yield cast("IO[bytes]", stream)


@contextmanager
def _zstd(path: Path) -> Iterator[IO[bytes]]:
    program = shutil.which("zstd")
    if program is None:
        raise ImageError(f"archive {path}", expected="zstd to unpack it (Debian package zstd)", found="none")
    command = [program, "-dcq", "--", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            if process.wait() != 0:
                raise ImageError(f"archive {path}", expected="zstd data", found=f"zstd exit {process.returncode}")
        finally:
            process.kill()


_OPENERS = {b"\x1f\x8b": _gzip, b"BZh": _bzip2, b"\xfd7zXZ\0": _xz, b"\x28\xb5\x2f\xfd": _zstd}
