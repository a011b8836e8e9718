from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.x86.cpu_features import WORDS, feature_names, feature_words, model_of, vendor_of
from asyncvmm.x86.cpuid import CpuidEntry

LEAF_1_ECX, LEAF_7_EBX = (0x1, 0, "ecx"), (0x7, 0, "ebx")


def leaf(function: int, **registers: int) -> CpuidEntry:
    return CpuidEntry(function, **registers)


@pytest.mark.parametrize(
    ("word", "bit", "name"),
    [
        (LEAF_1_ECX, 0, "pni"),
        (LEAF_1_ECX, 26, "xsave"),
        (LEAF_1_ECX, 30, "rdrand"),
        ((0x1, 0, "edx"), 26, "sse2"),
        (LEAF_7_EBX, 5, "avx2"),
        (LEAF_7_EBX, 16, "avx512f"),
        (LEAF_7_EBX, 31, "avx512vl"),
        ((0x7, 0, "ecx"), 22, "rdpid"),
        ((0x7, 0, "edx"), 24, "amx_tile"),
        ((0x7, 0, "edx"), 29, "arch_capabilities"),
        ((0x80000001, 0, "edx"), 29, "lm"),
        ((0x80000001, 0, "edx"), 27, "rdtscp"),
        ((0x80000001, 0, "ecx"), 5, "abm"),
        ((0x40000001, 0, "eax"), 24, "kvm_clocksource_stable"),
        ((0xD, 0, "eax"), 18, "xtiledata"),
    ],
)
def test_bits_have_the_names_that_the_manuals_give_them(word: tuple[int, int, str], bit: int, name: str) -> None:
    assert feature_names(word, 1 << bit) == [name]


@given(st.sampled_from(WORDS), st.integers(0, 0xFFFFFFFF))
def test_every_bit_has_one_name(word: tuple[int, int, str], bits: int) -> None:
    names = feature_names(word, bits)
    assert len(set(names)) == bits.bit_count()


def test_the_names_of_leaf_1_are_those_of_this_hosts_kernel() -> None:
    flags = set(re.findall(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    named = set(feature_names(LEAF_1_ECX, 0xFFFFFFFF)) | set(feature_names((0x1, 0, "edx"), 0xFFFFFFFF))
    assert {"sse2", "cx8", "apic", "fxsr"} <= flags & named


def test_only_words_that_are_there_are_compared() -> None:
    assert feature_words([leaf(0x1, ecx=1 << 26)]) == {LEAF_1_ECX: 1 << 26, (0x1, 0, "edx"): 0}
    assert feature_words([]) == {}


def test_what_the_guest_or_the_machine_decides_is_no_feature() -> None:
    osxsave, deadline, x2apic, hypervisor = 1 << 27, 1 << 24, 1 << 21, 1 << 31
    assert feature_words([leaf(0x1, ecx=osxsave | deadline | x2apic | hypervisor, edx=1 << 28)]) == {
        LEAF_1_ECX: 0,
        (0x1, 0, "edx"): 0,
    }


def test_the_vendor_is_spelled_by_three_registers() -> None:
    assert vendor_of([leaf(0, ebx=0x756E6547, edx=0x49656E69, ecx=0x6C65746E)]) == "GenuineIntel"
    assert vendor_of([]) == ""


@pytest.mark.parametrize(
    ("signature", "model"),
    [(0x000306C3, (6, 0x3C, 3)), (0x00800F12, (0x17, 0x01, 2)), (0x00000543, (5, 4, 3)), (0, (0, 0, 0))],
    ids=["Haswell", "Zen", "Pentium", "nothing"],
)
def test_family_model_and_stepping_take_the_extended_bits_in(signature: int, model: tuple[int, int, int]) -> None:
    assert model_of([leaf(0x1, eax=signature)]) == model
