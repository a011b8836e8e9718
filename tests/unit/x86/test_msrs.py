from __future__ import annotations

from asyncvmm.x86.msrs import boot_msrs


def test_memory_is_write_back_by_default_and_fixed_ranges_are_off() -> None:
    assert dict(boot_msrs())[0x2FF] == 0x806


def test_fast_strings_are_on() -> None:
    assert dict(boot_msrs())[0x1A0] == 1


def test_no_register_is_named_twice() -> None:
    assert len(dict(boot_msrs())) == len(boot_msrs())
