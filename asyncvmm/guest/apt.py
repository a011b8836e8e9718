"""Fetching packages with apt, without installing them and without touching the system's own apt state.

The host's package lists are used where it has some; else lists are fetched into a private directory, which needs no
privileges. A package is known by name, version and the SHA-256 of its .deb before a byte of it is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from asyncvmm.errors import ImageError

_TIMEOUT_S = 900
_OPTIONS = ("-q", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root")
_ENVIRONMENT = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


@attrs.frozen
class Package:
    """One version of one binary package, as the package lists describe it."""

    name: str
    version: str
    sha256: str
    depends: str = attrs.field(default="", repr=False)


def parse_package(stanza: str) -> Package | None:
    """The package of the first stanza of ``apt-cache show`` output; None if it does not name one."""
    fields: dict[str, str] = {}
    for line in stanza.lstrip("\n").split("\n\n", 1)[0].splitlines():
        key, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "\t")):
            fields[key] = value.strip()
    if not all(fields.get(key) for key in ("Package", "Version", "SHA256")):
        return None
    return Package(fields["Package"], fields["Version"], fields["SHA256"], fields.get("Depends", ""))


def first_dependency(package: Package, prefix: str) -> str | None:
    """The name of the first dependency that begins with ``prefix``, without its version condition."""
    names = (part.strip().split(" ", 1)[0] for part in package.depends.split(","))
    return next((name for name in names if name.startswith(prefix)), None)


class Apt:
    """apt, with the host's lists or with private ones. ``scratch`` is a directory that the caller removes."""

    def __init__(self, scratch: Path, report: Callable[[str], None]) -> None:
        self._scratch = scratch
        self._report = report
        self._options: tuple[str, ...] = _OPTIONS
        self._updated = False

    def find(self, name: str) -> Package | None:
        """The candidate version of a package; None if apt does not know the name. Raises ImageError."""
        package = self._show(name)
        if package is None and not self._updated:
            self._update_private_lists()
            package = self._show(name)
        return package

    def download(self, package: Package) -> Path:
        """The package's .deb in the scratch directory, checked by apt against the lists. Raises ImageError."""
        self._report(f"downloading {package.name} {package.version}")
        directory = self._scratch / f"deb-{package.name}"
        directory.mkdir(exist_ok=True)
        self._run(["apt-get", *self._options, "download", f"{package.name}={package.version}"], directory)
        debs = sorted(directory.glob("*.deb"))
        if len(debs) != 1:
            raise ImageError("apt-get download", expected="one .deb", found=f"{len(debs)} for {package.name}")
        return debs[0]

    def _show(self, name: str) -> Package | None:
        command = ["apt-cache", *self._options, "show", "--no-all-versions", name]
        return parse_package(self._run(command, self._scratch, check=False))

    def _update_private_lists(self) -> None:
        self._report("fetching package lists")
        state, cache = self._scratch / "apt-state", self._scratch / "apt-cache"
        (state / "lists" / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        self._options = (*_OPTIONS, "-o", f"Dir::State={state}", "-o", f"Dir::Cache={cache}")
        self._options += ("-o", "Dir::State::status=/var/lib/dpkg/status")
        self._updated = True
        self._run(["apt-get", *self._options, "update"], self._scratch)

    def _run(self, command: Sequence[str], directory: Path, *, check: bool = True) -> str:
        environment = {**os.environ, **_ENVIRONMENT}
        return run(command, directory, environment=environment, check=check)


@contextmanager
def unpacked(deb: Path) -> Iterator[Path]:
    """The files of a .deb, unpacked beside it for as long as the block lasts. Raises ImageError."""
    directory = deb.with_suffix(".unpacked")
    try:
        run(["dpkg-deb", "-x", str(deb), str(directory)], deb.parent)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(
    command: Sequence[str], directory: Path, *, environment: dict[str, str] | None = None, check: bool = True
) -> str:
    """Run a program to its end and return its output. Raises ImageError with the last of its errors."""
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(command[0], expected="it to run", found=str(error)) from error
    if check and done.returncode != 0:
        tail = " / ".join(done.stderr.decode(errors="replace").strip().splitlines()[-3:])
        raise ImageError(
            " ".join((command[0], command[-1])), expected="exit code 0", found=f"{done.returncode}: {tail}"
        )
    return done.stdout.decode(errors="replace")
