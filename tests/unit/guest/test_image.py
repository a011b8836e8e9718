from __future__ import annotations

import threading
from pathlib import Path

import pytest

from asyncvmm.errors import ConfigError, ImageError, KernelError
from asyncvmm.guest import cpio
from asyncvmm.guest.image import Image, build_image, find_image
from asyncvmm.guest.sources import default_kernel

pytestmark = pytest.mark.requires("busybox")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(0x200))
    return path


def _build(home: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path) -> tuple[Image, list[str]]:
    monkeypatch.setenv("ASYNCVMM_HOME", str(home))
    said: list[str] = []
    return build_image("test", kernel=kernel, report=said.append), said


def _contents(image: Image) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in image.directory.iterdir()}


def test_two_builds_of_the_same_inputs_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path
) -> None:
    one, _ = _build(tmp_path / "one", monkeypatch, kernel)
    two, _ = _build(tmp_path / "two", monkeypatch, kernel)
    assert _contents(one) == _contents(two)


def test_a_second_build_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path) -> None:
    first, _ = _build(tmp_path, monkeypatch, kernel)
    before = first.initrd.stat()
    second, said = _build(tmp_path, monkeypatch, kernel)
    assert second == first == find_image("test")
    assert second.initrd.stat().st_ino == before.st_ino
    assert said == ["image test is up to date"]


def test_another_kernel_makes_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path) -> None:
    first, _ = _build(tmp_path, monkeypatch, kernel)
    kernel.write_bytes(kernel.read_bytes() + b"more")
    second, _ = _build(tmp_path, monkeypatch, kernel)
    assert second.directory != first.directory
    assert second.kernel.read_bytes().endswith(b"more")


def test_a_damaged_image_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path) -> None:
    first, _ = _build(tmp_path, monkeypatch, kernel)
    whole = _contents(first)
    first.initrd.write_bytes(b"")
    second, _ = _build(tmp_path, monkeypatch, kernel)
    assert _contents(second) == whole


def test_the_initramfs_has_pid_1_a_shell_and_a_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path
) -> None:
    image, _ = _build(tmp_path, monkeypatch, kernel)
    entries = {entry.name: entry for entry in cpio.read(image.initrd.read_bytes())}
    assert entries["init"].data[:4] == b"\x7fELF"
    assert entries["bin/sh"].data == b"/bin/busybox"
    assert entries["dev/console"].rdev == (5, 1)


def test_concurrent_builders_end_with_one_whole_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path
) -> None:
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path))
    images: list[Image] = []
    builders = [threading.Thread(target=lambda: images.append(build_image("test", kernel=kernel))) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert images == [find_image("test")] * 4


def test_a_kernel_that_is_none_is_refused_and_leaves_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path
) -> None:
    kernel.write_text("not a kernel")
    with pytest.raises(KernelError):
        _build(tmp_path, monkeypatch, kernel)
    with pytest.raises(ImageError):
        find_image("test")


def test_modules_without_a_kernel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modules"):
        build_image("test", modules=tmp_path)


@pytest.mark.requires("no-host-kernel")
def test_without_apt_and_without_a_host_kernel_the_error_names_all_that_was_tried() -> None:
    with pytest.raises(ImageError, match=r"apt-get.*; .*/boot/vmlinuz-"):
        default_kernel(None, print)
