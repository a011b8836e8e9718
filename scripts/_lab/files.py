"""Files and disks of the lab: built aside and renamed, so that a killed build leaves nothing that looks whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncvmm.errors import ImageError

_MIB = 1 << 20


@contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """A directory to fill; it gets its name when the block has ended well."""
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield aside
        aside.chmod(0o755)
        aside.rename(target)
    except FileExistsError:
        pass  # another run built the same meanwhile
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A directory for as long as the block lasts. Those that killed runs left behind are removed: nobody locks them."""
    for leftover in parent.glob("run-*"):
        with suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=parent) as scratch, _locked(Path(scratch)):
        yield Path(scratch)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock. Raises BlockingIOError if another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_others(kept: Path, pattern: str) -> None:
    """Remove what matches beside ``kept``: older builds of it."""
    for other in kept.parent.glob(pattern):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)


def make_disk(tree: Path, disk: Path) -> None:
    """An ext4 file system with the content of ``tree``. Raises ImageError."""
    bytes_, files = _measure(tree)
    size = bytes_ + bytes_ // 10 + files * 512 + 4 * _MIB
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "MKE2FS_CONFIG": "/dev/null"}
    command = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", str(files + 64), "-m", "0",
        "-O", "^has_journal,^resize_inode,^metadata_csum", "-E", "root_owner=0:0", "-d", str(tree),
        str(disk), f"{size // 1024}k",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImageError("mke2fs", expected="exit code 0", found=f"{done.returncode}: {done.stderr.strip()[-500:]}")


def _measure(tree: Path) -> tuple[int, int]:
    """Bytes in whole blocks, and the number of files and directories."""
    total = count = 0
    for directory, directories, files in os.walk(tree):
        count += len(directories) + len(files)
        total += 4096 * len(directories)
        total += sum(-(-os.lstat(os.path.join(directory, name)).st_size // 4096) * 4096 for name in files)
    return total, count


def put(tree: Path, path: str | Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file at an absolute path of the tree."""
    target = place(tree, path)
    target.write_bytes(data)
    target.chmod(mode)


def place(tree: Path, path: str | Path) -> Path:
    """Where an absolute path lies in the tree (in /usr where Debian merged it), its directory made."""
    name = os.path.abspath(path)
    if name.split("/")[1] in MERGED:
        name = "/usr" + name
    target = Path(f"{tree}{name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


MERGED = ("bin", "sbin", "lib", "lib64")
"""Directories that are symbolic links into /usr."""
