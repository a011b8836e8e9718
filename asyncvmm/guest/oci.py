"""An OCI image layout: a directory with a container image in it, as ``skopeo copy`` and ``buildah push`` write one.

Sources: the OCI image specification 1.1: image-layout.md, image-index.md, manifest.md, descriptor.md. Nothing is
believed before its digest and its size are as the descriptor above it says; the index itself is the caller's word.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import attrs
import orjson

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree
from asyncvmm.guest.tarball import Allowance, add_tar

MAX_JSON = 4 << 20
"""Most bytes of an index, a manifest or a configuration."""

MAX_LAYERS = 500
"""Most layers of one image."""

_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DEPTH = 4
_CHUNK = 1 << 20


@attrs.frozen
class Layout:
    """One image of a layout: the digest of its manifest, and its layers' archives, the lowest first."""

    digest: str
    layers: tuple[tuple[Path, dict[str, Any]], ...] = attrs.field(repr=False)

    def load(self, scratch: Path) -> FileTree:
        """The files of all layers together. ``scratch`` must outlive the tree. Raises ImageError."""
        tree, allowance = FileTree(), Allowance()
        for path, descriptor in self.layers:
            _verify(path, descriptor)
            add_tar(tree, path, scratch, allowance, layer=True)
        return tree


def is_layout(directory: Path) -> bool:
    """Whether this directory is an OCI image layout."""
    return (directory / "oci-layout").is_file() and (directory / "index.json").is_file()


def open_layout(directory: Path) -> Layout:
    """The one linux/amd64 image of a layout, its manifest and configuration verified. Raises ImageError."""
    version = _object(_read(directory / "oci-layout"), "oci-layout").get("imageLayoutVersion")
    if not isinstance(version, str) or not version.startswith("1."):
        raise ImageError(f"OCI layout {directory}", expected="imageLayoutVersion 1", found=repr(version))
    index = _object(_read(directory / "index.json"), "index.json")
    descriptor = _choose(directory, index, _DEPTH)
    manifest = _json_blob(directory, descriptor)
    _check_architecture(_json_blob(directory, _descriptor(manifest.get("config"))))
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise ImageError("OCI manifest", expected=f"1 to {MAX_LAYERS} layers", found="something else")
    descriptors = [_descriptor(layer) for layer in layers]
    return Layout(descriptor["digest"], tuple((_blob(directory, layer), layer) for layer in descriptors))


def _choose(directory: Path, index: dict[str, Any], depth: int) -> dict[str, Any]:
    manifests = index.get("manifests")
    if not isinstance(manifests, list) or depth == 0:
        raise ImageError("OCI index", expected="manifests", found=type(manifests).__name__ if depth else "too deep")
    fitting = [entry for entry in map(_descriptor, manifests) if _fits(entry)]
    if len(fitting) != 1:
        raise ImageError("OCI index", expected="one image for linux/amd64", found=len(fitting))
    if fitting[0].get("mediaType") in _INDEXES:
        return _choose(directory, _json_blob(directory, fitting[0]), depth - 1)
    return fitting[0]


def _fits(descriptor: dict[str, Any]) -> bool:
    platform = descriptor.get("platform")
    if not isinstance(platform, dict):
        return True
    return (platform.get("os"), platform.get("architecture")) == ("linux", "amd64")


def _check_architecture(config: dict[str, Any]) -> None:
    found = f"{config.get('os')}/{config.get('architecture')}"
    if found != "linux/amd64":
        raise ImageError("OCI image", expected="linux/amd64", found=found)


def _descriptor(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        digest, size = value.get("digest"), value.get("size")
        if isinstance(digest, str) and _DIGEST.fullmatch(digest) and isinstance(size, int) and size >= 0:
            return value
    raise ImageError("OCI descriptor", expected="a sha256 or sha512 digest and a size", found=repr(value)[:200])


def _blob(directory: Path, descriptor: dict[str, Any]) -> Path:
    algorithm, _, digest = descriptor["digest"].partition(":")
    return Path(directory, "blobs", algorithm, digest)


def _json_blob(directory: Path, descriptor: dict[str, Any]) -> dict[str, Any]:
    path = _blob(directory, descriptor)
    data = _read(path)
    digest = hashlib.new(descriptor["digest"].partition(":")[0], data).hexdigest()
    _compare(descriptor, digest, len(data))
    return _object(data, str(path))


def _verify(path: Path, descriptor: dict[str, Any]) -> None:
    digest, size = hashlib.new(descriptor["digest"].partition(":")[0]), 0
    try:
        with path.open("rb") as stream:
            while size <= descriptor["size"] and (chunk := stream.read(_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ImageError(f"OCI blob {path}", expected="a readable file", found=error.strerror) from error
    _compare(descriptor, digest.hexdigest(), size)


def _compare(descriptor: dict[str, Any], digest: str, size: int) -> None:
    if size != descriptor["size"]:
        raise ImageError(f"OCI blob {descriptor['digest']}", expected=f"{descriptor['size']} bytes", found=size)
    if digest != descriptor["digest"].partition(":")[2]:
        raise ImageError("OCI blob", expected=descriptor["digest"], found=digest)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise ImageError(f"OCI layout file {path}", expected="a readable file", found=error.strerror) from error
    if len(data) > MAX_JSON:
        raise ImageError(f"OCI layout file {path}", expected=f"at most {MAX_JSON} bytes", found="more")
    return data


def _object(data: bytes, label: str) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except ValueError as error:
        raise ImageError(f"OCI {label}", expected="JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise ImageError(f"OCI {label}", expected="a JSON object", found=type(value).__name__)
    return value
