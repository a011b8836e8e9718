"""Making a file system image of a directory: ext4 by mke2fs, squashfs by mksquashfs, erofs by mkfs.erofs.

Written by root, a directory's files have their owners and modes already. Else ext4 gets them by debugfs afterwards,
squashfs by its pseudo files, and erofs not at all: all its files are root's. Sources: mke2fs(8), debugfs(8),
mksquashfs(1), mkfs.erofs(1).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree, Node

FilesystemType = Literal["ext4", "squashfs", "erofs"]
TYPES: tuple[FilesystemType, ...] = get_args(FilesystemType)

MAX_SIZE_MIB = 16 << 20
"""Most MiB of an ext4 image: what mke2fs makes with blocks of 4 KiB and no further thought."""

_MIB = 1 << 20
_BLOCK = 4096
_INODE = 256
_INODE_RATIO = 16384
_FREE = 64 * _MIB
_TIMEOUT_S = 3600
_TOOLS = {"ext4": ("mke2fs", "e2fsprogs"), "squashfs": ("mksquashfs", "squashfs-tools")}
_TOOLS["erofs"] = ("mkfs.erofs", "erofs-utils")
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find_tool(program: str, package: str) -> str:
    """Where a program is, also outside an ordinary user's PATH. Raises ImageError that names the Debian package."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN))
    found = shutil.which(program, path=path)
    if found is None:
        raise ImageError(f"no {program}", expected=f"the Debian package {package}", found="none")
    return found


def check_tools(kind: FilesystemType) -> None:
    """Raises ImageError if what makes such a file system is not installed."""
    find_tool(*_TOOLS[kind])


def make_filesystem(kind: FilesystemType, directory: Path, tree: FileTree, target: Path, size_mib: int | None) -> None:
    """Make an image ``target`` of ``directory``, whose files are the tree's. Blocks. Raises ImageError.

    ``size_mib`` is the size of an ext4; None takes what the files need and 64 MiB more. The others are as large as
    they are.
    """
    make = {"ext4": _ext4, "squashfs": _squashfs, "erofs": _erofs}[kind]
    make(directory, tree, target, size_mib)


def _ext4(directory: Path, tree: FileTree, target: Path, size_mib: int | None) -> None:
    inodes = _inodes(tree)
    size = size_mib * _MIB if size_mib else needed_bytes(tree)
    count = max(size // _INODE_RATIO, inodes + inodes // 2 + 1024)
    command = [find_tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", str(_INODE)]
    command += ["-m", "0", "-N", str(count), "-U", str(uuid.uuid4()), "-E", "root_owner=0:0"]
    _run([*command, "-d", str(directory), str(target), f"{size // 1024}k"])
    entries: Iterable[tuple[str, Node]] = [("", tree.root)] if os.geteuid() == 0 else [("", tree.root), *tree.walk()]
    _own_by_debugfs(target, entries)


def needed_bytes(tree: FileTree) -> int:
    """The size of an ext4 that holds the tree and 64 MiB more, whole MiB."""
    nodes = {id(node): node for _, node in tree.walk()}.values()
    content = sum(_blocks(node) * _BLOCK for node in nodes) + len(nodes) * (_INODE * 3 // 2 + 64)
    return -(-(content + content // 8 + _FREE) // _MIB) * _MIB


def _blocks(node: Node) -> int:
    if node.is_directory:
        names = sum(len(os.fsencode(name)) + 12 for name in node.children)
        return 2 + names * 3 // 2 // _BLOCK
    return -(-(node.size or len(node.target)) // _BLOCK)


def _inodes(tree: FileTree) -> int:
    return len({id(node) for _, node in tree.walk()})


def _own_by_debugfs(image: Path, entries: Iterable[tuple[str, Node]]) -> None:
    commands = image.with_name(f"{image.name}.debugfs")
    with commands.open("w", encoding="utf-8", errors="surrogateescape") as out:
        for path, node in entries:
            out.writelines(_owner_commands(path, node))
    program = find_tool("debugfs", "e2fsprogs")
    said = _run([program, "-w", "-f", str(commands), str(image)]).splitlines()[1:]  # the first is its version
    commands.unlink()
    if said:
        raise ImageError("debugfs", expected="owners set without a word", found=said[0][:200])


def _owner_commands(path: str, node: Node) -> Iterator[str]:
    if "\n" in path or "\r" in path:
        raise ImageError(
            "file name", expected="no line breaks in it unless root builds the image", found=repr(path)[:200]
        )
    name = '"/' + path.replace('"', '""') + '"'
    yield f"set_inode_field {name} mode 0{node.mode:o}\n"
    yield from (f"set_inode_field {name} {field} {value}\n" for field, value in (("uid", node.uid), ("gid", node.gid)))


def _squashfs(directory: Path, tree: FileTree, target: Path, _: int | None) -> None:
    command = [find_tool(*_TOOLS["squashfs"]), str(directory), str(target), "-noappend", "-quiet", "-no-progress"]
    command += ["-comp", "zstd", "-Xcompression-level", "6"]
    if os.geteuid() == 0:
        _run(command)
        return
    pseudo = target.with_name(f"{target.name}.pseudo")
    with pseudo.open("w", encoding="utf-8", errors="surrogateescape") as out:
        out.writelines(_pseudo_line(path, node) for path, node in tree.walk())
    root = tree.root
    command += ["-root-mode", f"{root.mode & 0o7777:o}", "-root-uid", str(root.uid), "-root-gid", str(root.gid)]
    _run([*command, "-pf", str(pseudo)])
    pseudo.unlink()


def _pseudo_line(path: str, node: Node) -> str:
    if "\n" in path or "\r" in path:
        raise ImageError(
            "file name", expected="no line breaks in it unless root builds the image", found=repr(path)[:200]
        )
    name = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{name}" m {node.mode & 0o7777:o} {node.uid} {node.gid}\n'


def _erofs(directory: Path, _: FileTree, target: Path, __: int | None) -> None:
    owner = [] if os.geteuid() == 0 else ["--all-root"]
    _run([find_tool(*_TOOLS["erofs"]), "--quiet", "-zlz4hc", *owner, str(target), str(directory)])


def keeps_owners(kind: FilesystemType) -> bool:
    """Whether an image made by this user has its files' owners."""
    return kind != "erofs" or os.geteuid() == 0


def _run(command: list[str]) -> str:
    """Its standard error output. Raises ImageError."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(command[0], expected="it to run", found=str(error)) from error
    said = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        tail = " / ".join(said.strip().splitlines()[-3:])
        raise ImageError(Path(command[0]).name, expected="exit code 0", found=f"{done.returncode}: {tail}")
    return said
