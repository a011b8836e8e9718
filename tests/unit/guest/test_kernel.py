from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import KernelError
from asyncvmm.guest.kernel import is_bzimage, is_vmlinux, kernel_release, read_kernel
from asyncvmm.guest.sources import is_static


def _bzimage(version: bytes) -> bytes:
    image = bytearray(0x400)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x100).to_bytes(2, "little")
    image[0x300 : 0x300 + len(version)] = version
    return bytes(image)


def test_a_bzimage_names_its_release() -> None:
    assert kernel_release(_bzimage(b"6.1.0-1-cloud-amd64 (debian) #1 SMP\0")) == "6.1.0-1-cloud-amd64"


def test_a_text_file_is_refused_as_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_text("hello")
    with pytest.raises(KernelError, match="a bzImage or an x86-64 ELF vmlinux, found b'hello'"):
        read_kernel(path)


def test_a_missing_kernel_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="No such file"):
        read_kernel(tmp_path / "none")


@given(st.binary(max_size=0x400))
def test_any_bytes_can_be_looked_at(data: bytes) -> None:
    assert not (is_bzimage(data) and is_vmlinux(data))
    kernel_release(data)
    is_static(data)


def test_our_pid_1_is_a_static_program() -> None:
    from importlib.resources import files

    assert is_static(files("asyncvmm.guest").joinpath("init.bin").read_bytes())
