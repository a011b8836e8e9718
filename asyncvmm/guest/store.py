"""Where built guest images live, and how one is put there: whole or not at all.

    $ASYNCVMM_HOME, else $XDG_CACHE_HOME/asyncvmm, else ~/.cache/asyncvmm
      images/.built/<key>/   vmlinuz, initrd, manifest.json, perhaps root.<type>: immutable, named by the hash of
                             what went in
      images/<name>          a symbolic link to one of them, swapped by rename

A VM that still reads an image is not disturbed when its name comes to mean a newer one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson

from asyncvmm.errors import ImageError

FORMAT = 1
"""Version of the manifest's form."""

KERNEL, INITRD, MANIFEST = "vmlinuz", "initrd", "manifest.json"
ROOTS = {f"root.{kind}": kind for kind in ("ext4", "squashfs", "erofs")}
"""A root file system's file, and its type."""

_MAX_MANIFEST = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_FIX = "run: asyncvmm image build"


@attrs.frozen
class Image:
    """A guest image ready to boot. ``manifest`` names the versions and hashes of what went in and came out.

    ``root`` is the root file system that was built with it, of type ``root_type``; None if there is none. Nobody may
    write to it: a VM gets an overlay, or a copy.
    """

    name: str
    directory: Path
    kernel: Path
    initrd: Path
    manifest: dict[str, Any] = attrs.field(repr=False)
    root: Path | None = None

    @property
    def root_type(self) -> str | None:
        """``ext4``, ``squashfs`` or ``erofs``; None if there is no root."""
        return ROOTS[self.root.name] if self.root else None


def home() -> Path:
    """The directory that holds everything asyncvmm keeps."""
    if own := os.environ.get("ASYNCVMM_HOME"):
        return Path(own).absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).absolute() / "asyncvmm"
    return Path.home() / ".cache" / "asyncvmm"


def check_name(name: str) -> None:
    """Refuse a name that is not letters, digits, ``-`` and ``_`` (64 at the most). Raises ImageError."""
    if not _NAME.fullmatch(name):
        raise ImageError("image name", expected="1 to 64 letters, digits, - and _", found=repr(name))


def find_image(name: str = "default") -> Image:
    """The built image of that name, its manifest read and its files' sizes compared with it.

    Raises ImageError that says what is wrong and how to mend it.
    """
    check_name(name)
    link = home() / "images" / name
    if not link.exists():
        raise ImageError(f"no image {name!r}", expected=str(link), found=f"none ({_FIX})")
    return _load(name, link.resolve())


def list_images() -> list[Image]:
    """All images that are whole, by name."""
    images = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in sorted((home() / "images").iterdir()):
            with contextlib.suppress(ImageError):
                images.append(find_image(entry.name))
    return images


def built(name: str, key: str) -> Image | None:
    """The image of that key under that name, if it is there and whole."""
    with contextlib.suppress(ImageError):
        image = find_image(name)
        if image.manifest.get("key") == key:
            return image
    return None


def _load(name: str, directory: Path) -> Image:
    manifest = _read_manifest(directory / MANIFEST)
    for file, expected in _sizes(manifest).items():
        try:
            found = (directory / file).stat().st_size
        except OSError as error:
            raise _damaged(directory / file, f"{expected} bytes", error.strerror) from error
        if found != expected:
            raise _damaged(directory / file, f"{expected} bytes", f"{found} bytes")
    root = next((directory / file for file in ROOTS if file in _sizes(manifest)), None)
    return Image(name, directory, directory / KERNEL, directory / INITRD, manifest, root)


def _sizes(manifest: dict[str, Any]) -> dict[str, Any]:
    """The size of each file that belongs to the image. Raises KeyError, TypeError for what is no manifest."""
    outputs = manifest["outputs"]
    return {file: outputs[file]["size"] for file in (KERNEL, INITRD, *(file for file in ROOTS if file in outputs))}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            manifest = orjson.loads(stream.read(_MAX_MANIFEST))
        sizes = _sizes(manifest).values()
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "an image manifest", f"{type(error).__name__}: {error}") from error
    if version != FORMAT or not all(isinstance(size, int) for size in sizes):
        raise _damaged(path, f"format {FORMAT}", f"format {version!r}")
    return dict(manifest)


def _damaged(path: Path, expected: str, found: object) -> ImageError:
    return ImageError(f"damaged image file {path}", expected=expected, found=f"{found} ({_FIX})")


@contextlib.contextmanager
def locked() -> Iterator[Path]:
    """The images' directory, with every other builder kept waiting for as long as the block lasts."""
    images = home() / "images"
    try:
        (images / ".built").mkdir(parents=True, exist_ok=True)
        lock = os.open(images / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ImageError("image store", expected=f"a directory to write: {images}", found=error.strerror) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_leftovers(images)
        yield images
    finally:
        os.close(lock)


def _remove_leftovers(images: Path) -> None:
    """What a builder that was killed left behind: nobody else builds while we hold the lock."""
    for leftover in images.glob(".new-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def publish(images: Path, name: str, key: str, files: Mapping[str, bytes | Path]) -> Image:
    """Put an image's files in the store under its key and let the name mean it. The lock must be held.

    What is a path is moved there, from the same file system.

    A crash at any moment leaves the old image or the new one.
    """
    target = images / ".built" / key
    if target.exists():
        shutil.rmtree(target)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=images))
    aside.chmod(0o755)
    for file, content in files.items():
        if isinstance(content, Path):
            _move_durably(content, aside / file)
        else:
            _write_durably(aside / file, content)
    _sync_directory(aside)
    aside.rename(target)
    _sync_directory(target.parent)
    link = images / f".new-{name}"
    link.symlink_to(Path(".built") / key)
    _clear_way(images / name)
    link.replace(images / name)
    _sync_directory(images)
    return find_image(name)


def _clear_way(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _move_durably(source: Path, path: Path) -> None:
    source.chmod(0o444)
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    source.rename(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(data: bytes) -> str:
    """SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
