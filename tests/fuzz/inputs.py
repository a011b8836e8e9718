"""Scripts worth playing again: one hex line each in inputs/TARGET.txt; ``#`` lines say what they are for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

TARGETS = ("queue", "blk", "rng", "balloon", "console", "net", "vsock", "framing", "cpio", "tar", "snapshot")
SYNONYMS = {"transport": "queue"}
INPUTS = Path(__file__).parent / "inputs"

Run = Callable[[bytes], None]


def load(name: str) -> Run:
    """A target's ``run``, which plays one script and raises what is wrong."""
    run: Run = import_module(f"tests.fuzz.fuzz_{name}").run
    return run


def saved(name: str) -> list[bytes]:
    """The scripts kept for a target."""
    path = INPUTS / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [bytes.fromhex(line) for line in lines if line and not line.startswith("#")]
