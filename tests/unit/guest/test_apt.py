from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.guest.apt import Package, first_dependency, parse_package

STANZA = """\
Package: linux-image-cloud-amd64
Version: 6.1.1-1
Depends: kmod, linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)
Description: a kernel
 Version: not a field, a line of the description
SHA256: abcd

Package: linux-image-cloud-amd64
Version: 5
SHA256: ef
"""


def test_the_first_stanza_names_the_package() -> None:
    package = parse_package(STANZA)
    assert package is not None
    assert (package.name, package.version, package.sha256) == ("linux-image-cloud-amd64", "6.1.1-1", "abcd")


def test_a_meta_package_leads_to_the_concrete_kernel() -> None:
    package = parse_package(STANZA)
    assert package is not None
    assert first_dependency(package, "linux-image-") == "linux-image-6.1.0-1-cloud-amd64"


def test_a_package_without_such_a_dependency_leads_nowhere() -> None:
    assert first_dependency(Package("a", "1", "00", "libc6 (>= 2), kmod | x"), "linux-image-") is None


def test_output_without_a_package_is_none() -> None:
    assert parse_package("") is None
    assert parse_package("Package: a\nVersion: 1\n") is None


@given(st.text())
def test_any_text_parses_or_is_none(text: str) -> None:
    parse_package(text)
