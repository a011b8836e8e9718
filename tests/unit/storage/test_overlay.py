from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.device_config import DriveConfig
from asyncvmm.errors import DriveBusy, DriveError, ImageError
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.storage.image import Image
from asyncvmm.storage.opening import open_image
from asyncvmm.storage.overlay import Overlay, make_overlay
from asyncvmm.storage.overlay_file import MAP_AT, OverlayHeader, header_for, parse_header
from asyncvmm.storage.qcow2 import base_of, empty_overlay
from tests.support.scarcity import descriptors_left

PATTERN = os.urandom(1 << 20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(PATTERN)
    return path


def opened(base: Path, overlay: Overlay) -> Image:
    return open_image(DriveConfig(path=base, overlay=True), overlay)


def test_a_clone_begins_as_its_base_and_leaves_it_alone(base: Path, tmp_path: Path) -> None:
    image = opened(base, make_overlay(base, None, directory=tmp_path))
    assert image.size == len(PATTERN)
    assert image.read(0, len(PATTERN)) == PATTERN
    image.write(512, [b"mine" * 1024])
    image.flush()
    assert image.read(0, 8192) == PATTERN[:512] + b"mine" * 1024 + PATTERN[4608:8192]
    image.close()
    assert base.read_bytes() == PATTERN


def test_clones_do_not_see_each_other(base: Path, tmp_path: Path) -> None:
    images = [opened(base, make_overlay(base, None, directory=tmp_path)) for _ in range(5)]
    for number, image in enumerate(images):
        image.write(4096, [bytes([number]) * 4096])
    for number, image in enumerate(images):
        assert image.read(4096, 4096) == bytes([number]) * 4096
        image.close()


def test_a_clone_without_a_path_never_has_a_name(base: Path, tmp_path: Path) -> None:
    overlay = make_overlay(base, None, directory=tmp_path)
    assert os.listdir(tmp_path) == ["base.img"]
    before = len(os.listdir("/proc/self/fd"))
    overlay.remove()
    overlay.remove()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_clone_takes_space_for_what_it_has_written_alone(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    image = opened(base, make_overlay(base, target))
    image.write(0, [b"x" * 4096])
    image.close()
    assert target.stat().st_blocks * 512 <= 64 << 10


def test_a_clone_with_a_path_is_kept(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    for number in range(3):
        overlay = make_overlay(base, target)
        assert (overlay.how == "kept") is (number > 0)
        image = opened(base, overlay)
        assert image.read(number * 8192, 8192) == PATTERN[number * 8192 : (number + 1) * 8192]
        image.write(number * 8192, [bytes([number]) * 8192])
        image.close()
        overlay.remove()
    image = opened(base, make_overlay(base, target))
    assert image.read(0, 3 * 8192) == bytes(8192) + b"\1" * 8192 + b"\2" * 8192
    image.close()


def test_what_was_flushed_survives_without_an_orderly_end(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    image = opened(base, make_overlay(base, target))
    image.write(0, [b"a" * 8192])
    image.flush()
    image.write(8192, [b"b" * 8192])
    copy = tmp_path / "as-after-a-crash.img"
    copy.write_bytes(target.read_bytes())
    image.close()
    image = opened(base, make_overlay(base, copy))
    assert image.read(0, 16384) in (b"a" * 8192 + PATTERN[8192:16384], b"a" * 8192 + b"b" * 8192)
    image.close()


def test_a_write_through_is_kept_without_a_flush(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    image = opened(base, make_overlay(base, target))
    image.write(4096, [b"s" * 4096], sync=True)
    copy = tmp_path / "as-after-a-crash.img"
    copy.write_bytes(target.read_bytes())
    image.close()
    image = opened(base, make_overlay(base, copy))
    assert image.read(4096, 4096) == b"s" * 4096
    image.close()


def test_a_base_that_is_read_by_clones_is_not_written(base: Path, tmp_path: Path) -> None:
    overlay = make_overlay(base, tmp_path / "clone.img")
    image = opened(base, overlay)
    if overlay.format == "mapped":
        with pytest.raises(DriveBusy, match=r"base\.img in use"):
            open_image(DriveConfig(path=base))
    image.close()


def test_a_base_that_is_written_is_not_cloned(base: Path, tmp_path: Path) -> None:
    writer = open_image(DriveConfig(path=base))
    with pytest.raises(DriveBusy, match=r"base\.img in use"):
        make_overlay(base, tmp_path / "clone.img")
    assert os.listdir(tmp_path) == ["base.img"]
    writer.close()


def test_one_overlay_serves_one_vm(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    image = opened(base, make_overlay(base, target))
    with pytest.raises(DriveBusy, match=r"clone\.img in use"):
        opened(base, make_overlay(base, target))
    image.close()


def test_direct_overlays_work_alike(base: Path, tmp_path: Path) -> None:
    image = open_image(DriveConfig(path=base, overlay=True, cache="none"), make_overlay(base, None, directory=tmp_path))
    image.write(512, [b"d" * 1024])
    assert image.read(0, 4096) == PATTERN[:512] + b"d" * 1024 + PATTERN[1536:4096]
    image.close()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_base_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DriveError, match=r"nothing\.img \(No such file"):
        make_overlay(tmp_path / "nothing.img", None)


def test_a_base_without_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.img").touch()
    with pytest.raises(ImageError, match=r"not empty, found .*empty\.img"):
        make_overlay(tmp_path / "empty.img", None)


def test_a_target_in_no_directory_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveError, match=r"missing/clone\.img \(No such file"):
        make_overlay(base, tmp_path / "missing" / "clone.img")


@pytest.mark.parametrize("content", [b"", b"my thesis", PATTERN + b"more", b"asyncvmm-overlay" + bytes(9000)])
@pytest.mark.parametrize("for_qemu", [True, False])
def test_a_file_that_is_no_overlay_of_the_base_is_left_alone(
    base: Path, tmp_path: Path, content: bytes, for_qemu: bool
) -> None:
    target = tmp_path / "precious"
    target.write_bytes(content)
    with pytest.raises(ImageError, match="overlay"):
        make_overlay(base, target, for_qemu=for_qemu)
    assert target.read_bytes() == content


def test_the_base_is_no_overlay_of_itself(base: Path, tmp_path: Path) -> None:
    (tmp_path / "link").hardlink_to(base)
    (tmp_path / "symlink").symlink_to(base)
    for target in (base, tmp_path / "link", tmp_path / "symlink"):
        with pytest.raises(ImageError, match="a new file, or an overlay"):
            make_overlay(base, target)


def test_a_kept_overlay_does_not_fit_a_base_that_changed(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    if make_overlay(base, target).format != "mapped":
        return
    os.utime(base, ns=(1, 1))
    with pytest.raises(ImageError, match=r"changed 1\), found .*clone\.img"):
        make_overlay(base, target)


def mapped_overlay(base: Path, target: Path) -> OverlayHeader:
    """An overlay's file made by hand: the same on every file system."""
    header = header_for(base, base.stat().st_size)
    with target.open("wb") as file:
        file.write(header.pack())
        file.truncate(header.file_size)
    return header


def test_a_damaged_map_is_refused(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    mapped_overlay(base, target)
    with target.open("r+b") as file:
        file.seek(MAP_AT)
        file.write(b"\2")
    with pytest.raises(ImageError, match="a map of zeroes and ones"):
        opened(base, make_overlay(base, target))


def test_a_truncated_overlay_is_refused(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    header = mapped_overlay(base, target)
    os.truncate(target, header.file_size - 4096)
    with pytest.raises(ImageError, match=f"expected {header.file_size} bytes"):
        make_overlay(base, target)


def test_each_machine_refuses_the_others_overlays(base: Path, tmp_path: Path) -> None:
    mapped_overlay(base, tmp_path / "mapped")
    with pytest.raises(ImageError, match=r"the QEMU machine can use, found .*mapped \(mapped\)"):
        make_overlay(base, tmp_path / "mapped", for_qemu=True)
    if make_overlay(base, tmp_path / "qcow2", for_qemu=True).format == "qcow2":
        with pytest.raises(ImageError, match=r"the KVM machine can use, found .*qcow2 \(qcow2\)"):
            make_overlay(base, tmp_path / "qcow2")


@given(st.binary(max_size=64), st.integers(0, MAP_AT - 1))
def test_a_header_with_wrong_bytes_is_refused(wrong: bytes, place: int) -> None:
    header = OverlayHeader(size=1 << 20, mtime_ns=5, block=4096, base=b"/base")
    page = header.pack()
    assert parse_header(page) == header
    damaged = (page[:place] + wrong + page[place + len(wrong) :])[:MAP_AT]
    if damaged != page:
        with pytest.raises(ImageError):
            parse_header(damaged)


@given(st.integers(1, 1 << 44))
def test_a_header_says_what_it_was_told_whatever_the_size(size: int) -> None:
    header = header_for(Path("/dev/null"), size)
    assert parse_header(header.pack()) == header
    assert header.data_at <= 5 << 20
    assert header.data_at % 4096 == 0


# -- against a model ---------------------------------------------------------------------------------------------------

Step = tuple[str, int, int, int]
_STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "unmap", "flush", "reopen"]), st.integers(0, 120), st.integers(1, 30))
)


@settings(max_examples=80, deadline=None)
@given(_STEPS, st.booleans())
def test_an_overlay_is_what_a_bytearray_is(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]], direct: bool
) -> None:
    directory = tmp_path_factory.mktemp("model")
    base, target = directory / "base.img", directory / "clone.img"
    size = 120 * 512 + 100
    base.write_bytes(PATTERN[:size])
    model = bytearray(PATTERN[:size] + bytes(412))
    mapped_overlay(base, target)
    drive = DriveConfig(path=base, overlay=target, cache="none" if direct else "writeback")
    image = open_image(drive, make_overlay(base, target))
    for number, (action, sector, count) in enumerate(steps):
        start, end = sector * 512, min(len(model), (sector + count) * 512)
        if action == "write":
            model[start:end] = bytes([number & 255]) * (end - start)
            image.write(start, [bytes(model[start:end])])
        elif action in ("zero", "unmap"):
            model[start:end] = bytes(end - start)
            image.zero(start, end - start, unmap=action == "unmap")
        elif action == "flush":
            image.flush()
        else:
            image.close()
            image = open_image(drive, make_overlay(base, target))
        assert image.read(start, end - start) == model[start:end]
        room = bytearray(end - start)
        assert not image.read_now(start, [memoryview(room)]) or room == model[start:end]
    assert image.read(0, len(model)) == model
    image.close()
    assert base.read_bytes() == PATTERN[:size]


def test_discarding_frees_the_overlays_space_and_touches_nothing_else(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone.img"
    mapped_overlay(base, target)
    image = opened(base, make_overlay(base, target))
    image.write(0, [bytes(range(256)) * 256])
    image.flush()
    before = target.stat().st_blocks
    image.discard(0, 32768)
    assert target.stat().st_blocks < before
    assert image.read(32768, 32768) == bytes(range(256)) * 128
    assert image.read(65536, 4096) == PATTERN[65536 : 65536 + 4096]
    image.close()


# -- qcow2 -------------------------------------------------------------------------------------------------------------


def test_a_qcow2_overlay_names_its_base(base: Path) -> None:
    _, parts = empty_overlay(base, len(PATTERN))
    assert base_of(parts[0]) == (os.fsencode(base.resolve()), len(PATTERN))


@given(st.binary(max_size=300))
def test_what_is_no_qcow2_header_is_refused(noise: bytes) -> None:
    with pytest.raises(ImageError):
        base_of(b"QFI\xfb" + bytes(4) + bytes(8) + noise)
    with pytest.raises(ImageError):
        base_of(noise)


def test_a_base_that_is_too_large_for_qcow2_is_refused(base: Path) -> None:
    with pytest.raises(ImageError, match="at most 2 PiB"):
        empty_overlay(base, 1 << 60)


def test_a_temporary_overlay_for_qemu_is_removed(base: Path, tmp_path: Path) -> None:
    overlay = make_overlay(base, None, for_qemu=True, directory=tmp_path)
    assert overlay.path is not None
    assert overlay.path.exists()
    overlay.remove()
    overlay.remove()
    assert os.listdir(tmp_path) == ["base.img"]


@pytest.mark.requires("qemu")
@pytest.mark.parametrize("size", [512 * 1024 + 100, 1 << 30, 3 << 40])
def test_qemu_opens_and_writes_a_qcow2_overlay(tmp_path: Path, size: int) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"B" * 4096)
    os.truncate(base, size)
    overlay = make_overlay(base, tmp_path / "clone.qcow2", for_qemu=True)
    commands = ["read -P 0x42 0 4096", "write -P 0x43 512 512", "read -P 0x43 512 512"]
    done = subprocess.run(
        [
            *(find_qemu().path, "-M", "q35", "-m", "32", "-display", "none", "-nodefaults", "-monitor", "stdio", "-S"),
            *("-blockdev", f"driver=file,node-name=f,filename={overlay.path}"),
            *("-blockdev", f"driver={overlay.format},node-name=d,file=f"),
        ],
        input="".join(f'qemu-io d "{command}"\n' for command in commands) + "quit\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4096/4096 bytes at offset 0") == 1
    assert done.stdout.count("512/512 bytes at offset 512") == 2
    assert "failed" not in done.stdout
    with base.open("rb") as file:
        assert file.read(4096) == b"B" * 4096
    kept = make_overlay(base, tmp_path / "clone.qcow2", for_qemu=True)
    assert (kept.how, kept.format) == ("kept", overlay.format)


def test_an_overlay_that_finds_no_descriptor_leaves_none(base: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for count in itertools.count():
        try:
            with descriptors_left(count):
                overlay = make_overlay(base, None, directory=tmp_path)
        except DriveError:
            assert len(os.listdir("/proc/self/fd")) == before
        else:
            overlay.remove()
            break
    assert count
