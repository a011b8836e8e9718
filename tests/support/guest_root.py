"""A root file system for guests in tests: busybox, a page for its web server, and what serves it on a vsock port.

Kept in .cache/guests under a name that says what went into it: where there is no compiler, as in the lab, one that was
built before serves.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from asyncvmm.guest.rootfs import Rootfs, build_root, open_source
from asyncvmm.guest.sources import find_busybox
from tests.support.requirements import ROOT, problem_with, require

SIZE_MIB = 16
PAGE = random.Random(1).randbytes(256 << 10)
"""What its web server gives at /page."""

_SERVE = ROOT / "tests" / "guests" / "vsock_serve.c"
_CACHE = ROOT / ".cache" / "guests"
_NEEDS = ("musl-gcc", "e2fsprogs", "busybox")
_APPLETS = (
    *("awk", "cat", "chmod", "dd", "echo", "fsfreeze", "grep", "head", "httpd", "ip", "kill", "ls", "mkdir", "mount"),
    *("readlink", "rm", "seq", "sh", "sha256sum", "sleep", "stty", "sync", "tail", "touch", "wc"),
)


def guest_root(directory: Path) -> Path:
    """A copy of the ext4 image that a guest may write to. Skips the test where it cannot be built."""
    if not (image := _path()).exists():
        require_all()
        _build(image)
    return Path(shutil.copyfile(image, directory / "root.ext4"))


def require_all() -> None:
    """Skip the test unless the image can be built."""
    for need in _NEEDS:
        require(need)


def build_if_possible() -> None:
    """So that a run elsewhere finds it."""
    if not (image := _path()).exists() and not any(map(problem_with, _NEEDS)):
        _build(image)


def _path() -> Path:
    return _CACHE / f"root-{hashlib.sha256(Path(__file__).read_bytes() + _SERVE.read_bytes()).hexdigest()[:16]}.ext4"


def _build(target: Path) -> None:
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        tree = Path(scratch, "tree")
        _fill(tree)
        rootfs = Rootfs(tree, "ext4", SIZE_MIB)
        image = build_root(rootfs, open_source(rootfs), Path(scratch), lambda _: None)
        for older in _CACHE.glob("root-*.ext4"):
            older.unlink(missing_ok=True)  # each would be carried into the lab
        image.rename(target)


def _fill(tree: Path) -> None:
    for name in ("bin", "www"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(find_busybox(None).data)
    (tree / "bin/busybox").chmod(0o755)
    for applet in _APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "www/page").write_bytes(PAGE)
    command = ["musl-gcc", "-std=gnu11", "-Os", "-static", "-s", "-o", str(tree / "bin/vsock_serve"), str(_SERVE)]
    subprocess.run(command, check=True, timeout=60)
