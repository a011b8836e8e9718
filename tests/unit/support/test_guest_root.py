"""The root file system that guests in the lab boot from; building it here is also what puts it there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guest_root import PAGE, guest_root

pytestmark = pytest.mark.requires("musl-gcc", "e2fsprogs", "busybox")


def test_the_root_is_a_whole_ext4_with_the_page_in_it(tmp_path: Path) -> None:
    image = guest_root(tmp_path)
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True, timeout=60)
    said = subprocess.run(["debugfs", "-R", "cat /www/page", image], check=True, capture_output=True, timeout=60)
    assert said.stdout == PAGE


def test_each_test_has_a_copy_of_its_own(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        image = guest_root(tmp_path / name)
        assert bytes(4) != image.read_bytes()[1024:1028]
        image.write_bytes(bytes(1 << 20))
