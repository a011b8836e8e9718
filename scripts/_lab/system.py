"""The lab's slow-changing disk: Python with its standard library, the packages of .venv, shared libraries, busybox.

Everything lies at its path on this host, so that the virtual environment works unchanged. Byte code is compiled here
and never checked against its source there: under emulation both would cost seconds.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from _lab.files import MERGED, make_disk, place, publish_directory, put, remove_others, scratch_directory
from asyncvmm.guest.apt import Apt
from asyncvmm.guest.sources import find_busybox, has_apt

_NOT_OF_THE_LIBRARY = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "site-packages",
    "dist-packages",
)
_NOT_OF_THE_PACKAGES = (
    *("pip", "setuptools", "pkg_resources", "mypy", "mypyc", "ruff", "grimp", "hatchling"),
    *("*duckdb", "_duckdb*", "pandas", "*polars*", "numpy", "numpy.libs"),
)
"""Patterns of names: what no test in the lab uses, hundreds of megabytes of it."""

_PROGRAMS = ("setpriv", "passt", "passt.avx2", "mke2fs", "debugfs", "e2fsck")
"""What tests in the lab run, as far as it is installed here. passt starts the variant of its name that fits the CPU."""

_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "group": "root:x:0:\nkvm:x:106:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
    "hostname": "lab\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


def system_disk(cache: Path, root: Path, report: Callable[[str], None]) -> Path:
    """The cached system disk; built first if Python or its packages changed. Raises ImageError."""
    directory = cache / f"system-{_key(root)}"
    if not directory.exists():
        report("building the system disk (Python and its packages)")
        with scratch_directory(cache) as scratch, publish_directory(directory) as aside:
            tree = scratch / "tree"
            _fill(tree, root, scratch, report)
            make_disk(tree, aside / "disk")
        remove_others(directory, "system-*")
    return directory / "disk"


def _key(root: Path) -> str:
    """What the disk is made of: its builder's source, Python's build, the packages' own records, the programs found."""
    key = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("system.py", "files.py")))
    key.update(f"{root} {sys.version} {sys.base_prefix} {_programs()}".encode())
    for record in sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/RECORD")):
        key.update(record.read_bytes())
    return key.hexdigest()[:16]


def _fill(tree: Path, root: Path, scratch: Path, report: Callable[[str], None]) -> None:
    _skeleton(tree)
    busybox = find_busybox(Apt(scratch, report) if has_apt() else None)
    put(tree, "/usr/bin/busybox", busybox.data, 0o755)
    _python(tree)
    _virtual_environment(tree, root)
    for program in _programs():
        _copy(tree, Path(program))
    _shared_libraries(tree)
    for applet in busybox.applets:
        _link(tree, Path("/", applet), Path("/usr/bin/busybox"))


def _programs() -> list[str]:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return [found for name in _PROGRAMS if (found := shutil.which(name, path=path))]


def _skeleton(tree: Path) -> None:
    for name in ("dev", "proc", "sys", "tmp", "run", "root", "etc", "lab", "var/tmp", *(f"usr/{m}" for m in MERGED)):
        (tree / name).mkdir(parents=True)
    for name in MERGED:
        (tree / name).symlink_to(f"usr/{name}")
    for name, text in _ETC.items():
        put(tree, f"/etc/{name}", text.encode())


def _python(tree: Path) -> None:
    _copy_with_links(tree, Path(sys.executable))
    base = dict.fromkeys(("base", "platbase", "installed_base", "installed_platbase"), sys.base_prefix)
    for library in {sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")}:
        _copy_python(tree, Path(library), _NOT_OF_THE_LIBRARY)


def _copy_with_links(tree: Path, path: Path) -> None:
    """Copy a file and every symbolic link on the way from this name to it."""
    while path.is_symlink():
        target = Path(os.readlink(path))
        _link(tree, path, target)
        path = path.parent / target
    _copy(tree, path)


def _virtual_environment(tree: Path, root: Path) -> None:
    venv = root / ".venv"
    _copy(tree, venv / "pyvenv.cfg")
    for program in sorted((venv / "bin").iterdir()):
        if program.is_symlink():
            _link(tree, program, Path(os.readlink(program)))
        elif program.stat().st_size < 1 << 20:
            _copy(tree, program)
    _copy_python(tree, Path(sysconfig.get_path("purelib")), _NOT_OF_THE_PACKAGES)


def _link(tree: Path, path: Path, target: Path) -> None:
    link = place(tree, path)
    if not os.path.lexists(link):
        link.symlink_to(target)


def _copy(tree: Path, path: Path) -> None:
    shutil.copy2(path, place(tree, path.parent.resolve() / path.name))


def _copy_python(tree: Path, library: Path, leave_out: tuple[str, ...]) -> None:
    """Copy a directory of Python code without the named parts, and compile it for the place where it will be."""

    unwanted = shutil.ignore_patterns(*leave_out)

    def ignored(directory: str, names: list[str]) -> set[str]:
        out = {
            name
            for name in names
            if name in ("__pycache__", "tests") or name.startswith("config-") or "__mypyc" in name
        }
        return out | (unwanted(directory, names) if Path(directory) == library else set())

    target = place(tree, library)
    shutil.copytree(library, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    compileall.compile_dir(
        target, quiet=2, workers=0, stripdir=str(tree), prependdir="/",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )  # fmt: skip


def _shared_libraries(tree: Path) -> None:
    """What the dynamic linker will ask for, found by asking it here."""
    programs = [str(path) for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and _is_elf(path)]
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True)
    for library in sorted(set(_libraries(done.stdout))):
        if not library.startswith(str(tree)):
            _copy(tree, Path(library))


def _libraries(listing: str) -> Iterator[str]:
    for line in listing.splitlines():
        if line.startswith("\t") and (found := re.search(r"(?:^\s*|=> )(/\S+) \(0x", line)):
            yield found[1]


def _is_elf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"
