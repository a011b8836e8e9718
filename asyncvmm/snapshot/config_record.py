"""A VMConfig as plain values, and back: what a snapshot keeps of how its VM was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import attrs

from asyncvmm.config import VMConfig
from asyncvmm.errors import ConfigError, SnapshotDamaged


def to_plain(config: VMConfig) -> dict[str, Any]:
    """The configuration as dicts, lists, text and numbers."""
    return attrs.asdict(config, value_serializer=_plain)


def _plain(_: object, __: object, value: Any) -> Any:
    return str(value) if isinstance(value, Path | IPv4Address | IPv4Interface) else value


def from_plain(plain: object) -> VMConfig:
    """The configuration that was saved. Raises SnapshotDamaged for what is none."""
    names = {field.name for field in attrs.fields(VMConfig)}
    if not isinstance(plain, Mapping) or not names >= set(plain):
        raise SnapshotDamaged("saved configuration", expected="the fields of a VMConfig", found=repr(plain)[:200])
    try:
        return VMConfig(**{name: _FIELDS.get(name, _same)(value) for name, value in plain.items()})
    except (ConfigError, TypeError, AttributeError) as error:
        raise SnapshotDamaged("saved configuration", expected="a VMConfig's values", found=str(error)[:200]) from error


def _same(value: Any) -> Any:
    return value


def _record(kind: str) -> Callable[[Any], Any]:
    def build(value: Any) -> Any:
        if value is None:
            return None
        from asyncvmm import device_config

        return getattr(device_config, kind)(**value)

    return build


def _drives(value: Any) -> Any:
    return [_record("DriveConfig")(drive) for drive in value]


def _net(value: Any) -> Any:
    if value is None:
        return None
    return _record("NetConfig")({**value, "publish": [_record("Publish")(entry) for entry in value.get("publish", ())]})


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "drives": _drives,
    "net": _net,
    "balloon": _record("BalloonConfig"),
    "vsock": _record("VsockConfig"),
    "rng": _record("RngConfig"),
    "virtio_console": _record("ConsoleConfig"),
}
