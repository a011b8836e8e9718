from __future__ import annotations

import contextlib
import gzip
import lzma
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ImageError
from asyncvmm.guest.modinfo import parse_modinfo
from asyncvmm.guest.modules import collect_modules, modules_list


def module(**modinfo: str) -> bytes:
    """A kernel module with nothing but the given ``.modinfo`` strings."""
    strings = b"".join(f"{key}={value}".encode() + b"\0" for key, value in modinfo.items())
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(strings) + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64) + _section(1, 64, len(strings)) + _section(10, 64 + len(strings), len(names))
    return header + strings + names + sections


def _section(name: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)


def _order(directory: Path) -> list[str]:
    return modules_list(collect_modules(directory)).splitlines()


def test_a_module_comes_behind_what_it_depends_on(tmp_path: Path) -> None:
    (tmp_path / "virtio_mmio.ko").write_bytes(module(depends="virtio,virtio_ring"))
    (tmp_path / "virtio.ko").write_bytes(module(depends="virtio_ring"))
    (tmp_path / "virtio_ring.ko").write_bytes(module(depends=""))
    assert _order(tmp_path) == ["virtio_ring.ko mmio", "virtio.ko mmio", "virtio_mmio.ko mmio"]


def test_a_dependency_is_loaded_for_the_devices_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "virtio_net.ko").write_bytes(module(depends="common"))
    (tmp_path / "virtio_blk.ko").write_bytes(module(depends="common"))
    (tmp_path / "common.ko").write_bytes(module())
    assert _order(tmp_path) == ["common.ko 2", "virtio_blk.ko 2", "common.ko 1", "virtio_net.ko 1"]


def test_each_transport_comes_with_all_it_needs(tmp_path: Path) -> None:
    (tmp_path / "virtio_mmio.ko").write_bytes(module(depends="virtio"))
    (tmp_path / "virtio_pci.ko").write_bytes(module(depends="virtio"))
    (tmp_path / "virtio.ko").write_bytes(module())
    assert _order(tmp_path) == ["virtio.ko mmio", "virtio_mmio.ko mmio", "virtio.ko pci", "virtio_pci.ko pci"]


def test_a_file_system_is_loaded_for_the_root_that_is_made_of_it(tmp_path: Path) -> None:
    (tmp_path / "erofs.ko").write_bytes(module(depends="libcrc32c"))
    (tmp_path / "libcrc32c.ko").write_bytes(module())
    (tmp_path / "overlay.ko").write_bytes(module())
    assert _order(tmp_path) == ["libcrc32c.ko erofs", "erofs.ko erofs", "overlay.ko overlay"]


def test_what_is_not_there_counts_as_built_in(tmp_path: Path) -> None:
    (tmp_path / "virtio_blk.ko").write_bytes(module(depends="virtio"))
    assert _order(tmp_path) == ["virtio_blk.ko 2"]


def test_a_dash_in_a_file_name_is_an_underscore_in_a_module_name(tmp_path: Path) -> None:
    (tmp_path / "virtio-rng.ko").write_bytes(module(name="virtio_rng"))
    assert _order(tmp_path) == ["virtio_rng.ko 4"]


def test_compressed_modules_are_shipped_unpacked(tmp_path: Path) -> None:
    (tmp_path / "virtio_mmio.ko.xz").write_bytes(lzma.compress(module(depends="virtio")))
    (tmp_path / "virtio.ko.gz").write_bytes(gzip.compress(module(name="virtio")))
    assert [m.data for m in collect_modules(tmp_path)] == [module(name="virtio"), module(depends="virtio")]


def test_a_damaged_compressed_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "virtio_mmio.ko.xz").write_bytes(lzma.compress(module())[:-10])
    with pytest.raises(ImageError, match="readable module"):
        collect_modules(tmp_path)


def test_a_circle_of_dependencies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "virtio_mmio.ko").write_bytes(module(depends="virtio"))
    (tmp_path / "virtio.ko").write_bytes(module(depends="virtio_mmio"))
    with pytest.raises(ImageError, match="circle"):
        collect_modules(tmp_path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="directory"):
        collect_modules(tmp_path / "none")


def test_modinfo_strings_are_read_by_key() -> None:
    assert parse_modinfo(module(depends="a,b", license="GPL")) == {"depends": "a,b", "license": "GPL"}


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_as_a_module(data: bytes) -> None:
    with pytest.raises(ImageError):
        parse_modinfo(data)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_damaged_module_parses_or_is_refused_with_a_typed_error(at: int, patch: bytes) -> None:
    damaged = bytearray(module(depends="virtio"))
    damaged[at : at + len(patch)] = patch
    with contextlib.suppress(ImageError):
        parse_modinfo(bytes(damaged))
