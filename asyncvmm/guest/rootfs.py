"""A workload's root file system, made of a directory, a tar archive or an OCI image layout.

What it is made of is hashed first, so that an image whose inputs have not changed is not built again.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.guest.directory import hash_tree, read_directory
from asyncvmm.guest.filetree import FileTree
from asyncvmm.guest.mkfs import MAX_SIZE_MIB, TYPES, FilesystemType, check_tools, keeps_owners, make_filesystem
from asyncvmm.guest.oci import is_layout, open_layout
from asyncvmm.guest.staging import stage
from asyncvmm.guest.store import sha256_of_file
from asyncvmm.guest.tarball import Allowance, add_tar

_SHOWN = 5


@attrs.frozen
class Rootfs:
    """What to make a root file system of. ``source``: a directory, a tar archive (plain, gzip, bzip2, xz, zstd), or
    an OCI image layout. ``size_mib``: of an ext4; None takes what the files need and 64 MiB more.

    Raises ImageError.
    """

    source: Path
    fstype: FilesystemType = "ext4"
    size_mib: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.fstype not in TYPES:
            raise ImageError("root file system type", expected=" or ".join(TYPES), found=repr(self.fstype))
        if self.size_mib is not None and self.fstype != "ext4":
            raise ImageError("root file system size", expected="none but for ext4", found=f"{self.size_mib} MiB")
        if self.size_mib is not None and not 1 <= self.size_mib <= MAX_SIZE_MIB:
            raise ImageError("root file system size", expected=f"1 to {MAX_SIZE_MIB} MiB", found=self.size_mib)


def asked_rootfs(source: Path | None, fstype: str | None, size_mib: int | None) -> Rootfs | None:
    """What a caller who may leave everything out asked for. Raises ImageError."""
    if source is None:
        if fstype is not None or size_mib is not None:
            raise ImageError("root file system", expected="what to make it of", found="none")
        return None
    return Rootfs(source, cast("FilesystemType", fstype or "ext4"), size_mib)


@attrs.frozen
class RootSource:
    """What a root is made of, opened. ``identity`` goes into the image's key; ``load`` gives the files.

    ``directory`` is where they are already; None if they must be written out first.
    """

    identity: dict[str, Any]
    load: Callable[[Path], FileTree]
    directory: Path | None = None


def open_source(rootfs: Rootfs) -> RootSource:
    """Look at what a root is to be made of, and hash it. Raises ImageError."""
    check_tools(rootfs.fstype)
    wanted = {"type": rootfs.fstype, "size_mib": rootfs.size_mib, "as_root": os.geteuid() == 0}
    if not rootfs.source.is_dir():
        digest = _hash_file(rootfs.source)
        return RootSource({"source": "tar", "sha256": digest, **wanted}, lambda scratch: _tar(rootfs.source, scratch))
    if is_layout(rootfs.source):
        layout = open_layout(rootfs.source)
        return RootSource({"source": "oci", "digest": layout.digest, **wanted}, layout.load)
    tree = read_directory(rootfs.source)
    identity = {"source": "directory", "sha256": hash_tree(tree), **wanted}
    return RootSource(identity, lambda _: _as_root_s(tree), rootfs.source)


def build_root(rootfs: Rootfs, source: RootSource, images: Path, report: Callable[[str], None]) -> Path:
    """Make the file system, in a new directory of ``images`` that the store clears up after a killed builder.

    The caller moves the file away and removes its directory. Raises ImageError.
    """
    directory = Path(tempfile.mkdtemp(prefix=".new-root-", dir=images))
    try:
        return _build(rootfs, source, directory, report)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise ImageError("root file system", expected="room to make it", found=str(error)) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _build(rootfs: Rootfs, source: RootSource, directory: Path, report: Callable[[str], None]) -> Path:
    scratch, staged = directory / "archives", directory / "files"
    scratch.mkdir()
    staged.mkdir()
    report(f"reading {rootfs.source}")
    tree = source.load(scratch)
    if source.directory is None:
        _report_left_out(stage(tree, staged), report)
        shutil.rmtree(scratch)
    if not keeps_owners(rootfs.fstype):
        report(f"not root: all files in the {rootfs.fstype} belong to root")
    report(f"making the {rootfs.fstype}")
    target = directory / f"root.{rootfs.fstype}"
    make_filesystem(rootfs.fstype, source.directory or staged, tree, target, rootfs.size_mib)
    shutil.rmtree(staged)
    return target


def _report_left_out(names: list[str], report: Callable[[str], None]) -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if names:
        report(f"left out: {', '.join(names[:_SHOWN])}{more}")


def _tar(path: Path, scratch: Path) -> FileTree:
    tree = FileTree()
    add_tar(tree, path, scratch, Allowance())
    return tree


def _as_root_s(tree: FileTree) -> FileTree:
    """An ordinary user who builds a root of his own files means them to be root's."""
    user, group = os.geteuid(), os.getegid()
    for node in (tree.root, *(node for _, node in tree.walk())):
        if user:
            node.uid = 0 if node.uid == user else node.uid
            node.gid = 0 if node.gid == group else node.gid
    return tree


def _hash_file(path: Path) -> str:
    what, expected = f"root {path}", "a directory or an archive"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(what, expected=expected, found="neither")
        return sha256_of_file(path)
    except OSError as error:
        raise ImageError(what, expected=expected, found=error.strerror) from error
