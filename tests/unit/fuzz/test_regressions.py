"""Every script that once found something, and others that lead far into a device, played again without a fuzzer."""

from __future__ import annotations

import pytest

from tests.fuzz.inputs import TARGETS, load, saved


@pytest.mark.parametrize("name", TARGETS)
def test_a_device_withstands_every_script_that_was_kept(name: str) -> None:
    run = load(name)
    scripts = saved(name)
    assert scripts, "no scripts are kept for it"
    for script in scripts:
        run(script)
