"""Extras: libraries that only some exports need, asked for when they are."""

from __future__ import annotations

import importlib.util

from asyncvmm.errors import HostError


def need(what: str, module: str, extra: str) -> None:
    """See that ``module`` can be imported. Raises HostError naming the extra of asyncvmm that brings it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that holds it
        found = False
    if not found:
        expected = f"the library {module} (pip install 'asyncvmm[{extra}]')"
        raise HostError(what, expected=expected, found="none")
