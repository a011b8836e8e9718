from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree
from asyncvmm.guest.oci import MAX_JSON, is_layout, open_layout
from asyncvmm.guest.rootfs import Rootfs, build_root, open_source

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def _tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class LayoutMaker:
    """Writes an OCI layout; ``change`` gets the manifest before it is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs" / "sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.directory / "blobs" / "sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def json(self, value: object, media_type: str = MANIFEST) -> dict[str, Any]:
        return {"mediaType": media_type, **self.blob(orjson.dumps(value))}

    def image(self, *layers: bytes, architecture: str = "amd64", **changes: Any) -> dict[str, Any]:
        config = self.json({"os": "linux", "architecture": architecture})
        manifest = {"schemaVersion": 2, "config": config, "layers": [self.blob(layer) for layer in layers]}
        return self.json({**manifest, **changes})

    def index(self, *descriptors: dict[str, Any]) -> Path:
        (self.directory / "index.json").write_bytes(orjson.dumps({"schemaVersion": 2, "manifests": descriptors}))
        return self.directory


@pytest.fixture
def maker(tmp_path: Path) -> LayoutMaker:
    return LayoutMaker(tmp_path / "layout")


def _load(layout: Path, tmp_path: Path) -> FileTree:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return open_layout(layout).load(tmp_path / "scratch")


def _names(tree: FileTree) -> list[str]:
    return [name for name, _ in tree.walk()]


def test_layers_are_laid_one_over_the_other(maker: LayoutMaker, tmp_path: Path) -> None:
    layout = maker.index(maker.image(gzip.compress(_tar(a=b"1", b=b"2")), _tar(**{".wh.a": b"", "c": b"3"})))
    assert is_layout(layout)
    assert _names(_load(layout, tmp_path)) == ["b", "c"]


def test_an_index_in_an_index_leads_to_the_image_for_this_machine(maker: LayoutMaker, tmp_path: Path) -> None:
    here = {**maker.image(_tar(here=b"")), "platform": {"os": "linux", "architecture": "amd64"}}
    there = {**maker.image(_tar(there=b"")), "platform": {"os": "linux", "architecture": "arm64"}}
    unknown = {**maker.image(_tar(proof=b"")), "platform": {"os": "unknown", "architecture": "unknown"}}
    layout = maker.index(maker.json({"manifests": [there, here, unknown]}, INDEX))
    assert _names(_load(layout, tmp_path)) == ["here"]
    assert open_layout(layout).digest == here["digest"]


@pytest.mark.requires("e2fsprogs")
def test_a_layout_becomes_a_root_file_system(maker: LayoutMaker, tmp_path: Path) -> None:
    layers = (_tar(**{"etc/motd": b"lower", "etc/gone": b""}), _tar(**{"etc/motd": b"upper", "etc/.wh.gone": b""}))
    rootfs = Rootfs(maker.index(maker.image(*map(gzip.compress, layers))))
    source = open_source(rootfs)
    assert source.identity["source"] == "oci"
    image = build_root(rootfs, source, tmp_path, lambda _: None)
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    said = [_debugfs(image, request) for request in ("cat /etc/motd", "ls -p /etc")]
    assert said[0] == "upper"
    assert "gone" not in said[1]


def _debugfs(image: Path, request: str) -> str:
    return subprocess.run(["debugfs", "-R", request, image], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("count", [0, 2])
def test_no_image_or_several_are_refused(maker: LayoutMaker, count: int) -> None:
    layout = maker.index(*[maker.image(_tar(a=bytes(number))) for number in range(count)])
    with pytest.raises(ImageError, match=f"one image for linux/amd64, found {count}"):
        open_layout(layout)


def test_an_image_for_another_machine_is_refused(maker: LayoutMaker) -> None:
    with pytest.raises(ImageError, match="found linux/arm64"):
        open_layout(maker.index(maker.image(_tar(a=b""), architecture="arm64")))


def test_a_layer_of_another_digest_is_refused(maker: LayoutMaker, tmp_path: Path) -> None:
    layer = _tar(a=b"1")
    layout = maker.index(maker.image(layer))
    path = maker.directory / "blobs/sha256" / hashlib.sha256(layer).hexdigest()
    path.write_bytes(layer[:-1] + b"x")
    with pytest.raises(ImageError, match="expected sha256:"):
        _load(layout, tmp_path)
    path.write_bytes(layer + b"x")
    with pytest.raises(ImageError, match=f"expected {len(layer)} bytes"):
        _load(layout, tmp_path)
    path.unlink()
    with pytest.raises(ImageError, match="readable file"):
        _load(layout, tmp_path)


def test_a_manifest_of_another_digest_is_refused(maker: LayoutMaker) -> None:
    descriptor = maker.image(_tar(a=b"1"))
    path = maker.directory / "blobs/sha256" / descriptor["digest"].partition(":")[2]
    path.write_bytes(path.read_bytes().replace(b"schemaVersion", b"schemaversion"))
    with pytest.raises(ImageError, match="expected sha256:"):
        open_layout(maker.index(descriptor))


@pytest.mark.parametrize(
    "digest", ["sha256:../../../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "A" * 64, "", 7, None, "sha512:00"]
)
def test_a_digest_that_could_lead_elsewhere_is_refused(maker: LayoutMaker, digest: object) -> None:
    with pytest.raises(ImageError, match="descriptor"):
        open_layout(maker.index({"mediaType": MANIFEST, "digest": digest, "size": 1}))


@pytest.mark.parametrize("layers", [[], None, "x", [{}], [{"digest": "sha256:" + "0" * 64, "size": -1}], [7]])
def test_a_manifest_without_proper_layers_is_refused(maker: LayoutMaker, layers: object) -> None:
    with pytest.raises(ImageError):
        open_layout(maker.index(maker.image(layers=layers)))


def test_indexes_without_end_are_refused(maker: LayoutMaker) -> None:
    descriptor = maker.image(_tar(a=b""))
    for _ in range(10):
        descriptor = maker.json({"manifests": [descriptor]}, INDEX)
    with pytest.raises(ImageError, match="too deep"):
        open_layout(maker.index(descriptor))


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / "index.json").write_text("[]"),
        lambda directory: (directory / "index.json").write_text('{"manifests": 5}'),
        lambda directory: (directory / "index.json").write_bytes(b" " * (MAX_JSON + 1)),
        lambda directory: (directory / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}'),
        lambda directory: (directory / "oci-layout").write_text("{}"),
        lambda directory: (directory / "oci-layout").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_layout_is_refused(maker: LayoutMaker, damage: Callable[[Path], object]) -> None:
    layout = maker.index(maker.image(_tar(a=b"")))
    damage(layout)
    with pytest.raises(ImageError):
        open_layout(layout)
