"""Smaller limits for a module, so that a short script comes up against them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def lowered(module: ModuleType, **limits: int) -> Iterator[None]:
    """Its constants have these values meanwhile."""
    before = {name: getattr(module, name) for name in limits}
    try:
        for name, value in limits.items():
            assert value < before[name]
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
