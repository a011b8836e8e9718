"""A file system's tree in memory, without its content: what tar layers add up to before a file is written anywhere.

Names come from archives that nobody has checked. A path is taken as relative to the tree's own root; a symbolic link
on the way is followed inside the tree as a guest would follow it, and one that climbs above the root is refused. So a
tree never names anything outside itself, and whoever writes it out parent by parent follows no link of the host's.

Whiteouts: the OCI image specification, "Image Layer Filesystem Changeset".
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from asyncvmm.errors import ImageError

MAX_ENTRIES = 500_000
"""Most files of one tree."""

MAX_NAME = 255
"""Most bytes of one name, as in Linux (NAME_MAX)."""

MAX_PATH = 4095
"""Most bytes of one path, as in Linux (PATH_MAX, without its NUL)."""

MAX_LINKS, MAX_STEPS = 40, 4096
"""Most symbolic links on the way to one file, as in Linux, and most directories entered altogether."""


@attrs.define(eq=False)
class Node:
    """One file: ``mode`` with its type bits, ``target`` of a symbolic link, ``rdev`` (major, minor) of a device.

    Two names of one Node are hard links. ``content`` is the caller's business: where a regular file's bytes are.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: str = ""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = attrs.Factory(dict)
    content: Any = None
    children: dict[str, Node] = attrs.Factory(dict)

    @property
    def is_directory(self) -> bool:
        """Whether it can have children."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it leads elsewhere."""
        return stat.S_ISLNK(self.mode)


def split(name: str) -> list[str]:
    """The parts of an archive member's name; none for the root. Raises ImageError for what could leave the root."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ImageError("file name in the archive", expected="a path inside the root", found=repr(name[:200]))
    sizes = [len(part.encode("utf-8", "surrogateescape")) for part in parts]
    if sum(sizes) + len(sizes) > MAX_PATH or any(size > MAX_NAME for size in sizes):
        raise ImageError("file name in the archive", expected=f"at most {MAX_PATH} bytes", found=repr(name[:200]))
    return parts


class FileTree:
    """The tree. Every method takes a path as ``split`` gives it. Raises ImageError."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self.added = 0

    def put(self, path: Sequence[str], node: Node) -> None:
        """Add a file, with the directories above it; a directory keeps the children it has."""
        self.added += 1
        if self.added > MAX_ENTRIES:
            raise ImageError("root file system", expected=f"at most {MAX_ENTRIES} files", found="more")
        if not path:
            if not node.is_directory:
                raise ImageError("root file system", expected="a directory as its root", found=stat.filemode(node.mode))
            node.children, self.root = self.root.children, node
            return
        parent = self._directory(path[:-1])
        before = parent.children.get(path[-1])
        if before is not None and before.is_directory and node.is_directory:
            node.children = before.children
        parent.children[path[-1]] = node

    def link(self, path: Sequence[str], target: Sequence[str]) -> None:
        """Add a second name of a file that is there."""
        node = self.find(target)
        if node is None or node.is_directory:
            raise ImageError("hard link in the archive", expected="a file before it", found="/".join(target)[:200])
        self.put(path, node)

    def find(self, path: Sequence[str]) -> Node | None:
        """The file of that name, a symbolic link itself; None if there is none."""
        parent = self._walk(path[:-1], make=False)
        if parent is None or not path:
            return parent
        return parent.children.get(path[-1])

    def remove(self, path: Sequence[str]) -> None:
        """Remove a file with all beneath it, if it is there."""
        parent = self._walk(path[:-1], make=False)
        if parent is not None:
            parent.children.pop(path[-1], None)

    def clear(self, path: Sequence[str]) -> None:
        """Remove all beneath a directory, if it is there."""
        directory = self._walk(path, make=False)
        if directory is not None:
            directory.children = {}

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Every file but the root, parents first, in the order of names; paths are relative to the root."""
        waiting = [(name, node) for name, node in sorted(self.root.children.items(), reverse=True)]
        while waiting:
            path, node = waiting.pop()
            yield path, node
            waiting += [(f"{path}/{name}", child) for name, child in sorted(node.children.items(), reverse=True)]

    def _directory(self, path: Sequence[str]) -> Node:
        directory = self._walk(path, make=True)
        assert directory is not None
        return directory

    def _walk(self, path: Sequence[str], *, make: bool) -> Node | None:
        """The directory at a path, links followed; made if need be, else None where there is none."""
        trail, todo, links, steps = [self.root], list(reversed(path)), 0, 0
        while todo:
            part = todo.pop()
            steps += 1
            if part == "..":
                if len(trail) == 1:
                    raise ImageError("symbolic link in the archive", expected="it to stay inside the root", found="..")
                trail.pop()
                continue
            node = trail[-1].children.get(part)
            if node is not None and node.is_symlink:
                links += 1
                _check_way(links, steps, part)
                if node.target.startswith("/"):
                    del trail[1:]
                todo += [step for step in reversed(node.target.split("/")) if step not in ("", ".")]
                continue
            node = self._enter(trail[-1], part, make)
            if node is None:
                return None
            trail.append(node)
        return trail[-1]

    def _enter(self, parent: Node, name: str, make: bool) -> Node | None:
        node = parent.children.get(name)
        if node is None and make:
            self.added += 1
            node = parent.children[name] = Node(stat.S_IFDIR | 0o755)
        if node is not None and not node.is_directory:
            if make:
                raise ImageError("file in the archive", expected="a directory above it", found=f"a file, {name[:200]}")
            return None
        return node


def _check_way(links: int, steps: int, name: str) -> None:
    if links > MAX_LINKS or steps > MAX_STEPS:
        found = f"more at {name[:200]}"
        raise ImageError("symbolic links in the archive", expected=f"at most {MAX_LINKS} on one path", found=found)
