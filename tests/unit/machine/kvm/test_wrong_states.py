"""Device sections that are none, or another machine's: refused, without harm."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, RngConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from tests.support.device_rig import Rig, Saved

pytestmark = pytest.mark.anyio


@pytest.fixture
def small() -> DeviceConfig:
    return DeviceConfig(rng=RngConfig(), console=ConsoleConfig(ports=("data",)))


async def test_other_devices_than_those_saved_are_refused(small: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(small) as rig:
        saved = await rig.save(tmp_path / "saved")
        for other in (
            attrs.evolve(small, rng=None),
            attrs.evolve(small, balloon=BalloonConfig()),
            attrs.evolve(small, console=ConsoleConfig(ports=("other",))),
            attrs.evolve(small, console=ConsoleConfig()),
        ):
            with pytest.raises(SnapshotMismatch):
                await Rig(other, of=(rig, saved)).__aenter__()


@pytest.mark.parametrize("section", [b"", b"{", b"[]", b"null", b'"text"', b"7", b'{"rng":7,"console":{}}', b"\0" * 99])
async def test_a_section_that_is_none_is_refused(small: DeviceConfig, tmp_path: Path, section: bytes) -> None:
    async with Rig(small) as rig:
        saved = await rig.save(tmp_path / "saved")
        with pytest.raises((SnapshotDamaged, SnapshotMismatch)):
            await Rig(small, of=(rig, attrs.evolve(saved, section=section))).__aenter__()


NONSENSE: tuple[Any, ...] = (None, -1, 1 << 63, "x", [], {}, True)


async def test_no_value_of_a_section_does_harm(config: DeviceConfig, tmp_path: Path) -> None:
    """Each value in turn is replaced by nonsense: the section is refused, or the devices bear it."""
    async with Rig(config) as rig:
        saved = await rig.save(tmp_path / "saved")
        plain = json.loads(saved.section)
        for index, place in enumerate(places(plain)):
            for value in NONSENSE[index % 3 :: 3]:
                await bear(rig, saved, replaced(plain, place, value))


async def bear(rig: Rig, saved: Saved, plain: Any) -> None:
    again = Rig(rig.config, of=(rig, attrs.evolve(saved, section=json.dumps(plain).encode())))
    try:
        await again.__aenter__()
    except (SnapshotDamaged, SnapshotMismatch):
        return
    again.devices.unhold()
    await anyio.sleep(0.001)
    await again.__aexit__(None, None, None)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


def replaced(plain: Any, path: tuple[Any, ...], value: Any) -> Any:
    twin = copy.deepcopy(plain)
    at = twin
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return twin
