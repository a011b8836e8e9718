"""The lab's fast-changing disk: the working tree as it is now, the guest images, and the command to run."""

from __future__ import annotations

import compileall
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from _lab.files import make_disk, place, put, scratch_directory
from asyncvmm.guest.store import home

_OF_THE_PROJECT = ("asyncvmm", "tests", "scripts", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
_OF_THE_CACHE = ("kernel", "guests")
"""Directories of .cache that tests in the lab use: built kernels, built test guests."""

START = Path(__file__).with_name("start.sh")


@contextmanager
def project_disk(
    cache: Path, root: Path, command: Sequence[str], also: Sequence[Path], env: Sequence[str]
) -> Iterator[Path]:
    """A disk for one run. Raises ImageError."""
    with scratch_directory(cache) as scratch:
        tree, disk = scratch / "tree", scratch / "disk"
        sources = [root / name for name in _OF_THE_PROJECT] + [root / ".cache" / name for name in _OF_THE_CACHE]
        for path in [*sources, home() / "images", *map(Path.absolute, also)]:
            _take(tree, path)
        for name in ("asyncvmm", "tests"):
            _compile(tree, root / name)
        put(tree, "/lab/start", START.read_bytes(), 0o755)
        put(tree, "/lab/command", _script(root, command, env).encode(), 0o755)
        make_disk(tree, disk)
        shutil.rmtree(tree)
        yield disk


def _take(tree: Path, path: Path) -> None:
    if path.is_dir():
        shutil.copytree(
            path, place(tree, path), symlinks=True, ignore=shutil.ignore_patterns(".new-*"), dirs_exist_ok=True
        )
    elif path.exists():
        shutil.copy2(path, place(tree, path))


def _compile(tree: Path, directory: Path) -> None:
    """Byte code that is not there yet: compiling under emulation would be slow. Times are kept, so it stays valid."""
    target = place(tree, directory)
    if target.is_dir():
        compileall.compile_dir(target, quiet=2, stripdir=str(tree), prependdir="/")


def _script(root: Path, command: Sequence[str], env: Sequence[str]) -> str:
    variables = {
        "ASYNCVMM_LAB": "1",
        "ASYNCVMM_HOME": str(home()),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": f"{root}/.venv/bin:/usr/local/bin:/usr/sbin:/usr/bin",
        "PYTHONPATH": str(root),
        "PYTHONUNBUFFERED": "1",
        "TERM": os.environ.get("TERM", "dumb"),
        **dict(pair.split("=", 1) for pair in env),
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"#!/bin/sh\n{exports}cd {shlex.quote(str(root))}\nexec {shlex.join(command)}\n"
