"""Writing a ``FileTree`` out as real files, for a program that makes a file system of a directory.

The directory is new and nobody else's, and parents come first, so every name leads where the tree says. As root the
files get their owners, devices and extended attributes; as anybody else they are the writer's own and readable to
him, and whoever makes the file system sets owners and modes there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree, Node
from asyncvmm.guest.tarball import Content

_CHUNK = 1 << 20


def stage(tree: FileTree, directory: Path) -> list[str]:
    """Write the tree into an empty directory. Gives what had to be left out, in words; a file goes from the tree, too.

    Raises ImageError.
    """
    writer = _Writer(tree, directory, privileged=os.geteuid() == 0)
    try:
        nodes = list(tree.walk())
        for path, node in nodes:
            writer.create(path, node)
        for path, node in reversed(nodes):
            writer.finish(path, node)
        writer.finish("", tree.root)
    except OSError as error:
        raise ImageError("root file system", expected="it to be written here", found=str(error)) from error
    return writer.left_out


class _Writer:
    def __init__(self, tree: FileTree, directory: Path, *, privileged: bool) -> None:
        self._tree = tree
        self._directory = directory
        self._privileged = privileged
        self._written: dict[int, Path] = {}
        self.left_out: list[str] = []

    def create(self, path: str, node: Node) -> None:
        target = self._directory / path
        if id(node) in self._written:
            os.link(self._written[id(node)], target, follow_symlinks=False)
            return
        if not self._make(target, path, node):
            return
        if not node.is_directory:
            self._written[id(node)] = target

    def _make(self, target: Path, path: str, node: Node) -> bool:
        if node.is_directory:
            target.mkdir(mode=0o700)
        elif node.is_symlink:
            target.symlink_to(node.target)
        elif stat.S_ISREG(node.mode):
            _write_content(target, node)
        elif stat.S_ISFIFO(node.mode):
            os.mkfifo(target, 0o600)
        else:
            return self._make_device(target, path, node)
        return True

    def _make_device(self, target: Path, path: str, node: Node) -> bool:
        try:
            os.mknod(target, stat.S_IFMT(node.mode) | 0o600, os.makedev(*node.rdev))
        except PermissionError:
            self.left_out.append(f"device {path}")
            self._tree.remove(path.split("/"))
            return False
        return True

    def finish(self, path: str, node: Node) -> None:
        """Owner before mode: a change of owner takes the set-user-ID bit away."""
        target = self._directory / path
        if not os.path.lexists(target):
            return
        if self._privileged:
            os.chown(target, node.uid, node.gid, follow_symlinks=False)
            self._set_xattrs(target, path, node)
        if not node.is_symlink:
            readable = 0 if self._privileged else 0o700 if node.is_directory else 0o600
            target.chmod(stat.S_IMODE(node.mode) | readable)
        os.utime(target, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)

    def _set_xattrs(self, target: Path, path: str, node: Node) -> None:
        for name, value in node.xattrs.items():
            try:
                os.setxattr(target, name, value, follow_symlinks=False)
            except (OSError, ValueError):
                self.left_out.append(f"{name} of {path}")


def _write_content(target: Path, node: Node) -> None:
    content: Content = node.content
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as out, content.path.open("rb") as source:
        source.seek(content.offset)
        for place, size in content.pieces if content.pieces is not None else ((0, node.size),):
            out.seek(place)
            _copy(source, out, size)
        out.truncate(node.size)


def _copy(source: IO[bytes], out: IO[bytes], size: int) -> None:
    while size:
        chunk = source.read(min(size, _CHUNK))
        if not chunk:
            raise ImageError("archive", expected=f"{size} more bytes of a file", found="its end")
        out.write(chunk)
        size -= len(chunk)
