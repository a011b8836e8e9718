"""Archives and image layers: headers with right checksums, and fields that nobody honest writes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from asyncvmm.errors import ImageError
from asyncvmm.guest import tarball
from asyncvmm.guest.filetree import FileTree
from asyncvmm.guest.tarball import Allowance, add_tar
from tests.fuzz.limits import lowered
from tests.fuzz.script import Script

BLOCK = 512
ALLOWANCE = 1 << 20
_TYPES = b"0001122555346xxgSLK7V"
_NAMES = (
    b"a",
    b"a/b",
    b"a/b/c",
    b"l",
    b"l/x",
    b"../a",
    b"/a",
    b".",
    b"",
    b"a/.wh.b",
    b"a/.wh..wh..opq",
    b".wh.a",
    b"a//b/",
)
_TARGETS = (b"a", b"..", b"/", b"l", b"../../a", b"a/b", b"")
_KEYS = (
    b"path",
    b"size",
    b"linkpath",
    b"mtime",
    b"uid",
    b"SCHILY.xattr.user.x",
    b"GNU.sparse.map",
    b"GNU.sparse.major",
)


def run(data: bytes) -> None:
    """Only ImageError comes out; what is read lies in the archive, and under the root."""
    script, tree = Script(data), FileTree()
    with TemporaryDirectory() as name, lowered(tarball, _MAX_HEADER=1 << 14, _MAX_HEADERS=1 << 17):
        path, scratch = Path(name, "archive"), Path(name, "scratch")
        scratch.mkdir()
        layer = script.flag()
        path.write_bytes(_archive(script))
        try:
            add_tar(tree, path, scratch, Allowance(ALLOWANCE), layer=layer)
        except ImageError:
            return
        _check(tree, path.stat().st_size)


def _check(tree: FileTree, size: int) -> None:
    for name, node in tree.walk():
        assert not {"", ".", ".."} & set(name.split("/"))
        if node.content is not None:
            assert 0 <= node.content.offset <= size
            assert 0 <= node.size <= ALLOWANCE
            for place, length in node.content.pieces or ():
                assert 0 <= place <= place + length <= node.size


def _archive(script: Script) -> bytes:
    archive = b""
    while not script.ended and len(archive) < 1 << 15:
        kind = _TYPES[script.byte() % len(_TYPES)]
        content = _records(script) if kind in b"xg" else script.data(script.byte() % 64)
        archive += _header(script, kind, len(content) if script.byte() % 8 else script.number(4))
        archive += content + bytes(-len(content) % BLOCK)
    return archive + bytes(2 * BLOCK if script.byte() % 8 else script.byte())


def _records(script: Script) -> bytes:
    records = b""
    for _ in range(1 + script.byte() % 3):
        record = (
            b" "
            + script.pick(_KEYS)
            + b"="
            + script.pick((b"1", b"-1", b"a", b"9" * 30, b"1,2", script.data(9)))
            + b"\n"
        )
        size = len(record) + 2 if script.byte() % 8 else script.byte()
        records += b"%02d" % size + record
    return records


def _header(script: Script, kind: int, size: int) -> bytes:
    name = script.pick(_NAMES) if script.byte() % 8 else script.data(20)
    odd = script.byte()
    block = bytearray(BLOCK)
    for at, width, value in (
        (0, 100, name),
        (100, 8, b"%07o" % (script.number(2) & 0o7777)),
        (108, 8, b"%07o" % (script.byte() if odd % 8 else 0o7777777)),
        (116, 8, b"0000000"),
        (124, 12, b"%011o" % size if odd % 16 else b"\xff" + script.data(11)),
        (136, 12, b"%011o" % script.number(4)),
        (156, 1, bytes((kind,))),
        (157, 100, script.pick(_TARGETS)),
        (257, 8, script.pick((b"ustar\x0000", b"ustar  \x00"))),
        (329, 8, b"%07o" % script.byte()),
        (337, 8, b"%07o" % script.byte()),
    ):
        block[at : at + width] = value[:width].ljust(width, b"\0")
    if odd > 0xF0:
        at = script.number(2) % BLOCK
        block[at : at + 16] = script.data(16)[: BLOCK - at]
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 0x20 + sum(block[156:]))
    return bytes(block)
