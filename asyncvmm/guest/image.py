"""Building guest images: a kernel, an initramfs with our PID 1, busybox and the virtio modules, perhaps a root.

An image is a function of its inputs: they are hashed into its key, the same inputs give the same bytes, and a build
whose key is already there does nothing. ``find_image`` and ``list_images`` live in ``store`` and are offered here too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs
import orjson

from asyncvmm.errors import ConfigError
from asyncvmm.guest import store
from asyncvmm.guest.apt import Apt
from asyncvmm.guest.initramfs import build_initramfs
from asyncvmm.guest.kernel import kernel_release
from asyncvmm.guest.rootfs import Rootfs, RootSource, build_root, open_source
from asyncvmm.guest.sources import (
    Busybox,
    KernelFiles,
    KernelSource,
    default_kernel,
    find_busybox,
    given_kernel,
    has_apt,
)
from asyncvmm.guest.store import Image, find_image, home, list_images

__all__ = ["Image", "Rootfs", "build_image", "find_image", "home", "list_images"]

BUILDER_VERSION = 2
"""Raised when the same ingredients come to make another image."""


def _silence(_: str) -> None:
    pass


def build_image(
    name: str = "default",
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    rootfs: Rootfs | None = None,
    report: Callable[[str], None] = _silence,
) -> Image:
    """Build the image ``name`` unless it is there already, and return it. Blocks: for seconds, or for a download.

    Without ``kernel`` it takes the distribution's cloud kernel package, downloaded and not installed, or where that
    cannot be had the host's own kernel. ``modules`` is a directory with the given kernel's modules. ``rootfs`` is
    what to make a root file system of, for workloads to run in. ``report`` gets one line for each step. Raises
    ImageError or KernelError.
    """
    store.check_name(name)
    if modules is not None and kernel is None:
        raise ConfigError("modules", expected="a kernel to go with them", found="none")
    with store.locked() as images, tempfile.TemporaryDirectory(prefix="asyncvmm-image-") as scratch:
        apt = Apt(Path(scratch), report) if has_apt() else None
        source = given_kernel(kernel, modules) if kernel else default_kernel(apt, report)
        ingredients = Ingredients(source, find_busybox(apt), rootfs, open_source(rootfs) if rootfs else None)
        return _build(images, name, ingredients, report)


@attrs.frozen
class Ingredients:
    """What an image is made of, found but not yet loaded."""

    kernel: KernelSource
    busybox: Busybox
    rootfs: Rootfs | None = None
    root: RootSource | None = None


def _build(images: Path, name: str, ingredients: Ingredients, report: Callable[[str], None]) -> Image:
    init = files("asyncvmm.guest").joinpath("init.bin").read_bytes()
    inputs = _inputs(ingredients, init)
    key = store.sha256(orjson.dumps(inputs, option=orjson.OPT_SORT_KEYS))[:32]
    if image := store.built(name, key):
        report(f"image {name} is up to date")
        return image
    kernel_files, busybox = ingredients.kernel.load(), ingredients.busybox
    report("building the initramfs")
    initrd = build_initramfs(init, busybox.data, busybox.applets, kernel_files.modules)
    contents: dict[str, bytes | Path] = {store.KERNEL: kernel_files.kernel, store.INITRD: initrd}
    with _root(ingredients, images, report) as root:
        contents |= root
        contents[store.MANIFEST] = _dump(_manifest(key, inputs, kernel_files, contents))
        image = store.publish(images, name, key, contents)
    report(f"image {name} is ready in {image.directory}")
    return image


def _inputs(ingredients: Ingredients, init: bytes) -> dict[str, Any]:
    inputs = {
        "builder": BUILDER_VERSION,
        "kernel": ingredients.kernel.identity,
        "busybox": ingredients.busybox.identity,
        "init": {"sha256": store.sha256(init)},
    }
    return {**inputs, "rootfs": ingredients.root.identity} if ingredients.root else inputs


@contextmanager
def _root(ingredients: Ingredients, images: Path, report: Callable[[str], None]) -> Iterator[dict[str, Path]]:
    if ingredients.rootfs is None or ingredients.root is None:
        yield {}
        return
    path = build_root(ingredients.rootfs, ingredients.root, images, report)
    try:
        yield {path.name: path}
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def _manifest(
    key: str, inputs: dict[str, Any], kernel_files: KernelFiles, contents: Mapping[str, bytes | Path]
) -> dict[str, Any]:
    return {
        "format": store.FORMAT,
        "key": key,
        "inputs": inputs,
        "kernel_release": kernel_release(kernel_files.kernel),
        "modules": [
            {"file": module.file, "need": module.need, "sha256": store.sha256(module.data)}
            for module in kernel_files.modules
        ],
        "outputs": {file: _output(file, content) for file, content in contents.items()},
    }


def _output(file: str, content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"sha256": store.sha256(content), "size": len(content)}
    return {"sha256": store.sha256_of_file(content), "size": content.stat().st_size, "type": store.ROOTS[file]}


def _dump(manifest: dict[str, Any]) -> bytes:
    return orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
