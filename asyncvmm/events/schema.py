"""The JSON Schema (draft 2020-12) of every event line, as shipped in the package."""

from __future__ import annotations

from importlib import resources
from typing import Any, cast

import orjson


def schema_text() -> str:
    """The schema file as it stands."""
    return resources.files("asyncvmm.events").joinpath("schema.json").read_text("utf-8")


def schema() -> dict[str, Any]:
    """The schema, parsed. Each call gives a fresh dict."""
    return cast("dict[str, Any]", orjson.loads(schema_text()))
