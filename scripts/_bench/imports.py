"""What ``import asyncvmm`` costs a program that has asyncio: fresh interpreters, bytecode cached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from _bench.bench import Bench
from _bench.figure import Figure, Target
from _bench.turns import take_turns

STATEMENTS = ("import asyncio, asyncvmm", "import asyncio; from asyncvmm import VM, VMConfig")
FLOOR = "import asyncio"
_PROGRAM = "import time; begin = time.perf_counter_ns(); {}; print(time.perf_counter_ns() - begin)"


async def measure(bench: Bench) -> list[Figure]:
    """import_time of the package, and of its front door's names."""
    return [_measure(statement, bench.rounds(25, 5), bench.cache) for statement in STATEMENTS]


def _measure(statement: str, rounds: int, cache: Path) -> Figure:
    _time(statement, cache)  # writes the bytecode
    turns = take_turns(lambda: _time(statement, cache), lambda: _time(FLOOR, cache), rounds)
    return Figure(
        name="import_time",
        unit="ms",
        ours=turns.ours,
        peer_name=FLOOR,
        peer=turns.peer,
        target=Target("difference", "<=", 60.0),
        conditions={"python_thread": "idle", "statement": statement},
    )


def _time(statement: str, cache: Path) -> float:
    """Milliseconds of ``statement`` in an interpreter of its own."""
    words = [sys.executable, "-c", _PROGRAM.format(statement)]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60, env=_environment(cache))
    return int(done.stdout) / 1e6


def _environment(cache: Path) -> dict[str, str]:
    """Ours, with bytecode kept in a place of its own, as an installed package's is, whatever the caller's settings."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPYCACHEPREFIX": str(cache / "bytecode")}
