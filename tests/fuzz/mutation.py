"""Saved states that were tampered with."""

from __future__ import annotations

import copy
from typing import Any

from tests.fuzz.script import Script

_NONSENSE: tuple[Any, ...] = (
    None,
    -1,
    1 << 64,
    (1 << 32) - 1,
    0x55,
    True,
    1.5,
    "",
    "zz",
    "00" * 4096,
    [],
    {},
    [[]],
    [None],
    {"": 0},
    ["ff"],
)


def mutate(state: Any, script: Script) -> Any:
    """It, with a few values replaced, or left out."""
    for _ in range(1 + script.byte() % 3):
        places = list(_places(state))
        if not places:
            break
        container, key = places[script.number(2) % len(places)]
        kind = script.byte()
        if kind < 0x20:
            del container[key]
        else:
            container[key] = copy.deepcopy(_NONSENSE[kind % len(_NONSENSE)]) if kind < 0xC0 else script.number(4)
    return state


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)
