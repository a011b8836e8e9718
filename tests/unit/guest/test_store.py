from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from asyncvmm.errors import ImageError
from asyncvmm.guest import store


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path))
    return tmp_path / "images"


def _publish(name: str, key: str, kernel: bytes = b"kernel") -> store.Image:
    outputs = {store.KERNEL: {"size": len(kernel)}, store.INITRD: {"size": 6}}
    manifest = orjson.dumps({"format": store.FORMAT, "key": key, "outputs": outputs})
    with store.locked() as images:
        files = {store.KERNEL: kernel, store.INITRD: b"initrd", store.MANIFEST: manifest}
        return store.publish(images, name, key, files)


def test_a_published_image_is_found_by_name() -> None:
    published = _publish("default", "k1")
    assert store.find_image("default") == published
    assert published.kernel.read_bytes() == b"kernel"


def test_a_name_can_come_to_mean_a_newer_image_while_the_old_one_is_in_use() -> None:
    old = _publish("default", "k1")
    new = _publish("default", "k2", b"newer kernel")
    assert store.find_image("default") == new
    assert old.kernel.read_bytes() == b"kernel"


def test_images_are_listed_by_name_and_damaged_ones_are_left_out() -> None:
    _publish("b", "k1")
    _publish("a", "k2")
    _publish("broken", "k3").kernel.write_bytes(b"")
    assert [image.name for image in store.list_images()] == ["a", "b"]


def test_no_store_is_an_empty_list() -> None:
    assert store.list_images() == []


def test_an_unknown_image_names_the_command_that_builds_it() -> None:
    with pytest.raises(ImageError, match="asyncvmm image build"):
        store.find_image("default")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a.b", "-x", "x" * 65, "a\n"])
def test_a_name_that_could_leave_the_store_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match="image name"):
        store.find_image(name)


def test_a_truncated_file_is_reported_with_both_sizes() -> None:
    _publish("default", "k1").kernel.write_bytes(b"ker")
    with pytest.raises(ImageError, match="expected 6 bytes, found 3 bytes"):
        store.find_image("default")


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b'{"format":1,"outputs":{}}', b"\xff", b"null"])
def test_a_damaged_manifest_is_refused(manifest: bytes) -> None:
    (_publish("default", "k1").directory / store.MANIFEST).write_bytes(manifest)
    with pytest.raises(ImageError, match="damaged image file"):
        store.find_image("default")


def test_a_manifest_of_another_format_is_refused() -> None:
    image = _publish("default", "k1")
    (image.directory / store.MANIFEST).write_bytes(orjson.dumps({**image.manifest, "format": 99}))
    with pytest.raises(ImageError, match="format 99"):
        store.find_image("default")


def test_what_a_killed_builder_left_is_removed(images: Path) -> None:
    (images / ".new-dead").mkdir(parents=True)
    (images / ".new-dead" / "vmlinuz").write_bytes(b"half")
    _publish("default", "k1")
    assert sorted(path.name for path in images.iterdir()) == [".built", ".lock", "default"]


def test_a_damaged_image_is_not_taken_for_built() -> None:
    _publish("default", "k1").initrd.unlink()
    assert store.built("default", "k1") is None


def test_a_store_that_cannot_be_written_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path / "file"))
    with pytest.raises(ImageError, match="image store"), store.locked():
        pass


def test_home_is_the_caller_s_then_the_cache_then_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert store.home() == Path(os.environ["ASYNCVMM_HOME"])
    monkeypatch.delenv("ASYNCVMM_HOME")
    assert store.home() == Path("/xdg/asyncvmm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.home() == Path.home() / ".cache/asyncvmm"
