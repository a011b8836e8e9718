"""What tests in several folders stand on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is full after half a MiB. Needs ``root`` and ``mount-namespaces``."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)
