"""A host directory as the content of a root file system: its ``FileTree``, and a hash of all that is in it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import orjson

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import MAX_ENTRIES, FileTree, Node
from asyncvmm.guest.store import sha256_of_file
from asyncvmm.guest.tarball import Allowance, Content


def read_directory(directory: Path) -> FileTree:
    """The tree under a directory: links as links, no file opened; sockets are left out. Raises ImageError."""
    tree, allowance = FileTree(), Allowance()
    seen: dict[tuple[int, int], Node] = {}
    tree.put([], _node(directory, directory.lstat(), seen, allowance))
    try:
        for path, status in _files(directory):
            if not stat.S_ISSOCK(status.st_mode):
                tree.put(path.relative_to(directory).parts, _node(path, status, seen, allowance))
    except OSError as error:
        raise ImageError(f"directory {directory}", expected="readable files", found=str(error)) from error
    return tree


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    waiting, count = [directory], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                count += 1
                if count > MAX_ENTRIES:
                    raise ImageError(f"directory {directory}", expected=f"at most {MAX_ENTRIES} files", found="more")
                yield Path(entry.path), entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))


def _node(path: Path, status: os.stat_result, seen: dict[tuple[int, int], Node], allowance: Allowance) -> Node:
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return seen[identity]
    node = Node(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    if node.is_symlink:
        node.target = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        allowance.take(status.st_size)
        node.size, node.content = status.st_size, Content(path)
        seen[identity] = node
    elif not node.is_directory:
        node.rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return node


def hash_tree(tree: FileTree) -> str:
    """SHA-256 of every name, owner, mode, time and content, in hexadecimal. Reads every file. Raises ImageError."""
    digest = hashlib.sha256()
    for path, node in [("", tree.root), *tree.walk()]:
        record = (os.fsencode(path).hex(), node.mode, node.uid, node.gid, node.mtime_ns, os.fsencode(node.target).hex())
        digest.update(orjson.dumps((*record, node.rdev, node.size)))
        if node.content is not None:
            digest.update(_hash_file(node.content.path))
    return digest.hexdigest()


def _hash_file(path: Path) -> bytes:
    try:
        return bytes.fromhex(sha256_of_file(path))
    except OSError as error:
        raise ImageError(f"file {path}", expected="a readable file", found=error.strerror) from error
